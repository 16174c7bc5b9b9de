"""What one reward does in the environment that runs this; `table.py` starts it. Prints one JSON object.

python benchmarks/rewards/probe.py NAME FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_ds.errors import UserError
from opd_ds.rewards import RewardUnavailableError, WrongWeightsError, build, check, reward_class
from opd_ds.rewards.references import score_with

PROMPT = 'a photo of a cat beside a sign with the text "Hello"'
MINIATURE_PROMPT = "the number 0 in blue on white"
CAPTIONS = {"source_caption": "a cat", "target_caption": "a cat beside a sign"}
METADATA = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}], **CAPTIONS}] * 2


def message_of_check(name: str, options: dict[str, Any]) -> str:
    try:
        check(name, options=options)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refuses_a_wrong_file(name: str, options: Callable[[], dict[str, Any]]) -> str:
    try:
        build(name, **options())
    except WrongWeightsError as error:
        return f"yes: {error}"
    return "NO"


def scores(name: str, options: dict[str, Any]) -> str:
    from tests.rewards.drawing import drawn

    reward = build(name, **options)
    prompt = MINIATURE_PROMPT if name.startswith("miniature") else PROMPT
    references = [(drawn("Hello"),), (drawn("Hello"),)]
    values = score_with(reward, [drawn("Hello"), drawn("Help")], [prompt] * 2, METADATA, references)
    right = values.shape == (2,) and str(values.dtype) == "torch.float32" and values.device.type == "cpu"
    shown = ", ".join("NaN" if math.isnan(value) else f"{value:.4g}" for value in values.tolist())
    return shown if right else f"NO: {tuple(values.shape)} {values.dtype} on {values.device}"


def main(name: str, folder: Path) -> None:
    # The installed package goes before the checkout, which is here for its tests' small weights only.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from tests.rewards.tiny_weights import WITH_WEIGHTS, make

    reward_class(name)
    # Options of rewards without weights may name what they need; those with weights are looked for where they belong.
    said = message_of_check(name, {} if name in WITH_WEIGHTS else make(name, folder / "tiny"))
    report = {"imports": "yes", "check": said}
    if not said.startswith(RewardUnavailableError.__name__):
        report["scores"] = scores(name, make(name, folder / "tiny"))
        report["refuses"] = "no weights"
        if name in WITH_WEIGHTS:
            report["refuses"] = refuses_a_wrong_file(name, lambda: make(name, folder / "spoilt", spoilt=True))
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
