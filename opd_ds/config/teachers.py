"""The sections of frozen networks: teachers, the anchor, and the base."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from opd_ds.config.base import Section
from opd_ds.errors import UserError

Placement = Annotated[
    Literal["auto", "resident", "shared", "offload", "stream", "zero_inference"],
    Field(
        description="resident: on the device; shared: a further adapter in the LoRA student's network, or that network "
        "without its adapters; offload: on the host, on the device while it is asked; stream: on the host, block by "
        "block with every forward, the next one on its way; zero_inference: sharded over the ranks; auto: shared where "
        "the student is a LoRA and the teacher a LoRA or model.path itself, else resident"
    ),
]
ShardedBy = Annotated[
    str | None, Field(description="ds_config of a zero_inference teacher; default zero_inference_gpu")
]
QuantizedAs = Literal["int8", "fp8", "nf4"]
Quantization = Annotated[
    QuantizedAs | None,
    Field(
        description="frozen weights of linear layers in 8 bits (int8, fp8) or 4 (nf4), by torchao: those of a LoRA "
        "student's base, of a teacher that is resident; see docs/quantization.md"
    ),
]


def _check_placement(section: TeacherSection | BaseSection) -> None:
    placement = section.placement
    if section.deepspeed is not None and placement != "zero_inference":
        raise ValueError(f"deepspeed is read only with placement = 'zero_inference', not {placement!r}")
    if section.quantize is None or placement in ("auto", "resident"):
        return
    quantize = f"quantize = {section.quantize!r}"
    if placement == "shared":
        raise ValueError(
            f"{quantize} with placement = 'shared', whose base is the student's: remove it and set student.quantize, "
            "or set placement to 'resident'"
        )
    raise ValueError(
        f"{quantize} with placement = {placement!r}: quantized weights cannot be moved or sharded; set placement to "
        "'resident', or remove quantize"
    )


class TeacherSection(Section):
    """The model that a task is learned from; a path alone stands for a mapping with that path."""

    short_key: ClassVar[str] = "path"

    path: str = Field(description="LoRA or full checkpoint: folder, safetensors file, hub id or package:<path>")
    guidance: float = Field(4.5, ge=0, description="the teacher's own, apart from the student's")
    placement: Placement = "auto"
    deepspeed: ShardedBy = None
    quantize: Quantization = None
    trust_base: bool = Field(False, description="accept a LoRA that names another base (a renamed copy of ours)")

    @model_validator(mode="after")
    def _consistent(self) -> TeacherSection:
        _check_placement(self)
        return self

    def placed(
        self, key: str, student: str, *, is_lora: bool, is_base: bool = False, apart: bool = False
    ) -> TeacherSection:
        """The section with its placement decided, where that is `auto`.

        Args:
            key: of the section in the run config.
            student: `student.kind`. All LoRAs of a run stand on its base, in its precision.
            is_base: it is `model.path` itself, which a LoRA student's network is with its adapters switched off.
            apart: teachers have ranks of their own, where the student's network is not.

        Raises:
            UserError: `shared` where it is not possible.
        """
        possible = student == "lora" and (is_lora or is_base) and self.quantize is None and not apart
        if self.placement == "shared" and not possible:
            found = f"student.kind = {student!r}" if student != "lora" else "the teacher is another full checkpoint"
            raise UserError(
                f"{key}.placement = 'shared' makes the teacher a part of a LoRA student's network, but {found}; set it "
                "to resident, offload, stream or zero_inference"
            )
        if self.placement != "auto":
            return self
        return self.model_copy(update={"placement": "shared" if possible else "resident"})


class AnchorSection(TeacherSection):
    """A frozen teacher that every task is also held to, with a small weight (Flow-OPD, arXiv 2605.08063)."""

    weight: PositiveFloat = Field(0.02, description="factor on the anchor's part beside the task teacher's")


class BaseSection(Section):
    """`model.path` as a frozen network beside the student; read with `objective.extrapolation` above 0."""

    placement: Placement = "auto"
    deepspeed: ShardedBy = None
    quantize: Quantization = None

    @model_validator(mode="after")
    def _consistent(self) -> BaseSection:
        _check_placement(self)
        return self
