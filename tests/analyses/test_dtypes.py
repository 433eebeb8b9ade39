"""Every figure is drawn of a checkpoint in bfloat16, the dtype of most releases."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

from loopscope.analyses.common.figures import FIGURES
from loopscope.checkpoints.load import load, read_card, save
from loopscope.checkpoints.locate import locate
from small_figures import SMALL, small_config

OF_LOGS = ("grokking", "hop-updates")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("narrow")


@cache
def narrow(source: str, folder: Path) -> str:
    """A copy of a checkpoint in bfloat16, with its questions and its graph."""
    made = folder / source.replace("/", "-")
    save(load(source).to(torch.bfloat16), made, read_card(source))
    files = locate(source)
    for path in (files.questions, files.graph):
        if path is not None:
            shutil.copy(path, made)
    assert load(made).cfg.d_model > 0
    assert next(load(made).parameters()).dtype == torch.bfloat16
    return str(made)


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in OF_LOGS])
@pytest.mark.slow
def test_every_figure_runs_in_bfloat16(name: str, folder: Path) -> None:
    settings: dict[str, Any] = {}
    if "checkpoints" in SMALL[name]:
        sources = SMALL[name]["checkpoints"]
        settings["checkpoints"] = tuple(narrow(source, folder) for source in sources)
    else:
        source = SMALL[name].get("checkpoint", "mini/multi_hop/r2")
        settings["checkpoint"] = narrow(source, folder)
    record = FIGURES[name].module().run(small_config(name, **settings))
    assert len(record.frame()) > 0
    assert len(record.summary()) > 0
    assert isinstance(FIGURES[name].module().figure(record), go.Figure)
