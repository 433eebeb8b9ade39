"""The README's example runs, and its numbers are what the commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analyses import halting_curves, recurrence_grid
from analyses.configs import HaltingConfig, RecurrenceConfig

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(compile(example, "README.md", "exec"), {})
    assert "logit_margin" in capsys.readouterr().out


def test_the_numbers_beyond_the_trained_depth() -> None:
    best = recurrence_grid.run(RecurrenceConfig()).accuracy.max(1).values
    assert f"at least {float(best[:10].min()):.2f} on 1 to 10 trained hops" in README
    assert ", ".join(f"{accuracy:.2f}" for accuracy in best[10:].tolist()) + " on 11 to 16" in README


@pytest.mark.parametrize(("checkpoint", "hops"), [("r2", 4), ("r4", 9)])
def test_the_numbers_of_overthinking(checkpoint: str, hops: int) -> None:
    accuracy = recurrence_grid.run(RecurrenceConfig(checkpoint=f"mini/multi_hop/{checkpoint}")).accuracy[hops - 1]
    fall = f"from {float(accuracy.max()):.2f} at r = {int(accuracy.argmax()) + 1} to {float(accuracy[-1]):.2f} at r = 24"
    assert f"{hops} hops fall {fall}" in README


def test_the_numbers_of_halting() -> None:
    stops = halting_curves.run(HaltingConfig())
    (both, alone), (many, few) = stops.accuracy.mean(1)[:2].tolist(), stops.loops_used.mean(1)[:2].tolist()
    assert f"KL and entropy: accuracy {both:.2f} in {many:.1f} iterations; KL alone: {alone:.2f} in {few:.1f}" in README
