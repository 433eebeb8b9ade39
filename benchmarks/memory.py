"""What a cache holds: the residual stream, which is the default, against every activation."""

from __future__ import annotations

import torch

from benchmarks.timing import paper_size

LOOPS, HOPS, QUESTIONS = 8, 12, 64


@torch.no_grad()
def run() -> str:
    """One line: the size of both caches."""
    model = paper_size()
    tokens = torch.randint(1, 217, (QUESTIONS, HOPS + 1), generator=torch.Generator().manual_seed(0))
    sizes = []
    for names in (None, "**"):
        _, cache = model.run_with_cache(tokens, n_loops=LOOPS, names_filter=names)
        sizes.append(sum(value.numel() * value.element_size() for value in cache.values()) / 2**20)
    what = f"cache at d=768, L=4, {LOOPS} iterations, {QUESTIONS} questions of {HOPS} hops"
    return f"{what}: {sizes[0]:.0f} MiB of residual stream (the default), {sizes[1]:.0f} MiB of everything"
