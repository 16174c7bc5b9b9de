"""What ranks of a node share: weights on the host, and a round's encoded prompts. Two processes under the launcher."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_ds.config.teachers import TeacherSection
from opd_ds.engine import Group, NodeMemory
from opd_ds.models import Conditioning, ModelFamily, build_family
from opd_ds.models.host_weights import HostWeights
from opd_ds.testing.tiny.sd3 import PROMPTS
from opd_ds.training.encoding import encode_over_ranks
from opd_ds.training.teachers import TeacherPool, TeacherSpec
from tests.ranks import launch

CPU = torch.device("cpu")
# By rank: prompts with their places; the third is asked on both, and one rank encodes what the other wants alone.
ASKED = [
    {PROMPTS[2]: (0, 0), PROMPTS[0]: (0, 2)},
    {PROMPTS[1]: (0, 1), PROMPTS[2]: (0, 3), PROMPTS[3]: (1, 1), **{f"{i} more": (1, 3 + i) for i in range(14)}},
]


def check_two_ranks(world: Path, group: Group) -> dict[str, Any]:
    """Called on both ranks; what they found."""
    memory, rank = NodeMemory(group), group.world.rank
    found: dict[str, Any] = {"fills": group.gather(memory.fills)}
    with memory.buffer(1000) as mapped:
        if memory.fills:
            mapped.fill_(7)
    found["seen"] = group.gather(int(mapped.sum()))
    if not memory.fills:
        mapped[0] = 5  # nobody does, but who looks sees that it is the same memory
    group.barrier()
    found["first"] = group.gather(int(mapped[0]))

    family = build_family("sd3", world / "base", dtype=torch.float32, device=CPU, max_text_length=10)
    alone = family.encode(list(ASKED[rank]))
    shared = build_family("sd3", world / "base", dtype=torch.float32, device=CPU, max_text_length=10)
    shared.host_memory = memory
    shared.encode([""])
    encoded = encode_over_ranks(shared, group, ASKED[rank])
    found["encoded"] = group.gather(equal(alone, encoded))
    weights = shared.loaded.encoder_weights
    assert isinstance(weights, HostWeights)
    found["encoders"] = group.gather(mapping_of(weights._packed))

    path = world / "adapter"
    spec = TeacherSpec(TeacherSection(path=str(path), placement="offload"), path)
    pool, plain = (TeacherPool(family, {"one": spec}, CPU, memory=where) for where in (memory, None))
    with pool.active("one") as teacher, pool.active("one") as again, plain.active("one") as expected:
        assert teacher is again
        found["teacher"] = group.gather(torch.equal(answer(family, teacher, alone), answer(family, expected, alone)))
        found["teachers"] = group.gather(mapping_of(next(teacher.parameters())))
    return found


def equal(ours: Conditioning, theirs: Conditioning) -> bool:
    return all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())


def answer(family: ModelFamily, network: Any, cond: Conditioning) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return family.velocity(network, torch.randn(2, *family.latent_shape), torch.full((2,), 0.5), cond[slice(2)])


def mapping_of(tensor: torch.Tensor) -> str:
    """The file, by device and inode, that the tensor's memory is mapped from, and whether that has a name."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, _, device, inode, *name = line.split(maxsplit=5)
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= tensor.data_ptr() < end:
            return " ".join([mode, device, inode, *name])
    raise AssertionError("mapped nowhere")


@pytest.mark.multirank
def test_weights_stand_once_and_prompts_are_encoded_once(tiny_world: Path, tmp_path: Path) -> None:
    script, result = tmp_path / "check.py", tmp_path / "found.json"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {os.getcwd()!r})\n"
        "from opd_ds.cluster.rendezvous import prepare_environment\n"
        "from opd_ds.cluster.world import detect_world\n"
        "from opd_ds.engine import init_group\n"
        "from tests.test_node_memory import check_two_ranks\n"
        "world = detect_world()\n"
        "prepare_environment(world)\n"
        "with init_group(world) as group:\n"
        f"    found = check_two_ranks(Path({str(tiny_world)!r}), group)\n"
        "    if world.is_main:\n"
        f"        Path({str(result)!r}).write_text(json.dumps(found))\n"
    )
    launch(2, script=str(script))
    found = json.loads(result.read_text())
    assert found["fills"] == [True, False]
    assert found["seen"] == [7000, 7000]
    assert found["first"] == [5, 5]
    assert found["encoded"] == [True, True]
    assert found["teacher"] == [True, True]
    for kind in ("encoders", "teachers"):
        first, second = found[kind]
        assert first == second
        assert first.startswith("rw-s")
        assert first.endswith("(deleted)"), "it ends with the processes that map it"


def test_a_neighbour_that_cannot_be_reached_is_done_without(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 beside a rank 0 in another PID namespace: it fills memory of its own."""
    two = Group(group.world, group.device)
    gather = two.gather

    def gathered(value: Any) -> list[Any]:
        own = gather(value)[0]
        other = ("/proc/0/fd/0", *own[1:]) if isinstance(own, tuple) else own
        return [other, own]

    monkeypatch.setattr(two, "gather", gathered)
    monkeypatch.setattr(two, "world", type(group.world)(rank=1, local_rank=1, size=2, local_size=2))
    memory = NodeMemory(two)
    assert memory.fills
    with memory.buffer(10) as mapped:
        mapped.fill_(1)
    assert int(mapped.sum()) == 10
