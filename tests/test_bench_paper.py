"""The bench of the paper's claim: its budget, its jobs, its claims from made-up scores, and gradients that vary."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.paper import miniature_table
from benchmarks.paper.bench import bench, write
from benchmarks.paper.claims import summary
from benchmarks.paper.gradients import Draws, Spread, gradient_variance
from benchmarks.paper.jobs import Job
from benchmarks.paper.methods import NOISE, STUDENT, Variant
from benchmarks.paper.passes import measured_passes
from benchmarks.paper.plan import FULL, QUICK, Plan, Run, cascade, jobs, joint, runs, student, teacher
from benchmarks.paper.real import real_rewards
from benchmarks.paper.table import COLUMNS, SCORED, Findings, Outcome, Point, collect
from benchmarks.plots import grouped_bars, panels, write_png
from opd_ds.config.loading import parse_config
from opd_ds.config.paths import resolve_path
from opd_ds.config.schema import RunConfig
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.miniature.world import ALL_TASKS, TASKS
from opd_ds.models import build_family
from opd_ds.plan.passes import Passes, planned_passes
from opd_ds.runs.train import train
from tests.test_bench_jobs import quiet
from tests.tiny import PROMPTS, run_settings

# ---- the budget ----


def taught(world: Path, folder: Path, schedule: str = "together", **teach: Any) -> dict[str, Any]:
    data = run_settings(world, folder, run__rounds=5, train__schedule=schedule)
    task = {"prompts": str(world / "prompts.txt"), "rewards": ["jpeg_compressibility"]}
    data |= {"tasks": {"one": task | {"turns": 2}, "two": task | {"guidance": 1.0}}, "deepspeed": "zero0"}
    return data | {"teach": {"algorithm": "nft", "group": 2} | teach}


def distilled(world: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return run_settings(world, folder, run__rounds=2, deepspeed="zero0", **changes)


@pytest.mark.parametrize(
    "case",
    [
        *("alternate", "together", "no start", "distil", "anchor", "beyond", "two epochs", "fused", "fused queries"),
        "negative prompt at every third step",
        *("sft", "drawn"),
    ],
)
def test_passes_are_known_before_a_run(case: str, tiny_world: Path, tmp_path: Path, group: Group) -> None:
    folder = tmp_path / "out"
    anchor = {"path": str(tiny_world / "other"), "guidance": 2.0}
    data = {
        "alternate": lambda: taught(tiny_world, folder, schedule="alternate"),
        "together": lambda: taught(tiny_world, folder),
        "no start": lambda: taught(tiny_world, folder, kl=0.0),
        "distil": lambda: distilled(tiny_world, folder, rollout__trained_steps={"queries": 3}),
        "anchor": lambda: distilled(tiny_world, folder, anchor=anchor, rollout__trained_steps={"steps": [0, 2]}),
        "beyond": lambda: distilled(tiny_world, folder, objective={"extrapolation": 0.25}),
        "two epochs": lambda: distilled(tiny_world, folder, train__inner_epochs=2),
        "fused": lambda: distilled(tiny_world, folder, rollout__mode="fused", rollout__trained_steps={"steps": [0, 2]}),
        "fused queries": lambda: distilled(
            tiny_world, folder, rollout__mode="fused", rollout__trained_steps={"queries": 1}
        ),
        "negative prompt at every third step": lambda: distilled(
            tiny_world, folder, rollout__negative_every=3, rollout__trained_steps={"steps": [0, 3]}
        ),
        "sft": lambda: distilled(tiny_world, folder, objective={"method": "sft"}),
        "drawn": lambda: distilled(
            tiny_world, folder, train__schedule="random", train__updates_per_round=2, tasks__two__samples=2
        ),
    }[case]()
    config: RunConfig = parse_config(data)
    planned = planned_passes(config)
    train(config, group)
    measured = measured_passes(folder)
    if case == "distil":  # an expectation: random steps end the rollouts
        assert planned.forward == pytest.approx(measured.forward, rel=0.15)
        assert planned.backward == measured.backward
    else:
        assert (planned, planned.negative) == (measured, measured.negative)
    assert planned.backward > 0


RECIPE = Variant(STUDENT)


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=["full", "quick"])
def test_joint_and_cascade_have_the_budget_of_distilling(plan: Plan) -> None:
    by_name = {run.name: run for run in runs(plan)}
    assert len(by_name) == len(runs(plan))
    for seed in plan.seeds:
        own = by_name[student(RECIPE, seed)].passes.units
        counted = [by_name[student(RECIPE, seed)], *(by_name[teacher(task, seed)] for task in TASKS)]
        spent = sum((run.passes for run in counted), Passes()).units
        together = by_name[joint(seed)].passes
        in_turn = sum((by_name[name].passes for name in cascade(seed)), Passes())
        assert together == in_turn
        turn = sum(replace(by_name[teacher(task, seed)], rounds=1).passes.units for task in TASKS)
        assert spent <= together.units < spent + turn
        for variant in plan.students:
            assert 0.9 * own < by_name[student(variant, seed)].passes.units <= 1.01 * own, variant


def test_parts_that_one_seed_has() -> None:
    with pytest.raises(UserError, match=r"^--part methos: allowed are methods, queries, noise, further$"):
        FULL.with_parts(["methos"])
    assert FULL.with_parts(["queries"]) == replace(FULL, noise=(), further=())
    names = {run.name for run in runs(FULL.with_parts(["methods"]))}
    assert names == {run.name for run in runs(FULL)} - {
        student(variant, FULL.seeds[0]) for variant in (*FULL.queries, *FULL.noise, *FULL.further)
    }


def evaluation_of(run: Run) -> tuple[Any, ...]:
    """Everything that scores depend on beside the weights; a prompt set may be a task or a probe."""
    evaluated = run.config.evaluated
    sets = {name: (one.eval_prompts, one.rewards[0].label, one.guidance) for name, one in sorted(evaluated.items())}
    return run.config.evaluation, run.config.rollout.guidance, run.config.precision, sets


def test_all_methods_are_evaluated_alike() -> None:
    """But students that are guided, with their guidance."""
    first, *others = [run for run in runs(FULL) if not run.name.startswith("guided-teachers-and-student")]
    base = next(job for job in jobs(FULL) if job.name == "base").arguments
    settings = tuple(base[place + 1] for place, argument in enumerate(base) if argument == "--set")
    assert all(evaluation_of(run) == evaluation_of(first) for run in others)
    assert evaluation_of(Run("base", "train", "miniature", 1, settings)) == evaluation_of(first)
    assert first.config.rollout.guidance == 1.0


def test_every_job_is_planned_after_what_it_reads() -> None:
    everything = jobs(FULL)
    assert len({job.name for job in everything}) == len(everything)
    for job in everything:
        parts = [part for argument in job.arguments for part in argument.split("=")]
        read = {
            part.split("/")[1]
            for part in parts
            if "/export" in part or (job.arguments[0] == "eval" and "/model" in part)
        }
        assert read == set(job.needs)


def test_the_plans_fit() -> None:
    minutes = {name: sum(job.seconds for job in jobs(plan)) / 60 / 2 for name, plan in (("f", FULL), ("q", QUICK))}
    assert minutes["f"] < 240
    assert minutes["q"] < 15


# ---- claims from made-up scores ----


def outcome(method: str, seed: int | None, rewards: tuple[float, float, float, float], units: int = 0) -> Outcome:
    return Outcome(method, seed, dict(zip(SCORED, rewards, strict=True)), Passes(units, 0), units / 100)


def curve(*points: tuple[int, float]) -> list[Point]:
    return [Point(Passes(units, 0), dict.fromkeys(SCORED, reward)) for units, reward in points]


def findings(opd_look: float = 0.8, early_joint: float = 0.2) -> Findings:
    outcomes = [outcome("base", None, (0.2, 0.2, 0.2, 0.2)), outcome("real", None, (1.0, 1.0, 1.0, 1.0))]
    curves = {}
    for seed in (0, 1):
        outcomes += [
            outcome("teacher:text", seed, (0.8, 0.1, 0.2, 0.4), 100),
            outcome("teacher:composition", seed, (0.1, 0.8, 0.2, 0.4), 120),
            outcome("teacher:look", seed, (0.1, 0.1, 0.8, 0.4), 80),
            outcome("merged", seed, (0.5, 0.5, 0.5, 0.5), 300),
            outcome("opd", seed, (0.8, 0.8, opd_look, 0.7), 60),
            outcome("opd+teachers", seed, (0.8, 0.8, opd_look, 0.7), 360),
            outcome("opd-beyond-0.25", seed, (0.9, 0.9, 0.7, 0.7), 60),
            outcome("joint", seed, (0.5 + 0.1 * seed, 0.5, 0.5, 0.5), 370),
            outcome("cascade", seed, (0.1, 0.3, 0.8, 0.3), 370),
        ]
        curves["opd", seed] = curve((0, 0.2), (60, 0.8))
        curves["joint", seed] = curve((0, 0.2), (50, 0.95), (61, early_joint), (190, 0.4), (370, 0.5))
        curves["cascade", seed] = curve((0, 0.2), (60, 0.3), (370, 0.4))
    singles = [outcome(one.name, 0, (0.5, 0.6, 0.7, 0.5), 60) for one in QUICK.queries]
    singles.append(outcome("one-round-late", 0, (0.7, 0.7, 0.7, 0.6), 60))
    noise = {variant.name: curve((0, 0.2), (50, 0.5)) for variant in NOISE}
    steps = [
        {
            "step": step,
            "sigma": 1.0 - step / 2,
            "closed_form": {"mean_norm2": 1.0, "variance": 0.5, "noise_variance": 0.0},
            "ppo": {"mean_norm2": 1.5, "variance": 5.0, "noise_variance": 4.0},
            "ratio": 10.0,
            "distance2": 0.1,
            "distance2_expected": 0.1,
        }
        for step in range(2)
    ]
    return Findings(outcomes, singles, curves, noise, {"steps": steps, "ratio": 10.0})


# The claims in their order.
KEEPS, BEYOND, COUNTED, PARALLEL, FREE, ALL, GAIN, VARIANCE = range(8)


def broken(found: Findings) -> list[int]:
    """Claims that do not hold."""
    return [number for number, claim in enumerate(summary(found, {})["claims"]) if not claim["holds"]]


def with_outcome(method: str, seed: int, rewards: tuple[float, float, float, float], units: int) -> Findings:
    found = findings()
    found.outcomes[:] = [
        outcome(method, seed, rewards, units) if (one.method, one.seed) == (method, seed) else one
        for one in found.outcomes
    ]
    return found


def test_the_average_is_that_of_the_paper() -> None:
    """By hand: text from 0.1 (specialists elsewhere) to 0.9; joint's mean over its seeds is 0.55."""
    found = summary(findings(), {})["methods"]
    assert found["opd"]["average"] == pytest.approx((0.7 / 0.8 + 0.7 / 0.8 + 1.0) / 3)
    assert found["base"]["average"] == pytest.approx((0.1 / 0.8 + 0.1 / 0.8 + 0.0) / 3)
    assert found["joint"]["average"] == pytest.approx((0.45 / 0.8 + 0.4 / 0.8 + 0.3 / 0.6) / 3)
    assert found["real"]["average"] is None
    assert found["opd+teachers"]["average"] == found["opd"]["average"]
    assert found["joint"]["tasks"]["text"] == pytest.approx({"mean": 0.55, "spread": 0.1 / 2**0.5})
    assert found["joint"]["tasks"][ALL_TASKS]["mean"] == pytest.approx(0.5)
    assert found["base"]["tasks"]["text"]["spread"] is None


