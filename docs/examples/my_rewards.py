"""Rewards of your own, named in a config as `my_rewards.py:blueness` or `:Contrast`; of videos, of edited pictures."""

import torch


def blueness(images, prompts, metadata, strength=1.0):
    """How much more blue than red the images are, -1 to 1 times `strength`.

    Args:
        images: PIL images, RGB.
        prompts: one text per image.
        metadata: one dict per image: the other columns of its prompt file.
    """
    means = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
    return [strength * (blue - red) / 255 for red, _, blue in means]


class Contrast:
    """Standard deviation of an image's grey values, 0 to 0.5; a class loads something once and keeps it."""

    def __init__(self, device="cpu"):
        self.device = device

    def score(self, images, prompts, metadata):
        """One number per image: a tensor, an array or a list. None or NaN: no score, which is not 0."""
        scores = []
        for image in images:
            grey = torch.tensor(list(image.convert("L").tobytes()), device=self.device) / 255
            scores.append(grey.std(correction=0).item())
        return scores

    def identity(self):
        """What decides the numbers beside this file and the options, if anything does: a model's name or hash."""
        return {"range": "0 to 0.5"}


def stillness(clips, prompts, metadata):
    """How little changes from frame to frame, -1 to 0: minus the mean difference of neighbouring frames' grey values.

    Args:
        clips: with `frames`, PIL images, RGB, and `fps`.
    """
    scores = []
    for clip in clips:
        grey = torch.stack([torch.tensor(list(frame.convert("L").tobytes())) / 255 for frame in clip.frames])
        scores.append(-grey.diff(dim=0).abs().mean().item())
    return scores


stillness.takes_clips = True  # a class says so in its body; without it a reward gets each frame of a video as an image


def unchanged(images, prompts, metadata, references):
    """How little an edited picture differs from its reference, -1 to 0: minus the mean difference of grey values.

    Args:
        references: of each image the reference pictures of its prompt, PIL, RGB; an empty tuple where it has none.
    """
    scores = []
    for image, own in zip(images, references, strict=True):
        if not own:
            scores.append(None)
            continue
        pair = [torch.tensor(list(one.convert("L").resize(image.size).tobytes())) / 255 for one in (image, own[0])]
        scores.append(-(pair[0] - pair[1]).abs().mean().item())
    return scores


unchanged.takes_references = True  # without it a reward is called with three arguments
