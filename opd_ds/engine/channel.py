"""Messages between ranks of different process groups: gloo between hosts, beside whatever the groups use.

The ranks that train and the ranks that hold teachers have a process group each, which DeepSpeed takes for the whole
world. What goes between the two goes through the host, so no kernel waits on a device for the other side, and two NCCL
communicators never wait for one another.
"""

from __future__ import annotations

import io
import pickle
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined]

from opd_ds.cluster.world import World

# A rank may wait as long as others evaluate or write; the watchdog ends what hangs.
_PATIENCE = timedelta(days=60)
_ALIGNED = 64  # bytes: where a tensor begins in a message
_WAITING_MESSAGES = 8  # that a rank receives before it looks at them


class Channel:
    """Sends and receives between any two ranks of a launch. What one rank sends another arrives in order.

    Args:
        store: of the launch.
    """

    def __init__(self, store: Store, world: World) -> None:
        self._gloo: Any = ProcessGroupGloo(PrefixStore("opd_ds/channel", store), world.rank, world.size, _PATIENCE)
        self._size = world.size

    def send(self, message: Any, to: int) -> None:
        """Until the other rank takes it. Tensors in it are on the host."""
        body = packed(message)
        self._gloo.send([torch.tensor([body.numel()])], to, 0).wait()
        self._gloo.send([body], to, 0).wait()

    def receive(self, source: int) -> Any:
        """The next message of a rank; blocks."""
        size = torch.empty(1, dtype=torch.int64)
        self._gloo.recv([size], source, 0).wait()
        body = torch.empty(int(size), dtype=torch.uint8)
        self._gloo.recv([body], source, 0).wait()
        return unpacked(body)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Collective."""
        body = packed(value)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self._size)]
        self._gloo.allgather([sizes], [torch.tensor([body.numel()])]).wait()
        longest = max(int(size) for size in sizes)
        bodies = [torch.empty(longest, dtype=torch.uint8) for _ in range(self._size)]
        padded = torch.cat([body, body.new_zeros(longest - body.numel())])
        self._gloo.allgather([bodies], [padded]).wait()
        return [unpacked(one[: int(size)].clone()) for one, size in zip(bodies, sizes, strict=True)]


class Outbox:
    """A thread that sends, so that the rank goes on."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], int] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: Callable[[], Any], to: int) -> None:
        """Send what `message` gives, which is called in the thread and may wait for a device.

        Raises:
            RuntimeError: an earlier message could not be sent.
        """
        if self._error is not None:
            raise self._error
        self._queue.put((message, to))

    def close(self) -> None:
        """Until all is sent."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:  # the other side is gone
                continue
            message, to = item
            try:
                self._channel.send(message(), to)
            except Exception as error:
                self._error = error


class Inbox:
    """A thread that receives one rank's messages before somebody looks at them.

    Args:
        last: tells the message after which there is none.
    """

    def __init__(self, channel: Channel, source: int, last: Callable[[Any], bool]) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(_WAITING_MESSAGES)
        threading.Thread(target=self._run, args=(channel, source, last), name=f"inbox {source}", daemon=True).start()

    def get(self) -> Any:
        """The next message; blocks.

        Raises:
            RuntimeError: the other rank is gone.
        """
        message = self._queue.get()
        if isinstance(message, _Broken):
            raise message.error
        return message

    def _run(self, channel: Channel, source: int, last: Callable[[Any], bool]) -> None:
        message = None
        while message is None or not last(message):
            try:
                message = channel.receive(source)
            except Exception as error:
                self._queue.put(_Broken(error))
                return
            self._queue.put(message)


class _Broken:
    def __init__(self, error: Exception) -> None:
        self.error = error


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and keeps them by their places in the message."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.end = 0

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        start, self.end = self.end, _aligned(self.end + value.nbytes)
        self.tensors.append(value)
        return start, value.dtype, tuple(value.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, data: Tensor) -> None:
        super().__init__(file)
        self._data = data

    def persistent_load(self, place: Any) -> Tensor:
        start, dtype, shape = place
        count = 1
        for length in shape:
            count *= length
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return self._data[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def packed(message: Any) -> Tensor:
    """uint8: the length of what follows, that is the message without tensors, and the tensors."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    text = file.getbuffer()
    begin = _aligned(8 + len(text))
    body = torch.zeros(begin + pickler.end, dtype=torch.uint8)
    body[:8] = torch.tensor([len(text)]).view(torch.uint8)
    body[8 : 8 + len(text)] = torch.frombuffer(text, dtype=torch.uint8)
    start = begin
    for tensor in pickler.tensors:
        if tensor.numel():
            flat = tensor.detach().contiguous().flatten().view(torch.uint8)
            body[start : start + len(flat)] = flat
        start += _aligned(tensor.nbytes)
    return body


def unpacked(body: Tensor) -> Any:
    length = int(body[:8].view(torch.int64))
    file = io.BytesIO(body[8 : 8 + length].numpy().tobytes())
    return _Unpickler(file, body[_aligned(8 + length) :]).load()
