"""Rewards from a user's own file: `my_rewards.py:Blueness`, a class with `score` or a plain function."""

from __future__ import annotations

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from opd_ds.config.paths import looked_for
from opd_ds.config.sections import OWN_REWARD
from opd_ds.errors import UserError, nearest, shown
from opd_ds.rewards.base import Metadata, Needs
from opd_ds.rewards.clips import Clip, takes_clips
from opd_ds.rewards.references import References, takes_references

if TYPE_CHECKING:  # as in base.py
    from torch import Tensor

_ASKED = ("images", "prompts", "metadata")


def _asked(found: object) -> tuple[str, ...]:
    """What a class's `score`, or a function, is called with."""
    return (*_ASKED, "references") if takes_references(found) else _ASKED


def is_own(name: str) -> bool:
    """Whether `name` is FILE.py:NAME."""
    return OWN_REWARD in name


def same_own(one: str, other: str) -> bool:
    """Whether two names, of which a config gives one with its whole path, are of the same file and attribute."""

    def parts(name: str) -> tuple[Path, str]:
        path, _, attribute = name.rpartition(":")
        return _file(path), attribute

    return is_own(one) and is_own(other) and parts(one) == parts(other)


def _file(path: str) -> Path:
    return Path(path).expanduser().resolve()


@dataclass(frozen=True)
class OwnCode:
    """What FILE.py:NAME stands for.

    Attributes:
        found: the class or function.
        sha256: of the file as it was run.
    """

    file: Path
    attribute: str
    found: Callable[..., Any]
    sha256: str

    @property
    def needs(self) -> Needs:
        return getattr(self.found, "needs", Needs())

    @property
    def signature(self) -> inspect.Signature:
        """What options are checked against: the constructor's parameters, or what a function takes further."""
        signature = inspect.signature(self.found)
        if inspect.isclass(self.found):
            return signature
        return signature.replace(parameters=list(signature.parameters.values())[len(_asked(self.found)) :])

    @property
    def required(self) -> bool:
        """Whether some option has to be given."""
        try:
            self.signature.bind()
        except TypeError:
            return True
        return False


def load(name: str, key: str = "reward") -> OwnCode:
    """Run the file of FILE.py:NAME and take NAME from it. A file that has not changed is run once.

    Raises:
        UserError: no such file, it does not run, or NAME is not what a reward is; `key` says where it stood.
    """
    path, _, attribute = name.rpartition(":")
    file = _file(path)
    problem = f"{key} = {name!r}: "
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UserError(f"{problem}{error.strerror}{looked_for(path)}; give FILE.py:NAME") from error
    sha256 = hashlib.sha256(source).hexdigest()
    module = _module(file, source, sha256, problem)
    if not hasattr(module, attribute):
        there = [name for name, value in vars(module).items() if _is_of(module, value)]
        raise UserError(
            f"{problem}{file.name} has no {attribute!r}; it has {', '.join(there) or 'no class and no function'}."
            f"{nearest(attribute, there)}"
        )
    found = getattr(module, attribute)
    _check(found, f"{problem}{attribute}")
    return OwnCode(file, attribute, found, sha256)


