"""The step loop never waits for the device: rounds of every family on the meta device, which has no values to wait for.

An operation that asks for a value, mixes devices, or copies from memory that is not pinned fails here as it would stop
the host (or raise) on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.rl import GuardSection, NftSection
from opd_ds.data import PromptSet
from opd_ds.diffusion import kernel
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.engine import Group
from opd_ds.models import Conditioning, ModelFamily, build_family, lora
from opd_ds.runs.preflight import trainer_class
from opd_ds.testing.family_checks import model_settings
from opd_ds.testing.tiny.parts import references
from opd_ds.training.buffer import PerPair, PerSample, PerState, TrajectoryBuffer, noised_states
from opd_ds.training.rl.grpo_guard import GrpoGuardKnown, GrpoGuardLoss
from opd_ds.training.rl.nft import NftKnown, NftLoss
from opd_ds.training.trainer import Components, Trainer
from opd_ds.utils.pictures import Picture
from opd_ds.utils.transfer import to_device
from tests.tiny import run_settings

CPU, META = torch.device("cpu"), torch.device("meta")
FAMILIES = (
    "sd3", "flux", "flux_kontext", "flux2", "flux2_dev", "qwen_image", "qwen_image_edit", "z_image", "wan", "ltx",
)  # fmt: skip
# Of two lengths where a family's prompts have one: with the mask that this takes.
PROMPTS = ["the number 5", "a red 3 on blue", "a neat 8 beside a black square on a white square"]
READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::_unique2",
}
COPIES = {"aten::_to_copy", "aten::copy_"}
# A number of the host goes with the start of most kernels; these copy it.
COPY_NUMBERS = {"aten::index", "aten::index_put_", "aten::where", "aten::cat", "aten::stack"}


class NoHostSync(TorchDispatchMode):
    """Raises on what would make the host wait for a device, for which meta stands; `pin` marks pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers = 0
        self._pinned: list[Tensor] = []

    def pin(self, tensor: Tensor) -> Tensor:
        self._pinned.append(tensor)
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        with NoNumbersToDevice(), self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device == META]
        on_host = [tensor for tensor in tensors if tensor.device == CPU]
        if on_device and name in READS:
            raise AssertionError(f"{func} reads a tensor of the device")
        if name in COPIES:
            target = args[0].device if name == "aten::copy_" else kwargs.get("device", args[0].device)
            source = args[1] if name == "aten::copy_" else args[0]
            self._check_copy(source, target, bool(kwargs.get("non_blocking") or args[2:]))
        elif on_device and any(tensor.ndim > 0 or name in COPY_NUMBERS for tensor in on_host):
            raise AssertionError(f"{func} takes tensors of host and device")
        return func(*args, **kwargs)

    def _check_copy(self, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        if source.device == META and target == CPU:
            raise AssertionError("a tensor of the device is copied to the host")
        if source.device == CPU and target == META:
            self.transfers += 1
            if not non_blocking or not any(source is pinned for pinned in self._pinned):
                raise AssertionError("the host waits for a copy to the device")


class NoNumbersToDevice(TorchFunctionMode):
    """Raises where Python numbers become a tensor on the device, which the other mode does not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor) and result.device == META
        indexed = func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META
        index = args[1] if indexed and isinstance(args[1], tuple) else args[1:2]
        if made or (indexed and any(isinstance(part, list) for part in index)):
            raise AssertionError("Python numbers are copied to the device")
        return result


@pytest.fixture
def no_host_sync(monkeypatch: pytest.MonkeyPatch) -> NoHostSync:
    mode = NoHostSync()
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: mode.pin(tensor))
    monkeypatch.setattr(torch, "Event", FakeEvent)
    return mode


class FakeEvent:
    """A timing event of no device."""

    def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1.0


class OneRank(Group):
    def sum(self, values: Tensor) -> Tensor:
        """The round's one wait."""
        return torch.ones(values.shape, dtype=torch.float64)


class Student:
    """An engine without DeepSpeed."""

    learning_rate = 0.0
    skipped_steps = 0

    def __init__(self, module: nn.Module) -> None:
        self.module, self.backwards = module, 0

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    @contextmanager
    def gathered(self) -> Iterator[Student]:
        yield self

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self.backwards += 1

    def step(self) -> float:
        return 0.0


class Teachers:
    """A pool of one network."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module.requires_grad_(False)

    @contextmanager
    def active(self, task: str) -> Iterator[nn.Module]:
        yield self._module

    def prefetch(self, task: str) -> None:
        pass

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def in_turn(self, tasks: Iterable[str]) -> list[str]:
        return list(tasks)

    def guidance(self, task: str) -> float:
        return 1.0


@pytest.fixture(scope="module", params=FAMILIES)
def families(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ModelFamily]:
    """A family by name on the meta device, whose prompts are encoded on the host."""
    name, folder = request.param, tmp_path_factory.mktemp("family")
    import_module(f"opd_ds.testing.tiny.{name}").write(folder / "base")
    size: dict[str, Any] = {"height": 32, "width": 32, "max_text_length": 64}
    size |= model_settings(name)
    size |= {"frames": {"wan": 5, "ltx": 9}[name]} if name in ("wan", "ltx") else {}
    host, family = (
        build_family(name, folder / "base", dtype=torch.float32, device=device, **size) for device in (CPU, META)
    )

    known = [host.negative_prompt, *PROMPTS]
    encoded = host.encode(known)

    def encode(prompts: list[str]) -> Conditioning:
        rows = [known.index(prompt) for prompt in prompts]
        return on_meta(encoded.select(torch.tensor(rows), rows))

    pictures = {picture: host.encode_picture(picture) for own in references(host, len(PROMPTS)) for picture in own}

    def encode_picture(picture: Picture) -> Tensor:
        return torch.empty_like(pictures[picture], device=META)

    if host.sees_pictures:
        beside = [(prompt, own) for prompt in known for own in references(host, len(PROMPTS))]
        seen = host.encode_texts([prompt for prompt, _ in beside], [own for _, own in beside])

        def encode_texts(prompts: list[str], pictures: list[tuple[Picture, ...]]) -> Conditioning:
            rows = [beside.index(text) for text in zip(prompts, pictures, strict=True)]
            return on_meta(seen.select(torch.tensor(rows), rows))

        family.encode_texts = encode_texts  # type: ignore[method-assign,assignment]
    family.encode = encode  # type: ignore[method-assign,assignment]
    family.encode_picture = encode_picture  # type: ignore[method-assign]
    return name, family


def on_meta(cond: Conditioning) -> Conditioning:
    tensors = {key: torch.empty_like(value, device=META) for key, value in cond.tensors.items()}
    return Conditioning(tensors, cond.lengths)


def distillation(name: str, family: ModelFamily, folder: Path, **changes: Any) -> tuple[Trainer, Student]:
    """Two tasks of a LoRA student, with an anchor; one has reference pictures where the family takes any."""
    changes = {"objective": {"method": "ppo"}, "rollout__kernel": "flow", "rollout__noise_level": 0.7} | changes
    changes |= {"rollout__guidance": 1.0 if family.unguided else 3.0, "anchor": {"path": "base", "weight": 0.1}}
    changes |= {"rollout__samples": 2, "rollout__steps": 2, "rollout__micro_batch": 3, "train__micro_batch": 3}
    changes |= {"student__kind": "lora", "rollout__trained_steps": {"queries": 2}}
    settings = run_settings(folder, folder / "out", **changes)
    settings["model"] = {"family": name, "path": str(family.path)}
    config = DistilConfig.model_validate(settings)
    network = family.empty_transformer()
    with META:
        lora.new_adapter(network, "student", LoraConfig(r=2, target_modules=list(family.lora_targets)))
    prompts = dict.fromkeys(config.tasks, PromptSet(tuple(PROMPTS), ({},) * len(PROMPTS), ""))
    if family.takes_pictures:
        prompts["one"] = replace(prompts["one"], pictures=tuple(references(family, len(PROMPTS))))
    teacher, cond = family.empty_transformer(), family.encode([PROMPTS[0]])
    for each in (network, teacher):  # tables of positions go to the device at a network's first forward
        family.velocity(each, torch.zeros(1, *family.latent_shape, device=META), torch.zeros(1, device=META), cond)
    student: Any = Student(network)
    teachers: Any = Teachers(teacher)
    rewards: Any = None  # of looks, which there are none
    parts = Components(config, OneRank(World(), META), family, student, None, prompts, teachers, rewards)
    return trainer_class(config)(parts), student


def test_a_round_never_waits(families: tuple[str, ModelFamily], no_host_sync: NoHostSync, tmp_path: Path) -> None:
    """Rollout, scoring and training of two tasks, with everything that a rollout may keep."""
    never_waits(families, no_host_sync, tmp_path)


@pytest.mark.parametrize("families", ["sd3", "flux_kontext"], indirect=True, scope="module")
def test_a_fused_round_never_waits(families: tuple[str, ModelFamily], no_host_sync: NoHostSync, tmp_path: Path) -> None:
    """The networks are those of buffered rounds; once without and once with reference pictures."""
    never_waits(families, no_host_sync, tmp_path, rollout__mode="fused", objective={"method": "closed_form"})


def never_waits(families: tuple[str, ModelFamily], no_host_sync: NoHostSync, folder: Path, **changes: Any) -> None:
    trainer, student = distillation(*families, folder, **changes)
    with no_host_sync.watching():
        report = trainer.run_round(0)
    assert student.backwards == 4  # two of each task, or two of each step
    assert no_host_sync.transfers > 0
    assert report.seconds["train"] > 0


@pytest.mark.parametrize("kind", ["nft", "guard"])
def test_learning_from_rewards_never_waits(no_host_sync: NoHostSync, kind: str) -> None:
    """Its buffers and losses; the network's part is as above."""
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64)
    loss: Any
    if kind == "nft":
        loss = NftLoss(NftSection(algorithm="nft", kl=0.1), sigmas, META)
    else:
        coefficients = kernel("flow", 0.7).coefficients(sigmas)
        loss = GrpoGuardLoss(
            GuardSection(algorithm="guard", kl=0.1), coefficients, sigmas, range(len(coefficients)), META
        )
    with no_host_sync.watching():
        final = torch.zeros(4, 2, 4, 4, device=META)
        chosen = torch.arange(2).expand(4, -1)
        noised = noised_states(final, SampleNoise([1, 2, 3, 4], (2, 4, 4)), sigmas, chosen, torch.float32)
        cond = Conditioning({"x": torch.zeros(4, device=META)})
        table = to_device(sigmas.float(), META)
        buffer = TrajectoryBuffer(noised.states, chosen, torch.ones(4), cond, table)
        flow, worth = PerState(noised.flow), PerSample(torch.zeros(4, device=META))
        frozen = PerPair(torch.zeros(8, 2, 4, 4, device=META))
        for pairs in buffer.micro_batches(3):
            states, _, _ = buffer.inputs(pairs)
            known: Any = NftKnown if kind == "nft" else GrpoGuardKnown
            values = known(flow.at(pairs), frozen.at(pairs), worth.at(pairs), frozen.at(pairs))
            losses, _ = loss(states.requires_grad_(), pairs.step, values)
            (losses * buffer.weights[pairs.sample]).sum().backward()


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "as_tensor": lambda x: torch.as_tensor(3, device=x.device),
    "pageable": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "blocking": lambda x: torch.ones(3).pin_memory().to(x.device),
    "index by a list": lambda x: x[[0, 1]],
    "index by the host": lambda x: x[torch.tensor([0, 1])],
    "mixed": lambda x: x + torch.ones(3),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_is_found(no_host_sync: NoHostSync, what: str) -> None:
    x = torch.zeros(3, device=META)
    with no_host_sync.watching(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        WAITS[what](x)
