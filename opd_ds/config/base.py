"""What every section of a config is, and what an algorithm's section says besides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


def _in_full(folder: Path) -> Path:
    if "$" in str(folder):
        raise ValueError("variables are not replaced in a config; write the path in full")
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{error}; write the path in full") from error


# A folder that is written to. `~` is the home folder, as a shell has it.
Folder = Annotated[Path, AfterValidator(_in_full)]


class Section(BaseModel):
    """Unknown keys are errors everywhere.

    Attributes:
        short_key: the key that a text in place of the section gives; empty where it has to be a mapping.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    short_key: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {cls.short_key: value} if cls.short_key and isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        section = handler(core_schema)
        return {"anyOf": [{"type": "string"}, section]} if cls.short_key else section


class Algorithm(Section):
    """What a run learns by. A component: it owns its part of the config, says what the round asks and keeps, and names
    the trainer that it builds. `opd_ds.config.algorithms` finds it by name.

    Attributes:
        trainer: "module:Class", imported when a run starts; the command answers without torch.
        title: for model cards.
        drawn_by: whose trajectories are trained on.
        kept_per_state: latents that the buffer keeps of every state beside the state itself.
        fused_trainer: likewise, where a rollout's forward is the training forward; empty where it cannot be.
        rewarded_trainer: likewise, where `reward_term` learns from rewards beside teachers; empty where it cannot be.
    """

    trainer: ClassVar[str]
    title: ClassVar[str]
    drawn_by: ClassVar[Literal["student", "teacher"]] = "student"
    kept_per_state: ClassVar[int] = 0
    fused_trainer: ClassVar[str] = ""
    rewarded_trainer: ClassVar[str] = ""

    @property
    def asks_teacher(self) -> bool:
        """Whether a task's teacher is asked at every trained state."""
        return self.drawn_by == "student"

    @property
    def student_snapshots(self) -> int:
        """Earlier policies of the student that are kept, and asked at every trained state."""
        return 0

    @property
    def trained_window(self) -> int | None:
        """How many steps in a row are trained where the algorithm chooses them itself."""
        return None

    @property
    def needs_noise(self) -> bool:
        """Whether trained transitions are weighed by their likelihood, which only noise gives them."""
        return False
