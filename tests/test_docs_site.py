"""The documentation builds as a site without a warning, and its links to code lead to lines of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="pip install 'opd-ds[docs]'")
pytest.importorskip("mkdocstrings", reason="pip install 'opd-ds[docs]'")
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_every_page_and_the_readme_are_there_and_searched(site: Path) -> None:
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert not [page for page in pages if not (site / page / "index.html").is_file()]
    assert "launchers/quickstart.sh" in (site / "index.html").read_text(encoding="utf-8")
    searched = {
        entry["location"].split("#")[0] for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    assert {"", "config/", "api/", "tour/"} <= searched
    assert not [place for place in searched if place.endswith(".py/")]


def test_the_tours_links_lead_to_lines_of_code(site: Path) -> None:
    tour = (site / "tour" / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="\.\./(repository/[^"#]+)#(__codelineno-0-\d+)"><code>[\w.]*?(\w+)</code>', tour)
    assert len(links) > 20
    for page, anchor, name in links:
        html = (site / page / "index.html").read_text(encoding="utf-8")
        line = "<a " + html.split(f'id="{anchor}"')[1].split('<span id="__span')[0]
        assert name in re.sub(r"<[^>]+>", "", line)


def test_the_python_reference_has_signatures_and_docstrings(site: Path) -> None:
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("api.load_config", "api.plan_run", "diffusion.kernels.kernel", "models.base.ModelFamily"):
        assert f'id="opd_ds.{name}"' in page
    assert "Mean squared velocity difference per sample" in page
