"""What is in a prompt set, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from opd_ds.config.sections import PromptsSection
from opd_ds.data.readers import Problem, Row, locate, rows
from opd_ds.data.sizes import Size, own_size
from opd_ds.errors import UserError, shown
from opd_ds.rewards.geneval.rules import Task
from opd_ds.rewards.ocr import is_text, quotations, target_text

_SHOWN = 5
_UNIT = 16  # pixels; what the sizes of released models are multiples of
_TAGS_SHOWN, _TAG_LENGTH = 20, 40


@dataclass
class Findings:
    """Counts of a prompt set; `problems` would end a run or leave a prompt without a score. `odd_quotes` are prompts
    with quote marks that stand alone; `odd_sizes` would end a run with model.size_from = 'prompts'.
    """

    prompts: int = 0
    pictures: int = 0
    longest: Row | None = None
    tags: Counter[str] = field(default_factory=Counter)
    quoting: int = 0
    geneval: int = 0
    repeats: list[Row] = field(default_factory=list)
    odd_quotes: list[Row] = field(default_factory=list)
    sizes: Counter[Size] = field(default_factory=Counter)
    odd_sizes: list[Problem] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def look_through(chosen: PromptsSection, key: str) -> Findings:
    """Read all of a prompt set.

    Raises:
        UserError: it is not there.
    """
    found = Findings()
    seen: set[tuple[str, ...]] = set()
    for row in rows(locate(chosen, key), chosen):
        if isinstance(row, Problem):
            found.problems.append(row)
            continue
        found.prompts += 1
        if found.longest is None or len(row.prompt) > len(found.longest.prompt):
            found.longest = row
        found.quoting += bool(target_text(row.prompt, row.metadata))
        text = row.metadata.get("text")
        if text is None and quotations(row.prompt)[1]:
            found.odd_quotes.append(row)
        if text is not None and not is_text(text):
            found.problems.append(Problem(f"text = {shown(text, 40)}: the reward `ocr` needs a text", row.place))
        if row.asked in seen:
            found.repeats.append(row)
        seen.add(row.asked)
        found.pictures += len(row.pictures)
        for picture in row.pictures:
            try:
                picture.load()  # what was read of it is its header
            except UserError as error:
                found.problems.append(Problem(str(error).removeprefix(f"{row.place}: "), row.place))
        if row.metadata.get("tag"):
            found.tags[str(row.metadata["tag"])] += 1
        _look_at_size(row, found)
        try:
            found.geneval += Task.parse(row.metadata) is not None
        except UserError as error:
            found.problems.append(Problem(str(error), row.place))
    if not found.prompts and not found.problems:
        found.problems.append(Problem("no prompts"))
    return found


def _look_at_size(row: Row, found: Findings) -> None:
    try:
        size = own_size(row.metadata)
    except ValueError as error:
        found.odd_sizes.append(Problem(str(error), row.place))
        return
    if size is None:
        return
    found.sizes[size] += 1
    if size.height % _UNIT or size.width % _UNIT:
        found.odd_sizes.append(Problem(f"height x width = {size} are no multiples of {_UNIT}", row.place))


def describe(found: Findings) -> str:
    """For people: a line per thing that there is."""
    lines = [f"prompts       {found.prompts}"]
    if found.pictures:
        lines.append(f"pictures      {found.pictures}")
    if found.tags:
        tags = [f"{_plain(tag)} {count}" for tag, count in found.tags.most_common(_TAGS_SHOWN)]
        more = [f"and {len(found.tags) - _TAGS_SHOWN} more"] if len(found.tags) > _TAGS_SHOWN else []
        lines.append(f"tags          {', '.join(tags + more)}")
    if found.geneval:
        lines.append(f"GenEval       {found.geneval} with metadata that the reward `geneval` reads")
    if found.quoting:
        lines.append(f"quoted text   {found.quoting} that the reward `ocr` can score")
    if found.sizes:
        listed = ", ".join(f"{size} {count}" for size, count in found.sizes.most_common(_SHOWN))
        rest = f" and {len(found.sizes) - _SHOWN} more" if len(found.sizes) > _SHOWN else ""
        lines.append(f"sizes         height x width of {found.sizes.total()}, for model.size_from: {listed}{rest}")
    if found.odd_sizes:
        first_odd = found.odd_sizes[0]
        lines.append(f"odd sizes     {len(found.odd_sizes)} that a run with model.size_from = prompts may refuse")
        lines.append(f"  {first_odd.place}: {first_odd.what}")
    if found.odd_quotes:
        first = found.odd_quotes[0]
        target = target_text(first.prompt, first.metadata)
        lines.append(f"odd quotes    {len(found.odd_quotes)} with quote marks that stand alone, as inch signs do")
        lines.append(f"  {first.place}: {shown(first.prompt)}: `ocr` looks for {shown(target, 40)}")
    if found.repeats:
        first = found.repeats[0]
        lines.append(f"repeats       {len(found.repeats)}, the first: {first.place}: {shown(first.prompt)}")
    if found.longest:
        lines.append(f"longest       {len(found.longest.prompt)} characters, {found.longest.place}")
    lines.append(f"problems      {len(found.problems) or 'none'}")
    lines += [f"  {problem.place or 'all of it'}: {problem.what}" for problem in found.problems[:_SHOWN]]
    if len(found.problems) > _SHOWN:
        lines.append(f"  and {len(found.problems) - _SHOWN} more")
    return "\n".join(lines)


def as_dict(found: Findings) -> dict[str, Any]:
    """For programs: the same counts, places, and all problems."""
    return {
        "prompts": found.prompts,
        "pictures": found.pictures,
        "tags": dict(found.tags),
        "geneval": found.geneval,
        "quoting": found.quoting,
        "odd_quotes": [row.place for row in found.odd_quotes],
        "sizes": {str(size): count for size, count in found.sizes.items()},
        "odd_sizes": [asdict(problem) for problem in found.odd_sizes],
        "repeats": [row.place for row in found.repeats],
        "longest": len(found.longest.prompt) if found.longest else 0,
        "problems": [asdict(problem) for problem in found.problems],
    }


def _plain(tag: str) -> str:
    return tag if tag.isprintable() and len(tag) <= _TAG_LENGTH else shown(tag, _TAG_LENGTH)
