"""Ask every tool about every case and write docs/peers.md."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.cases import BLOCKS, CASES, CYCLES, D_MODEL, LENGTH, LOOPS
from benchmarks.peers.tools import TOOLS
from benchmarks.results import machine

PAGE = Path(__file__).parents[2] / "docs" / "peers.md"
EXACT = 1e-4
_BYTES = 1024  # ru_maxrss counts in kibibytes

_TEXT = """# The same analysis in other tools

Written by `python -m benchmarks.peers` on: {machine}.

This page asks several tools to do the same patching experiment on a model whose blocks run several
times in one forward pass. One *cell* of the experiment is: at one call of a block, at one position,
write the value of the clean run, and read the logits at the last position.

There are two models. One is a hand-written module like Ouro ({blocks} blocks, {loops} iterations,
d={d_model}, {length} tokens); the other is HRM-Text of transformers ({high} high cycles,
with {low} low cycles in each). The right values come from plain PyTorch hooks that count their
calls.

* *off by*: the largest error over all cells of the difference between two logits, in standard
  deviations of that difference over the cells;
* *a cell*: processor time per cell, in a process of its own with one thread;
* *memory*: how much the cells added to the largest size of the process.

{tables}

## How each tool was used

{how}

## What is left

A tool that counts calls, or names them as TorchLens does (`blocks.0:2`), answers this question
exactly. What this library adds is that the iteration is an axis: of the hook names that caches,
filters and gradients share, of every record's table, of lenses, exits and sweeps; that the cells of
a sweep run as rows of few forward passes that begin where the patch is; and that it knows what a
family does between iterations (injected inputs, boundary norms, gates, key-value caches).
"""


@dataclass(frozen=True)
class Answer:
    """What a tool gives for a case.

    Attributes:
        effects: Float[Tensor, " cell"], the metric of each; None where it refuses.
        seconds: Processor time for all cells.
        peak: Bytes that the process grew by.
        refusal: Why there is no answer.
    """

    effects: Tensor | None
    seconds: float = 0.0
    peak: int = 0
    refusal: str = ""


def ask(tool: str, case: str) -> Answer:
    """One tool's answer to one case; an error of the tool is a refusal."""
    torch.set_num_threads(1)
    made, run = CASES[case](), TOOLS[tool][1]
    with torch.no_grad():
        try:
            run(replace(made, positions=made.positions[:1]))  # a warm-up
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            return Answer(None, refusal=f"{type(error).__name__}: {said[0][:160]}")
        before, started = _peak(), time.process_time()
        effects = run(made)
        return Answer(effects.float().clone(), time.process_time() - started, _peak() - before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES


def _apart(tool: str, case: str) -> Answer:
    """The answer of a process that nothing else was imported into."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.pt"
        subprocess.run([sys.executable, "-m", "benchmarks.peers", tool, case, path], check=True)
        return Answer(**torch.load(path, weights_only=True))


def main() -> None:
    """Ask every tool about every case, each in a new process, and write the page."""
    torch.set_num_threads(1)
    tables = []
    for case in CASES:
        answers = {}
        for tool in TOOLS:
            answers[tool] = _apart(tool, case)
            print(case, tool, answers[tool].seconds, answers[tool].refusal, flush=True)
        tables.append(f"## {case}\n\n{table(answers)}")
    how = [
        f"* **{tool}**: {' '.join((run.__doc__ or '').split())}" for tool, (_, run) in TOOLS.items()
    ]
    PAGE.write_text(
        _TEXT.format(
            machine=machine(), tables="\n\n".join(tables), how="\n".join(how), blocks=BLOCKS,
            loops=LOOPS, d_model=D_MODEL, length=LENGTH, high=CYCLES[0], low=CYCLES[1],
        ),
        encoding="utf-8",
    )  # fmt: skip
    print(f"wrote {PAGE}")


def table(answers: dict[str, Answer]) -> str:
    """One row a tool."""
    right = answers["plain hooks"].effects
    assert right is not None
    rows = [("tool", "version", "off by", "a cell", "memory"), ("---",) * 5]
    for tool, answer in answers.items():
        number = "not installed"
        with suppress(PackageNotFoundError):
            number = version(TOOLS[tool][0])
        if answer.effects is None:
            rows.append((tool, number, f"no answer ({answer.refusal})", "-", "-"))
            continue
        apart = float((answer.effects - right).abs().max() / right.std())
        rows.append(
            (
                tool,
                number,
                "exact" if apart < EXACT else f"{apart:.2f}",
                f"{1e3 * answer.seconds / len(right):.2f} ms",
                f"{answer.peak / 2**20:.0f} MiB",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        torch.save(asdict(ask(*sys.argv[1:3])), sys.argv[3])
    else:
        main()
