"""Flow matching on the teachers' images (SFT): the off-policy way, for comparison."""

from __future__ import annotations

from torch import Tensor

from opd_ds.config.sections import ANCHOR
from opd_ds.diffusion.rollout import micro_batches
from opd_ds.training.buffer import Columns, PerState, named
from opd_ds.training.distillation import Distillation
from opd_ds.training.meter import RoundMeter
from opd_ds.training.objectives import FlowMatchingLoss, TeacherVelocities
from opd_ds.training.shares import Share, TaskBatch, by_task
from opd_ds.training.trainer import Experience, TrainingData


class FlowMatching(Distillation):
    """Each task's teacher draws; its images are noised afresh, and the flow there stands for the teacher's velocity."""

    loss_class = FlowMatchingLoss

    def _collect(self, index: int, batches: dict[Share, TaskBatch], meter: RoundMeter) -> Experience[TeacherVelocities]:
        with self._teachers.gathered():
            return self._draw_and_ask(index, batches, meter)

    def _draw_and_ask(
        self, index: int, batches: dict[Share, TaskBatch], meter: RoundMeter
    ) -> Experience[TeacherVelocities]:
        with meter.phase("rollout"):
            final = self._draw_by_teachers(batches, meter)
            noised = {share: self._noised(index, share, final[share], batch) for share, batch in batches.items()}
            buffers = {share: self._buffer(share, noised[share].states, batch) for share, batch in batches.items()}
        with meter.phase("score"):
            said = self._query(buffers, meter)
        anchors = {share: of[ANCHOR].guided for share, of in said.items() if ANCHOR in of}
        data = {
            share: TrainingData(
                buffers[share],
                Columns(self.known_class, named(teacher=PerState(noised[share].flow), anchor=anchors.get(share))),
                batch.pairs,
            )
            for share, batch in batches.items()
        }
        return Experience(batches, data, final)

    def _draw_by_teachers(self, batches: dict[Share, TaskBatch], meter: RoundMeter) -> dict[Share, Tensor]:
        """Each task's images, by its teacher."""
        final, settings = {}, self._config.rollout
        for task, shares in by_task(batches).items():
            with self._teachers.drawing(task) as teacher:
                guidance = self._teachers.guidance(task)
                for share in shares:
                    batch, sampler = batches[share], self._samplers[share.size]
                    parts = micro_batches([settings.steps] * len(batch.part), settings.micro_batch)
                    rolled = self._roll_out(teacher, batch.cond, batch.noise, sampler, guidance, meter, parts=parts)
                    final[share] = rolled.final
        return final
