"""report.html: safe, small, whole without a network, and alive in a real browser."""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from opd_ds.evaluation.charts import Bar, Curve, bars, curves, radar
from opd_ds.evaluation.report import write_report
from opd_ds.evaluation.results import FORMAT, Results, _entry
from opd_ds.evaluation.statistics import normalised_average
from opd_ds.evaluation.store import PictureStore
from opd_ds.rewards import Clip

EVIL = '<script>alert(1)</script> "quoted" & {{ 7 * 7 }} </script><img src=x onerror=alert(2)>'
MODELS = {"base": 0.4, "teacher:one": 0.6, "student": 0.55}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_evaluation(folder: Path, prompts: list[str], *, side: int = 16, noisy: bool = False) -> Results:
    """Made-up results of three models on two sets with one reward each, and images."""
    generator = np.random.default_rng(0)
    sets = {
        name: {"sha256": "", "prompts": prompts, "samples": 1, "rewards": [name], "own": [name]}
        for name in ("text", "look")
    }
    scores: dict[str, Any] = {}
    for model, level in MODELS.items():
        scores[model] = {}
        for name in sets:
            values = np.clip(generator.normal(level, 0.2, len(prompts)), 0, 1)
            scores[model][name] = {name: _entry(values.tolist(), len(prompts))}
            target = folder / "images" / model.replace(":", "-") / name
            target.mkdir(parents=True)
            for number in range(len(prompts)):
                if noisy:  # between a photograph and noise: coarse structure plus grain
                    coarse = Image.fromarray(generator.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
                    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int64)
                    grain = generator.normal(0, 8, (side, side, 1))
                    picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
                else:
                    picture = Image.new("RGB", (side, side), tuple(generator.integers(0, 256, 3).tolist()))
                picture.save(target / f"{number:05d}-0.png", compress_level=1)
    table: dict[str, list[float | None]] = {
        model: [by_set[name][name]["mean"] for name in sets] for model, by_set in scores.items()
    }
    return {
        "format": FORMAT,
        "settings": {"steps": 4, "seed": 1, "negative_prompt": EVIL},
        "models": {model: {"identity": "0", "guidance": {}, "folder": model.replace(":", "-")} for model in MODELS},
        "rewards": {name: {"engine": name} for name in sets},
        "sets": sets,
        "scores": scores,
        "metrics": [[name, name] for name in sets],
        "normalised_average": normalised_average(table),
    }


def metrics_rows() -> list[dict[str, Any]]:
    return [
        {"round": k, "loss": 1.0 / k, "grad_norm": 0.1, "task/one/kl": 0.5 / k, "task/two/kl": 0.4 / k}
        for k in range(1, 1201)
    ]


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def test_prompts_cannot_become_markup(tmp_path: Path) -> None:
    prompts = [EVIL, "a red 3", "it's '; alert(3); '"]
    page = Page(write_report(tmp_path, write_evaluation(tmp_path, prompts), metrics_rows()).read_text())
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == ["application/json", None]
    assert EVIL in page.text
    assert "alert(" not in page.scripts[1]
    assert all(a["data-prompt"] in prompts for _, a in page.tags if "data-prompt" in a)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(prompts) * len(MODELS) * 2
    assert all(a["alt"] and "src" not in a for a in images)  # images come from the block of data, on demand
    assert {a["data-picture"] for a in images} == {str(k) for k in range(len(images))}
    assert len(json.loads(page.scripts[0])) == len(images)


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    text = write_report(tmp_path, write_evaluation(tmp_path, ["a", "b", "c"]), metrics_rows()).read_text()
    page = Page(text)
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not any({"src", "href", "srcset", "action"} & attributes.keys() for _, attributes in page.tags)
    assert not re.search(r"fetch|XMLHttpRequest|import\(|@import|url\(", page.scripts[1] + text[: text.index("<body>")])
    assert str(tmp_path) not in text.replace(tmp_path.name, "")


