"""DeQA-Score. Run inside the environment of requirements/deqa.txt only.

Weights are the folder of zhiyuanyou/DeQA-Score-Mix3. Its Python files are the library: they are run, so take the folder
from its authors' repository and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# In place of the network: what the folder's own code offers, and what the adapter calls.
_STAND_IN = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class StandInConfig(PretrainedConfig):
    model_type = "stand_in"

class StandIn(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.levels = torch.nn.Linear(1, 5)

    def score(self, images, task_="quality", input_="image"):
        grey = torch.tensor([[image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255] for image in images])
        return self.levels(grey).softmax(-1) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
"""


def random_weights(path: str) -> None:
    """A folder with code of its own as the published one, whose network is a stand-in of ten parameters."""
    import torch
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True)
    names = {"AutoConfig": "modeling.StandInConfig", "AutoModelForCausalLM": "modeling.StandIn"}
    config = {"model_type": "stand_in", "architectures": ["StandIn"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "modeling.py").write_text(_STAND_IN, encoding="utf-8")
    torch.manual_seed(0)
    state = {"levels.weight": torch.randn(5, 1), "levels.bias": torch.randn(5)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load(weights: str) -> Callable[[list[Image.Image], list[str], list[dict[str, Any]]], dict[str, np.ndarray]]:
    """To `score` [B]: technical quality, 1 (bad) to 5 (excellent), of the image alone.

    In float16 on a GPU, as its authors run it; in float32 on the CPU.
    """
    import torch
    from transformers import AutoModelForCausalLM  # type: ignore[attr-defined,unused-ignore]

    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        weights,
        trust_remote_code=True,
        attn_implementation="eager",
        torch_dtype=torch.float16 if on_gpu else torch.float32,
    )
    model = model.to("cuda" if on_gpu else "cpu").eval()

    @torch.no_grad()
    def run(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        return {"score": model.score(images, task_="quality", input_="image").float().cpu().numpy()}

    return run
