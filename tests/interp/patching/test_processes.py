"""Two processes share a sweep, a lens and a recurrence grid, and each returns what one process
does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from loopscope.interp.common.processes import over_ranks
from loopscope.models.basis.tokens import Batch
from paths import HELPERS
from shared_work import LENS_OF, LENSES, SHORT, grid, one_cell, questions_of, sweep
from tiny_run import free_port
from toy import BATCH, LAYERS, assert_close, padded, toy

RANK = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from accelerate import Accelerator
from shared_work import LENS_OF, everything
found = everything()
if Accelerator(cpu=True).is_main_process:
    found["alone"] = LENS_OF["readout"]()
torch.save(found, sys.argv[1])
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = []
    for rank in range(2):
        command = [sys.executable, "-c", RANK, str(folder / f"{rank}.pt"), str(HELPERS)]
        environment = {
            **os.environ,
            **shared,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
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
def test_each_process_returns_the_whole_lens(
    name: str, two: list[dict[str, dict[str, Any]]]
) -> None:
    expected = LENS_OF[name]()
    for rank in two:
        assert_the_same(rank[name]["values"], expected["values"])
        assert torch.equal(rank[name]["reads"], expected["reads"])


@pytest.mark.slow
def test_the_examples_are_shared_where_rows_do_not_depend_on_each_other(
    two: list[dict[str, dict[str, Any]]],
) -> None:
    own = {name: [rank[name]["own"] for rank in two] for name in LENSES}
    assert own == {
        "logit": [[1], [2]],
        "readout": [[1], [1, 1]],  # rows one at a time
        "single": [[], [1]],  # fewer examples than processes
        "dependent": [[BATCH]] * 2,
        "resampled": [[BATCH, BATCH]] * 2,  # the reference, and then the run
    }


@pytest.mark.slow
def test_processes_with_different_inputs_or_metrics_share_nothing(
    two: list[dict[str, dict[str, Any]]],
) -> None:
    for number, rank in enumerate(two):
        assert_the_same(rank["own"]["sweep"], questions_of(number, 0))
        assert_the_same(rank["own"]["metric"], questions_of(0, number))


@pytest.mark.slow
def test_each_process_returns_the_whole_recurrence_grid(
    two: list[dict[str, dict[str, Any]]],
) -> None:
    expected = grid()
    assert set(expected["own"]) == {5}
    for rank in two:
        assert rank["grid"]["sizes"] == expected["sizes"]
        for ours, theirs in zip(rank["grid"]["values"], expected["values"], strict=True):
            assert torch.equal(ours, theirs)  # shares of five questions
    assert [set(rank["grid"]["own"]) for rank in two] == [{2}, {3}]


@pytest.mark.slow
def test_where_an_accelerator_exists_one_process_may_ask_alone(
    two: list[dict[str, dict[str, Any]]],
) -> None:
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
