"""One examination from start to end. Every rank makes the same calls in the same order, whatever it finds."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from opd_ds.cluster.world import World
from opd_ds.config.schema import RunConfig
from opd_ds.doctor import disk, network
from opd_ds.doctor.findings import Finding, Report, Seen, attempt, merge, not_checked
from opd_ds.doctor.meeting import LostRanksError, Meeting
from opd_ds.doctor.node import look_at_node
from opd_ds.doctor.rewards import look_at_rewards
from opd_ds.doctor.start import START, look_at_start
from opd_ds.doctor.weights import look_at_files, trainable_parameters

# With a problem in one of these no process group starts, or it hangs.
_NEEDED_BY_A_GROUP = ("torch", "deepspeed", "CUDA runtime", "NCCL", "accelerator")


@dataclass(frozen=True)
class Subject:
    """What is asked about. `load` reads the run config (None: no run was named); `output_dir` overrides the run's."""

    load: Callable[[], RunConfig] | None = None
    output_dir: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """`report` is None on all ranks but 0. `hangs`: a collective never returned, the process cannot end by itself."""

    report: Report | None
    hangs: bool = False


def examine(world: World, subject: Subject, timeout: float) -> Outcome:
    """Examine this node, or all nodes together; `timeout` is in seconds, for ranks to arrive, answer and form a group.

    Raises:
        UserError: this rank cannot reach rank 0.
        StoppedError: rank 0 has ended the examination because ranks are missing; its report says which.
    """
    meeting, findings = Meeting(world, timeout), list[Finding]()
    try:
        meeting.meet()
    except LostRanksError as lost:
        # What this node alone can say is still worth having.
        alone = [Local(world, subject).seen]
        return Outcome(Report(meeting.hosts, [*merge(meeting.hosts, alone), *_lost(lost, [])]))
    try:
        hangs = _examine_together(meeting, subject, findings)
    except LostRanksError as lost:
        return Outcome(Report(meeting.hosts, [*findings, *_lost(lost, findings)]), hangs=True)
    return Outcome(Report(meeting.hosts, findings) if world.is_main else None, hangs)


def _examine_together(meeting: Meeting, subject: Subject, findings: list[Finding]) -> bool:
    """Adds to `findings` on rank 0; True when a collective hangs here."""
    local = Local(meeting.world, subject)
    seen = meeting.to_main([asdict(one) for one in local.seen])
    findings += merge(meeting.hosts, [[Seen(**one) for one in own] for own in seen])
    findings += _shared_folder(meeting, local.output_dir)
    meeting.from_main()
    times = meeting.to_main(time.time())
    if meeting.world.size == 1:
        findings += [network.clock_finding(times, meeting.hosts), *network.no_group("one process")]
        return False
    if meeting.world.is_main:
        findings.append(network.clock_finding(times, meeting.hosts))
    return _group(meeting, findings)


class Local:
    """What this rank sees by itself. Files and disks are looked at by one rank a node."""

    def __init__(self, world: World, subject: Subject) -> None:
        self.config: RunConfig | None = None
        self.seen = look_at_node(world)
        if subject.load is not None:
            load = subject.load
            self.seen += attempt("run config", lambda: self._load(load))
        self.output_dir = subject.output_dir or (self.config.run.output_dir if self.config else None)
        if world.local_rank == 0:
            self.seen += self._files(world) + self._disk()

    def _load(self, load: Callable[[], RunConfig]) -> Iterator[Seen]:
        self.config = load()
        digest = hashlib.sha256(self.config.model_dump_json().encode()).hexdigest()[:12]
        yield Seen("run config", f"read, fingerprint {digest}", agree=digest)

    def _files(self, world: World) -> list[Seen]:
        config = self.config
        if config is None:
            return [_not_seen("weights and prompts", self._why("give the run with --recipe or --config"))]
        seen = look_at_files(config) + look_at_rewards(config)
        return seen + attempt(START, lambda: look_at_start(config, world, seen))

    def _why(self, advice: str) -> str:
        return "the run config cannot be read" if any(one.what == "run config" for one in self.seen) else advice

    def _disk(self) -> list[Seen]:
        folder = self.output_dir
        if folder is None:
            why = self._why("give --output-dir, or the run with --recipe or --config")
            return [_not_seen("output folder", why), _not_seen("write speed", why)]
        needed = None
        if self.config is not None:
            parameters = trainable_parameters(self.config)
            needed = disk.checkpoint_bytes(self.config, folder, parameters) if parameters else None
        return attempt("output folder", lambda: disk.look_at_disk(folder, needed))


def _not_seen(what: str, why: str) -> Seen:
    return Seen(what, f"not checked: {why}", checked=False)


def _shared_folder(meeting: Meeting, folder: Path | None) -> list[Finding]:
    """Rank 0 leaves a file in its output folder; do the others see it? Rank 0 says so, the others say nothing."""
    if meeting.world.size == 1:
        return [not_checked(disk.SHARED, "one process")]
    with disk.Token(folder if meeting.world.is_main else None) as token:
        path = meeting.from_main(token.path)
        visible = meeting.to_main(path is not None and disk.sees(path))
    if not meeting.world.is_main:
        return []
    if folder is None:
        return [not_checked(disk.SHARED, "no output folder is known on rank 0")]
    if token.path is None:
        return [not_checked(disk.SHARED, f"rank 0 cannot write there ({token.failure})")]
    return [disk.shared_folder(folder, visible, meeting.hosts)]


def _group(meeting: Meeting, findings: list[Finding]) -> bool:
    """The process group, unless what was found forbids it; True when it hangs or is broken."""
    hindered = [one.what for one in findings if one.problem and one.what in _NEEDED_BY_A_GROUP]
    if meeting.from_main(hindered):
        if meeting.world.is_main:
            findings += network.no_group(f"first fix {', '.join(hindered)}")
        return False
    own, returned = network.within(meeting.timeout, lambda: network.measure(meeting.world))
    measured = [network.Measured(**one) for one in meeting.to_main(asdict(own))]
    # All ranks leave together: a group is taken down only when nobody is in it any more.
    works = meeting.from_main(all(one.failure is None for one in measured))
    if meeting.world.is_main:
        findings += network.group_findings(measured, meeting.hosts)
    if works:
        network.end_group()
    return not (works and returned)


def _lost(lost: LostRanksError, findings: list[Finding]) -> list[Finding]:
    why = "ranks are missing"
    left = [not_checked(disk.SHARED, why), not_checked(network.CLOCKS, why), *network.no_group(why)]
    done = {finding.what for finding in findings}
    return [Finding("ranks", "not all answer", str(lost)), *(one for one in left if one.what not in done)]
