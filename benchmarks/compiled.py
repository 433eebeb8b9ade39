"""What `torch.compile` gains on a forward, and what a model that was compiled does under hooks.

`python -m benchmarks.compiled` writes its section of RESULTS.md. It needs a compiler of C++.
"""

from __future__ import annotations

import logging
import shutil
import time
from functools import partial

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.scale import busy
from benchmarks.timing import interleaved, paper_size

LOOPS, HOPS, QUESTIONS, ROUNDS = 4, 12, 16, 5
_SITE = "loops.1.blocks.0.hook_mlp_out"


@torch.no_grad()
def run(d_model: int = 768, n_layers: int = 4, n_heads: int = 12) -> str:
    """One line: the time of a forward without hooks, compiled and not, and that of one with a hook,
    after checking that the hook acts in both.
    """
    if shutil.which("g++") is None:
        return (
            "torch.compile was not measured, since it needs a compiler of C++ and there is no g++"
        )
    plain, compiled = (paper_size(d_model, n_layers, n_heads) for _ in range(2))
    tokens = torch.randint(
        1, 217, (QUESTIONS, HOPS + 1), generator=torch.Generator().manual_seed(0)
    )
    compiled.compile()
    started = time.perf_counter()
    _check(compiled(tokens, n_loops=LOOPS), plain(tokens, n_loops=LOOPS))
    first = time.perf_counter() - started
    hooks = [(_SITE, lambda value, hook: value * 0)]
    under = {
        name: partial(model.run_with_hooks, tokens, n_loops=LOOPS, fwd_hooks=hooks)
        for name, model in (("plain", plain), ("compiled", compiled))
    }
    _check(under["compiled"](), under["plain"]())
    bare = {
        name: partial(model, tokens, n_loops=LOOPS)
        for name, model in (("plain", plain), ("compiled", compiled))
    }
    _check(bare["compiled"](), bare["plain"]())
    free, hooked = interleaved(bare, ROUNDS), interleaved(under, ROUNDS)
    return (
        f"torch.compile at d={d_model}, L={n_layers}, {LOOPS} iterations, {QUESTIONS} questions of"
        f" {HOPS} hops: a forward takes {free['compiled'] / free['plain']:.2f} times the plain"
        f" one's {free['plain']:.2f} s, after {first:.0f} s of compiling; with a hook, which acts"
        f" as in the plain model, {hooked['compiled'] / hooked['plain']:.2f} times"
    )


def _check(found: Tensor, expected: Tensor) -> None:
    apart = float((found - expected).abs().max() / expected.abs().max())
    if apart > 1e-4:
        raise RuntimeError(f"the compiled model is off by {apart:.1e} of the largest logit")


def main() -> None:
    """Print the line and write the section."""
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it warns of each graph break
    line = run()
    print(line, flush=True)
    results.write("Compiled models", "python -m benchmarks.compiled", [f"* {line}{busy()}"])


if __name__ == "__main__":
    main()
