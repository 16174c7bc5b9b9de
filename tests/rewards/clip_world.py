"""A small CLIP and BLIP with random weights in the published layouts, and the networks' arithmetic written out."""

from __future__ import annotations

import itertools
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]

MEAN = np.array((0.48145466, 0.4578275, 0.40821073))
STD = np.array((0.26862954, 0.26130258, 0.27577711))
PROMPTS = ["a red cat", "two dogs, on a bench", ""]


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Noise of several scales, (width, height) each; by default wide, tall and square."""
    generator = np.random.default_rng(3)
    found = []
    for width, height in sizes or ((48, 32), (33, 70), (24, 24)):
        rough = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
        noise = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found.append(Image.blend(rough, noise, 0.4))
    return found


def truncated_picture(folder: Path) -> Image.Image:
    """Opens, and fails when its pixels are read."""
    file = folder / "whole.png"
    pictures()[0].save(file)
    (folder / "half.png").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return Image.open(folder / "half.png")


def write_clip_tokenizer(folder: Path) -> dict[str, int]:
    """CLIP's tokenizer on single characters, tokenizer.json and all; returns its vocabulary."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>")]).save_pretrained(folder)
    return vocabulary


def clip_ids(prompt: str, vocabulary: dict[str, int], length: int) -> list[int]:
    """What that tokenizer should give, zeros after the end; for prompts of letters, commas and spaces."""
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    found = [start]
    for word in prompt.replace(",", " , ").split():
        if word == "cat":
            found.append(vocabulary["cat</w>"])
        else:
            found += [vocabulary[letter] for letter in word[:-1]] + [vocabulary[f"{word[-1]}</w>"]]
    found = [*found[: length - 1], end]
    return found + [0] * (length - len(found))


def write_clip_folder(folder: Path) -> Path:
    """A transformers folder like openai/clip-vit-large-patch14, tiny."""
    from transformers import CLIPConfig, CLIPModel

    vocabulary = write_clip_tokenizer(folder)
    end = vocabulary["<|endoftext|>"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPConfig(
        projection_dim=24,
        text_config={**sizes, "vocab_size": len(vocabulary), "max_position_embeddings": 16, "eos_token_id": end},
        vision_config={**sizes, "patch_size": 8, "image_size": 32},
    )
    torch.manual_seed(5)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, all images would look alike
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.logit_scale.fill_(4.6)
    model.save_pretrained(folder)
    return folder


def open_clip_state(vocabulary: int, width: int = 32, layers: int = 2) -> State:
    """Random weights in open_clip's layout, heads of both towers: 16."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    state = {
        "positional_embedding": random(16, width),
        "text_projection": random(width, 24),
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": random(vocabulary, width),
        "visual.class_embedding": random(width),
        "visual.positional_embedding": random(17, width),
        "visual.proj": random(width, 24),
        "visual.conv1.weight": random(width, 3, 8, 8),
    }
    for name in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        state |= {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}
    for tower in ("transformer", "visual.transformer"):
        for layer in range(layers):
            block = f"{tower}.resblocks.{layer}"
            for name, out, inner in (
                ("mlp.c_fc", 48, width),
                ("mlp.c_proj", width, 48),
                ("attn.out_proj", width, width),
            ):
                state |= {f"{block}.{name}.weight": random(out, inner), f"{block}.{name}.bias": random(out)}
            for name in ("ln_1", "ln_2"):
                state |= {f"{block}.{name}.weight": 1 + random(width), f"{block}.{name}.bias": random(width)}
            state |= {f"{block}.attn.in_proj_weight": random(3 * width, width)}
            state |= {f"{block}.attn.in_proj_bias": random(3 * width)}
    return state


def below(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def open_clip_tower(state: State, prefix: str, x: Tensor, causal: bool) -> Tensor:
    """The residual blocks as open_clip writes them: nn.MultiheadAttention, pre-norm, exact GELU."""
    width = x.shape[-1]
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1) if causal else None
    for layer in range(2):
        own = below(state, f"{prefix}.{layer}.")
        attention = nn.MultiheadAttention(width, 16, batch_first=True).eval()
        attention.load_state_dict(below(own, "attn."))
        y = F.layer_norm(x, (width,), own["ln_1.weight"], own["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = F.layer_norm(x, (width,), own["ln_2.weight"], own["ln_2.bias"])
        y = F.gelu(F.linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + F.linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    return x


@torch.no_grad()
def open_clip_cosine(state: State, pixels: Tensor, ids: Tensor) -> Tensor:
    """[B], open_clip's forward."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).mT
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = norm("visual.ln_pre", torch.cat([first, patches], 1) + state["visual.positional_embedding"])
    x = open_clip_tower(state, "visual.transformer.resblocks", x, causal=False)
    seen = norm("visual.ln_post", x[:, 0]) @ state["visual.proj"]

    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    x = norm("ln_final", open_clip_tower(state, "transformer.resblocks", x, causal=True))
    read = x[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"]
    return F.cosine_similarity(seen, read)


def head_state(width: int, prefix: str = "layers.") -> State:
    """The five linear layers of LAION's and ImageReward's heads, narrow."""
    generator = torch.Generator().manual_seed(9)
    widths = (width, 12, 8, 6, 4, 1)
    state = {}
    for number, (inner, out) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        state[f"{prefix}{number}.weight"] = torch.randn(out, inner, generator=generator) / inner**0.5
        state[f"{prefix}{number}.bias"] = torch.randn(out, generator=generator)
    return state
