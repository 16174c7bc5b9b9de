"""One process as a rank of many: bytes held and received are those of the formulas."""

from __future__ import annotations

import json

import pytest

from benchmarks import fake_world
from tests.ranks import launch


@pytest.mark.multirank
@pytest.mark.parametrize(("ds_config", "ranks"), [("zero2", 8), ("zero3", 8), ("zero3_hpz", 16)])
def test_bytes_of_a_round_are_those_of_the_formulas(ds_config: str, ranks: int) -> None:
    done = launch(1, ds_config, str(ranks), script=fake_world.__name__)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    found = json.loads(line)
    assert found["planned_state"] == pytest.approx(found["state"], rel=0.1)
    counted = {name: one for name, one in found["collectives"].items() if one["formula"] is not None}
    assert len(counted) == {"zero2": 2, "zero3": 2, "zero3_hpz": 3}[ds_config]
    for one in counted.values():
        assert one["received"] == pytest.approx(one["formula"], rel=0.05)
