"""The sections of a run config. Every key is checked before anything heavy is imported or loaded."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from opd_ds.config.base import Folder, Section
from opd_ds.config.teachers import Quantization, TeacherSection
from opd_ds.config.turns import TaskSchedule

STOCHASTIC_KERNELS = ("flow", "dance", "ddim", "cps")
# The name under which the anchor is asked; no task can have it.
ANCHOR = "(anchor)"
# The same of the base, where targets are extrapolated from it.
BASE = "(base)"
# What FILE.py:NAME, a reward of a user's own file, is known by.
OWN_REWARD = ".py:"
# The label of a task's weighted sum of rewards; no reward can have it.
WEIGHTED_SUM = "weighted_sum"
AttentionBackend = Literal[
    "auto", "native", "math", "efficient", "cudnn", "native_flash", "flash", "flash_varlen", "flash3", "flash3_varlen",
    "flex", "xformers",
]  # fmt: skip
Beta = Annotated[float, Field(ge=0, lt=1)]


class ProfileSection(Section):
    """Rounds that run under torch's profiler; they are slower, and the others cost nothing."""

    rounds: tuple[PositiveInt, ...] = Field(
        (), description="counted from 1; traces and a summary go to profile/ in run.output_dir"
    )


class RunSection(Section):
    """How long a run is, and what it writes when."""

    rounds: PositiveInt = Field(le=10_000_000, description="optimizer rounds in all")
    seed: int = Field(0, description="names every prompt and noise draw together with round, task and sample index")
    output_dir: Folder = Field(description="metrics, TensorBoard, checkpoints and export go here")
    checkpoint_every: PositiveInt = Field(25, description="rounds between checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="how many of the newest checkpoints stay")
    checkpoint_in_background: bool = Field(
        False, description="rounds go on while a thread writes; needs host memory for one more copy of the state"
    )
    hang_minutes: PositiveFloat = Field(
        30, description="when no rank makes progress for this long, the run ends and says who waits"
    )
    deterministic: bool = Field(
        False,
        description="on GPUs the same numbers bit for bit from every start on the same machines; slower. On CPUs that "
        "holds anyway",
    )
    eval_every: NonNegativeInt = Field(0, description="rounds between evaluations of the student; 0: only at the end")
    image_every: NonNegativeInt = Field(0, description="rounds between image grids in trackers; 0: only at the end")
    profile: ProfileSection = ProfileSection()

    @model_validator(mode="after")
    def _profiled_rounds_exist(self) -> RunSection:
        late = [number for number in self.profile.rounds if number > self.rounds]
        if late:
            raise ValueError(f"profile.rounds = {list(self.profile.rounds)}: the run ends after round {self.rounds}")
        return self


class ModelSection(Section):
    """The base model of student and teachers, and how it is loaded."""

    family: str = Field("sd3", description="`opd-ds models` lists them")
    path: str = Field(description="diffusers folder, hub id, or package:<path inside opd_ds>")
    height: PositiveInt | None = Field(None, description="pixels; default: the model's own size")
    width: PositiveInt | None = Field(None, description="pixels; default: the model's own size")
    sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        (),
        description="[height, width] of several image sizes, pixels; one is drawn for each prompt; see docs/sizes.md",
    )
    size_from: Literal["drawn", "prompts", "pictures"] = Field(
        "drawn",
        description="prompts: where a prompt set has columns height and width, the prompt's own, or of `sizes` that of "
        "the nearest aspect ratio; pictures: the same with the size of the reference picture",
    )
    frames: PositiveInt | None = Field(None, description="of a video; default: the family's own")
    max_text_length: PositiveInt | None = Field(
        None, description="tokens of a prompt; T5's where there are several encoders; default: the family's own"
    )
    negative_prompt: str | None = Field(
        None,
        description="of the pass without prompt, where guidance makes two passes; default: the family's own: a blank "
        "for Qwen-Image, nothing for the others; a prompt set may have a column negative_prompt of its own",
    )
    low_noise_guidance: float | None = Field(
        None,
        ge=0,
        description="Wan 2.2 A14B: under guidance that of the low-noise network, of all models; default: one",
    )
    text_encoders: Literal["resident", "offload", "cached"] = Field(
        "offload",
        description="resident: on the device all the time; offload: there only to encode; cached: never loaded, what "
        "`opd-ds data encode` wrote is read",
    )
    decode_micro_batch: PositiveInt | None = Field(
        None, description="images that the VAE decodes at once; default: as many as are drawn at once"
    )
    reference_side: PositiveInt | None = Field(
        None,
        description="reference pictures are resized to the area of a square of so many pixels; default: as the "
        "family's pipeline does, to about 1024",
    )
    attention: AttentionBackend = Field(
        "auto",
        description="the kernel of attention, of student and teachers; auto: torch chooses. native, math, efficient, "
        "cudnn and native_flash are torch's own, the others are packages; the varlen ones take prompts of different "
        "lengths in one batch",
    )
    sequence_parallel: PositiveInt = Field(
        1,
        description="ranks that share each sequence of tokens, in student and teachers: for long videos and large "
        "images; 1: each rank has its sequences whole; see docs/speed.md",
    )
    vae_tiling: bool = Field(
        False, description="the VAE decodes in overlapping tiles: less memory for large images and videos, other pixels"
    )
    compile_blocks: bool = Field(
        False,
        description="torch.compile of the network's blocks, student's and teachers'; minutes at the first round. Not "
        "with parameters on NVMe",
    )
    text_cache: Folder | None = Field(
        None, description="folder of encoded prompts; default: text_cache in run.output_dir"
    )

    @model_validator(mode="after")
    def _one_size_or_several(self) -> ModelSection:
        for key in ("height", "width"):
            if self.sizes and (value := getattr(self, key)) is not None:
                raise ValueError(f"{key} = {value} beside sizes: put it into sizes, as [height, width], or remove it")
        twice = [list(size) for size in self.sizes if self.sizes.count(size) > 1]
        if twice:
            raise ValueError(f"sizes: {twice[0]} is named twice; a size is drawn as often as any other")
        return self


