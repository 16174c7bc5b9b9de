"""Ten thousand requests with random faults: every image is accounted for, and neither side's memory grows."""

from __future__ import annotations

import gc
import logging
import os
import random
from collections import Counter
from typing import Any

import psutil
import pytest
import requests
from PIL import Image

from opd_ds.rewards import build
from tests.rewards.drawing import flat
from tests.rewards.servers import answering, process_serving
from tests.rewards.test_remote import FAULTS, REFUSED, Faulty

SERVER = "import sys; from opd_ds.rewards.server import serve; from tests.rewards.test_remote import Width; "
SERVER += "serve(Width(), '127.0.0.1', int(sys.argv[1]))"
# What an image's metadata order of `Width`, what the client then counts, and in how many of 500 requests.
ORDERS = {
    None: ("", 350),
    "nan": ("without a score from the server", 50),
    "raise": ("http 500", 50),
    "short": ("http 500", 49),
    "slow": ("timeout", 1),
}
REQUESTS, WARM_UP = 5_000, 1_000


def resident_mib(process: psutil.Process) -> float:
    gc.collect()
    return process.memory_info().rss / 2**20


def pictures(draw: random.Random) -> list[Image.Image]:
    return [flat("red", draw.randrange(32, 96)) for _ in range(draw.randint(1, 4))]


def endure(step: Any, processes: dict[str, psutil.Process]) -> None:
    """`REQUESTS` steps; the memory after the warm-up is the memory at the end, up to 16 MiB of the allocator's."""
    start: dict[str, float] = {}
    for number in range(REQUESTS):
        if number == WARM_UP:
            start = {name: resident_mib(process) for name, process in processes.items()}
        step()
    for name, process in processes.items():
        end = resident_mib(process)
        print(f"{name}: {start[name]:.1f} MiB after {WARM_UP} requests, {end:.1f} MiB after {REQUESTS}")
        assert end - start[name] < 16, name


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest keeps log records: ten thousand lines would look like a leak."""
    monkeypatch.setattr(logging.getLogger("opd_ds"), "disabled", True)


@pytest.mark.slow
def test_a_server_and_its_client_endure_each_other() -> None:
    draw, expected, scored, refused = random.Random(0), Counter[str](), 0, Counter[int]()
    with process_serving("-c", SERVER) as (process, url):
        reward = build("remote", url=url, retries=0, timeout=2)

        def step() -> None:
            nonlocal scored
            images = pictures(draw)
            (order,) = draw.choices(list(ORDERS), [weight for _, weight in ORDERS.values()])
            kind = ORDERS[order][0]
            scores = reward.score(images, [""] * len(images), [{"do": order}] * len(images))
            if kind:
                expected[kind] += len(images)
                assert scores.isnan().all()
            else:
                scored += len(images)
                assert scores.tolist() == [image.width for image in images]
            if kind == "timeout":  # the reward is still at it
                requests.post(f"{url}/score", b'{"images": [], "prompts": []}', timeout=20)
            if draw.random() < 0.2:
                body, _, _ = REFUSED[draw.choice(list(REFUSED))]
                refused[requests.post(f"{url}/score", body, timeout=20).status_code // 100] += 1

        endure(step, {"server": psutil.Process(process.pid), "client": psutil.Process(os.getpid())})
        assert reward.failures == expected
        assert process.poll() is None
    print(f"{scored} pictures scored, gaps {dict(expected)}, bad requests by status {dict(refused)}")


@pytest.mark.slow
def test_a_client_endures_a_server_that_goes_wrong_in_every_way() -> None:
    draw, expected, server = random.Random(1), Counter[str](), Faulty()
    slow = [name for name, (_, kind) in FAULTS.items() if kind == "timeout"]
    names = [name for name in FAULTS if name not in slow]
    with answering(server) as url:
        reward = build("remote", url=url, retries=0, timeout=1)

        def step() -> None:
            server.fault = draw.choice([*names, *["none"] * len(names)])
            if draw.random() < 0.005:
                server.fault = draw.choice(slow)
            images = [flat("red", draw.randrange(32, 96)) for _ in range(2)]  # what the wrong answers are wrong for
            kind = FAULTS[server.fault][1]
            if kind:
                expected[kind] += len(images)
            assert reward.score(images, [""] * len(images)).isnan().all() == bool(kind)

        endure(step, {"client and faulty server": psutil.Process(os.getpid())})
        assert reward.failures == expected
    print(f"gaps {dict(expected)}")
