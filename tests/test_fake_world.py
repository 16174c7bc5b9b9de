"""One process as a rank of many: bytes held and received are those of the formulas."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import fake_world


@pytest.mark.parametrize(("ds_config", "ranks"), [("zero2", 8), ("zero3", 8), ("zero3_hpz", 16)])
def test_bytes_of_a_round_are_those_of_the_formulas(ds_config: str, ranks: int) -> None:
    command = [sys.executable, "-m", fake_world.__name__, ds_config, str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned_state"] == pytest.approx(found["state"], rel=0.1)
    counted = {name: one for name, one in found["collectives"].items() if one["formula"] is not None}
    assert len(counted) == {"zero2": 2, "zero3": 2, "zero3_hpz": 3}[ds_config]
    for one in counted.values():
        assert one["received"] == pytest.approx(one["formula"], rel=0.05)
