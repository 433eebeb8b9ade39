"""A recurrence sweep r = 1..40: one run read after each iteration, against 40 separate runs padded
to 50 columns.
"""

from __future__ import annotations

import time

import torch

from benchmarks.timing import paper_size
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.basis.tokens import Batch

LOOPS, HOPS, PADDED, QUESTIONS = 40, 12, 50, 2


@torch.no_grad()
def run() -> str:
    """One line: both times and their ratio, after checking that the answers agree."""
    model = paper_size()
    length = HOPS + 1
    tokens = torch.zeros(QUESTIONS, PADDED, dtype=torch.int64)
    tokens[:, :length] = torch.randint(
        1, 217, (QUESTIONS, length), generator=torch.Generator().manual_seed(0)
    )
    mask = (torch.arange(PADDED) < length).long().expand(QUESTIONS, -1)
    column = torch.full((QUESTIONS,), length)
    short = Batch(tokens[:, : length + 1], mask[:, : length + 1], column)
    readout_lens(model, short, 1)
    started = time.perf_counter()
    lens = readout_lens(model, short, LOOPS, keep_logits=True)
    ours = time.perf_counter() - started
    started = time.perf_counter()
    separate = torch.stack(
        [model(tokens, n_loops=r, mask=mask)[:, length] for r in range(1, LOOPS + 1)]
    )
    theirs = time.perf_counter() - started
    assert lens.logits is not None, "keep_logits was asked for"
    apart = float((lens.logits - separate).abs().max() / separate.abs().max())
    if apart > 1e-4:
        raise RuntimeError(f"the two ways of sweeping disagree by {apart:.1e} of the logits' scale")
    what = f"sweep r = 1..{LOOPS} at d=768, L=4, {QUESTIONS} questions of {HOPS} hops"
    return f"{what}: {ours:.2f} s against {theirs:.2f} s, {theirs / ours:.0f} times faster"
