"""A reference library as a reward: our server serves it, and `parity` asks it for more than scores."""

from __future__ import annotations

import base64
import io
import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from opd_ds.errors import UserError
from opd_ds.rewards.base import Metadata, Needs
from opd_ds.rewards.wire import encode_request
from opd_ds.utils.hashing import file_sha256
from tools.reference_parity.environment import Environment


class ReferenceReward:
    """What a process in the library's environment answers, from its start to `close`."""

    needs: ClassVar[Needs] = Needs()

    def __init__(self, environment: Environment, weights: Path) -> None:
        """Start the process and wait until it has loaded `weights`.

        Raises:
            UserError: it did not.
        """
        self.name = environment.name
        self._weights = weights
        command = environment.worker("score", str(weights))
        # A session of its own: Ctrl-C is for the server alone, with which the worker's input ends.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        try:
            self._answer()
        except RuntimeError as error:
            raise UserError(f"reference library {self.name!r}: {weights} was not loaded ({error}, see above)") from None

    def close(self) -> None:
        """Wait for the process, which ends with its input."""
        self._process.communicate()

    def arrays(
        self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None
    ) -> dict[str, np.ndarray]:
        """All that the adapter gives.

        Raises:
            RuntimeError: the library failed, or its process has ended.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `_answer` says how it ended
            self._process.stdin.write(encode_request(images, prompts, metadata) + b"\n")
            self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        with np.load(io.BytesIO(base64.b64decode(answer["arrays"])), allow_pickle=False) as arrays:
            return dict(arrays)

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> torch.Tensor:
        """[B], float32."""
        return torch.from_numpy(self.arrays(images, prompts, metadata)["score"]).float()

    def identity(self) -> dict[str, Any]:
        sha256 = file_sha256(self._weights)
        return {"engine": f"reference library {self.name}", "weights": self._weights.name, "sha256": sha256}

    def _answer(self) -> dict[str, str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with exit code {self._process.wait()}")
        return json.loads(line)