class LoraSection(Section):
    """The LoRA of a LoRA student."""

    rank: PositiveInt = Field(32, description="of the two added matrices; more learns more, and takes more memory")
    alpha: PositiveFloat = Field(64, description="the added weights are scaled by alpha / rank")
    targets: tuple[str, ...] | None = Field(None, description="modules to adapt; default: those of the model family")


class EmaSection(Section):
    """The exponential moving average of the student's weights: what evaluation draws with and export writes."""

    decay: float = Field(0.9, ge=0, lt=1, description="share of the old average in the new one; 0: no average is kept")
    warmup: bool = Field(True, description="decay = min(decay, (1 + s) / (10 + s)) with s optimizer steps")
    every: PositiveInt = Field(1, description="optimizer steps between EMA updates")


class StudentSection(Section):
    """What is trained."""

    kind: Literal["full", "lora"] = Field(
        "full", description="all weights of the network, or a LoRA on the frozen base"
    )
    start: str | None = Field(
        None, description="weights to start from instead of the base's: a LoRA, or a full checkpoint where kind is full"
    )
    networks: Literal["both", "high_noise", "low_noise"] = Field(
        "both", description="which is trained where a model has two (Wan 2.2 A14B); the other stays the base's"
    )
    lora: LoraSection = LoraSection()
    quantize: Quantization = None
    gradient_checkpointing: bool | Literal["offload"] = Field(
        False,
        description="activations are computed again in the backward pass: less memory, one more forward pass; offload: "
        "what is kept for that, the inputs of the blocks, waits on the host",
    )
    ema: EmaSection = EmaSection()

    @model_validator(mode="after")
    def _frozen_weights_only(self) -> StudentSection:
        if self.quantize is not None and self.kind == "full":
            raise ValueError(
                f"quantize = {self.quantize!r} is for weights that are not trained, and kind = 'full' trains all; set "
                "kind to 'lora', or remove quantize"
            )
        return self


OptimizerType = Literal[
    "Adam", "AdamW", "AdamW8bit", "Adafactor", "Muon", "Adagrad", "Lamb", "Lion", "SGD", "RMSprop", "RAdam", "Adamax",
    "Adadelta",
]  # fmt: skip


