"""`python -m benchmarks`, from a checkout: claims, of the paper and of ours, checked by runs."""

from __future__ import annotations

import sys

import typer

from benchmarks.commands import bad_input, claims, costs, gpu, rewards
from opd_ds.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Claims, of the paper and of ours, checked by runs.")
app.command("paper-miniature")(claims.paper_miniature)
app.command("miniature-table")(claims.miniature_table)
app.command("passes")(claims.passes)
app.command("edit-world")(claims.edit_world)
app.command("families")(claims.families)
app.command("plan")(costs.plan_memory)
app.command("fake-world")(costs.fake_world)
app.command("quantization")(costs.quantization)
app.command("cached-guidance")(costs.cached_guidance)
app.command("kernels")(costs.kernels)
app.command("optimizers")(costs.optimizers)
app.command("growth")(costs.growth)
app.command("loading")(costs.loading)
app.command("speed")(costs.speed)
app.command("cost")(costs.cost)
app.command("teacher-ranks")(costs.teacher_ranks)
app.command("checkpoint-cost")(costs.checkpoint_cost)
app.command("gpu")(gpu.gpu)
app.command("bad-input")(bad_input.bad_input)
app.command("reward-table")(rewards.reward_table)
app.command("ocr-accuracy")(rewards.ocr_accuracy)


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