def test_claims_that_hold() -> None:
    found = summary(findings(), {"seeds": [0, 1]})
    assert broken(findings()) == []
    assert len(found["claims"]) == 8
    assert found["student_by_teacher"]["text"] == {0: 1.0, 1: 1.0}
    assert found["left_out"] == []
    # The slowest teacher and the distillation.
    assert found["claims"][PARALLEL]["numbers"]["pass units by seed"] == {
        "opd": {0: 180, 1: 180}, "joint": {0: 190, 1: 190}, "cascade": {0: 370, 1: 370}
    }  # fmt: skip


def test_claims_that_do_not_hold_are_said() -> None:
    forgot = findings(opd_look=0.78)
    assert broken(forgot) == [KEEPS]
    ratio = summary(forgot, {})["claims"][KEEPS]["numbers"]["student / teacher by seed"]["look"][0]
    assert ratio == pytest.approx(0.975)
    # Joint is read at 61, the first evaluation that has cost at least 60: what it did before does not count.
    early = summary(findings(early_joint=0.95), {})
    assert [claim["holds"] for claim in early["claims"]] == [True] * FREE + [False] + [True] * 3
    assert early["claims"][FREE]["numbers"]["pass units by seed"]["joint"] == {0: 61, 1: 61}
    dear = findings()
    for seed in (0, 1):
        dear.curves["joint", seed] = curve((0, 0.2), (61, 0.2), (190, 0.4), (370, 0.95))
    assert broken(dear) == [COUNTED]
    for seed in (0, 1):
        dear.curves["joint", seed] = curve((0, 0.2), (61, 0.2), (190, 0.95), (370, 0.4))
    assert broken(dear) == [PARALLEL]
    assert broken(with_outcome("teacher:look", 0, (0.1, 0.1, 0.59, 0.4), 80)) == [GAIN]
    assert broken(with_outcome("merged", 0, (0.5, 0.5, 0.5, 0.95), 300)) == [ALL]
    assert broken(with_outcome("opd-beyond-0.25", 0, (0.9, 0.65, 0.7, 0.7), 60)) == [BEYOND]
    weak = findings()
    weak.gradients["ratio"] = 0.9
    assert broken(weak) == [VARIANCE]


