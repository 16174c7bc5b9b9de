"""From a run config to a Trainer: what `preflight` has checked is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opd_ds.config.schema import RunConfig
from opd_ds.engine import Group, NodeMemory, ShardedEma, StudentEngine, parameter_builder
from opd_ds.evaluation.benchmark import Benchmark, EvaluationSet
from opd_ds.evaluation.evaluator import Evaluator
from opd_ds.evaluation.pictures import Painter
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.models import ModelFamily, compile_blocks
from opd_ds.runs.identity import run_identity, with_rewards
from opd_ds.runs.preflight import preflight, trainer_class
from opd_ds.runs.resume import ResumePoint, Start, refuse_other_rewards
from opd_ds.runs.rewards import build_rewards
from opd_ds.training.auto_batch import AutoMicroBatch
from opd_ds.training.networks import student_module
from opd_ds.training.remote_teachers import RemoteTeachers, answering
from opd_ds.training.serving import TeacherServer
from opd_ds.training.teachers import TeacherPool, load_shared, networks_of
from opd_ds.training.trainer import Components, Trainer

EVALUATION_FOLDER = "eval"


@dataclass(frozen=True)
class Parts:
    """A run, ready to start.

    Attributes:
        config: as `Checked` has it.
        identity: what a checkpoint must share with the run that resumes it.
        resumed: where it goes on from; its state is not loaded yet.
    """

    config: RunConfig
    family: ModelFamily
    student: StudentEngine
    ema: ShardedEma | None
    teachers: TeacherPool | RemoteTeachers
    trainer: Trainer
    evaluator: Evaluator
    benchmark: Benchmark
    rewards: RewardPool
    identity: dict[str, Any]
    resumed: ResumePoint | None


def prepare(config: RunConfig, group: Group, start: Start | None = None) -> Parts:
    """Build the run. Collective.

    Args:
        start: as for `preflight`.

    Raises:
        UserError: on every rank, with the message of the first rank that failed, before the networks load.
    """
    checked = preflight(config, group.everybody, group.roles.world, start)
    config, files, family = checked.config, checked.files, checked.family
    assert group.roles.teachers == config.scoring.ranks, "the group was started with another number of teacher ranks"
    group.share_sequences(config.model.sequence_parallel)
    family.sequence_mesh = group.sequence_mesh
    memory = family.host_memory = NodeMemory(group)
    identity: dict[str, Any] | None = None
    with group.raise_on_any_rank():
        rewards = build_rewards(config.rewards, family)
        if group.world.is_main:
            identity = with_rewards(checked.identity or run_identity(config, files, family), rewards)
            if checked.resumed is not None:
                refuse_other_rewards(config, identity, checked.resumed)
    identity = group.broadcast(identity)
    parameters = parameter_builder(files.student_ds_config, group.device, family.empty_transformer)
    with group.raise_on_any_rank():
        module = student_module(config.student, config.run.seed, family, files.start, parameters)
        load_shared(module, files.teachers.values(), family)
        family.share_sequences(module)
        if config.model.compile_blocks:
            compile_blocks(module)
    offloads = config.student.gradient_checkpointing == "offload"
    student = StudentEngine(
        module, files.student_ds_config, group, config.rollout.gather, files.schedule, offload_activations=offloads
    )
    ema = ShardedEma(student, config.student.ema) if config.student.ema.decay > 0 else None
    teachers: TeacherPool | RemoteTeachers
    if group.roles.teachers:
        teachers = RemoteTeachers(group, files.teachers)
    else:
        teachers = TeacherPool(
            family, files.teachers, group.device, student=student, memory=memory, compiled=config.model.compile_blocks
        )
    pool = RewardPool(rewards, family.decode, group.device, family.fps)
    if config.learns_from_rewards:  # whose thread decodes
        with group.raise_on_any_rank():
            family.load_vae()
    trainer = trainer_class(config)(Components(config, group, family, student, ema, files.prompts, teachers, pool))
    painter = Painter(config, family, group)
    evaluator = Evaluator(config, group, painter, files.eval_prompts, pool)
    sets = {
        name: EvaluationSet.of(prompts, own, own, config.evaluation.samples_per_prompt, section.summed)
        for name, prompts in files.eval_prompts.items()
        for section in [config.evaluated[name]]
        for own in [tuple(reward.label for reward in section.rewards)]
    }
    folder = config.run.output_dir / EVALUATION_FOLDER
    benchmark = Benchmark(folder, group, painter, identity["base"]["sha256"], sets, rewards)
    return Parts(config, family, student, ema, teachers, trainer, evaluator, benchmark, pool, identity, checked.resumed)


def prepare_server(config: RunConfig, group: Group, start: Start | None = None) -> TeacherServer:
    """The teachers of this rank, which holds nothing else; the ranks that train call `prepare`. Collective with these
    in its checks.

    Raises:
        UserError: as `prepare`.
    """
    checked = preflight(config, group.everybody, group.roles.world, start)
    config, specs, family = checked.config, checked.files.teachers, checked.family
    family.host_memory = NodeMemory(group)
    plan = answering(specs, group.roles)
    names = [name for number in plan.held(group.world.rank) for name in networks_of(specs)[number]]
    compiled = config.model.compile_blocks
    teachers = TeacherPool(family, {name: specs[name] for name in names}, group.device, compiled=compiled)
    scoring = AutoMicroBatch.scoring(config, group.device)
    return TeacherServer(group, family, teachers, plan, scoring)
