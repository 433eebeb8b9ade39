"""Stages of inference of the shipped miniature: what the table says of the method's numbers."""

from __future__ import annotations

import pytest

from loopscope.analyses.figures.dynamics.inference_stages import InferenceStagesConfig, figure, run


def test_late_loops_of_the_shipped_miniature_mix_alike() -> None:
    record = run(InferenceStagesConfig(per_hop=20))
    frame, table = record.frame(), record.summary()
    assert record.inputs == 20
    assert list(table["loop"]) == list(range(8))
    blocks = [frame["mixing"][(frame.loop == 3) & (frame.layer == i)].item() for i in range(2)]
    assert table["mixing"][3] == pytest.approx(sum(blocks) / 2)
    assert table["change of mixing"][0] != table["change of mixing"][0]
    assert table["change of mixing"][1] > 0.05
    assert table["change of mixing"][7] < 0.02
    assert len(figure(record).data) == 4 * 8


def test_a_text_of_ones_own() -> None:
    record = run(InferenceStagesConfig(checkpoint="mini/smiles", text=("CC(=O)N",), n_loops=2))
    assert record.inputs == 1
    assert set(record.frame()["loop"]) == {0, 1}
