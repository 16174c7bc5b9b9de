"""What the keys of an adapter's file are, by their endings: factors of a LoRA, alphas, and everything else by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

# How trainers write the factors: lora_A, lora_down, lora.down, of several adapters or processors lora1.down.
_FIRST_FACTOR = re.compile(r"[._]?lora(?P<number>\d?)(?P<joint>[._])(?P<name>A|down)(?P<adapter>\.[^.]+)?\.weight$")
_SECOND_FACTOR = re.compile(r"[._]?lora\d?[._](B|up)(\.[^.]+)?\.weight$")
_PARTNER = {"A": "B", "down": "up"}
_TEXT_ENCODER = re.compile(r"^(base_model\.model\.)?(text_encoder|lora_te|te\d?[._]|conditioner|cond_stage)")
# As PEFT and diffusers name them, and as all are named once they are read.
ADAPTER_KEY = re.compile(r"^(?P<module>.+)\.(?P<part>lora_[AB])\.(?:(?P<adapter>[^.]+)\.)?weight$")
ALPHA = ".alpha"
KOHYA_NAMES = ("lora_unet_", "lora_transformer_")
AUTHORS_NAMES = (*KOHYA_NAMES, "diffusion_model.")  # what a conversion to diffusers' names must leave none of

# Methods other than LoRA, and additions to one. Read in PEFT 0.21, LyCORIS 3, kohya's sd-scripts and ComfyUI.
_OTHER_KINDS = {
    re.compile(pattern): kind
    for pattern, kind in {
        r"dora_scale|lora_magnitude_vector": "DoRA weights",
        r"lokr_": "LoKr weights",
        r"hada_": "LoHa weights",
        r"lora_mid\.": "a third factor (LoCon)",
        r"boft_": "BOFT weights",
        r"(^|[._])oft_": "OFT weights",
        r"vera_lambda|vera_[AB]": "VeRA weights",
        r"ia3_|\.on_input$": "IA3 weights",
        r"\.[ab][12]\.weight$": "GLoRA weights",
        r"lora_embedding_[AB]": "a LoRA of embeddings",
        r"modules_to_save": "whole modules (modules_to_save)",
        r"lora\d?[._](A|B|up|down)(\.[^.]+)?\.bias$|bias_(delta|diff)": "biases of the LoRA (lora_bias)",
        r"\.diff(_[a-z]+)?$|\.set_weight$|\.[wb]_norm$": "weight differences",
    }.items()
}
_FORMS = {
    "base_model.model.": "PEFT",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "diffusion_model.": "ComfyUI",
    ".processor.": "XLabs",
    "lycoris_": "LyCORIS",
}
# What is added to a weight: where it is all zero it does nothing.
_ADDED = re.compile(r"\.diff(_[a-z]+)?$|\.bias$|\.[wb]_norm$")


def is_adapter_key(key: str) -> bool:
    """Whether a file with this key is an adapter's, of whatever kind."""
    return "lora" in key.lower() or other_kind(key) is not None


def other_kind(key: str) -> str | None:
    """The name of the method, where the key is not of a plain LoRA's factors."""
    return next((kind for pattern, kind in _OTHER_KINDS.items() if pattern.search(key)), None)


def does_nothing_at_zero(key: str) -> bool:
    """Whether what the key holds is added to a weight or an output."""
    kind = other_kind(key)
    return kind in ("weight differences", "biases of the LoRA (lora_bias)") and bool(_ADDED.search(key))


def of_text_encoder(key: str) -> bool:
    """Whether it belongs to a text encoder, in the names of diffusers, kohya or the authors of a model."""
    return bool(_TEXT_ENCODER.match(key))


def is_factor(key: str) -> bool:
    """Whether it is the first or the second factor of a LoRA."""
    return bool(_FIRST_FACTOR.search(key) or _SECOND_FACTOR.search(key))


def is_second_factor(key: str) -> bool:
    """Whether it is B of B A."""
    return bool(_SECOND_FACTOR.search(key))


def partners(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """By the name of the adapted module, as the file writes it: the keys of the first and of the second factor."""
    found = {}
    for key in keys:
        match = _FIRST_FACTOR.search(key)
        if match:
            ending = f"{_PARTNER[match['name']]}{match['adapter'] or ''}.weight"
            found[key[: match.start()]] = (key, key[: match.start("name")] + ending)
    return found


def form_of(keys: Iterable[str]) -> str:
    """In whose form an adapter's keys are written, for people."""
    names = list(keys)
    for mark, form in _FORMS.items():
        if any(mark in key for key in names):
            return form
    return "diffusers"


def respelled(key: str) -> str:
    """`lora_down` and `lora_up` for `lora_A` and `lora_B`, and the other way round: some converters know one only.
    Kohya's names are written with one of them only, and stay.
    """
    if key.startswith(KOHYA_NAMES):
        return key
    for ours, theirs in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
        if f".{ours}." in key:
            return key.replace(f".{ours}.", f".{theirs}.")
        if f".{theirs}." in key:
            return key.replace(f".{theirs}.", f".{ours}.")
    return key
