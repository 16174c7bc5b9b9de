"""Building the miniature that edits: a small FLUX.1 Kontext which draws digits and recolours pictures of them.

It has the miniature's VAE, and text encoders of the same size. As that base it is mediocre on purpose: captions and
instructions often name other colours than the image has.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from torch import Tensor

from opd_ds.evaluation.pictures import to_image
from opd_ds.miniature import assets, editing, world
from opd_ds.miniature.build import BASE as DRAWING_BASE
from opd_ds.miniature.build_base import (
    BaseSettings,
    Log,
    Phase,
    encode_pictures,
    fit,
    flow_loss,
    noisy_captions,
    round_to_half,
    told,
)
from opd_ds.miniature.networks import Sizes, make_editing_pipeline
from opd_ds.models import build_family
from opd_ds.models.base import ModelFamily

BASE, TASK, PICTURE = "base", "edit", "picture"  # the folder, the task, the column of the reference picture
_COUNTS = {"train": ("world", 240), "test": ("reader_test", 60)}  # whose drawings, how many edits


@dataclass(frozen=True)
class EditingSettings:
    """The recipes' world; tests build a smaller one.

    Attributes:
        base: half of its `batch` are images with captions, half are edits.
    """

    sizes: Sizes = field(default_factory=lambda: Sizes(layers=3, heads=12, head_dim=8))
    base: BaseSettings = field(
        default_factory=lambda: BaseSettings(
            phases=(*(Phase(1000, 2e-3, 1.0, 0.5),) * 2, Phase(1000, 1.2e-3, 1.0, 0.5)), batch=48, pool=6000, soiled=0.3
        )
    )


def build_editing(output_dir: Path, seed: int = 0, settings: EditingSettings | None = None, say: Log = print) -> None:
    """Make base and prompts under `output_dir`; what is there already is not made again.

    Raises:
        UserError: scikit-learn is not installed.
    """
    settings = settings or EditingSettings()
    strokes = world.load_strokes()
    started = time.perf_counter()
    for name, (use, count) in _COUNTS.items():
        _write_prompts(output_dir / "prompts" / TASK / name, strokes[use][0], count, seed)
    if not (output_dir / BASE).is_dir():
        _build_base(
            output_dir / BASE,
            strokes["world"],
            settings,
            seed,
            lambda text: say(f"{time.perf_counter() - started:6.0f} s  {text}"),
        )


def _write_prompts(folder: Path, masks: Tensor, count: int, seed: int) -> None:
    """`<folder>.jsonl`: instructions with the paths of their pictures, which go into `folder`."""
    edits = editing.random_edits(masks, count, torch.Generator().manual_seed(seed), soiled=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (prompt, picture) in enumerate(zip(edits.prompts, edits.before, strict=True)):
        file = folder / f"{number:03}.png"
        to_image(picture).save(file)
        rows.append({"prompt": prompt, PICTURE: f"{folder.name}/{file.name}"})
    folder.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _build_base(folder: Path, strokes: tuple[Tensor, Tensor], settings: EditingSettings, seed: int, log: Log) -> None:
    captions = [scene.prompt(task) for task in world.TASKS for scene in world.scenes()]
    vae = AutoencoderKL.from_pretrained(assets() / DRAWING_BASE / "vae")
    pipeline = make_editing_pipeline([*captions, *map(editing.instruction, world.COLOURS)], settings.sizes, vae, seed)
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    pipeline.save_pretrained(draft)
    # Training takes the family's own forward, so that what is learned is what runs draw with.
    family = build_family(
        "flux_kontext",
        draft,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_text_length=settings.sizes.text_length,
        reference_side=world.SIZE,
    )
    _train_base(pipeline, family, strokes, settings, seed, log)
    pipeline.save_pretrained(draft)
    round_to_half(draft / "transformer" / "diffusion_pytorch_model.safetensors")
    draft.rename(folder)


def _train_base(
    pipeline: FluxKontextPipeline,
    family: ModelFamily,
    strokes: tuple[Tensor, Tensor],
    settings: EditingSettings,
    seed: int,
    log: Log,
) -> None:
    """Transformer and text encoders together, on captions and on edits in every step."""
    base, names = settings.base, list(world.COLOURS)
    generator = torch.Generator().manual_seed(seed)
    drawn = world.random_pictures(*strokes, base.pool, generator, soiled=base.soiled)
    edits = editing.random_edits(strokes[0], base.pool, generator, soiled=base.soiled)
    latents, before, after = (
        encode_pictures(pipeline.vae, pictures) for pictures in (drawn.pictures, edits.before, edits.after)
    )

    def loss_of(prompts: list[str], wanted: Tensor, references: Tensor | None) -> Tensor:
        cond = family.encode_with(pipeline, prompts)
        if references is not None:
            cond = cond.with_references(tuple((one,) for one in references))
        return flow_loss(
            lambda noisy, sigma: family.velocity(pipeline.transformer, noisy, sigma, cond), wanted, generator
        )

    def loss_of_both(phase: Phase) -> Tensor:
        rows, edited = torch.randint(base.pool, (2, base.batch // 2), generator=generator)
        captions = noisy_captions(drawn.rows(rows), base, phase, generator)
        inks = told(edits.ink[edited], phase.colour_truth, len(names), generator)
        asked = [editing.instruction(names[ink]) for ink in inks]
        return (loss_of(captions, latents[rows], None) + loss_of(asked, after[edited], before[edited])) / 2

    modules = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    fit([parameter for module in modules for parameter in module.parameters()], base.phases, loss_of_both, log)