class OwnReward:
    """The scores of a user's class or function, which may be a tensor, an array or a list; None is NaN, an image
    without a score. It takes clips where the class or function has `takes_clips = True`, reference pictures likewise.

    Raises:
        UserError: at construction, when the class's own constructor raises or its scores are none.
    """

    needs: ClassVar[Needs] = Needs()

    def __init__(self, code: OwnCode, options: Mapping[str, Any]) -> None:
        self.name, self.takes_clips = code.attribute, takes_clips(code.found)
        self.takes_references = takes_references(code.found)
        self._code, self._options = code, dict(options)
        self._made: Any = None
        if inspect.isclass(code.found):
            try:
                self._made = code.found(**options)
            except UserError:
                raise
            except Exception as error:  # a user's code may raise anything
                what = _told(error, code.file)
                raise UserError(f"reward {code.file.name}:{code.attribute} cannot be built: {what}") from error
        self.note = self._try_out()

    def _try_out(self) -> str:
        """Score two blank images or clips, and raise UserError where that gives no scores. What the code raises is only
        a note, for `note`: it may need metadata that nobody can make up.
        """
        from PIL import Image

        blank, kind = Image.new("RGB", (64, 64)), "clip" if self.takes_clips else "image"
        drawn = [Clip((blank,) * 5, 16.0) if self.takes_clips else blank.copy() for _ in range(2)]
        try:
            found = self._ask(drawn, [f"a blank {kind}"] * 2, [{}, {}], [(blank.copy(),) for _ in drawn])
        except Exception as error:  # a user's code may raise anything
            return f"raises for two blank {kind}s without metadata: {_told(error, self._code.file)}"
        self._tensor(found, 2)
        return ""

    def identity(self) -> dict[str, Any]:
        """The file's hash, the options, and what the class itself says."""
        own = self._made.identity() if hasattr(self._made, "identity") else {}
        code = {"file": self._code.file.name, "reward": self._code.attribute, "sha256": self._code.sha256}
        options = {key: value for key, value in self._options.items() if key != "device"}
        return {"engine": "own file", **code, "options": options, **own}

    def score(
        self,
        images: list[Any],
        prompts: list[str],
        metadata: Metadata | None = None,
        references: References | None = None,
    ) -> Tensor:
        """[B] float32.

        Raises:
            UserError: not one number per image or clip.
        """
        known = [{} for _ in images] if metadata is None else list(metadata)
        found = self._ask(images, prompts, known, [()] * len(images) if references is None else list(references))
        return self._tensor(found, len(images))

    def _ask(self, *known: Any) -> Any:
        asked = known[: len(_asked(self._code.found))]
        return self._code.found(*asked, **self._options) if self._made is None else self._made.score(*asked)

    def _tensor(self, found: Any, count: int) -> Tensor:
        import torch

        kind = "clip" if self.takes_clips else "image"
        returned, expected = f"{self._code.file.name}:{self.name} returned", f"expected one number per {kind}"
        if not isinstance(found, torch.Tensor):
            try:
                values = [torch.nan if value is None else float(value) for value in found]
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"{returned} {type(found).__name__} ({' '.join(shown(found).split())}); {expected}"
                ) from error
            found = torch.tensor(values)
        if found.shape != (count,):
            numbers = f"{len(found)} numbers" if found.dim() == 1 else f"a tensor of shape {tuple(found.shape)}"
            raise UserError(f"{returned} {numbers} for {count} {kind}s; {expected}")
        return found.detach().to("cpu", torch.float32)


def _module(file: Path, source: bytes, sha256: str, problem: str) -> ModuleType:
    name = f"opd_ds_own_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{sha256[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    try:
        exec(compile(source, str(file), "exec"), vars(module))
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise UserError(f"{problem}{file.name} does not run: {_told(error, file)}") from error
    return module


def _is_of(module: ModuleType, value: Any) -> bool:
    """Whether the file itself defines this class or function."""
    return (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__


def _check(found: Any, problem: str) -> None:
    """Raise UserError unless it is a class with `score`, or a function, and takes images, prompts and metadata."""
    called = ", ".join(_asked(found))
    is_class = inspect.isclass(found)
    if is_class and not callable(getattr(found, "score", None)):
        raise UserError(f"{problem} is a class without a method score(self, {called})")
    if not is_class and not inspect.isfunction(found):
        raise UserError(
            f"{problem} has the type {type(found).__name__}; a reward is a class with score, or a function of {called}"
        )
    asked = found.score if is_class else found
    expected = [*(["self"] if is_class else []), *_asked(found)]
    signature = inspect.signature(asked)
    try:  # by position, as it is called; a function's further parameters are its options
        (signature.bind if is_class else signature.bind_partial)(*expected)
    except TypeError as error:
        what = f"{asked.__name__}({', '.join(expected)})"
        raise UserError(f"{problem} has {asked.__name__}{signature}; expected {what}: {error}") from error


def _told(error: Exception, file: Path) -> str:
    """One line: the kind, the message, and the line of the file where it came from."""
    message = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} (line {error.lineno})"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{type(error).__name__}: {message}" + (f" (line {lines[-1]})" if lines else "")
