"""The reader: a small convolutional network that reads the digit in an image, whatever its colours."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd_ds.miniature import world

FILE = "reader.safetensors"


class Reader(nn.Module):
    """Images [B, 3, 16, 16] in [0, 1] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        # An image and its mean: colours are told from the ground, not from black.
        return self.layers(pictures - pictures.mean((2, 3), keepdim=True))


def train_reader(masks: Tensor, labels: Tensor, steps: int, seed: int) -> Reader:
    """Learn from digits that no model of the world is trained on, in random colours, shifted, some of them soiled."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = world.random_pictures(masks, labels, 128, generator, soiled=0.5)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        pictures = F.pad(batch.pictures, (1, 1, 1, 1), mode="replicate")
        pictures = pictures[:, :, 1 + shift[0] : 17 + shift[0], 1 + shift[1] : 17 + shift[1]]
        loss = F.cross_entropy(reader(pictures), batch.digit, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval()


def save_reader(reader: Reader, folder: Path) -> None:
    save_file({name: value.half() for name, value in reader.state_dict().items()}, folder / FILE)


def load_reader(folder: Path) -> Reader:
    """The reader that `folder` holds, in float32."""
    reader = Reader()
    reader.load_state_dict({name: value.float() for name, value in load_file(folder / FILE).items()})
    return reader.eval()
