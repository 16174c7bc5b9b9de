"""Batches that shrink until they fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd_ds.training.auto_batch import AutoMicroBatch


def limited(rows: Tensor, at_most: int, sizes: list[int]):  # type: ignore[no-untyped-def]
    def compute(part: slice) -> Tensor:
        size = len(rows[part])
        if size > at_most:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(size)
        return rows[part] * 2

    return compute


@given(total=st.integers(1, 40), at_most=st.integers(1, 40))
def test_all_rows_come_in_order_and_the_size_is_found_once(total: int, at_most: int) -> None:
    rows, sizes = torch.arange(total), list[int]()
    fitting = AutoMicroBatch("scoring", None, shrinks=True)
    found = torch.cat(fitting.run(total, limited(rows, at_most, sizes)))
    assert torch.equal(found, rows * 2)
    assert max(sizes) <= at_most
    assert 2 * max(sizes) >= min(total, at_most)  # never more than halved too far
    size = fitting.size
    fitting.run(total, limited(rows, at_most, sizes))
    assert fitting.size == size


def test_shrinking_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="opd_ds"):
        AutoMicroBatch("scoring.micro_batch = auto", None, shrinks=True).run(8, limited(torch.arange(8), 2, []))
    assert [r.getMessage() for r in caplog.records] == [
        "scoring.micro_batch = auto: 8 at once do not fit, going on with 4",
        "scoring.micro_batch = auto: 4 at once do not fit, going on with 2",
    ]


@pytest.mark.parametrize("shrinks", [True, False])
def test_what_cannot_shrink_says_so(shrinks: bool) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        AutoMicroBatch("scoring", None, shrinks=shrinks).run(4, limited(torch.arange(4), 0, []))