def test_the_best_and_worst_prompts_are_those_with_the_largest_differences(tmp_path: Path) -> None:
    prompts = [f"prompt {k}" for k in range(30)]
    results = write_evaluation(tmp_path, prompts)
    page = Page(write_report(tmp_path, results, []).read_text())
    opened = [a["data-open"] for tag, a in page.tags if tag == "button" and "data-open" in a]
    for name in ("text", "look"):
        ours, theirs = (np.array(results["scores"][m][name][name]["per_prompt"]) for m in ("student", "base"))
        order = np.argsort(ours - theirs)
        assert {f"{name}-{order[0]}", f"{name}-{order[-1]}"} <= set(opened)
    rows = {a.get("id") for _, a in page.tags}
    assert set(opened) <= rows  # every one of them has its images in the page
    assert "Training" not in page.text  # there were no metrics


def test_a_limit_keeps_the_best_and_worst(tmp_path: Path) -> None:
    results = write_evaluation(tmp_path, [f"prompt {k}" for k in range(60)])
    page = Page(write_report(tmp_path, results, [], limit=120).read_text())
    assert sum(tag == "img" for tag, _ in page.tags) == 120
    opened = {a["data-open"] for _, a in page.tags if "data-open" in a}
    assert opened <= {a.get("id") for _, a in page.tags}


@pytest.mark.extended
def test_a_thousand_pictures_stay_under_50_megabytes(tmp_path: Path) -> None:
    """Images with grain, which compress worse than photographs do."""
    results = write_evaluation(tmp_path, [f"prompt {k}" for k in range(8)], side=320, noisy=True)
    for place in (tmp_path / "images").glob("*/*"):  # the same few images over and over: drawing 1000 takes long
        for number in range(8, 170):
            (place / f"{number:05d}-0.png").symlink_to(place / f"{number % 8:05d}-0.png")
    many = [f"prompt {k}" for k in range(170)]
    for name in results["sets"]:
        results["sets"][name]["prompts"] = many
        for model in MODELS:
            results["scores"][model][name][name] = _entry([0.5] * 170, 170)
    report = write_report(tmp_path, results, metrics_rows())
    pictures = json.loads(Page(report.read_text()).scripts[0])
    assert 990 <= len(pictures) <= 1000
    assert 5e6 < report.stat().st_size < 50e6


def width_of_bar(text: str, colour: str) -> float:
    path = re.search(rf'd="M ([\d.]+) [\d.]+\s+L ([\d.]+)[^"]*"[^>]*style="fill: {colour}', text)
    assert path is not None
    return float(path[2]) - float(path[1])


def test_charts_say_what_they_show_and_escape_names() -> None:
    entries = [
        Bar("<b> $a$", "#111111", 20.5, 20.3, 20.7),
        Bar("two", "#222222", 20.8, 20.6, 21.0),
        Bar("three", "#333333", *[None] * 3),
    ]
    drawn = bars("PickScore", entries)
    assert "&lt;b&gt; $a$ 20.500" in drawn
    assert ">&lt;b&gt; $a$</text>" in drawn  # no formula
    assert "<b>" not in drawn
    assert ">not measured</text>" in drawn
    assert "axis not from 0" in drawn
    assert width_of_bar(drawn, "#222222") > 1.2 * width_of_bar(drawn, "#111111")  # from 0 it would not be seen
    from_zero = bars("x", [Bar("a", "#111111", 0.2, 0.1, 0.3), Bar("b", "#222222", 0.4, 0.3, 0.5)])
    assert width_of_bar(from_zero, "#222222") == pytest.approx(2 * width_of_bar(from_zero, "#111111"), rel=0.01)
    assert "a 1.00, 0.00, 0.50" in radar(["x", "y", "z"], [Bar("a", "#111111", *[None] * 3)], {"a": [1.0, 0.0, 0.5]})
    line = curves("loss", [Curve("loss", "#111111", list(range(1, 5001)), [1.0 / k for k in range(1, 5001)])])
    path = re.search(r'd="([^"]+)"[^>]*stroke: #111111', line)
    assert path is not None
    assert path[1].count("L") < 400
    assert ">0.01</text>" in line  # a logarithmic axis
    assert "to 0.0002" in line
    assert curves("loss", [Curve("loss", "#111", [1.0], [float("nan")])]) == ""


