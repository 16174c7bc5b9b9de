"""The thread in which rewards score images beside the training: what is learned from, and what is only watched.

On an accelerator it decodes and scores on a stream of its own: what it waits for is its own work, not all that the
rounds have queued. The stream's priority is that of the rounds. None is lower, and the rounds cannot have a higher one:
ZeRO-3 waits for its reductions on the default stream (DeepSpeed 0.19.8), so they have to stay there.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from opd_ds.evaluation.pictures import to_drawn
from opd_ds.rewards import Drawn, Reward

_P = ParamSpec("_P")
_T = TypeVar("_T")


class RewardPool:
    """A run's rewards and the one thread that calls them: rewards need not be safe for several threads.

    Args:
        rewards: by label.
        decode: latents [B, C, ...] to images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1], on the CPU.
        device: of the run. None: the CPU.
        fps: frames per second of videos.
    """

    def __init__(
        self,
        rewards: dict[str, Reward],
        decode: Callable[[Tensor], Tensor],
        device: torch.device | None = None,
        fps: float = 1.0,
    ) -> None:
        self.rewards, self._decode, self._fps = rewards, decode, fps
        self._device = None if device is None or device.type == "cpu" else device
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rewards", initializer=self._begin)

    def _begin(self) -> None:
        if self._device is not None:
            torch.accelerator.set_device_index(self._device)  # a thread begins on device 0, whatever the rank's is
            torch.accelerator.set_stream(torch.Stream(device=self._device))

    def submit(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Have `work` done in the thread, after what was submitted before, and with the device's values as they are
        here and now. `work` returns when nothing on its stream reads them any more, as what is on the host has to.
        """
        if self._device is None:
            return self._worker.submit(work, *args, **kwargs)
        ready = torch.accelerator.current_stream(self._device).record_event()

        def when_ready() -> _T:
            ready.wait()
            return work(*args, **kwargs)

        return self._worker.submit(when_ready)

    def drawn(self, latents: Tensor) -> list[Drawn]:
        """The images or clips of latents, in the caller's thread."""
        return [to_drawn(one, self._fps) for one in self._decode(latents)]
