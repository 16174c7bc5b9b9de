"""What `import opd_ds` offers; the commands call the same functions, and their tests test them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import opd_ds
from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.runs.train import train
from opd_ds.training.trainer import RoundReport
from tests.tiny import run_settings


def test_importing_it_loads_neither_torch_nor_diffusers() -> None:
    program = (
        "import sys, opd_ds; opd_ds.load_config('miniature'); print(sorted({'torch', 'diffusers'} & {*sys.modules}))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"


PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


def signature(name: str) -> str:
    """As the page shows it, without types."""
    whole = inspect.signature(getattr(opd_ds, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in whole.parameters.values()]
    return f"{name}{whole.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"


def test_the_page_shows_every_name_with_its_signature_and_an_example() -> None:
    shown = dict(re.findall(r"^### `([^\n]+)`\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL))
    assert sorted(shown) == sorted(map(signature, opd_ds.__all__))
    for heading, text in shown.items():
        [example] = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
        name = heading.split("(")[0]
        compile(textwrap.dedent(example), name, "exec")
        assert name in example or name == "Coefficients"


def test_the_pages_own_loop_and_examples_on_tensors_run() -> None:
    loop = PAGE.split("## Your own loop with our kernels")[1].split("## Reference")[0]
    code = textwrap.dedent("".join(re.findall(r"^(?:    .*)?\n", loop, re.MULTILINE)))
    names: dict[str, Any] = {}
    exec(code, names)  # the page is ours
    assert names["network"].weight.grad.norm() > 0
    assert names["student"].config.num_layers == names["teacher"].config.num_layers == 4


def test_every_name_is_there_and_no_other() -> None:
    for name in opd_ds.__all__:
        assert callable(getattr(opd_ds, name))
        assert name in dir(opd_ds)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = opd_ds.trian


def test_configs_and_their_refusals(tmp_path: Path) -> None:
    config = opd_ds.load_config("miniature", overrides=["run.rounds=7"])
    assert config.run.rounds == 7
    with pytest.raises(UserError, match="has no section `teach`"):
        opd_ds.teach(config)
    with pytest.raises(UserError, match=r"no state\.json there"):
        opd_ds.export_checkpoint(tmp_path / "round-000001", tmp_path / "out")


def test_kernels_and_objective_take_plain_tensors() -> None:
    table = opd_ds.kernel("euler", 0.0).coefficients(torch.linspace(1, 0, 5, dtype=torch.float64))
    assert table.b.tolist() == pytest.approx([-0.25] * 4)
    student, teacher = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0)
    error = opd_ds.velocity_error(student, teacher)
    assert (opd_ds.kl_weight(table)[0] * error).tolist() == pytest.approx([0.25**2 / 2 * 4] * 2)


def test_callbacks_see_every_round(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    seen: list[RoundReport] = []
    config = DistilConfig.model_validate(run_settings(tiny_world, tmp_path / "out", run__rounds=2))
    train(config, group, callbacks=[seen.append])
    assert [report.round for report in seen] == [1, 2]
    assert seen[0].losses.loss > 0
