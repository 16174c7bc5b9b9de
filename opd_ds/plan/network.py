"""The model of a run without its weights: from the configs of a local folder, or from those that we keep."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from torch import nn

from opd_ds.config.paths import PACKAGE_PREFIX, package_root, resolve_path
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import LoraSection, StudentSection
from opd_ds.data import PromptSet, Sizes, check_sizes
from opd_ds.errors import UserError, about, nearest
from opd_ds.models import ModelFamily, block_names, family_class, lora
from opd_ds.models.inspection import ENCODER_WEIGHTS, check_base, has_weights, weight_files
from opd_ds.models.two_networks import PARTS
from opd_ds.models.weight_files import read_shapes
from opd_ds.training.networks import DTYPES, check_guidances, freeze_untrained, load_family, lora_targets

_CLIP_TOKENS = 77
_USUAL_SIDE = 1024  # of a reference picture, pixels
_ADAPTER = "plan"


@dataclass(frozen=True)
class Counts:
    """Numbers of elements: of parameters that are trained and that are not, of buffers, of the largest trained one."""

    trained: int
    frozen: int
    buffers: int
    largest: int
    small: int  # of parameters below a persistence threshold
    unit: int = 0  # of what ZeRO-3 gathers at once: the largest block, or the largest parameter where that is more

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen


@dataclass(frozen=True)
class Model:
    """What is known of a run's model before it is loaded.

    Attributes:
        source: where that is from, for people.
        encoders: parameters of the text encoders.
        tokens: of the longest prompt, as the network sees it, and of its pictures where the text encoder sees them.
        distilled: steps in which it is made to be drawn, without guidance; None: not distilled, or not known to be.
        pictures: (width, height) in pixels of the reference pictures of a prompt, as they are resized.
    """

    source: str
    family: ModelFamily
    configs: dict[str, Any]
    encoders: int
    tokens: int
    distilled: int | None = None
    pictures: tuple[tuple[int, int], ...] = ()

    @property
    def transformer_class(self) -> str:
        return self.configs["transformer"]["_class_name"]

    @property
    def references(self) -> list[tuple[int, ...]]:
        """Latent shapes of `pictures`."""
        channels, *_, columns = self.family.latent_shape
        pixels = self.family.width // columns
        return [(channels, height // pixels, width // pixels) for width, height in self.pictures]

    @cached_property
    def vae_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.vae().parameters())

    def network(self, adapter: LoraSection | None = None, targets: list[str] | str | None = None) -> nn.Module:
        """The transformer on meta in the run's dtype; with an adapter only that is trained; `targets`: where it adapts,
        if it is not the adapter's own setting that says so.
        """
        module = self.family.empty_transformer()
        if adapter is not None:
            targets = targets or list(adapter.targets or self.family.lora_targets)
            settings = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets)
            with torch.device("meta"):
                lora.new_adapter(module, _ADAPTER, settings)
        # Not `module.to`, with which diffusers warns about what is to stay in float32 where weights are converted.
        return nn.Module.to(module, self.family.dtype).train()

    def vae(self) -> nn.Module:
        """The VAE on meta in the run's dtype."""
        config = self.configs["vae"]
        with torch.device("meta"):
            vae = getattr(diffusers, self.family.vae_class).from_config(config)
        if self.family.vae_tiling:
            vae.enable_tiling()
        return nn.Module.to(vae, self.family.dtype).eval().requires_grad_(False)


def student_network(model: Model, settings: StudentSection) -> nn.Module:
    """The student on meta, with its adapter and its checkpointing."""
    if settings.kind == "lora":
        module = model.network(settings.lora, lora_targets(settings, model.family))
    else:
        module = model.network()
        freeze_untrained(module, settings, model.family)
    if settings.gradient_checkpointing:
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    return module


def count(module: nn.Module, threshold: float = 0) -> Counts:
    """Elements of a network; `threshold`: ZeRO-3 keeps parameters of fewer elements on every rank."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return Counts(
        trained=sum(size for size, trained in sizes if trained),
        frozen=sum(size for size, trained in sizes if not trained),
        buffers=sum(buffer.numel() for buffer in module.buffers()),
        largest=max((size for size, trained in sizes if trained), default=0),
        small=sum(size for size, _ in sizes if size < threshold),
        unit=max(*_block_sizes(module), *(size for size, _ in sizes), 0, 0),
    )


def _block_sizes(module: nn.Module) -> list[int]:
    blocks = [module.get_submodule(name) for name in block_names(module)]
    return [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]


def known_models() -> list[str]:
    """Names whose configs are kept here; the last part of their hub ids."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def known_configs(name: str) -> dict[str, Any]:
    """`transformer`, `vae` and `scheduler` as in a diffusers folder, `text_encoders` with their sizes, the
    `family`; of a model with two networks `transformer_2`.

    Where there is something to say: `index`, further entries of the folder's model_index.json; `distilled`, the
    `steps` in which a model is made to be drawn, without guidance. A file may hold only what differs from another's,
    which it names as `like`.
    """
    found = json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    like = found.pop("like", None)
    return found if like is None else known_configs(like) | found


