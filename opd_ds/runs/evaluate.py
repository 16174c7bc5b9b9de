"""`opd-ds eval` from start to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from opd_ds.checkpoint.export_student import EXPORT_FOLDER
from opd_ds.config.loading import named_prompts
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import RewardSection
from opd_ds.data import PromptSet, check_sizes
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.evaluation.benchmark import Benchmark, EvaluationSet
from opd_ds.evaluation.folders import next_folder, own_folder
from opd_ds.evaluation.pictures import Painter
from opd_ds.evaluation.publish import publish
from opd_ds.evaluation.report import REPORT_FILE
from opd_ds.evaluation.results import RESULTS_FILE, Results, outline, print_results, require_scores
from opd_ds.rewards import check
from opd_ds.rewards.own_file import same_own
from opd_ds.runs.encodings import check_pictures, check_text_cache
from opd_ds.runs.model_specs import Requests, contestants
from opd_ds.runs.monitor import METRICS_FILE, read_metrics
from opd_ds.runs.rewards import build_rewards, check_rewards
from opd_ds.runs.setup import EVALUATION_FOLDER
from opd_ds.training.networks import find_base, load_family
from opd_ds.utils.hashing import weights_sha256
from opd_ds.utils.progress import CONSOLE


@dataclass(frozen=True)
class Choice:
    """What to evaluate beyond what the config says.

    Attributes:
        prompts: further sets, `name=file`, or `name={path: file, ...}` with the other keys of a config.
        rewards: labels of the config or names of rewards; these instead of the tasks'.
        limit: only the first prompts of each set.
        output: the folder; default: eval in the run's, or the first of eval-2, eval-3 ... where that holds another one.
    """

    models: Requests = field(default_factory=Requests)
    prompts: list[str] = field(default_factory=list)
    rewards: list[str] = field(default_factory=list)
    limit: int | None = None
    output: Path | None = None


def show_table(results: Results, folder: Path) -> None:
    """For people: the table, and where the rest is."""
    print_results(CONSOLE, results)
    CONSOLE.print(f"scores:  {folder / RESULTS_FILE}\nreport:  {folder / REPORT_FILE}", highlight=False)


def evaluate(
    config: RunConfig, choice: Choice, group: Group, show: Callable[[Results, Path], None] = show_table
) -> Results:
    """Draw, score, write. Collective.

    Args:
        show: called on rank 0 with the results and their folder.

    Raises:
        UserError: on every rank, before any network loads.
        IncompleteError: after all is written and shown, when a reward has scored none of the images.
    """
    group.watch_hangs(config.run.hang_minutes, config.run.output_dir)
    with group.raise_on_any_rank():
        chosen = _rewards(config, choice.rewards)
        for label, section in chosen.items():
            check(section.name, f"reward {label}", section.options)
        prompts = _prompts(config, choice.prompts)
        base = find_base(config)
        family = load_family(config, base, group.device)
        drawn = {f"prompts of {name}": found.first(choice.limit) for name, found in prompts.items()}
        check_sizes(config.model, family, drawn)
        check_pictures(config, family, drawn, decode=group.world.is_main)
        for name, evaluated in config.evaluated.items():
            place = config.place(name)
            asked = [section for section in evaluated.rewards if section.label in chosen]
            own = {f"{place}.eval_prompts": prompts[name].first(choice.limit)} if name in prompts else {}
            check_rewards(asked, f"{place}.rewards", family, own)
        if group.world.is_main:
            check_text_cache(config, family, drawn.values())
        models = contestants(config, family, choice.models, list(prompts), group.device)
        base_sha256 = weights_sha256(base)
        rewards = build_rewards(chosen, family)
    sets = {name: _set(config, name, found, list(chosen), choice) for name, found in prompts.items()}
    run = config.run.output_dir
    painter = Painter(config, family, group)
    benchmark = Benchmark(run / EVALUATION_FOLDER, group, painter, base_sha256, sets, rewards)
    with group.raise_on_any_rank():
        folder = _folder(run, choice.output, outline(benchmark, models)) if group.world.is_main else None
    folder = group.broadcast(folder)
    drawn_before = sorted(place for place in run.glob(f"{EVALUATION_FOLDER}*") if place.is_dir() and place != folder)
    benchmark.keep_in(folder, drawn_before)
    results = publish(benchmark, models, group, read_metrics(run / METRICS_FILE))
    if group.world.is_main:
        show(results, folder)
    require_scores(results)
    return results


def _folder(run: Path, output: Path | None, new: Results) -> Path:
    """The run's own folder waits for its last round, where the run has begun and not ended."""
    if output is not None:
        return own_folder(output, new)
    under_way = (run / METRICS_FILE).is_file() and not (run / EXPORT_FOLDER).is_dir()
    return next_folder(run / EVALUATION_FOLDER, new, taken=under_way)


def _rewards(config: RunConfig, requested: list[str]) -> dict[str, RewardSection]:
    """By label: the tasks' rewards, or those requested."""
    known = config.rewards
    if not requested:
        return known
    sections = [known.get(name) or RewardSection.model_validate(name) for name in requested]
    for section in sections:
        of_config = known.get(section.label, section)
        if of_config.name != section.name and not same_own(of_config.name, section.name):
            raise UserError(
                f"--reward {section.name}: the config calls {of_config.name!r} {section.label!r} already; give that "
                "reward another `label` in the config"
            )
    return {section.label: known.get(section.label, section) for section in sections}


def _prompts(config: RunConfig, requested: list[str]) -> dict[str, PromptSet]:
    """The held-out prompts of tasks and probes, then the requested sets."""
    found = {
        name: PromptSet.read(section.eval_prompts, f"{config.place(name)}.eval_prompts")
        for name, section in config.evaluated.items()
        if section.eval_prompts is not None
    }
    for request in requested:
        name, separator, value = request.partition("=")
        if not separator or not name.replace("-", "").replace("_", "").isalnum() or name in found:
            raise UserError(
                f"--prompts {request}: expected NAME=FILE with a new name of letters, digits, '_' and '-'; "
                f"taken are {', '.join(found) or 'none'}"
            )
        found[name] = PromptSet.read(named_prompts(value, f"--prompts {name}"), f"--prompts {name}")
    if not found:
        raise UserError("no prompts to evaluate on: no task has eval_prompts; give --prompts NAME=FILE")
    return found


def _set(config: RunConfig, name: str, prompts: PromptSet, labels: list[str], choice: Choice) -> EvaluationSet:
    """Every reward is asked about every prompt. A task's own are those it names, the headline first, and those that
    only the command line names; a free set's are all of them.
    """
    own, summed = list(labels), {}
    if name in config.evaluated:
        section = config.evaluated[name]
        named = [reward.label for reward in section.rewards if reward.label in labels]
        own = named + [label for label in labels if label not in config.rewards]
        summed = section.summed if section.summed.keys() <= set(labels) else {}
    samples = config.evaluation.samples_per_prompt
    return EvaluationSet.of(prompts, tuple(labels), tuple(own), samples, summed, choice.limit)
