"""What probes hold in memory at d=2048 and 96 visits: `python -m benchmarks.probes`, some minutes.

The looped model is a block without weights, so that the time is that of the probes. Sums are
streamed, so what is held does not depend on the number of states; two numbers of states show that.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.timing import GIB, measured
from loopscope.interp.probes.probe import Probe, probe
from loopscope.models.basis.tokens import Batch
from loopscope.models.wrapped.wrap import wrap

D_MODEL, VISITS, STATES, CLASSES, ROWS = 2048, 96, 20_000, 8, 256
SIZES = (1024, 2048)  # states that are run


class Turning(nn.Module):
    """A looped language model whose block turns the state by one place and bends it."""

    def __init__(self, d_model: int, n_loops: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.n_loops = n_loops
        self.embedding = nn.Embedding.from_pretrained(
            torch.randn(CLASSES * 64, d_model, generator=generator)
        )
        self.blocks = nn.ModuleList([Turn()])
        self.head = nn.Linear(d_model, CLASSES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embedding(tokens)
        for _ in range(self.n_loops):
            state = self.blocks[0](state)
        logits: Tensor = self.head(state)
        return logits


class Turn(nn.Module):
    """The block."""

    def forward(self, state: Tensor) -> Tensor:
        return torch.tanh(1.5 * state.roll(1, -1)) + 0.1 * state


def probed(states: int, d_model: int = D_MODEL, visits: int = VISITS) -> Probe:
    """Ridge probes after every visit, of as many states of one token each."""
    model = wrap(Turning(d_model, visits).eval(), "blocks", visits, head="head")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CLASSES * 64, (states, 1), generator=generator)
    batch = Batch(tokens, torch.ones_like(tokens), torch.zeros(states, dtype=torch.long))
    return probe(model, batch, tokens[:, 0] % CLASSES, batch_size=ROWS)


def taken(states: int) -> tuple[float, float]:
    """Seconds, and the GiB that are held at most."""
    torch.set_num_threads(1)
    each = measured(lambda: probed(states))
    return each.seconds, each.peak


def run() -> list[str]:
    """One line per number of states, each from a process of its own, and one about 20,000."""
    lines = []
    for states in SIZES:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            seconds, peak = fresh.submit(taken, states).result()
        lines.append(
            f"probes of {states:,} states after each of {VISITS} visits at d={D_MODEL}, with a"
            f" control task: {seconds:.0f} s, peak {peak:.2f} GiB"
        )
    kept = STATES * VISITS * D_MODEL * 4 / GIB
    lines.append(
        f"{STATES:,} states were not run: their sums are as large, while the states alone would be"
        f" {kept:.1f} GiB in float32"
    )
    return lines


def main() -> None:
    """Measure and write the section."""
    torch.set_num_threads(1)  # as in the processes that measure
    lines = run()
    print("\n".join(lines))
    results.write("Probes", "python -m benchmarks.probes", [f"* {line}" for line in lines])


if __name__ == "__main__":
    main()
