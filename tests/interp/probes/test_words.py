"""Words that a call does not know; the shapes stage would refuse them by their annotation."""

from __future__ import annotations

import pytest
import torch

from loopscope.interp.edit.realignment import realign
from loopscope.interp.probes.differences import difference_probe
from loopscope.interp.probes.probe import probe
from toy import LOOPS, padded, toy


def test_unknown_words_are_refused() -> None:
    model, three = toy(), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="'ridge' or 'logistic', got 'svm'"):
        probe(model, padded(), three, n_loops=LOOPS, types=three, kind="svm")  # type: ignore[arg-type]
    with (
        pytest.raises(ValueError, match="'replace', 'rescale' or 'blend'"),
        realign(model, 1, how="turn", n_loops=LOOPS),  # type: ignore[arg-type]
    ):
        pass
    with pytest.raises(ValueError, match=r"one bool per pair.*got torch.int64"):
        difference_probe(model, padded(), padded(1), three, n_loops=LOOPS)
