"""What real images of the held-out prompts score: as good as a model of this world can be expected to draw."""

from __future__ import annotations

import torch

from opd_ds.config.loading import load_config
from opd_ds.data import PromptSet
from opd_ds.diffusion.noise import sample_seed
from opd_ds.errors import UserError
from opd_ds.evaluation.pictures import to_image
from opd_ds.miniature import world
from opd_ds.rewards import build

PICTURES_PER_PROMPT = 8


def real_rewards() -> dict[str, float] | None:
    """Mean reward by task of scans that neither models nor reader have seen, painted in the prompted colours.

    None when scikit-learn, which carries the scans, is not installed.
    """
    try:
        masks, labels = world.load_strokes()["reader_test"]
    except UserError:
        return None
    config, names, palette = load_config("miniature", None, []), list(world.COLOURS), world.palette()
    rewards = {}
    for name, section in config.evaluated.items():
        assert section.eval_prompts is not None
        prompts = PromptSet.read(section.eval_prompts, f"{config.place(name)}.eval_prompts").prompts
        pictures = []
        for prompt in prompts:
            scene = world.parse(prompt)
            assert scene is not None
            scans = masks[labels == scene.digit]
            generator = torch.Generator().manual_seed(sample_seed(0, 0, f"real/{prompt}", 0))
            chosen = scans[torch.randint(len(scans), (PICTURES_PER_PROMPT,), generator=generator)]
            ink, ground = (palette[names.index(name)].expand(len(chosen), 3) for name in (scene.ink, scene.ground))
            pictures += [to_image(picture) for picture in world.paint(chosen, ink, ground)]
        asked = [prompt for prompt in prompts for _ in range(PICTURES_PER_PROMPT)]
        rewards[name] = float(build(section.rewards[0].name).score(pictures, asked, [{}] * len(asked)).mean())
    return rewards
