"""Whether weights and prompts of a run are there, complete and the same on every node. Asks no network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from opd_ds.config.paths import PACKAGE_PREFIX, resolve_path
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import BASE, PromptsSection, StudentSection
from opd_ds.data.readers import FILES, locate
from opd_ds.doctor.findings import Seen, attempt, size_text
from opd_ds.errors import UserError
from opd_ds.models import family_class
from opd_ds.models.inspection import check_base, inspect, network_folder, weight_files
from opd_ds.models.weight_files import read_shapes
from opd_ds.utils.hashing import files_below

_HASHED = (".json", *FILES)  # small; large files are sampled
_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def look_at_files(config: RunConfig) -> list[Seen]:
    """Every model, teacher and prompt file of the run."""
    values: dict[str, str] = {}
    if config.student.start is not None:
        values["student.start"] = config.student.start
    for name, teacher in config.all_teachers.items():
        if name != BASE:  # which is model.path
            values[f"{config.teacher_key(name)}.path"] = teacher.path
    prompts = {f"tasks.{name}.prompts": task.prompts for name, task in config.tasks.items()}
    for name, section in config.evaluated.items():
        if section.eval_prompts is not None:
            prompts[f"{config.place(name)}.eval_prompts"] = section.eval_prompts
    base = partial(check_base, family=family_class(config.model.family))
    looks = [("model.path", partial(_look, "model.path", config.model.path, base))]
    looks += [(key, partial(_look, key, value, _refuse_problem)) for key, value in values.items()]
    looks += [(key, partial(_look_at_prompts, key, chosen)) for key, chosen in prompts.items()]
    return [seen for key, look in looks for seen in attempt(key, look)]


def _look_at_prompts(key: str, chosen: PromptsSection) -> Iterator[Seen]:
    place = locate(chosen, key)
    if isinstance(place, str):
        yield Seen(key, f"{place}: a data set of the hub, which the run fetches; needs the network on each node")
    else:
        yield from _look(key, str(place) if chosen.path.startswith(PACKAGE_PREFIX) else chosen.path)


def _refuse_problem(place: Path) -> None:
    inspect(place).refuse_problem()


def _look(key: str, value: str, refuse: Callable[[Path], None] | None = None) -> Iterator[Seen]:
    """Args: refuse: raises UserError where what is there cannot be loaded as `key`."""
    try:
        place = find_local(value, key)
    except UserError as error:
        yield Seen(key, f"{value}: absent", str(error))
        return
    if refuse is not None:
        refuse(place)
    files = files_below(place)
    if not files:
        raise UserError(f"{value!r} is an empty folder")
    digest = fingerprint(files, place)
    size = size_text(sum(file.stat().st_size for file in files))
    count = f" in {len(files)} files" if len(files) > 1 else ""
    yield Seen(key, f"{value}: {size}{count}, fingerprint {digest}", agree=digest)


def find_local(value: str, key: str) -> Path:
    """The file or folder that `resolve_path` would give, without ever fetching it.

    Raises:
        UserError: not there, or a hub id that is not downloaded yet.
    """
    on_disk = value.startswith((PACKAGE_PREFIX, ".", "/", "~")) or "/" not in value
    if on_disk or Path(value).expanduser().exists():
        return resolve_path(value, key)
    from huggingface_hub import snapshot_download

    org, name, *rest = value.split("/", 2)
    try:
        folder = Path(snapshot_download(f"{org}/{name}", local_files_only=True), *rest)
    except Exception as error:  # the hub client has a kind for each of absent, incomplete, no valid id
        raise _not_downloaded(f"{org}/{name}") from error
    if not folder.exists():
        raise _not_downloaded(f"{org}/{name}")
    return folder


def _not_downloaded(repository: str) -> UserError:
    return UserError(
        f"not downloaded yet: `hf download {repository}`; else the run fetches it, and needs the network on each node"
    )


def fingerprint(files: list[Path], root: Path) -> str:
    """Names, sizes, contents of small files, samples of large ones, whose hash would take minutes: 12 hex digits."""
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(root) if file != root else file.name
        digest.update(f"{name} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes() if file.suffix in _HASHED else _samples(file))
    return digest.hexdigest()[:12]


def _samples(file: Path) -> bytes:
    """Blocks from begin to end of a file; all of it where it is small."""
    last = max(0, file.stat().st_size - _SAMPLE_BYTES)
    with file.open("rb") as stream:
        blocks = []
        for place in sorted({last * step // (_SAMPLES - 1) for step in range(_SAMPLES)}):
            stream.seek(place)
            blocks.append(stream.read(_SAMPLE_BYTES))
    return b"".join(blocks)


def trainable_parameters(config: RunConfig) -> int | None:
    """How many the student trains, from the headers of the model's transformer; None when they are not here."""
    try:
        shapes = read_shapes(weight_files(network_folder(find_local(config.model.path, "model.path"))))
    except UserError:
        return None
    targets = config.student.lora.targets or family_class(config.model.family).lora_targets
    return sum(_trained(key, shape, config.student, targets) for key, shape in shapes.items()) or None


def _trained(key: str, shape: tuple[int, ...], student: StudentSection, targets: tuple[str, ...]) -> int:
    if key.endswith(".pos_embed"):  # a table of sines that is stored with the weights
        return 0
    if student.kind == "full":
        count = 1
        for length in shape:
            count *= length
        return count
    module = "." + key.removesuffix(".weight")
    hit = key.endswith(".weight") and any(module.endswith("." + target) for target in targets)
    return student.lora.rank * (shape[0] + shape[1]) if hit and len(shape) >= 2 else 0
