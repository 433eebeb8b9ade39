"""The three worked examples of CONTRIBUTING.md do what the page says."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch

from import_graph import FOLDERS
from loopscope import activation_patch, load, logit_diff, readout_lens
from loopscope.checkpoints.load import save
from loopscope.models.core.registry import FAMILIES, build
from paths import ROOT, SHIPPED
from toy import assert_close

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(
    zip(
        re.findall(r"Saved\s+as\s+`([^`]+)`", PAGE),
        re.findall(r"```python\n(.*?)```", PAGE, flags=re.S),
        strict=True,
    )
)
FAMILY, FIGURE, METHOD = EXAMPLES


@pytest.fixture
def placed() -> Iterator[None]:
    """Forget the modules and the family that an example adds."""
    before, known = set(sys.modules), dict(FAMILIES)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    for name in set(FAMILIES) - set(known):
        del FAMILIES[name]


def add(path: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import an example as the module that it would be in the folder it names."""
    room, _, stem = path.removesuffix(".py").rpartition("/")
    package = importlib.import_module(f"loopscope.{room.replace('/', '.')}")
    (folder / f"{stem}.py").write_text(EXAMPLES[path])
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    return importlib.import_module(f"{package.__name__}.{stem}")


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example_is_short_and_stands_where_its_kind_stands(path: str) -> None:
    lines = [line for line in EXAMPLES[path].splitlines() if line.strip()]
    assert len(lines) < 40
    assert (ROOT / path).parent.is_dir()
    assert not (ROOT / path).exists()


@pytest.mark.usefixtures("placed")
def test_the_family_is_built_saved_loaded_and_patched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = add(FAMILY, tmp_path, monkeypatch)
    sizes = {"n_layers": 2, "n_loops": 3, "d_model": 15, "n_heads": 3, "d_mlp": 22, "d_vocab": 29}
    torch.manual_seed(0)
    model = build(module.DampedConfig(**{**sizes, "head_dim": 6}, keep=0.3)).double()
    tokens = torch.randint(1, 29, (3, 7))
    _, cache = model.run_with_cache(tokens, names_filter="loops.*.hook_state_*")
    closed, ends = cache["loops.1.hook_state_out"], cache["loops.1.hook_state_in"]
    assert closed.shape == ends.shape == (3, 7, 15)
    save(model, tmp_path / "saved", {"readout": "last_real"})
    again = load(tmp_path / "saved")
    assert_close(again(tokens), model(tokens))
    other = torch.randint(1, 29, (3, 7))
    metric = logit_diff(torch.tensor([2, 3, 5]), torch.tensor([7, 11, 13]))
    sweep = activation_patch(
        again, tokens, other, metric, sites=["resid_post"], readout=-1, positions=[4], loops=[1]
    )
    cell, (_, cache) = sweep.cells[0], again.run_with_cache(tokens, names_filter="**")

    def patch(value: torch.Tensor, hook: object) -> torch.Tensor:
        value = value.clone()
        value[:, 4] = cache[cell.name][:, 4]
        return value

    with torch.no_grad():
        logits = again.run_with_hooks(other, fwd_hooks=[(cell.name, patch)])
    assert cell.name == "loops.1.blocks.0.hook_resid_post"
    assert_close(sweep.values[0], metric(logits[:, -1]))


@pytest.mark.slow
def test_the_figure_is_a_command(tmp_path: Path) -> None:
    for folder in ("loopscope", "analyses"):  # the links of the first lead to what follows
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    for folder in set(FOLDERS) - {"analyses"}:
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / FIGURE).write_text(EXAMPLES[FIGURE])
    command = (sys.executable, "-m", "loopscope", "state-norm", "ltg_trained", "--per-hop", "3")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["iterations", "norm"]
    frame = pd.read_csv(tmp_path / "out" / "state-norm.csv")
    assert frame["iterations"].tolist() == list(range(13))


@pytest.mark.usefixtures("placed")
def test_the_method_says_after_how_many_iterations_the_answer_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = add(METHOD, tmp_path, monkeypatch)
    model = load(SHIPPED / "ltg_trained")
    questions = ["<e_13><r_2><r_8><r_9>", "<e_14><r_2>", "<e_3><r_7><r_1><r_0><r_4>"]
    found = module.agreement(model, questions, 9)
    top = readout_lens(model, questions, 9).top(1).tokens[..., 0]
    for example, iterations in enumerate(found.iterations.tolist()):
        said = top[:, example].tolist()
        assert set(said[iterations - 1 :]) == {said[-1]}
        assert iterations == 1 or said[iterations - 2] != said[-1]
    assert set(found.frame()["iterations"]) <= set(range(1, 10))
