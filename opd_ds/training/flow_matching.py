"""Flow matching on the teachers' images (SFT): the off-policy way, for comparison."""

from __future__ import annotations

from opd_ds.config.sections import ANCHOR
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import micro_batches
from opd_ds.training.buffer import Columns, PerState, named, noised_states
from opd_ds.training.distillation import Distillation
from opd_ds.training.meter import RoundMeter
from opd_ds.training.objectives import FlowMatchingLoss, TeacherVelocities
from opd_ds.training.trainer import Experience, TaskBatch, TrainingData


class FlowMatching(Distillation):
    """Each task's teacher draws; its images are noised afresh, and the flow there stands for the teacher's velocity."""

    loss_class = FlowMatchingLoss

    def _collect(self, index: int, batches: dict[str, TaskBatch], meter: RoundMeter) -> Experience[TeacherVelocities]:
        with self._teachers.gathered():
            return self._draw_and_ask(index, batches, meter)

    def _draw_and_ask(
        self, index: int, batches: dict[str, TaskBatch], meter: RoundMeter
    ) -> Experience[TeacherVelocities]:
        with meter.phase("rollout"):
            settings = self._config.rollout
            final, noised = {}, {}
            for task, batch in batches.items():
                with self._teachers.drawing(task) as teacher:
                    guidance = self._teachers.guidance(task)
                    parts = micro_batches([settings.steps] * len(batch.part), settings.micro_batch)
                    rolled = self._roll_out(teacher, batch.cond, batch.noise, guidance, meter, parts=parts)
                    final[task] = rolled.final
                seeds = [sample_seed(self._config.run.seed, index, f"{task}/noised", i) for i in batch.part.indices]
                noise = SampleNoise(seeds, self._family.latent_shape)
                noised[task] = noised_states(final[task], noise, self._sigmas, batch.chosen, self._family.dtype)
            buffers = {task: self._buffer(noised[task].states, batch) for task, batch in batches.items()}
        with meter.phase("score"):
            said = self._query(buffers, meter)
        anchors = {task: of[ANCHOR].guided for task, of in said.items() if ANCHOR in of}
        data = {
            task: TrainingData(
                buffers[task],
                Columns(self.known_class, named(teacher=PerState(noised[task].flow), anchor=anchors.get(task))),
                [batch.pairs] * batch.updates,
            )
            for task, batch in batches.items()
        }
        return Experience(batches, data, final)
