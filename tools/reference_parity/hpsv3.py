"""hpsv3 1.0.0. Run inside the environment of requirements/hpsv3.txt only.

Weights are HPSv3.safetensors of MizzenAI/HPSv3. The library builds its network from Qwen/Qwen2-VL-7B-Instruct: a
folder `base` beside the weights is taken for it where there is one, else the hub is asked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
_PADS = ["<|image_pad|>", "<|video_pad|>"]
# Qwen2-VL's own, without its system message and tools.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_weights(path: str) -> None:
    """A checkpoint in the published layout and its `base`, both small: at the true size they are 16 GB each."""
    import torch
    from safetensors.torch import save_file
    from transformers import (  # type: ignore[attr-defined,unused-ignore]
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
    )

    base = Path(path).parent / "base"
    tokens = _write_processor(base)
    config = Qwen2VLConfig(
        vocab_size=max(tokens.values()) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(base)
    state = _network(base)[0].state_dict()
    save_file({name: torch.randn_like(tensor) * 0.1 for name, tensor in state.items()}, path)


def load(weights: str) -> Callable[[list[Image.Image], list[str], list[dict[str, Any]]], dict[str, np.ndarray]]:
    """To `score` [B], the mean that the library calls its final output, and `sigma` [B], as its head gives it.

    In bfloat16 on a GPU, as published; in float32 on the CPU.
    """
    import torch
    from hpsv3.inference import HPSv3RewardInferencer  # type: ignore[import-not-found,unused-ignore]

    base = Path(weights).parent / "base"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), str(base) if base.is_dir() else None)
        inferencer = HPSv3RewardInferencer(config_path=config, checkpoint_path=weights, device=device)

    @torch.no_grad()
    def run(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        # One by one: a pass over several pads them, which in bfloat16 changes the last digits.
        found = [inferencer.reward([image], [text])[0] for image, text in zip(images, prompts, strict=True)]
        both = torch.stack(found).float().cpu().numpy()
        return {"score": both[:, 0], "sigma": both[:, 1]}

    return run


def _config(folder: Path, base: str | None) -> str:
    """The shipped settings without what is for training alone."""
    import torch
    import yaml

    settings = yaml.safe_load((resources.files("hpsv3") / "config" / "HPSv3_7B.yaml").read_text())
    settings |= {"deepspeed": None, "report_to": "none", "output_dir": str(folder), "gradient_checkpointing": False}
    settings |= {"model_name_or_path": base} if base else {}
    if not torch.cuda.is_available():
        settings |= {"bf16": False, "torch_dtype": "float32", "use_cpu": True}
    file = folder / "HPSv3_7B.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(file)


def _network(base: Path) -> Any:
    """The library's network with its head and special token, and its processor, from `base`."""
    from hpsv3.train import create_model_and_processor  # type: ignore[import-not-found,unused-ignore]
    from hpsv3.utils.parser import (  # type: ignore[import-not-found,unused-ignore]
        DataConfig,
        ModelConfig,
        PEFTLoraConfig,
        TrainingConfig,
        parse_args_with_yaml,
    )

    with tempfile.TemporaryDirectory() as folder:
        kinds = (DataConfig, TrainingConfig, ModelConfig, PEFTLoraConfig)
        (_, training, model, lora), _ = parse_args_with_yaml(kinds, _config(Path(folder), str(base)), is_train=False)
        return create_model_and_processor(model_config=model, peft_lora_config=lora, training_args=training)


def _write_processor(base: Path) -> dict[str, int]:
    """A byte-level tokenizer with Qwen2-VL's special tokens, and its image processor; all tokens with their numbers."""
    import json

    from transformers import (  # type: ignore[attr-defined,unused-ignore]
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )
    from transformers.models.qwen2.tokenization_qwen2 import bytes_to_unicode

    base.mkdir(parents=True, exist_ok=True)
    letters = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    (base / "vocab.json").write_text(json.dumps(letters), encoding="utf-8")
    (base / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = Qwen2TokenizerFast(str(base / "vocab.json"), str(base / "merges.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": [*_SPECIAL, *_PADS]})
    tokenizer.pad_token = _SPECIAL[0]
    Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=_CHAT_TEMPLATE).save_pretrained(base)
    # As the library adds one more.
    return {**tokenizer.get_vocab(), "<|Reward|>": len(tokenizer)}
