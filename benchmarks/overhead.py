"""What the hook points cost when nothing is hooked: a forward against calling the same blocks
bare.
"""

from __future__ import annotations

import torch

from benchmarks.timing import interleaved, paper_size
from loopscope.checkpoints.load import load
from loopscope.models.core.attention import Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import NO_TAPS
from loopscope.models.families.recurrent_depth import RecurrentDepth


@torch.no_grad()
def measure(model: LoopedModel, n_loops: int, width: int, rounds: int = 7) -> float:
    """Share that a forward of 16 rows costs over its bare blocks, from the minimum of interleaved
    rounds.
    """
    assert isinstance(model, RecurrentDepth), "the bare loop below is this family's"
    tokens = torch.randint(
        1, model.cfg.d_vocab, (16, width), generator=torch.Generator().manual_seed(0)
    )
    rows = Rows.make(model.begin(tokens, n_loops=n_loops), type(model).visible)

    def bare() -> torch.Tensor:
        resid = torch.nn.functional.embedding(tokens, model.embedding)
        for _ in range(n_loops):
            for block in model.blocks:
                resid = block(resid, rows, NO_TAPS)
        return model.unembed(model.normalize(resid))

    if not torch.equal(bare(), model(tokens, n_loops=n_loops)):
        raise RuntimeError("the bare blocks and the forward compute different logits")
    times = interleaved({"bare": bare, "forward": lambda: model(tokens, n_loops=n_loops)}, rounds)
    return times["forward"] / times["bare"] - 1


def run() -> str:
    """One line: the overhead at the paper's size and at the shipped size."""
    large = paper_size()
    shipped = load("ltg_trained")
    at_large, at_small = measure(large, 4, 14), measure(shipped, 8, 9, rounds=49)
    return (
        f"idle hook points: {100 * at_large:+.1f} % at d=768, {100 * at_small:+.1f} % at the"
        " shipped size (batch 16)"
    )