class OptimizerSection(Section):
    """Fills the entries of the ds_config that say "auto"; an explicit entry there wins unless both are given."""

    model_config = ConfigDict(allow_inf_nan=False)

    type: OptimizerType | None = Field(
        None, description="docs/deepspeed.md says which goes with which ZeRO stage; default: the ds_config's, or AdamW"
    )
    lr: PositiveFloat = Field(3e-4, description="learning rate, the highest of the schedule")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Adam's decay of first and second moments")
    eps: PositiveFloat = Field(1e-8, description="Adam's addition to the denominator")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's, decoupled from the gradient")
    max_grad_norm: float = Field(
        1.0, ge=0, description="gradients with a larger norm are scaled down to it; 0: no clipping"
    )
    warmup_rounds: NonNegativeInt = Field(
        0, description="the learning rate grows linearly over these rounds; the last of them has all of it"
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="the learning rate after the warm-up: lr, or a half cosine from lr to min_lr"
    )
    min_lr: float = Field(0.0, ge=0, description="what the cosine reaches in the last round")

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerSection:
        if self.min_lr > 0 and self.schedule != "cosine":
            raise ValueError(f"min_lr = {self.min_lr:g} is read only with schedule = 'cosine', not {self.schedule!r}")
        return self


class TrainedSteps(Section):
    """Which steps of a trajectory are trained: give exactly one."""

    fraction: float | None = Field(None, gt=0, le=1, description="the first int(steps * fraction) steps")
    steps: tuple[NonNegativeInt, ...] | None = Field(None, description="these steps, counted from the noise end")
    queries: PositiveInt | None = Field(None, description="this many random steps per trajectory")
    favour: Literal["none", "low_noise", "high_noise"] = Field(
        "none",
        description="where random queries fall: everywhere alike, by Beta(5, 2) towards the image's end, or by its "
        "mirror image towards the noise, where rollouts also end soonest",
    )
    spread: bool = Field(
        False,
        description="several random queries of a trajectory lie apart, where favour wants them; else each falls by "
        "itself, and neighbouring states say nearly the same",
    )

    @model_validator(mode="after")
    def _one(self) -> TrainedSteps:
        if self.favour != "none" and self.queries is None:
            raise ValueError(f"favour = {self.favour!r} is for random steps: give queries, not fraction or steps")
        if self.spread and (self.queries or 0) < 2:
            raise ValueError("spread = true is for several random steps of a trajectory: give queries, 2 or more")
        given = [key for key in ("fraction", "steps", "queries") if getattr(self, key) is not None]
        if len(given) != 1:
            found = f"; here are {' and '.join(given)}: null takes one away" if given else ""
            raise ValueError(f"give exactly one of fraction, steps, queries{found}")
        return self


class RolloutSection(Section):
    """How the student draws the images that it learns on."""

    samples: PositiveInt = Field(
        description="trajectories per task and round over all ranks, unless a task has its own number"
    )
    steps: PositiveInt = Field(10, description="sampler steps of a trajectory")
    kernel: Literal["euler", "flow", "dance", "ddim", "dpm1", "dpm2", "cps"] = Field(
        "euler", description="sampler; flow, dance, ddim and cps draw noise at every step, the others do not"
    )
    noise_level: float = Field(
        0.0,
        ge=0,
        description="of the noise at every step; 0 makes every sampler deterministic; ddim and cps: at most 1",
    )
    guidance: float = Field(4.5, ge=0, description="the student's, in rollout, training and evaluation")
    micro_batch: PositiveInt = Field(8, description="trajectories per forward and rank")
    negative_every: PositiveInt = Field(
        1,
        description="steps of a guided rollout from one pass with the negative prompt to the next; in between the "
        "direction v_c - v_u of the last one guides (guidance caching, arXiv 2410.19355). Above 1 trained states are "
        "nearly, not quite, those of the guided student; what teachers and student say of them is exact",
    )
    mode: Literal["auto", "buffered", "fused"] = Field(
        "auto",
        description="buffered: training after the rollout, from a buffer; fused: in the rollout's own forward pass, "
        "which saves one pass per step and needs shared or resident teachers; auto: on GPUs fused where it is "
        "possible, takes fewer passes, and by `opd-ds plan` fits and is faster, else buffered; the log says why",
    )
    gather: Literal["auto", "once", "per_layer"] = Field(
        "auto",
        description="under ZeRO-3, for rollouts and evaluation: the student's weights whole on every rank, once, or "
        "layer by layer at every forward; auto: once where half of the free memory is enough",
    )
    trained_steps: TrainedSteps = TrainedSteps(fraction=1.0)

    @model_validator(mode="after")
    def _consistent(self) -> RolloutSection:
        if self.noise_level > 0 and self.kernel not in STOCHASTIC_KERNELS:
            raise ValueError(
                f"noise_level = {self.noise_level:g} contradicts kernel = {self.kernel!r}, which is deterministic; "
                f"set noise_level to 0 or choose one of {', '.join(STOCHASTIC_KERNELS)}"
            )
        if self.noise_level > 1 and self.kernel in ("ddim", "cps"):
            raise ValueError(f"noise_level = {self.noise_level:g}: kernel {self.kernel!r} allows 0 to 1")
        chosen = self.trained_steps
        if chosen.steps is not None and (not chosen.steps or max(chosen.steps) >= self.steps):
            raise ValueError(f"trained_steps.steps = {list(chosen.steps)}: must name steps 0 to {self.steps - 1}")
        if chosen.steps is not None and len(set(chosen.steps)) != len(chosen.steps):
            raise ValueError(f"trained_steps.steps = {list(chosen.steps)}: a step is named twice")
        if chosen.queries is not None and chosen.queries > self.steps:
            raise ValueError(f"trained_steps.queries = {chosen.queries}: a trajectory has only {self.steps} steps")
        if chosen.fraction is not None and int(self.steps * chosen.fraction) < 1:
            raise ValueError(f"trained_steps.fraction = {chosen.fraction:g} of {self.steps} steps leaves no step")
        return self