def test_charts_are_small_the_same_each_time_and_share_no_identifiers() -> None:
    entries = [Bar(name, "#111111", 0.2, 0.1, 0.3) for name in ("a", "b", "c")]
    first, again, other = bars("x", entries), bars("x", entries), bars("y", entries)
    assert first == again
    assert len(first) < 10_000
    assert not set(re.findall(r' id="([^"]+)"', first)) & set(re.findall(r' id="([^"]+)"', other))
    assert "<style" not in first  # it would hold for the whole page


def test_without_matplotlib_the_report_comes_and_says_how_to_get_charts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = write_evaluation(tmp_path, ["a", "b", "c"])
    with_charts = write_report(tmp_path, results, metrics_rows()).read_text()
    monkeypatch.setattr("opd_ds.evaluation.report.can_draw", lambda: False)
    without = write_report(tmp_path, results, metrics_rows()).read_text()
    hint = "pip install &#39;opd-ds[plots]&#39;"
    assert (with_charts.count("<svg"), with_charts.count(hint)) == (5, 0)
    assert (without.count("<svg"), without.count(hint)) == (0, 1)
    assert len(Page(without).tags) > 100  # the table, the images and all else


def test_clips_play_in_the_report(tmp_path: Path) -> None:
    """As animated WebP that browsers play by themselves: fewer frames, as long."""
    results = write_evaluation(tmp_path, ["a"])
    clip = Clip(tuple(Image.new("RGB", (320, 160), (level, 0, 0)) for level in range(0, 240, 5)), 16.0)
    store = PictureStore(tmp_path / "images")
    for model in MODELS:
        for name in ("text", "look"):
            store.write(Path(model.replace(":", "-"), name, "00000-0.png"), clip, {})
    results["settings"] |= {"frames": 48, "fps": 16.0}
    text = write_report(tmp_path, results, []).read_text()
    assert "Clips</h2>" in text
    shown = [base64.b64decode(data) for data in re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", text)]
    assert len(shown) == 6
    with Image.open(io.BytesIO(shown[0])) as picture:
        assert (picture.size, picture.n_frames, picture.info["loop"]) == ((256, 128), 24, 0)
        picture.seek(1)
        picture.load()
        assert picture.info["duration"] == 125


# ---- in a browser ----


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt install chromium)")
def test_the_report_lives_in_a_browser(tmp_path: Path) -> None:
    """Images near the window load and far ones do not; filter, search and viewer work; clips load; no error, no
    request.
    """
    results = write_evaluation(tmp_path, [EVIL, *(f"prompt {k}" for k in range(1, 80))])
    moving = Clip(tuple(Image.new("RGB", (32, 16), (level, 0, 0)) for level in range(0, 200, 20)), 10.0)
    PictureStore(tmp_path / "images").write(Path("base/text/00001-0.png"), moving, {})
    report = write_report(tmp_path, results, metrics_rows())
    probe = """<script>
    addEventListener("load", () => setTimeout(async () => {
      const later = ms => new Promise(done => setTimeout(done, ms));
      const loaded = () => [...document.querySelectorAll(".tile img")].filter(i => i.complete && i.naturalWidth).length;
      const visible = () => [...document.querySelectorAll(".row")].filter(r => r.checkVisibility()).length;
      const say = {errors: window.errors, images: document.querySelectorAll(".tile img").length, rows: visible()};
      document.getElementById("pictures").scrollIntoView(); await later(400);
      say.loaded = loaded();
      document.querySelector('.bar [data-set="look"]').click(); say.look = visible();
      const find = document.getElementById("find");
      find.value = "PROMPT 7"; find.dispatchEvent(new Event("input")); say.found = visible();
      find.value = ""; find.dispatchEvent(new Event("input"));
      document.querySelector('.bar [data-set=""]').click(); say.all = visible();
      document.querySelector(".extremes button").click();
      const viewer = document.getElementById("viewer");
      say.open = viewer.open; say.large = viewer.querySelectorAll("img").length;
      const before = document.getElementById("viewer-prompt").textContent;
      viewer.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
      say.stepped = before !== document.getElementById("viewer-prompt").textContent;
      viewer.querySelector("[data-close]").click(); say.closed = !viewer.open;
      say.requests = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;
      const clip = document.querySelector("#text-1 img"); clip.scrollIntoView(); await later(200);
      say.clip = [clip.naturalWidth, clip.naturalHeight];
      say.wide = document.documentElement.scrollWidth > innerWidth;
      location = "LISTENER?" + encodeURIComponent(JSON.stringify(say));
    }, 300));
    </script>"""
    watch = """<script>window.errors = []; window.alert = x => errors.push("alert");
    onerror = e => errors.push(String(e));</script>"""
    text = report.read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("<title>", watch + "<title>", 1).replace("</body>", probe + "</body>"))
    said = in_browser(probed, tmp_path / "profile", "1280,900")
    assert said["errors"] == []
    assert said["requests"] == 0
    assert (said["images"], said["rows"]) == (480, 160)
    assert 0 < said["loaded"] < 200
    assert (said["look"], said["found"], said["all"]) == (80, 11, 160)
    assert said["open"]
    assert said["large"] == 3
    assert said["stepped"]
    assert said["closed"]
    assert said["clip"] == [32, 16]
    assert not said["wide"]
    assert not in_browser(probed, tmp_path / "phone", "500,900")["wide"]


