"""Lpips: how far is an edited picture from its reference, as people see it?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from opd_ds.errors import UserError
from opd_ds.rewards.base import Metadata, Needs
from opd_ds.rewards.checkpoints import located, read_state, refuse, still_needed
from opd_ds.rewards.gaps import CountsGaps, Gaps, scored_where
from opd_ds.rewards.references import WITHOUT, References
from opd_ds.rewards.weights import Weights, WrongWeightsError
from opd_ds.utils.hashing import file_sha256

_SOURCE = "https://download.pytorch.org/models/"


def _network(file: str, size: str) -> Weights:
    """Of torchvision, whose file names end in the first digits of the hash."""
    return Weights("torchvision", _SOURCE + file, file, size, Path(file).stem.rpartition("-")[2])


_NETWORKS = {
    "alex": _network("alexnet-owt-7be5be79.pth", "244 MB"),
    "vgg": _network("vgg16-397923af.pth", "553 MB"),
}


class Lpips(CountsGaps):
    """Perceptual distance between an edited picture and its reference, LPIPS (arXiv 1801.03924): 0 is unchanged, about
    1 is another picture. Lower is better: give it a negative weight to learn from it.

    The authors' package computes it, version 0.1 of its linear layers, on the reference at the size of the image. What
    the edit is meant to change counts, too. An image without a reference has no score.

    Args:
        device: where the network runs.
        net: alex, which the authors advise for measuring, or vgg.
        weights: torchvision's file of the network in another place.

    Raises:
        WeightsMissingError, WrongWeightsError: no such file; not that network.
    """

    name = "lpips"
    takes_references: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(packages=("lpips", "torchvision"), extra="lpips", weights=(_NETWORKS["alex"],))

    def __init__(self, device: str = "cpu", net: str = "alex", weights: str | Path | None = None) -> None:
        import lpips

        self._file, self._net, self._device = located(_NETWORKS[net], weights), net, device
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # else it downloads the network
        _load(model.net, self._file)
        self._model = model.to(device).eval().requires_grad_(False)
        self._gaps = Gaps(self.name)

    @classmethod
    def needs_for(cls, options: Mapping[str, Any]) -> Needs:
        net = options.get("net", "alex")
        if net not in _NETWORKS:
            raise UserError(f"reward 'lpips': net = {net!r}; allowed: {', '.join(_NETWORKS)}")
        needs = Needs(cls.needs.packages, cls.needs.extra, (_NETWORKS[net],))
        return still_needed(needs, options, "weights")

    def identity(self) -> dict[str, Any]:
        return {"engine": "lpips 0.1", "net": self._net, "sha256": file_sha256(self._file)}

    def score(
        self,
        images: list[Image.Image],
        prompts: list[str],
        metadata: Metadata | None = None,
        references: References | None = None,
    ) -> Tensor:
        """[B] float32; the prompts are not read."""
        beside = references or [()] * len(images)

        def score(places: list[int]) -> Tensor:
            return torch.stack([self._distance(images[place], beside[place][0]) for place in places])

        return self._gaps.close(scored_where([None if own else WITHOUT for own in beside], score))

    @torch.no_grad()
    def _distance(self, image: Image.Image, reference: Image.Image) -> Tensor:
        """One by one: images of a call may differ in size."""
        resized = reference.resize(image.size, Image.Resampling.BICUBIC)
        found: Tensor = self._model(*(_pixels(one).to(self._device) for one in (image, resized)))
        return found.flatten()[0].float().cpu()


def _pixels(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


def _load(net: nn.Module, file: Path) -> None:
    """Torchvision's `features` into the package's slices, whose layers keep their numbers.

    Raises:
        WrongWeightsError: they are not of this network.
    """
    state = {key.removeprefix("features."): value for key, value in read_state(file).items() if "features." in key}
    numbers = {name: name.split(".", 1)[1] for name in net.state_dict()}
    origin = f"{file} is no such network"
    refuse(origin, missing=set(numbers.values()) - set(state), unexpected=set(state) - set(numbers.values()))
    try:
        net.load_state_dict({name: state[number] for name, number in numbers.items()})
    except RuntimeError as error:
        raise WrongWeightsError(f"{origin}: {' '.join(str(error).split())[:200]}") from error
