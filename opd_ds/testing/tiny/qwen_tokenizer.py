"""Qwen's tokenizer with a small vocabulary."""

from __future__ import annotations

from transformers import Qwen2Tokenizer

# Whole words of these texts become tokens, so that Qwen-Image's instruction has as many of them as the real one.
_TEXTS = [
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:",
    "user\nassistant\na red cat on a blue chair",
]
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """Any text in bytes, some words whole, the tokens of a chat, and a chat template that knows `enable_thinking`."""
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        _TEXTS * 2, vocab_size=600, new_special_tokens=special, show_progress=False
    )
    tokenizer.chat_template = _CHAT
    return tokenizer
