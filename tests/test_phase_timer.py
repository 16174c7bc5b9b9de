"""Seconds by phase: between events of a device that works behind the host, on the host's clock without one."""

from __future__ import annotations

import time

import pytest
import torch

from opd_ds.training.phase_timer import PhaseTimer


class Device:
    """Its clock, and what is still queued; nothing is known of an event before it is waited for."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, 0

    def work(self, milliseconds: float) -> None:
        self.now += milliseconds

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device

    def record(self) -> None:
        self.at = self._device.now

    def synchronize(self) -> None:
        self._device.waits += 1

    def elapsed_time(self, end: Event) -> float:
        assert self._device.waits == 1
        return end.at - self.at


def test_phases_take_the_devices_time_and_wait_once() -> None:
    device = Device()
    timer = PhaseTimer(torch.device("meta"), device.event)
    for milliseconds in (100.0, 50.0):
        with timer.phase("train"):
            device.work(milliseconds)
    with timer.phase("step"):
        device.work(8.0)
    assert device.waits == 0
    assert timer.seconds() == pytest.approx({"train": 0.15, "step": 0.008})
    assert device.waits == 1


def test_without_a_device_phases_take_the_hosts_time() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.phase("encode"):
            time.sleep(0.01)
    seconds = timer.seconds()
    assert list(seconds) == ["encode"]
    assert 0.02 <= seconds["encode"] < 5
    assert PhaseTimer(torch.device("cpu")).seconds() == {}
