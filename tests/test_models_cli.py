"""`opd-ds models`."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.models import FAMILIES


def test_every_family_says_what_it_is() -> None:
    result = CliRunner().invoke(app, ["models", "--json"])
    assert result.exit_code == 0
    rows = {row["family"]: row for row in json.loads(result.stdout)}
    assert list(rows) == list(FAMILIES)
    for row in rows.values():
        assert row["pipeline"].endswith("Pipeline")
        assert row["example"].count("/") == 1
        assert row["lora_targets"]
        assert row["known"]
        assert (row["guidance"], row["passes"]) in (("embedded", 1), ("classifier-free", 2))
    assert [rows[name]["reference_pictures"] for name in ("sd3", "flux_kontext", "flux2")] == [0, 1, 10]
    assert (rows["sd3"]["latents"], rows["wan"]["latents"]) == ("image", "video")


def test_the_list_for_people_names_the_same() -> None:
    text = CliRunner().invoke(app, ["models"]).stdout
    assert "StableDiffusion3Pipeline, for example stabilityai/stable-diffusion-3.5-medium" in text
    assert "Z-Image, Z-Image-Turbo (distilled, 8 steps)\n" in text
    assert "latents of videos; classifier-free guidance (2 passes, 1 at guidance 1)" in text
