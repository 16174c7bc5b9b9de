"""Starting the process group, and the few collectives the rest of the program needs."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opd_ds.cluster.rendezvous import set_local_rank
from opd_ds.cluster.roles import Roles
from opd_ds.cluster.store import wait_for_ranks
from opd_ds.cluster.watchdog import Watchdog, start_watchdog
from opd_ds.cluster.world import World
from opd_ds.engine import privates
from opd_ds.engine.build_lock import guard_builds
from opd_ds.engine.channel import Channel
from opd_ds.engine.memory import return_freed_memory
from opd_ds.errors import Interrupted, UserError
from opd_ds.utils.determinism import make_deterministic
from opd_ds.utils.machine import allow_open_files

HANG_FOLDER = "hang"


class Group:
    """All ranks of the run, or those of one role (`scoring.ranks`): for DeepSpeed they are the world.

    Attributes:
        exchanges: whether collectives carry what other ranks have; not in a `fake_group`.
        roles: which ranks of the launch train and which hold teachers.
        channel: between the ranks of both roles; None where all train.
        everybody: the ranks of both roles, for what they agree on; itself where all train.
        sequence_mesh: of the ranks that share sequences; None where each has its own.
    """

    exchanges = True

    def __init__(
        self,
        world: World,
        device: torch.device,
        watchdog: Watchdog | None = None,
        roles: Roles | None = None,
        channel: Channel | None = None,
    ) -> None:
        self.world, self.device, self._watchdog = world, device, watchdog
        self.roles, self.channel = roles or Roles(world), channel
        self.everybody = self if channel is None else Everybody(self.roles.world, device, channel)
        self.sequence_mesh: DeviceMesh | None = None

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """All ranks end together, with the work or with an interruption: nobody takes the others' end for a loss."""
        if self._watchdog is not None and (error is None or isinstance(error, Interrupted)):
            with contextlib.suppress(RuntimeError):  # all is done or saved; who is through the barrier may be gone
                self.everybody.barrier()
            self._watchdog.close()

    def share_sequences(self, ranks: int) -> None:
        """From now on so many neighbours have the same samples, and share each sequence of a network. Collective.

        Raises:
            UserError: see `Roles`.
        """
        self.roles, self.sequence_mesh = replace(self.roles, sharing=ranks), None
        if ranks > 1:
            # As diffusers (0.42) names the axes of its context parallelism; `data` are samples.
            shape, names = (self.drawing.size, 1, ranks), ("data", "ring", "ulysses")
            self.sequence_mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    @property
    def drawing(self) -> World:
        """This rank's place among those that have different samples; ranks that share sequences are one."""
        return self.roles.drawing

    @property
    def own_rows(self) -> slice:
        """Of consecutive samples that the ranks of a sequence have in common, those that this rank answers for: it
        decodes and scores them. Some ranks may have none.
        """
        return slice(self.world.rank % self.roles.sharing, None, self.roles.sharing)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of those that share its sequences."""
        return self.own_rows.start == 0

    def sum_over_samples(self, values: Tensor) -> Tensor:
        """`sum` of what was measured of samples, which the ranks of a sequence have measured alike."""
        return self.sum(values if self.is_first else torch.zeros_like(values))

    def progress(self, doing: str) -> None:
        """This rank makes progress; `doing` is shown if it stops. Costs nothing."""
        if self._watchdog is not None:
            self._watchdog.progress(doing)

    def watch_hangs(self, minutes: float, output_dir: Path) -> None:
        """End the job when no rank made progress for so long; each rank's stacks are left in `<output_dir>/hang`."""
        if self._watchdog is not None:
            self._watchdog.watch_hangs(60 * minutes, output_dir / HANG_FOLDER)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in float64 so that the order of ranks costs nothing visible; on the CPU."""
        from deepspeed import comm

        total = values.detach().to(self.device, torch.float64)
        comm.all_reduce(total)
        return total.cpu()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        values: list[Any] = [None] * self.world.size
        # Not DeepSpeed's (0.19.8): while it counts collectives, this one ends the process, with exit code 0.
        torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; what the others give is not looked at."""
        from deepspeed import comm

        values = [value if self.world.is_main else None]
        comm.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def all_to_all(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Rows [n, ...] to the ranks that want them.

        Args:
            rows: for rank 0 the first `sent[0]`, for rank 1 the next, and so on; equal in dtype and shape on all ranks.
            received: how many come from each rank; they are returned in the order of ranks.
        """
        from deepspeed import comm

        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        comm.all_to_all_single(arrived, rows.contiguous(), received, sent)
        return arrived

    def barrier(self) -> None:
        from deepspeed import comm

        comm.barrier()

    @contextmanager
    def raise_on_any_rank(self) -> Iterator[None]:
        """Work that may fail on some ranks only (files, say): every rank leaves with the first error, or none does.

        Nothing inside may be collective: a rank that failed would not take part.
        """
        failure: str | None = None
        cause: UserError | None = None
        try:
            yield
        except UserError as error:
            failure, cause = str(error), error
        failures = self.gather(failure)
        for rank, message in enumerate(failures):
            if message is not None:
                where = f"[rank {rank}] " if any(other != message for other in failures) else ""
                raise UserError(where + message) from cause


class Alone(Group):
    """One process on its CPU without a process group, for checks before a start: what ranks would share is its own."""

    exchanges = False

    def __init__(self) -> None:
        super().__init__(World(), torch.device("cpu"))

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


class Everybody(Group):
    """All ranks of a launch, whatever they do; they exchange no tensors."""

    def __init__(self, world: World, device: torch.device, channel: Channel) -> None:
        super().__init__(world, device)
        self._all = channel

    def gather(self, value: Any) -> list[Any]:
        return self._all.gather(value)

    def broadcast(self, value: Any) -> Any:
        return self.gather(value if self.world.is_main else None)[0]

    def barrier(self) -> None:
        self.gather(None)


@contextmanager
def counted_collectives() -> Iterator[dict[str, dict[int, int]]]:
    """What DeepSpeed sends meanwhile: collective -> bytes of a message -> how often. Filled in at the end."""
    from deepspeed import comm

    counts: dict[str, dict[int, int]] = {}
    comm.configure(enabled=True, prof_all=True)
    try:
        yield counts
    finally:
        comm.configure(enabled=False)
    for operation, by_size in privates.counted_messages().items():
        counts[operation] = {size: entry[0] for size, entry in by_size.items()}


def init_group(
    world: World, timeout: timedelta = timedelta(minutes=30), *, deterministic: bool = False, teacher_ranks: int = 0
) -> Group:
    """Start DeepSpeed's process group (nccl on CUDA, gloo on CPU), and the watch over its ranks.

    Args:
        timeout: for a single collective.
        deterministic: see `make_deterministic`.
        teacher_ranks: how many ranks hold teachers only. These and the others have a process group each.

    Raises:
        UserError: a rank that did not arrive; more processes on this node than devices, or two on one; MASTER_PORT is
            taken.
        Interrupted: this process was asked to stop while it waited for other ranks.
    """
    roles = Roles(world, teacher_ranks)
    if deterministic:
        make_deterministic()
    return_freed_memory()
    allow_open_files()
    if not os.environ.get("OMP_NUM_THREADS", "")[:1].isdigit():  # empty, say: then each rank would take all cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if on_cpu:
        _say_that_gpus_are_idle(world)
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed asks its own scheduler for a rate before the first step, and warns about it.
    logger.addFilter(lambda record: "before it has started" not in record.getMessage())
    # DeepSpeed 0.19.8 and diffusers 0.42 call collectives by names that torch 2.13 deprecates, once per call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.[\w.]+` is deprecated", category=FutureWarning)
    accelerator = get_accelerator()
    device, name = torch.device("cpu"), ""
    if not on_cpu:
        device = torch.device(accelerator.device_name(), _device_index(world, accelerator.device_count()))
        accelerator.set_device(device.index)
        name = _name_of(device)
        set_local_rank(device.index)  # what DeepSpeed takes for the device (engine.py, comm/torch.py)
    guard_builds()
    privates.leave_out_shm_op()
    store = wait_for_ranks(world, name)  # torch would wait in silence, and for as long as for a collective
    backend, channel = accelerator.communication_backend_name(), None
    if teacher_ranks:
        store.set_timeout(timeout)
        own = PrefixStore(f"opd_ds/roles/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        channel = Channel(own, world)
        _start_own_world(backend, own, roles, device, timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)  # takes the group that is there
    del store
    return Group(roles.own, device, start_watchdog(world) if world.size > 1 else None, roles, channel)


def _start_own_world(backend: str, store: PrefixStore, roles: Roles, device: torch.device, timeout: timedelta) -> None:
    """The process group of a role, which is torch's default one: what DeepSpeed does with the world it does with it."""
    os.environ["WORLD_SIZE"] = str(roles.own.size)  # zero.Init (0.19) refuses a world of another size
    torch.distributed.init_process_group(
        backend,
        store=PrefixStore("teachers" if roles.is_teacher else "students", store),
        rank=roles.own.rank,
        world_size=roles.own.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" and roles.own.size > 1 else None,  # as DeepSpeed (0.19) does
    )


def _device_index(world: World, devices: int) -> int:
    """srun may show each task its own device only (--gpus-per-task), then that is device 0."""
    if devices == 1:
        return 0
    if world.local_size > devices:
        raise UserError(
            f"{world.local_size} processes on this node but {devices} devices; start one process per device "
            "(--ntasks-per-node, --num_gpus, --nproc-per-node)"
        )
    return world.local_rank


def _name_of(device: torch.device) -> str:
    """Its UUID where it has one (CUDA), the same for all processes that use it; empty where it has none."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _say_that_gpus_are_idle(world: World) -> None:
    """On a CPU by what the shell says, and not because there is no GPU."""
    shown = {name: os.environ[name] for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES") if name in os.environ}
    hides = shown.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") and Path("/dev/nvidia0").exists()
    if world.is_main and (hides or torch.cuda.is_available()):
        said = ", ".join(f"{name}={value}" for name, value in shown.items())
        logging.getLogger("opd_ds").warning("the run is on CPUs although there are GPUs here: %s; unset it", said)
