"""The README's example runs, and its numbers are what the commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analyses import halting_curves, overthinking, recurrence_grid
from analyses.configs import HaltingConfig, OverthinkingConfig, RecurrenceConfig

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(compile(example, "README.md", "exec"), {})
    assert "logit_margin" in capsys.readouterr().out


def test_the_numbers_of_the_table() -> None:
    grid = recurrence_grid.run(RecurrenceConfig())
    best = grid.accuracy.max(1).values
    assert ", ".join(f"{accuracy:.2f}" for accuracy in best[8:].tolist()) in README
    assert f"{float(best[:8].min()):.2f} or better on 1 to 8 trained hops" in README
    assert (
        f"accuracy {float(grid.accuracy[12].max()):.2f} at {int(grid.accuracy[12].argmax()) + 1}, {float(grid.accuracy[12, -1]):.2f} at 24"
        in README
    )
    margins = overthinking.run(OverthinkingConfig())
    peak, where = (float(part[12]) for part in margins.peak())
    assert f"mean margin {peak:.2f} after {where:.0f} iterations, {float(margins.margin[12, -1]):.2f} after 24" in README
    stops = halting_curves.run(HaltingConfig())
    (both, alone), (many, few) = stops.accuracy.mean(1)[:2].tolist(), stops.loops_used.mean(1)[:2].tolist()
    assert f"KL and entropy: accuracy {both:.2f} in {many:.1f} iterations; KL alone: {alone:.2f} in {few:.1f}" in README


def test_the_numbers_of_the_wider_model() -> None:
    best = recurrence_grid.run(RecurrenceConfig(checkpoint="mini/multi_hop/r_dyn")).accuracy.max(1).values
    assert f"at least {float(best[:10].min()):.2f} on 1 to 10 trained hops" in README
    assert ", ".join(f"{accuracy:.2f}" for accuracy in best[10:].tolist()) + " on 11 to 16" in README


def test_the_numbers_of_the_fixed_model() -> None:
    accuracy = recurrence_grid.run(RecurrenceConfig(checkpoint="mini/multi_hop/r4")).accuracy
    best = accuracy.max(1)
    beyond = ", ".join(f"{value:.2f}" for value in best.values[8:11].tolist())
    assert f"reaches {float(best.values[:8].min()):.2f} on 1 to 8 hops but {beyond} on 9 to 11" in README
    fall = f"from {float(best.values[8]):.2f} at r = {int(best.indices[8]) + 1} to {float(accuracy[8, -1]):.2f} at r = 24"
    assert f"9 hops fall {fall}" in README
