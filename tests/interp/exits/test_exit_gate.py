"""The exit gate's figure, on the Ouro toy: against the definition, and against single runs."""

from __future__ import annotations

import math

import pytest
import torch

from golden_cases import GOLDEN
from loopscope.analyses.common.inputs_of import Asked, Group
from loopscope.analyses.common.subject import Subject
from loopscope.analyses.figures.answers import exit_gate
from loopscope.analyses.figures.answers.exit_gate import ExitGateConfig
from loopscope.checkpoints.load import load
from loopscope.models.basis.tokens import Batch

OURO, LOOPS, LENGTHS = str(GOLDEN / "ouro"), 4, (7, 4, 5)
SPOTS = [(i, p) for i, n in enumerate(LENGTHS) for p in range(n)]
THRESHOLDS = (0.0, 0.35, 0.6, 1.0)


def asked() -> Asked:
    """Three inputs of unequal length on the Ouro toy in float64."""
    tokens = torch.randint(1, 49, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
    batch = Batch(tokens * mask, mask, torch.tensor(LENGTHS) - 1)
    return Asked(
        Subject("ouro", load(OURO).double(), {}, None, {}), Group(None, ("a", "b", "c"), batch)
    )


@pytest.fixture(scope="module")
def record() -> exit_gate.ExitGate:
    return exit_gate.measure(asked(), asked().group(), THRESHOLDS)


@pytest.mark.shapes
def test_the_distribution_is_that_of_its_definition(record: exit_gate.ExitGate) -> None:
    batch, model = asked().group().batch, asked().subject.model
    cache = model.run_with_cache(
        batch.tokens, mask=batch.mask, n_loops=LOOPS, names_filter="loops.*.hook_exit_logit"
    )[1]
    assert record.tokens[1] == tuple(f"#{i}" for i in batch.tokens[1, :4].tolist())
    for k, (i, p) in enumerate(SPOTS):
        left, total = 1.0, 0.0
        for t in range(LOOPS):
            now = 1 / (1 + math.exp(-float(cache[f"loops.{t}.hook_exit_logit"][i, p])))
            chance = left * now if t < LOOPS - 1 else left
            left, total = left - chance, total + chance
            assert float(record.exit_now[t, k]) == pytest.approx(now, abs=1e-9)
            assert float(record.pdf[t, k]) == pytest.approx(chance, abs=1e-9)
            assert float(record.cdf[t, k]) == pytest.approx(total, abs=1e-9)
    expected = sum((t + 1) * record.pdf[t] for t in range(LOOPS))
    torch.testing.assert_close(record.expected(), expected, rtol=0, atol=1e-12)


def test_each_threshold_reads_the_first_iteration_that_reaches_it(
    record: exit_gate.ExitGate,
) -> None:
    batch, model = asked().group().batch, asked().subject.model
    with torch.no_grad():
        tops = [
            model(batch.tokens, n_loops=t + 1, mask=batch.mask).argmax(-1) for t in range(LOOPS)
        ]
    for j, threshold in enumerate(THRESHOLDS):
        for k, (i, p) in enumerate(SPOTS):
            first = next(t for t in range(LOOPS) if float(record.cdf[t, k]) >= threshold)
            assert int(record.used[j, k]) == first + 1
            assert bool(record.agrees[j, k]) == bool(tops[first][i, p] == tops[-1][i, p])
    table = record.summary()
    assert table["mean iterations"].tolist()[0] == 1.0
    assert table["mean iterations"].tolist()[-1] == LOOPS
    assert table["same top token as after all"].tolist()[-1] == 1.0
    assert table["same top token as after all"].tolist()[0] < 1.0
    assert table["mean iterations"].is_monotonic_increasing


def test_the_frame_has_a_row_for_each_token_and_iteration(record: exit_gate.ExitGate) -> None:
    frame = record.frame()
    assert len(frame) == len(SPOTS) * LOOPS
    second = frame[(frame["input"] == 1) & (frame["position"] == 3)]
    torch.testing.assert_close(torch.tensor(second["p"].to_numpy()), record.pdf[:, 7 + 3])


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="RecurrentDepth has no exit gate to read"):
        exit_gate.run(ExitGateConfig(checkpoint="mini/multi_hop/r2", per_hop=1))
    with pytest.raises(ValueError, match=r"probabilities in 0\.\.1, got \(0\.5, 1\.5\)"):
        exit_gate.run(ExitGateConfig(checkpoint=OURO, tokens=(5,), thresholds=(0.5, 1.5)))
    with pytest.raises(ValueError, match="one or more probabilities"):
        exit_gate.run(ExitGateConfig(checkpoint=OURO, tokens=(5,), thresholds=()))


def test_the_figure_shows_the_gate_the_sweep_and_every_token(record: exit_gate.ExitGate) -> None:
    figure = exit_gate.figure(record)
    assert [trace.type for trace in figure.data] == [
        "bar",
        "scatter",
        "scatter",
        "scatter",
        "scatter",
        "heatmap",
    ]
    torch.testing.assert_close(
        torch.tensor(figure.data[0].y, dtype=torch.float64), record.pdf.mean(1)
    )
    assert list(figure.data[3].x) == list(THRESHOLDS)
    cells = figure.data[5]
    assert [len(row) for row in cells.z] == [7, 7, 7]
    assert list(cells.text[1]) == [*record.tokens[1], "", "", ""]
    assert cells.z[1][3] == pytest.approx(float(record.expected()[10]))
    assert math.isnan(cells.z[1][4])
    assert figure.layout.annotations[3].text == "expected exit of each token (iterations)"


def test_long_inputs_are_wrapped_and_the_map_says_what_it_leaves_out() -> None:
    n = 16 * 25 + 3
    pdf = torch.full((2, n), 0.5)
    record = exit_gate.ExitGate(
        tokens=(tuple(f"<t_{i}>" for i in range(n)),),
        exit_now=pdf,
        pdf=pdf,
        cdf=pdf.cumsum(0),
        thresholds=(0.5,),
        used=torch.ones(1, n, dtype=torch.int64),
        agrees=torch.ones(1, n, dtype=torch.bool),
    )
    figure = exit_gate.figure(record)
    assert len(figure.data[5].z) == 24
    assert figure.data[5].text[1][0] == "&lt;t_16&gt;"
    assert figure.layout.annotations[3].text.endswith("the first 24 of 26 lines")
