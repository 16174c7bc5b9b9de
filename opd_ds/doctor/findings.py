"""What one rank sees, and what all ranks together make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from opd_ds.errors import UserError


@dataclass(frozen=True)
class Seen:
    """One check on one rank. `problem` is None when all is well, else what to do. `agree` must be equal on all ranks,
    `alone` on no two (None: need not)."""

    what: str
    found: str
    problem: str | None = None
    agree: str | None = None
    alone: str | None = None
    checked: bool = True


@dataclass(frozen=True)
class Finding:
    """One line of the report. `found` has a line per group of ranks where they differ; `checked` is False when `found`
    says why nothing was."""

    what: str
    found: str
    problem: str | None = None
    checked: bool = True


@dataclass(frozen=True)
class Report:
    """All findings on all ranks; `hosts` names the node of each rank."""

    hosts: list[str]
    findings: list[Finding]

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.problem is not None]

    def as_dict(self) -> dict[str, object]:
        findings = [asdict(finding) for finding in self.findings]
        return {"ok": not self.problems, "hosts": self.hosts, "findings": findings}


def not_checked(what: str, why: str) -> Finding:
    return Finding(what, f"not checked: {why}", checked=False)


def same_everywhere(what: str, found: str) -> Seen:
    """Something that has to be the same on all ranks, a version say."""
    return Seen(what, found, agree=found)


def attempt(what: str, look: Callable[[], Iterable[Seen]]) -> list[Seen]:
    """What `look` sees; whatever it raises becomes the finding, so that this rank still takes its part in the rest."""
    try:
        return list(look())
    except UserError as error:
        return [Seen(what, "failed", str(error))]
    except Exception as error:
        return [Seen(what, "failed", f"{one_line(error)}; this check could not be done")]


def one_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def merge(hosts: list[str], seen: list[list[Seen]]) -> list[Finding]:
    """One finding per check from what each rank saw, in the order of the first rank that has it."""
    by_check: dict[str, dict[int, Seen]] = {}
    for rank, own in enumerate(seen):
        for one in own:
            by_check.setdefault(one.what, {})[rank] = one
    return [_merged(what, by_rank, hosts) for what, by_rank in by_check.items()]


def _merged(what: str, by_rank: dict[int, Seen], hosts: list[str]) -> Finding:
    found = _said({rank: seen.found for rank, seen in by_rank.items()}, hosts, len(by_rank))
    with_problem = {rank: seen.problem for rank, seen in by_rank.items() if seen.problem is not None}
    complaints = [_said(with_problem, hosts, len(by_rank))] if with_problem else []
    agreed = {rank: seen.agree for rank, seen in by_rank.items() if seen.agree is not None}
    if len(set(agreed.values())) > 1:
        complaints.append("must be the same everywhere: " + _said(agreed, hosts, 0, "; "))
    alone = {rank: seen.alone for rank, seen in by_rank.items() if seen.alone is not None}
    if len(set(alone.values())) < len(alone):
        complaints.append("must be different on each rank: " + _said(alone, hosts, 0, "; "))
    checked = any(seen.checked for seen in by_rank.values())
    return Finding(what, found, "\n".join(complaints) or None, checked)


def _said(texts: dict[int, str], hosts: list[str], expected: int, separator: str = "\n") -> str:
    """The one text of all `expected` ranks, or each text with the ranks it is from."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in texts.items():
        ranks_of.setdefault(text, []).append(rank)
    if len(ranks_of) == 1 and len(texts) == expected:
        return next(iter(ranks_of))
    return separator.join(f"{who(ranks, hosts)}: {text}" for text, ranks in ranks_of.items())


def who(ranks: list[int], hosts: list[str]) -> str:
    """`rank 1`, `ranks 0-3, 6`; with the nodes where there are several: `rank 8 on node-b`."""
    spans: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1] = (spans[-1][0], rank)
        else:
            spans.append((rank, rank))
    names = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    where = ", ".join(sorted({hosts[rank] for rank in ranks}))
    return f"rank{'s' * (len(ranks) > 1)} {names}" + (f" on {where}" if len(set(hosts)) > 1 else "")


def size_text(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