def in_browser(file: Path, profile: Path, size: str) -> dict[str, Any]:
    """What the page's probe says: it ends by going to an address of ours with its findings."""
    assert CHROMIUM is not None
    said: queue.Queue[str] = queue.Queue()

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said.put(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    target = profile.with_suffix(".html")
    target.write_text(file.read_text().replace("LISTENER", f"http://127.0.0.1:{server.server_port}/"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
    command += [f"--user-data-dir={profile}", f"--window-size={size}", target.as_uri()]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        return json.loads(unquote(said.get(timeout=120)).partition("?")[2])
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
        server.shutdown()
        server.server_close()


def widths_of(drawn: str, colour: str) -> float:
    """Of the bar with this colour."""
    path = re.search(rf'<path d="([^"]*)"[^>]*fill: {colour}', drawn)
    assert path is not None
    xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path[1])]
    return max(xs) - min(xs)


@pytest.mark.parametrize("sign", [1, -1])
def test_bars_begin_at_zero_on_both_sides_of_it(sign: int) -> None:
    drawn = bars("x", [Bar("a", "#111111", sign * 0.2, None, None), Bar("b", "#222222", sign * 0.4, None, None)])
    assert widths_of(drawn, "#222222") == pytest.approx(2 * widths_of(drawn, "#111111"), rel=0.01)
    assert "axis not from 0" not in drawn
    assert f"b {sign * 0.4:.3f}" in drawn


@pytest.mark.parametrize("sign", [1, -1])
def test_close_values_far_from_zero_are_told_apart_and_tiny_differences_stay_tiny(sign: int) -> None:
    apart = bars("x", [Bar("a", "#111111", sign * 3.0, None, None), Bar("b", "#222222", sign * 3.3, None, None)])
    assert "axis not from 0" in apart
    assert widths_of(apart, "#222222") > 1.5 * widths_of(apart, "#111111")
    tiny = bars("x", [Bar("a", "#111111", sign * 3.0, None, None), Bar("b", "#222222", sign * 3.0001, None, None)])
    assert widths_of(tiny, "#222222") < 1.05 * widths_of(tiny, "#111111")


def test_long_names_keep_their_ends() -> None:
    names = ["student-with-a-very-long-name-round-000100", "student-with-a-very-long-name-round-000200"]
    drawn = bars("x", [Bar(name, "#111111", 0.5, None, None) for name in names])
    assert "…" in drawn
    assert "ound-000100<" in drawn.replace("\n", "")
    assert "ound-000200<" in drawn.replace("\n", "")


def test_every_reward_of_a_set_is_beside_its_image(tmp_path: Path) -> None:
    results = write_evaluation(tmp_path, ["a", "b"])
    for by_set in results["scores"].values():
        by_set["text"]["grade"] = _entry([-1.5, -2.0], 2)
    results["sets"]["text"]["own"] = results["sets"]["text"]["rewards"] = ["text", "grade"]
    page = write_report(tmp_path, results, []).read_text()
    assert "scores: text, grade" in page
    assert page.count("<small>grade -1.500") == 3
    assert page.count("<small>text ") == 6
    assert "text / grade" in page  # and in the table
