"""Who am I."""

from __future__ import annotations

import pytest

from opd_ds.errors import UserError
from opd_ds.launch import World, who_am_i


def test_from_the_environment() -> None:
    assert who_am_i({}) == World(0, 0, 1, 1)
    environment = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert who_am_i(environment) == World(3, 1, 4, 2)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK set but LOCAL_RANK, WORLD_SIZE not"),
        ({"RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, "RANK = 4 does not fit WORLD_SIZE = 4"),
    ],
)
def test_contradictions(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        who_am_i(environment)
