"""Tables in Markdown."""

from __future__ import annotations

from opd_ds.utils.markdown import markdown_table


def test_text_stands_left_numbers_right_and_bars_are_escaped() -> None:
    assert markdown_table(["a|b", "n"], [["x", 1], ["y|z", 2.5]]) == (
        "| a\\|b | n |\n| --- | ---: |\n| x | 1 |\n| y\\|z | 2.5 |\n"
    )
    assert markdown_table(["a", "b"], [], text_columns=2) == "| a | b |\n| --- | --- |\n"