class TrainSection(Section):
    """How a round's pairs are trained on."""

    micro_batch: PositiveInt = Field(8, description="(state, step) pairs per forward/backward and rank")
    schedule: TaskSchedule = Field(
        "together",
        description="the tasks of a round: all of them, their losses added up; alternate: one, after the other; "
        "random: one, drawn anew for each round; with tasks.NAME.turns",
    )
    updates_per_round: PositiveInt = Field(
        1, description="disjoint parts of a round's samples, each trained on in an optimizer step of its own"
    )
    inner_epochs: PositiveInt = Field(1, description="passes over all samples of a round")


class ScoringSection(Section):
    """How frozen networks are asked: teachers, and earlier policies of the student."""

    micro_batch: PositiveInt | Literal["auto"] | None = Field(
        None,
        description="pairs per teacher forward and rank; default: train's, so that a student that is its own teacher "
        "has loss 0; auto: on an accelerator the largest that fits, halved when memory runs out",
    )
    late: Literal[0, 1] = Field(
        0,
        description="1: the next round is rolled out and scored before a round trains, so that what a round trains on "
        "was drawn by weights one round older; needs memory for a second buffer",
    )
    ranks: NonNegativeInt = Field(
        0,
        description="the last so many ranks hold the teachers and nothing else, and answer while the others roll out "
        "and train; 0: every rank has its teachers beside the student. See docs/speed.md",
    )


