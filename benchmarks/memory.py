"""What a cache holds and costs: the residual stream, which is the default, against every
activation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import interleaved, paper_size

LOOPS, HOPS, QUESTIONS, ROUNDS = 8, 12, 16, 3


@torch.no_grad()
def run() -> str:
    """One line: the size of both caches, and what keeping them adds to a forward."""
    model = paper_size()
    tokens = torch.randint(
        1, 217, (QUESTIONS, HOPS + 1), generator=torch.Generator().manual_seed(0)
    )
    filters: dict[str, str | None] = {"residual stream (the default)": None, "everything": "**"}
    ways: dict[str, Callable[[], object]] = {"forward": lambda: model(tokens, n_loops=LOOPS)}
    ways |= {
        name: partial(model.run_with_cache, tokens, n_loops=LOOPS, names_filter=names)
        for name, names in filters.items()
    }
    seconds = interleaved(ways, ROUNDS)
    parts = []
    for name, names in filters.items():
        _, cache = model.run_with_cache(tokens, n_loops=LOOPS, names_filter=names)
        size = sum(value.numel() * value.element_size() for value in cache.values()) / 2**20
        parts.append(
            f"{size:.0f} MiB of {name}, {100 * (seconds[name] / seconds['forward'] - 1):+.0f} % of"
            " a forward's time"
        )
    return (
        f"cache at d=768, L=4, {LOOPS} iterations, {QUESTIONS} questions of {HOPS} hops:"
        f" {'; '.join(parts)}"
    )
