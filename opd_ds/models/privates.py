"""What is private in diffusers and PEFT and used here: every such name is in this file, with its reason.

Read in diffusers 0.42 and PEFT 0.18 to 0.21. A name that a later version lacks is one clear error.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

from opd_ds.errors import UserError

_RANGES = {"diffusers": "diffusers>=0.42,<0.43", "peft": "peft>=0.18,<0.22"}


def private(module: str, name: str) -> Any:
    """`name` of a module of diffusers or PEFT.

    Raises:
        UserError: this version does not have it.
    """
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        raise changed(package, f"{module}.{name} is gone") from error


def changed(package: str, what: str) -> UserError:
    """The error for a version of `package` that is not the one known here."""
    return UserError(f"{package} {version(package)}: {what}, which opd-ds relies on; install {_RANGES[package]}")


# ---- diffusers: pipelines compute these inside `__call__`, and offer no function that gives them alone ----


def linear_shift() -> Callable[..., float]:
    """How FLUX.1, Qwen-Image and Z-Image shift the sigmas by the number of tokens: (tokens, *limits) -> mu."""
    return private("diffusers.pipelines.flux.pipeline_flux", "calculate_shift")


def empirical_shift() -> Callable[[int, int], float]:
    """How FLUX.2 klein does: (tokens, steps) -> mu."""
    return private("diffusers.pipelines.flux2.pipeline_flux2_klein", "compute_empirical_mu")


def kontext_sizes() -> list[tuple[int, int]]:
    """(width, height) that FLUX.1 Kontext's pipeline resizes pictures to."""
    return private("diffusers.pipelines.flux.pipeline_flux_kontext", "PREFERRED_KONTEXT_RESOLUTIONS")


def wan_prompt_clean() -> Callable[[str], str]:
    """What Wan's pipeline does to a prompt before it is tokenized; it does not give the tokens' mask away."""
    return private("diffusers.pipelines.wan.pipeline_wan", "prompt_clean")


def single_file_converter(transformer_class: str) -> Callable[..., dict[str, Any]]:
    """What `from_single_file` renames weights with; by itself, to check names on the meta device."""
    classes = private("diffusers.loaders.single_file_model", "SINGLE_FILE_LOADABLE_CLASSES")
    return classes[transformer_class]["checkpoint_mapping_fn"]


def unet_state_dict_to_peft() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The last step of a pipeline's `load_lora_weights`, to LoRA names of PEFT's form."""
    return private("diffusers.utils", "convert_unet_state_dict_to_peft")


# ---- diffusers: context parallelism without `enable_parallelism`, see `sequence_parallel.py` ----


def context_parallel(mesh: Any) -> Any:
    """What attention and hooks take: the ranks along `ulysses` of a mesh share each sequence."""
    config_class, size = private("diffusers", "ContextParallelConfig"), mesh["ulysses"].size()
    parallel_class = private("diffusers.models._modeling_parallel", "ParallelConfig")

    class Shared(parallel_class):  # type: ignore[misc,valid-type]
        """A copy of a network asks the same ranks: process groups cannot be copied."""

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return self

    config = Shared(context_parallel_config=config_class(ulysses_degree=size))
    config.setup(mesh.get_rank(), mesh.size(), mesh.device_type, mesh=mesh)
    return config


def split_hook() -> type[Any]:
    """Divides what a plan names among inputs and outputs of a module."""
    return private("diffusers.hooks.context_parallel", "ContextParallelSplitHook")


def gather_hook() -> type[Any]:
    """Gathers a module's output."""
    return private("diffusers.hooks.context_parallel", "ContextParallelGatherHook")


# ---- PEFT: injected layers are documented, how to find and name them is not ----

# An adapted module keeps its own weights under this name.
BASE_LAYER = ".base_layer."


def tuner_layer_class() -> type[Any]:
    """The class of modules that adapters were injected into, to switch and merge them without a PeftModel."""
    return private("peft.tuners.tuners_utils", "BaseTunerLayer")


def switch_adapter(layer: Any, names: list[str]) -> None:
    """Make `names` a layer's active adapters, and no more: `set_adapter` also decides which parameters have gradients,
    which an engine around the network has counted on since its start.

    Raises:
        UserError: this version keeps the names elsewhere.
    """
    layer._active_adapter = names
    if layer.active_adapters != names:
        raise changed("peft", "a layer's active adapters are not in `_active_adapter`")


def pattern_key() -> Callable[[list[str], str], str]:
    """Which entry of a `rank_pattern` is a module's."""
    return private("peft.utils.other", "get_pattern_key")