def test_without_real_pictures_their_claim_is_left_out() -> None:
    some = findings()
    some.outcomes[:] = [one for one in some.outcomes if one.method != "real"]
    found = summary(some, {})
    assert len(found["claims"]) == 7
    assert found["left_out"] == ["real images: scikit-learn is not installed"]


def test_everything_is_written(tmp_path: Path) -> None:
    write(replace(findings(opd_look=0.78), other_passes=["joint-1"]), FULL, tmp_path)
    with (tmp_path / "table.csv").open() as stream:
        table = list(csv.reader(stream))
    assert tuple(table[0]) == COLUMNS
    assert ["joint", "1", "text", "0.6", "370", "3.7"] in table
    assert ["base", "", "look", "0.2", "0", "0.0"] in table
    assert len(table) == 1 + 4 * 20
    page = (tmp_path / "README.md").read_text()
    assert "**DOES NOT HOLD**: the student has at least 98% of each specialist's reward" in page
    assert page.count("**holds**") == 7
    assert "other passes than were measured: joint-1" in page
    assert "| joint | 0.550 ± 0.071 | 0.500 ± 0.000 |" in page
    for name in ("methods", "reward_against_passes", "queries", "noise", "gradient_variance"):
        assert f"]({name}.png)" in page
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 400
            assert len(picture.getcolors(1 << 20) or []) > 10
        with (tmp_path / f"{name}.csv").open() as stream:
            assert len(list(csv.reader(stream))) > 2
    with (tmp_path / "reward_against_passes.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {"name": "joint", "seed": "0", "task": "look", "passes": "61", "pass_units": "61", "reward": "0.2"} in rows
    queries = page.partition("One seed")[2]
    assert "| 1 | none | together | 0.500 | 0.600 | 0.700 | 0.500 | 0.600 | 60 |" in queries
    assert queries.index("one-round-late") < queries.index("| 1 | none |")
    assert json.loads((tmp_path / "summary.json").read_text())["settings"]["seeds"] == [3, 4, 5]


def test_parts_that_were_not_run_have_no_table_and_no_image(tmp_path: Path) -> None:
    write(replace(findings(), singles=[], noise={}), FULL, tmp_path)
    assert not (tmp_path / "queries.png").exists()
    assert not (tmp_path / "noise.png").exists()
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "One seed" not in page
    assert re.findall(r"!\[.*\]\((.*)\)", page) == ["methods.png", "reward_against_passes.png", "gradient_variance.png"]


def test_bars_stand_side_by_side_and_the_legend_names_each_once() -> None:
    figure, (left, right) = panels(2)
    grouped_bars(left, ["g", "h"], {"a": [1.0, 2.0], "b": [0.25, 0.5]}, {"a": [0.1, None]})
    grouped_bars(right, ["g"], {"a": [3.0], "b": [1.0]})
    assert [bar.get_height() for bar in left.patches] == [1.0, 2.0, 0.25, 0.5]
    (first, _), (second, _) = ([bar.get_x() for bar in bars] for bars in (left.patches[:2], left.patches[2:]))
    assert second == pytest.approx(first + left.patches[0].get_width())
    stream = io.BytesIO()
    write_png(figure, stream)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert Image.open(stream).width > 800


def test_without_matplotlib_the_work_is_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.plots.can_draw", lambda: False)
    with pytest.raises(UserError, match=r"^charts need matplotlib: pip install 'opd-ds\[plots\]'$"):
        bench(FULL, tmp_path / "paper", 1, quiet)
    assert not (tmp_path / "paper").exists()


# ---- the miniature's table ----


def test_the_miniatures_table_is_made_of_its_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first run alone scores base and teachers, and is what the others are compared with."""
    planned: list[Job] = []

    def fake(jobs: list[Job], folder: Path, parallel: int, say: Any) -> None:
        planned.extend(jobs)
        for number, one in enumerate(jobs):
            (folder / one.name).mkdir()
            scores = {"student": 0.7 + number / 10} | ({"base": 0.2, "teacher": 0.7} if number == 0 else {})
            (folder / one.name / "summary.json").write_text(json.dumps({"tasks": {"text": scores}}))

    monkeypatch.setattr(miniature_table, "run_jobs", fake)
    miniature_table.bench(tmp_path, [], 1, 2, 1, ["run.rounds=3"], quiet)
    assert (tmp_path / "table.md").read_text().splitlines()[
        2
    ] == "| text | 0.200 | 0.700 | 0.700 | 100 % | 0.800 | 120 % |"
    first, second = planned
    assert "evaluation.baselines=true" in first.arguments
    assert "evaluation.baselines=false" in second.arguments
    assert all("run.rounds=3" in one.arguments and one.module == "deepspeed.launcher.runner" for one in planned)
    with pytest.raises(UserError, match="--kind lor: allowed are full, lora"):
        miniature_table.bench(tmp_path, ["lor"], 1, 1, 1, [], quiet)


# ---- reading runs ----


def fake_run(folder: Path, run: Run, rewards: dict[int, float], *, twice: bool = False) -> None:
    """Records of `run` with all its passes in the first round, scored at the rounds of `rewards`."""
    place = folder / run.name
    place.mkdir(parents=True)
    spent = {"passes/forward": run.passes.forward, "passes/backward": run.passes.backward}
    nothing = dict.fromkeys(spent, 0)
    seconds = {"seconds/rollout": 1.0, "seconds/train": 0.5}
    lines = [{"round": k, **(spent if k == 1 else nothing), **seconds} for k in range(1, run.rounds + 1)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored = [{"round": k} | dict.fromkeys(KEYS, value) for k, value in rewards.items()]
    scored += scored[-1:] if twice else []
    (place / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scored))


def fake_evaluation(folder: Path, model: str, score: float) -> None:
    found = {task: {f"miniature_{task}": {"mean": score}} for task in TASKS}
    found[ALL_TASKS] = {"miniature_all": {"mean": score + 1}}
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "results.json").write_text(json.dumps({"format": 1, "scores": {model: found}}))


KEYS = [*(f"{task}/miniature_{task}" for task in TASKS), f"{ALL_TASKS}/miniature_all"]


def test_runs_are_read(tmp_path: Path) -> None:
    planned = {run.name: run for run in runs(QUICK)}
    own = student(RECIPE, 0)
    for run in planned.values():
        fake_run(tmp_path, run, {1: 0.3, run.rounds: 0.6}, twice=run.name == own)
    fake_evaluation(tmp_path / "base", "base", 0.1)
    fake_evaluation(tmp_path / "merged-0-scores", "merged", 0.4)
    found = collect(QUICK, tmp_path, None, {})
    by_method = {one.method: one for one in found.outcomes}
    students = {variant.name for variant in QUICK.students}
    assert set(by_method) == {
        "base", *(f"teacher:{t}" for t in TASKS), "merged", *students, "opd+teachers", "joint", "cascade"
    }  # fmt: skip
    assert by_method["merged"].rewards == pytest.approx(dict.fromkeys(TASKS, 0.4) | {ALL_TASKS: 1.4})
    in_turn = by_method["cascade"]
    assert in_turn.passes == sum((planned[name].passes for name in cascade(0)), Passes())
    assert in_turn.seconds == pytest.approx(1.5 * sum(planned[name].rounds for name in cascade(0)))
    three = sum((planned[teacher(task, 0)].passes for task in TASKS), Passes())
    assert by_method["opd+teachers"].passes == three + planned[own].passes
    stages = found.curves["cascade", 0]
    assert [point.passes.units for point in stages] == sorted(point.passes.units for point in stages)
    assert len(stages) == 1 + 2 * 3
    assert stages[0].rewards["text"] == 0.1
    assert len(found.curves["opd", 0]) == 3
    assert found.noise.keys() == {variant.name for variant in QUICK.noise}
    assert {one.method for one in found.singles} == {one.name for one in (*QUICK.queries, *QUICK.further)}
    assert found.other_passes == []
    shorter = replace(QUICK, share=0.1)
    assert own in collect(shorter, tmp_path, None, {}).other_passes
    (tmp_path / joint(0) / "scores.jsonl").write_text("")
    with pytest.raises(UserError, match=r"joint-0: not the records of a whole run"):
        collect(QUICK, tmp_path, None, {})


def test_real_pictures_score_higher_than_what_any_model_is_asked_for() -> None:
    pytest.importorskip("sklearn")
    rewards = real_rewards()
    assert rewards is not None
    assert rewards.keys() == set(SCORED)
    assert all(0.8 < value <= 1 for value in rewards.values())


# ---- gradients ----


def test_spread_is_mean_and_trace_of_the_covariance() -> None:
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    spread = Spread()
    for vector in vectors:
        spread.add(vector)
    torch.testing.assert_close(spread.mean, vectors.double().mean(0))
    assert spread.variance == pytest.approx(float(torch.cov(vectors.double().T).trace()), rel=1e-9)


def test_the_closed_form_varies_less_and_means_the_same(tiny_world: Path) -> None:
    family = build_family(
        "sd3", resolve_path(str(tiny_world / "base"), "model.path"), dtype=torch.float32, device=torch.device("cpu"),
        height=None, width=None, max_text_length=10, text_encoders="resident",
    )  # fmt: skip
    student, specialist = family.load_transformer(), family.load_transformer(tiny_world / "other")
    draws = Draws(batch=4, rollouts=6, transitions=48, steps=3)
    report = gradient_variance(family, student, specialist, PROMPTS, draws)
    assert len(report["steps"]) == 3
    for entry in report["steps"]:
        assert entry["ppo"]["variance"] > entry["closed_form"]["variance"] > 0
        assert entry["ratio"] > 1
        assert entry["closed_form"]["noise_variance"] == 0.0
        # No bias: the mean of the redrawn is as far from the closed form as their own variance explains.
        assert 0.2 < entry["distance2"] / entry["distance2_expected"] < 3
        # And the noise is what the PPO-style one has beyond the closed form.
        assert entry["ppo"]["noise_variance"] > entry["closed_form"]["variance"]
    assert report["ratio"] > 1
    json.dumps(report, allow_nan=False)
    with pytest.raises(UserError, match="answers as the student does"):
        gradient_variance(family, student, student, PROMPTS, Draws(batch=2, rollouts=2, transitions=2, steps=1))


# ---- the command ----


@pytest.mark.slow
def test_quick_from_start_to_end(tmp_path: Path) -> None:
    arguments = ["paper-miniature", "--quick", "--output-dir", str(tmp_path)]
    first = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert first.exit_code == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["passes_other_than_planned"] == []
    assert len(found["claims"]) >= 4
    assert found["claims"][-1]["holds"]  # the gradients' variance needs no long runs
    written = (tmp_path / "summary.json").read_text()
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert f"{len(jobs(QUICK))} of {len(jobs(QUICK))} jobs are finished already" in again.output
    assert (tmp_path / "summary.json").read_text() == written