class RewardSection(Section):
    """One reward; a bare name stands for a mapping with that name."""

    short_key: ClassVar[str] = "name"

    name: str = Field(description="as `opd-ds rewards list` has it, or FILE.py:NAME, a class or function of your own")
    label: str = Field("", description="what results call it; default: its name, without the file")
    options: dict[str, Any] = Field(default_factory=dict, description="the reward's own, see its class")
    frames: PositiveInt | None = Field(
        None, description="of a video: how many frames, evenly spread, the reward gets; default: all"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or "name" not in value:
            return value
        return {"label": str(value["name"]).rpartition(OWN_REWARD)[-1], **value}


class WeightedReward(RewardSection):
    """One reward that is learned from; a bare name stands for a mapping with that name."""

    weight: float = Field(1.0, description="factor on this reward in the sum that is learned from")


Cell = str | bool | int | float


class PromptsSection(Section):
    """Where prompts come from; a path alone stands for a mapping with that path."""

    short_key: ClassVar[str] = "path"

    path: str = Field(
        description="file (.txt, .jsonl, .parquet, .csv), package:<path inside opd_ds>, or a data set: folder or hub id"
    )
    column: str = Field("prompt", description="where the prompt stands; a .txt file is prompts alone")
    pictures: tuple[str, ...] = Field(
        (), description="columns with reference pictures: paths beside the file, bytes, or lists of these"
    )
    metadata: tuple[str, ...] | None = Field(
        None,
        description="columns that reach the rewards, beside those that the run reads itself; default: all others, but "
        "for pictures, sound and bytes",
    )
    where: dict[str, Cell | tuple[Cell, ...]] = Field(
        default_factory=dict, description="keep the rows whose columns hold this value, or one of these"
    )
    unique: bool = Field(False, description="keep only the first of equal prompts")
    limit: PositiveInt | None = Field(None, description="keep only the first so many")
    subset: str | None = Field(None, description="of a data set with several configurations")
    split: str | None = Field(None, description="of a data set with several")
    streaming: bool = Field(False, description="read a data set as it arrives instead of downloading all of it first")

    @field_validator("pictures", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class EvaluatedSection(Section):
    """What is drawn and scored: a task, or a probe."""

    eval_prompts: PromptsSection | None = Field(None, description="held-out prompts")
    guidance: float | None = Field(None, ge=0, description="the student's on these; default rollout.guidance")
    rewards: tuple[RewardSection, ...] = Field(
        (), description="they monitor and never decide a gradient; the first is the headline"
    )

    @property
    def summed(self) -> dict[str, float]:
        """By label, the weights of the rewards whose sum is the headline; none where one reward is."""
        return {}

    @property
    def headline(self) -> str | None:
        """The label of the reward that stands for the task in summaries."""
        if self.summed:
            return WEIGHTED_SUM
        return self.rewards[0].label if self.rewards else None


class ProbeSection(EvaluatedSection):
    """A prompt set that is drawn and scored beside the tasks and never trained on."""

    eval_prompts: PromptsSection = Field(description="held-out prompts")


class TrainedSection(EvaluatedSection):
    """A task."""

    prompts: PromptsSection = Field(description="training prompts")
    weight: PositiveFloat = Field(1.0, description="factor on this task's loss")
    samples: PositiveInt | None = Field(
        None, description="trajectories of a round over all ranks; default: rollout.samples"
    )
    turns: PositiveInt = Field(
        1,
        description="with train.schedule = alternate: rounds in a row on this task; with random: its share of the "
        "rounds, in parts of all tasks' turns",
    )


class TaskSection(TrainedSection):
    """A task that is learned from its teacher."""

    teacher: TeacherSection
    rewards: tuple[WeightedReward, ...] = Field(
        (), description="they monitor; with `reward_term` their weighted sum is learned from. The first is the headline"
    )


class EvaluationSection(Section):
    """How held-out prompts are drawn, during the run and at its end."""

    steps: PositiveInt = Field(40, description="Euler steps")
    samples_per_prompt: PositiveInt = Field(1, description="images of every prompt, from noise of their own")
    micro_batch: PositiveInt = Field(16, description="images per forward and rank")
    seed: int = Field(1234, description="of the noise; the same for every model, so that images can be compared")
    grid_prompts: NonNegativeInt = Field(4, description="prompts per task in image grids")
    baselines: bool = Field(True, description="also score base and teachers, at the end of the run")


class TrackerSection(Section):
    """Where a run's numbers and images are kept for people; a bare name stands for a mapping with that name."""

    short_key: ClassVar[str] = "name"

    name: Literal["tensorboard", "wandb", "trackio", "swanlab", "mlflow"] = Field(description="see docs/tracking.md")
    project: str = Field("opd_ds", min_length=1, description="project, or experiment of MLflow; not of TensorBoard")
    offline: bool = Field(
        False, description="nothing goes over the network; data stays in run.output_dir (trackio: in TRACKIO_DIR)"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of the tracker's init (of MlflowClient.create_run); keys of accounts belong "
        "into the environment",
    )


class WatchSection(Section):
    """Rewards measured between rounds, in a thread beside the training. Needs tasks with rewards."""

    every: NonNegativeInt = Field(0, description="rounds between two reward evaluations; 0: never")
    held_out: NonNegativeInt = Field(8, description="images per task of the first held-out prompts, on fixed noise")
    rollouts: NonNegativeInt = Field(
        8, description="images per task of the round's own rollouts on rank 0; above 0 these rollouts are finished"
    )