def find_model(config: RunConfig) -> Model:
    """The run's model at its largest image size, from a local folder's configs, or from ours by the last part of its
    hub id.

    Raises:
        UserError: neither is there, the family does not fit, or the model is not made for a guidance of the run.
    """
    model = _with_pictures(config, _found(config))
    check_guidances(config, model.family)
    return model


def _found(config: RunConfig) -> Model:
    value = config.model.path
    if value.startswith(PACKAGE_PREFIX) or Path(value).expanduser().exists():
        return _at_the_largest_size(config, _from_folder(config, resolve_path(value, "model.path")))
    names = {name.lower(): name for name in known_models()}
    name = names.get(value.rstrip("/").split("/")[-1].lower())
    if name is None:
        raise UserError(
            f"model.path = {value!r}: not on disk, and its configs are not kept here; known are "
            f"{', '.join(names.values())}; for others download the configs alone (hf download {value} --include "
            f"'*.json' --local-dir DIR) and give --set model.path=DIR.{nearest(value.split('/')[-1], names.values())}"
        )
    return _at_the_largest_size(config, _from_known(config, name))


def _at_the_largest_size(config: RunConfig, model: Model) -> Model:
    """Prompt sets are read only where they alone say which sizes there are."""
    settings, sets = config.model, dict[str, PromptSet]()
    if settings.size_from != "drawn" and not settings.sizes:
        sections = {f"tasks.{name}.prompts": task.prompts for name, task in config.tasks.items()}
        sections |= {
            f"{config.place(name)}.eval_prompts": section.eval_prompts
            for name, section in config.evaluated.items()
            if section.eval_prompts is not None
        }
        sets = {key: PromptSet.read(section, key) for key, section in sections.items()}
    check_sizes(settings, model.family, sets)
    sizes = Sizes(settings, model.family)
    families = [sizes.family(size) for size in sizes.possible(sets.values())]
    return replace(model, family=max(families, key=lambda family: prod(family.latent_shape)))


def _with_pictures(config: RunConfig, model: Model) -> Model:
    """With the reference pictures of the prompts that have the most. These are counted by columns, each taken for one
    square picture: sets are not read for it.
    """
    sections = [task.prompts for task in config.tasks.values()]
    sections += [section.eval_prompts for section in config.evaluated.values() if section.eval_prompts is not None]
    most, family = max((len(section.pictures) for section in sections), default=0), model.family
    if most > family.takes_pictures:
        raise UserError(
            f"prompts with {most} columns of pictures: model.family = {config.model.family!r} takes "
            f"{family.takes_pictures or 'none'}; docs/families.md says which families edit pictures"
        )
    side = family.reference_side or _USUAL_SIDE
    pictures = [(side, side)] * most
    fitted = tuple(family.fitted_size(picture) for picture in pictures)
    return replace(model, pictures=fitted, tokens=model.tokens + sum(map(family.seen_tokens, pictures)))


def _from_known(config: RunConfig, name: str) -> Model:
    configs = known_configs(name)
    encoders = sum(encoder["parameters"] for encoder in configs.pop("text_encoders"))
    index = {"_class_name": family_class(config.model.family).pipeline_class, **configs.pop("index", {})}
    files = dict.fromkeys((*(part for part in PARTS if part in configs), "vae"), "config.json")
    files["scheduler"] = "scheduler_config.json"
    with tempfile.TemporaryDirectory() as folder:  # a family reads its configs at once, and weights when asked
        for part, file in files.items():
            (Path(folder) / part).mkdir()
            (Path(folder) / part / file).write_text(json.dumps(configs[part]), encoding="utf-8")
        (Path(folder) / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        family = load_family(config, Path(folder), torch.device("cpu"))
    steps, tokens = configs.get("distilled", {}).get("steps"), _tokens(family, configs, _CLIP_TOKENS)
    return Model(f"packaged configs of {name}", family, configs, encoders, tokens, steps)


def _from_folder(config: RunConfig, folder: Path) -> Model:
    weights = has_weights(folder)
    if weights:
        with about(f"model.path = {config.model.path!r}"):
            check_base(folder, family_class(config.model.family))
    family = load_family(config, folder, torch.device("cpu"))
    configs = {part: json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae")}
    parts = sorted(folder.glob("text_encoder*")) if weights else []
    encoders = sum(sum(map(prod, read_shapes(weight_files(part, ENCODER_WEIGHTS)).values())) for part in parts)
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    clip = json.loads(tokenizer.read_text())["model_max_length"] if tokenizer.is_file() else _CLIP_TOKENS
    return Model(f"configs in {folder}", family, configs, encoders, _tokens(family, configs, clip))


def _tokens(family: ModelFamily, configs: dict[str, Any], clip: int) -> int:
    """SD3 puts CLIP's tokens in front of T5's."""
    joined = configs["transformer"]["_class_name"] == "SD3Transformer2DModel"
    return family.max_text_length + (clip if joined else 0)


def _folder() -> Path:
    return package_root() / "plan" / "known"


def bytes_of(precision: str) -> int:
    """Of one element in the run's dtype."""
    return DTYPES[precision].itemsize
