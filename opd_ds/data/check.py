"""What is in a prompt set, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from opd_ds.config.sections import PromptsSection
from opd_ds.data.readers import Problem, Row, locate, rows
from opd_ds.errors import UserError
from opd_ds.rewards.geneval.rules import Task
from opd_ds.rewards.ocr import target_text

_SHOWN = 5


@dataclass
class Findings:
    """Counts of a prompt set; `problems` would end a run or leave a prompt without a score."""

    prompts: int = 0
    tags: Counter[str] = field(default_factory=Counter)
    quoting: int = 0
    geneval: int = 0
    repeats: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def look_through(chosen: PromptsSection, key: str) -> Findings:
    """Read all of a prompt set.

    Raises:
        UserError: it is not there.
    """
    found, seen = Findings(), set()
    for row in rows(locate(chosen, key), chosen):
        if isinstance(row, Problem):
            found.problems.append(row)
            continue
        found.prompts += 1
        found.quoting += bool(target_text(row.prompt, row.metadata))
        if row.prompt in seen:
            found.repeats.append(row)
        seen.add(row.prompt)
        if row.metadata.get("tag"):
            found.tags[str(row.metadata["tag"])] += 1
        try:
            found.geneval += Task.parse(row.metadata) is not None
        except UserError as error:
            found.problems.append(Problem(str(error), row.place))
    if not found.prompts and not found.problems:
        found.problems.append(Problem("no prompts"))
    return found


def describe(found: Findings) -> str:
    """For people: a line per thing that there is."""
    lines = [f"prompts       {found.prompts}"]
    if found.tags:
        lines.append(f"tags          {', '.join(f'{tag} {count}' for tag, count in found.tags.most_common())}")
    if found.geneval:
        lines.append(f"GenEval       {found.geneval} with metadata that the reward `geneval` reads")
    if found.quoting:
        lines.append(f"quoted text   {found.quoting} that the reward `ocr` can score")
    if found.repeats:
        first = found.repeats[0]
        lines.append(f"repeats       {len(found.repeats)}, the first: {first.place}: {first.prompt!r}")
    lines.append(f"problems      {len(found.problems) or 'none'}")
    lines += [f"  {problem.place or 'all of it'}: {problem.what}" for problem in found.problems[:_SHOWN]]
    if len(found.problems) > _SHOWN:
        lines.append(f"  and {len(found.problems) - _SHOWN} more")
    return "\n".join(lines)
