"""The student under DeepSpeed: forward, accumulation over a round, one step, gathered weights, checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal

import deepspeed
import torch
from torch import Tensor, nn

from opd_ds.engine import privates, state
from opd_ds.engine.activations import OffloadedActivations
from opd_ds.engine.blocks import initialize
from opd_ds.engine.comm import Group
from opd_ds.engine.ds_components import check_device
from opd_ds.engine.ds_config import parameters_on_nvme
from opd_ds.engine.ds_settings import zero_stage
from opd_ds.engine.fragments import Fragment, check_cover, fragments
from opd_ds.engine.replica import UnshardedReplica, fits
from opd_ds.engine.schedule import Schedule
from opd_ds.engine.shards import ShardReader
from opd_ds.models import lora
from opd_ds.utils.progress import work


class StudentEngine:
    """A DeepSpeed engine of any ZeRO stage around the trainable network.

    Every rank must make the same calls in the same order: under ZeRO-3 each forward is a collective.

    Args:
        module: its parameters as `parameter_builder` of this ds_config makes them, those of an adapter whole.
        gather: how `gathered` works under ZeRO-3: the whole network at `once`, `per_layer` with every forward, or
            `auto`: at once where half of the free memory is enough for it. Parameters on NVMe are gathered per layer.
        schedule: of the learning rate; None leaves it to the ds_config.
        offload_activations: what a forward keeps for its backward waits on the host.

    Raises:
        UserError: DeepSpeed has no kernel of the optimizer for this device; or this version keeps its shards elsewhere
            than `privates` knows.
    """

    def __init__(
        self,
        module: nn.Module,
        ds_config: dict[str, Any],
        group: Group,
        gather: Literal["auto", "once", "per_layer"] = "auto",
        schedule: Schedule | None = None,
        *,
        offload_activations: bool = False,
    ) -> None:
        check_device(ds_config, group.device)
        self._group = group
        self._schedule, self._offloads = schedule, offload_activations
        self.zero_stage = zero_stage(ds_config)
        if gather != "per_layer" and parameters_on_nvme(ds_config):
            # DeepSpeed (0.19.8) reads parameters from NVMe through a handful of buffers, one parameter each.
            gather = "per_layer"
            if group.world.is_main:
                logging.getLogger("opd_ds").info("parameters are on NVMe: rollouts gather weights layer by layer")
        self._replica = UnshardedReplica(module) if self.zero_stage == 3 and gather != "per_layer" else None
        self._decided = gather != "auto"
        self._whole: nn.Module | None = None  # the replica, while it has weights
        self.learning_rate = 0.0  # of the last step
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if group.world.is_main:
            count = sum(math.prod(privates.whole_shape(parameter)) for parameter in trainable)
            logging.getLogger("opd_ds").info(
                "starting DeepSpeed: ZeRO stage %d, ranks: %d, trained parameters: %s",
                self.zero_stage, group.world.size, f"{count:,}",
            )  # fmt: skip
        self._engine = initialize(module, ds_config, trainable)
        self._engine.train()
        self._peaks = [group["lr"] for group in self._param_groups]  # Muon may have two
        check_cover(self.owned, {name: math.prod(shape) for name, shape in self.shapes.items()}, group)
        self.scalar_state()  # what a checkpoint asks of DeepSpeed is there, or the run ends here

    def __call__(self, **inputs: Any) -> Any:
        offloads = self._offloads and torch.is_grad_enabled()
        with OffloadedActivations(self.module) if offloads else nullcontext():
            return self._engine(**inputs)

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @contextmanager
    def gathered(self) -> Iterator[Callable[..., Any]]:
        """The network to ask many times without a gradient while its weights stay what they are. Collective.

        Within another `gathered` nothing more is gathered.
        """
        if self._replica is not None and not self._decided:
            self._decide()
        if self._replica is None or self._whole is not None:
            yield self._whole or self
            return
        with self._replica.materialized(self.module) as network:
            self._whole = network
            try:
                yield network
            finally:
                self._whole = None

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[Callable[..., Any]]:
        """The network with another adapter of it, or with none, to ask without a gradient: inside `gathered` the whole
        network, else the sharded one, whose forwards are collective.
        """
        with lora.using(self._whole or self.module, adapter):
            yield self._whole or self

    def _decide(self) -> None:
        self._decided = True
        if not fits(self.module, self._group):
            self._replica = None
        if self._group.world.is_main:
            how = "once a rollout" if self._replica is not None else "layer by layer: they do not fit unsharded"
            logging.getLogger("opd_ds").info("rollout.gather = auto: weights are gathered %s", how)

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps of the whole run that fp16's loss scale dropped because a gradient overflowed."""
        return privates.counters(self._engine)["skipped_steps"]

    @property
    def _param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = privates.inner_optimizer(self._engine.optimizer).param_groups
        return groups

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Backward of one micro-batch. `loss` is this rank's part of the round's loss: parts add up over ranks.

        DeepSpeed averages gradients over ranks, hence the factor. Only the micro-batch marked `last` closes the
        accumulation, so the number of micro-batches in a round is free.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._group.world.size, scale_wrt_gas=False)

    def step(self) -> float:
        """One optimizer step on what was accumulated; returns the global gradient norm before clipping."""
        norm = self._plain_grad_norm() if self.zero_stage == 0 else None
        if self._schedule is not None:
            factor = self._schedule(privates.counters(self._engine)["global_steps"])
            for group, peak in zip(self._param_groups, self._peaks, strict=True):
                group["lr"] = peak * factor
        self.learning_rate = float(self._param_groups[0]["lr"])
        self._engine.step()
        reported = self._engine.get_global_grad_norm()
        norm = reported if reported is not None else norm
        return float("nan") if norm is None else float(norm)

    def _plain_grad_norm(self) -> float | None:
        """Without ZeRO and in fp32 DeepSpeed has no optimizer wrapper that would tell the norm."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else None

    # ---- the trainable weights, as each rank holds them in full precision ----

    @cached_property
    def fragments(self) -> list[Fragment]:
        """What this rank holds of the fp32 masters; views of the very tensors that the optimizer updates."""
        return fragments(self._engine, self.zero_stage)

    @property
    def owned(self) -> list[Fragment]:
        """The fragments this rank answers for in a checkpoint: over all ranks, each element once."""
        if self.zero_stage > 0:
            return self.fragments
        return self.fragments[self._group.world.rank :: self._group.world.size]  # everybody holds everything

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the trainable parameters, whole."""
        named = [(name, value) for name, value in self.module.named_parameters() if value.requires_grad]
        return {name: privates.whole_shape(value) for name, value in named}

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Make the network's weights those of the masters, as DeepSpeed does at the end of a step. Collective."""
        if self.zero_stage == 3:
            privates.publish_stage_3(self._engine.optimizer)
        elif self.zero_stage > 0:
            privates.publish_stages_1_and_2(self._engine.optimizer)
        else:  # in fp32 the masters are the weights
            weights = dict(self.module.named_parameters())
            for fragment in self.fragments:
                weights[fragment.name].data.copy_(fragment.master.view_as(weights[fragment.name]))

    @torch.no_grad()
    def gather_weights(self, *, trainable_only: bool) -> dict[str, Tensor]:
        """Full weights by name, on rank 0's CPU (empty elsewhere). Collective; one tensor at a time on the device."""
        weights = {}
        wanted = [pair for pair in self.module.named_parameters() if pair[1].requires_grad or not trainable_only]
        with work("gathering the student", len(wanted), "weights") as gathering:
            for name, parameter in wanted:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                    if self._group.world.is_main:
                        weights[name] = parameter.detach().cpu().clone()
                gathering.advance()
        if self._group.world.is_main and not trainable_only:
            weights |= {name: buffer.detach().cpu().clone() for name, buffer in self._persistent_buffers()}
        return weights

    def _persistent_buffers(self) -> list[tuple[str, Tensor]]:
        skipped = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.module.named_modules()
            for name in module._non_persistent_buffers_set
        }
        return [(name, buffer) for name, buffer in self.module.named_buffers() if name not in skipped]

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of masters and optimizer state, as entries of `opd_ds.engine.state`."""
        return state.state_dict(self._engine, self.owned)

    def scalar_state(self) -> dict[str, Any]:
        """Steps, learning rates, schedule and loss scale, equal on all ranks."""
        return state.scalar_state(self._engine)

    @torch.no_grad()
    def load_state_dict(self, shards: ShardReader, scalars: dict[str, Any]) -> None:
        """Go on from a checkpoint, whatever ranks and ZeRO stage wrote it. Collective."""
        state.load_state_dict(self._engine, self.fragments, shards, scalars["optimizer_step"])
        state.load_scalar_state(self._engine, scalars)
        self.publish_masters()
