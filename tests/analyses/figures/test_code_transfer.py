"""One code through the iterations of the shipped miniature, against probes by hand."""

from __future__ import annotations

import pytest
import torch

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.figures.dynamics.code_transfer import CodeTransferConfig, figure, run
from loopscope.interp.probes.probe import probe


def test_the_shipped_miniature_keeps_one_code() -> None:
    record = run(CodeTransferConfig())
    assert record.questions == 450
    score, kept = record.matrix.score, record.matrix.kept()
    assert score[:, -1, -1].tolist() == [1.0, 1.0]
    assert score[0, 3, 7] > 0.9  # fitted at loop 3, tested at the last
    assert kept.min() > 0.75
    assert record.control[:, 1:].max() < 0.12
    frame = record.frame()
    assert len(frame) == 2 * 8 * 8
    row = frame[(frame.visit == "loops.3.blocks.1") & (frame.tested == 5)].iloc[0]
    assert row["score"] == score[1, 3, 5].item()
    assert row["control"] == record.control[1, 3].item()
    assert len(figure(record).data) == 2
    assert list(record.summary()["block"]) == ["blocks.0", "blocks.1"]


def test_the_control_is_that_of_a_probe() -> None:
    config = CodeTransferConfig(checkpoint="mini/multi_hop/r2", per_hop=9)
    record, subject = (
        run(config),
        open_subject(SourceConfig(checkpoint=config.checkpoint, per_hop=9)),
    )
    asked = [q for hops in range(2, (subject.trained_hops or 0) + 1) for q in subject.of_hops(hops)]
    batch, answers = subject.encode(asked)
    found = probe(subject.model, batch, answers, types=batch.tokens[:, 0])
    assert found.control is not None
    torch.testing.assert_close(record.control.T.flatten(), found.control)


def test_questions_are_needed() -> None:
    with pytest.raises(ValueError, match="beside its weights"):
        run(CodeTransferConfig(checkpoint="mini/smiles"))
