"""Records of a bench: jobs that are not run again on another day."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.paper.jobs import Job, run_jobs
from benchmarks.paper.plan import QUICK, jobs, runs, student, teacher
from benchmarks.paper.records import keep, restore
from benchmarks.paper.table import collect
from opd_ds.miniature.world import TASKS
from tests.test_bench_jobs import quiet
from tests.test_bench_paper import fake_evaluation, fake_run


def finished(folder: Path, planned: list[Job]) -> None:
    """As if these jobs had been run in `folder`."""
    for run in runs(QUICK):
        if run.name in {job.name for job in planned}:
            fake_run(folder, run, {1: 0.3, run.rounds: 0.6})
    for job in planned:
        (folder / job.name).mkdir(exist_ok=True)
        said = {"command": job.command, "settings": job.settings, "seconds": 60.0}
        (folder / job.name / "done.json").write_text(json.dumps(said))
    for name, model in (("base", "base"), ("merged-0-scores", "merged")):
        if (folder / name).is_dir():
            fake_evaluation(folder / name, model, 0.1)


def test_records_take_the_place_of_runs(tmp_path: Path) -> None:
    """All that tables are made of, in a file of some kB; what an unfinished job needs runs again."""
    planned, file = [job for job in jobs(QUICK) if job.name != "gradients"], tmp_path / "records.json"
    (tmp_path / "a").mkdir()
    finished(tmp_path / "a", planned)
    keep(planned, tmp_path / "a", file)
    assert file.stat().st_size < 1500 * len(planned)
    assert set(restore(planned, tmp_path / "b", file)) == {job.name for job in planned}
    assert restore(planned, tmp_path / "b", file) == []
    assert collect(QUICK, tmp_path / "b", None, {}) == collect(QUICK, tmp_path / "a", None, {})
    run_jobs(planned, tmp_path / "b", 1, quiet)  # none is left

    last = student(QUICK.students[1], 0)
    missing = [replace(job, settings="other") if job.name == last else job for job in planned]
    again = set(restore(missing, tmp_path / "c", file))
    assert {job.name for job in planned} - again == {last, *(teacher(task, 0) for task in TASKS)}
    finished(tmp_path / "d", [job for job in missing if job.name == last])
    keep(missing, tmp_path / "d", file)
    assert set(restore(missing, tmp_path / "e", file)) == {job.name for job in planned}


def test_a_job_that_ran_again_for_its_weights_leaves_the_record(tmp_path: Path) -> None:
    """Students in the file were made from the teachers in it."""
    of_teachers, file = [job for job in jobs(QUICK) if job.name.startswith("teacher-")], tmp_path / "records.json"
    for day in ("a", "b"):
        (tmp_path / day).mkdir()
        finished(tmp_path / day, of_teachers)
    keep(of_teachers, tmp_path / "a", file)
    first = file.read_text()
    for done in (tmp_path / "b").glob("*/done.json"):
        done.write_text(json.dumps(json.loads(done.read_text()) | {"seconds": 61.0}))
    keep(of_teachers, tmp_path / "b", file)
    assert file.read_text() == first
    changed = [replace(job, settings="other") for job in of_teachers]
    (tmp_path / "c").mkdir()
    finished(tmp_path / "c", changed)
    keep(changed, tmp_path / "c", file)
    assert file.read_text() != first


def test_a_key_to_come_changes_no_job_and_a_recipe_does() -> None:
    by_name = {job.name: job for job in jobs(QUICK)}
    same = {job.name: job.settings for job in jobs(QUICK)}
    assert {name: job.settings for name, job in by_name.items()} == same
    own = student(QUICK.students[0], 0)
    assert by_name[own].settings != next(job for job in jobs(replace(QUICK, share=0.2)) if job.name == own).settings
