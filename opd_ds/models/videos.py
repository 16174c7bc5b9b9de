"""What families of videos share."""

from __future__ import annotations

from opd_ds.errors import UserError


def check_frames(frames: int, factor: int) -> None:
    """Raise UserError unless a VAE with one latent for the first frame and one for each `factor` further ones takes
    `frames`.
    """
    if frames % factor != 1 % factor:
        below = max(frames - 1, 0) // factor * factor + 1
        raise UserError(
            f"model.frames = {frames}: must be {factor}k + 1 (the VAE's first frame, then {factor} a latent); the "
            f"nearest are {below} and {below + factor}"
        )
