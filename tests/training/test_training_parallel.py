"""Several processes train as one does, and compiled blocks compute what plain ones do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopscope.training.trainer import Trainer
from paths import HELPERS
from tiny_run import SHARED, TINY, free_port

RANK = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from tiny_run import SHARED
from loopscope.training.trainer import Trainer
trainer = Trainer(SHARED, Path(sys.argv[1]))
trainer.step(SHARED.stages[0])
gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
torch.save(gradients, f"{sys.argv[1]}/rank{trainer.accelerator.process_index}.pt")
trainer.run()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_gradients_and_the_weights_of_one(tmp_path: Path) -> None:
    one = Trainer(SHARED, tmp_path / "one")
    one.step(SHARED.stages[0])
    expected = {
        name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None
    }
    one.run()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, "-c", RANK, str(tmp_path / "two"), str(HELPERS)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    ours = torch.load(tmp_path / "one" / "state.pt", weights_only=True)
    theirs = torch.load(tmp_path / "two" / "state.pt", weights_only=True)
    for name, weight in ours["model"].items():
        torch.testing.assert_close(theirs["model"][name], weight, rtol=1e-2, atol=1e-3)
    assert (tmp_path / "two" / "final" / "card.json").is_file()


def test_processes_that_cannot_share_a_batch_equally_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopscope.training.trainer.Accelerator.num_processes", 5)
    with pytest.raises(
        ValueError, match="5 processes cannot share a batch of 12 questions equally"
    ):
        Trainer(TINY, tmp_path)
    assert not list(tmp_path.iterdir())


COMPILED = """
import sys
from pathlib import Path
import torch
import torch.nn.functional as F
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from tiny_run import SHARED
from loopscope.training.setup import Answering, fresh_model
from loopscope.training.trainer import Trainer
plain, compiled = fresh_model(SHARED), fresh_model(SHARED)
graphs = []
def backend(graph, example):
    graphs.append(graph)
    return graph.forward
for block in compiled.blocks:
    block.compile(dynamic=True, backend=backend)
trainer = Trainer(SHARED, Path(sys.argv[1]))
for stage in SHARED.stages:
    batch = trainer.batch(stage)
    for model in (plain, compiled):
        model.zero_grad()
        F.cross_entropy(Answering(model)(batch), batch.answers).backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
assert graphs, "nothing was compiled"
print("equal")
"""


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients(tmp_path: Path) -> None:
    """In a process of its own, because run-time checks of shapes cannot be compiled."""
    command = [sys.executable, "-c", COMPILED, str(tmp_path), str(HELPERS)]
    assert (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        == "equal"
    )
