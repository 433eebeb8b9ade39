"""Two processes share a sweep, a lens and a recurrence grid, and each returns what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from analyses import recurrence_grid
from analyses.figure_configs import RecurrenceConfig
from interp.ablation import Component, ablate
from interp.lens import Lens, logit_lens, readout_lens
from interp.patching import activation_patch
from interp.ranks import over_ranks
from models.base import LoopedModel
from models.tokens import Batch
from test_training_parallel import free_port
from toy import BATCH, LAYERS, BatchCentred, assert_close, odd_one, padded, projection, toy

RANK = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from accelerate import Accelerator
from test_ranks import LENS_OF, everything
found = everything()
if Accelerator(cpu=True).is_main_process:
    found["alone"] = LENS_OF["readout"]()
torch.save(found, sys.argv[1])
torch.distributed.destroy_process_group()
"""
SHORT = 2
LENSES = ("logit", "readout", "single", "dependent", "resampled")


def everything() -> dict[str, dict[str, Any]]:
    """What this process finds, and how much of it the process computed itself."""
    return {name: method() for name, method in {"sweep": sweep, "one cell": one_cell, "grid": grid, **LENS_OF}.items()}


def sweep() -> dict[str, Any]:
    return _sweep(sites=["resid_pre", "z"], heads=[0, 3], positions=[2, 3])


def one_cell() -> dict[str, Any]:
    return _sweep(sites=["resid_pre"], loops=[1], layers=[1], positions=[3])


def _sweep(**places: Any) -> dict[str, Any]:
    measured: list[int] = []
    metric = projection()

    def counted(logits: Tensor) -> Tensor:
        measured.append(len(logits))
        return metric(logits)

    found = activation_patch(toy("learned"), padded(1), padded(2), counted, SHORT, **places)
    return {"cells": found.cells, "values": [found.values, found.clean, found.corrupted], "own": len(measured) - 2}


def grid() -> dict[str, Any]:
    """Five questions of each hop count, of which the two processes run two and three."""
    begin, rows = LoopedModel.begin, []

    def counted(model: LoopedModel, tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        rows.append(len(tokens))
        return begin(model, tokens, *arguments, **options)

    LoopedModel.begin = counted
    try:
        found = recurrence_grid.run(RecurrenceConfig(checkpoint="ltg_trained", n_loops=6, per_hop=5))
    finally:
        LoopedModel.begin = begin
    return {"values": [found.accuracy, found.halted, found.halted_loops], "sizes": (found.hops, found.questions), "own": rows}


def _lens(model: LoopedModel, read: Callable[[LoopedModel], Lens]) -> dict[str, Any]:
    begin, rows = model.begin, []

    def counted(tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        rows.append(len(tokens))
        return begin(tokens, *arguments, **options)

    model.begin = counted
    lens = read(model)
    return {"values": [lens.heads_input, lens.logits, lens.entropy()], "reads": torch.stack([lens.example, lens.position]), "own": rows}


def resampled(model: LoopedModel) -> Lens:
    """A hook that gives each row the value of a reference row, and so must see all of them."""
    with ablate(model, Component("mlp"), how="resample", reference=padded(3, (7, 7, 7))):
        return logit_lens(model, padded(1), keep_logits=True)


LENS_OF: dict[str, Callable[[], dict[str, Any]]] = {
    "logit": lambda: _lens(toy(), lambda model: logit_lens(model, padded(1), positions="all", keep_logits=True)),
    "readout": lambda: _lens(toy(injection=True), lambda model: readout_lens(model, padded(1), keep_logits=True, batch_size=1)),
    "single": lambda: _lens(toy(), lambda model: readout_lens(model, padded(1, (5,)), keep_logits=True)),
    "dependent": lambda: _lens(odd_one(BatchCentred), lambda model: logit_lens(model, padded(1), keep_logits=True)),
    "resampled": lambda: _lens(toy(), resampled),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    ranks = []
    for rank in range(2):
        command = [sys.executable, "-c", RANK, str(folder / f"{rank}.pt"), str(Path(__file__).parent)]
        environment = {**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_the_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.slow
def test_each_process_returns_the_whole_sweep(two: list[dict[str, dict[str, Any]]]) -> None:
    expected = sweep()
    count = len(expected["cells"])
    assert (count, expected["own"]) == (SHORT * LAYERS * (1 + 2) * 2, count)
    for rank in two:
        assert rank["sweep"]["cells"] == expected["cells"]
        assert_the_same(rank["sweep"]["values"], expected["values"])
    assert [rank["sweep"]["own"] for rank in two] == [count // 2, count // 2]


@pytest.mark.slow
def test_a_sweep_of_fewer_cells_than_processes(two: list[dict[str, dict[str, Any]]]) -> None:
    expected = one_cell()
    for rank in two:
        assert rank["one cell"]["cells"] == expected["cells"]
        assert_the_same(rank["one cell"]["values"], expected["values"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LENSES)
def test_each_process_returns_the_whole_lens(name: str, two: list[dict[str, dict[str, Any]]]) -> None:
    expected = LENS_OF[name]()
    for rank in two:
        assert_the_same(rank[name]["values"], expected["values"])
        assert torch.equal(rank[name]["reads"], expected["reads"])


@pytest.mark.slow
def test_the_examples_are_shared_where_rows_do_not_depend_on_each_other(two: list[dict[str, dict[str, Any]]]) -> None:
    own = {name: [rank[name]["own"] for rank in two] for name in LENSES}
    assert own == {
        "logit": [[1], [2]],
        "readout": [[1], [1, 1]],  # rows one at a time
        "single": [[], [1]],  # fewer examples than processes
        "dependent": [[BATCH]] * 2,
        "resampled": [[BATCH, BATCH]] * 2,  # the reference, and then the run
    }


@pytest.mark.slow
def test_each_process_returns_the_whole_recurrence_grid(two: list[dict[str, dict[str, Any]]]) -> None:
    expected = grid()
    assert set(expected["own"]) == {5}
    for rank in two:
        assert rank["grid"]["sizes"] == expected["sizes"]
        for ours, theirs in zip(rank["grid"]["values"], expected["values"], strict=True):
            assert torch.equal(ours, theirs)  # shares of five questions
    assert [set(rank["grid"]["own"]) for rank in two] == [{2}, {3}]


@pytest.mark.slow
def test_where_an_accelerator_exists_one_process_may_ask_alone(two: list[dict[str, dict[str, Any]]]) -> None:
    """As a trainer does, whose main process examines the model."""
    assert ["alone" in rank for rank in two] == [True, False]
    assert_the_same(two[0]["alone"]["values"], LENS_OF["readout"]()["values"])
    assert two[0]["alone"]["own"] == [1] * BATCH


def test_one_process_shares_nothing() -> None:
    seen: list[Batch] = []

    def tokens(batch: Batch) -> Tensor:
        seen.append(batch)
        return batch.tokens

    batch = padded()
    assert over_ranks(toy(), batch, tokens) is batch.tokens
    assert seen == [batch]
