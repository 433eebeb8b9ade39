"""Values that annotations refuse before the code can: they are outside of the shapes stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dictionary_toys import dictionary, model
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.dictionaries.controls import pca_dictionary, random_dictionary
from loopscope.interp.dictionaries.graphs.graph import feature_graph
from loopscope.interp.dictionaries.reading import Reading
from loopscope.interp.dictionaries.splice import FeatureEdit, splice
from toy import padded

WIDTH, ROUNDS = 11, 3
READING = Reading("blocks.0.hook_resid_post", "blocks.0.hook_resid_post", ROUNDS)


@pytest.mark.parametrize("make", [pca_dictionary, random_dictionary])
def test_controls_are_of_states_of_the_reading(make: Any) -> None:
    more = () if make is pca_dictionary else (9,)
    for wrong, said in (
        (torch.ones(5, ROUNDS - 1, WIDTH), "3 iterations, width"),
        (torch.ones(5, WIDTH), "3 iterations, width"),
        (torch.full((5, ROUNDS, WIDTH), torch.nan), "hold nan"),
    ):
        with pytest.raises(ValueError, match=said):
            make(wrong, READING, *more, 3)


def test_bools_are_no_features() -> None:
    edit = FeatureEdit(torch.tensor([True, False]))
    why = r"must be integers in 0\.\.16, got \[True, F"
    with pytest.raises(ValueError, match=why), splice(model(), dictionary("shared"), edit):
        pass


@pytest.mark.parametrize("row", [None, "all", [0], 0.0])
def test_a_graph_of_features_is_of_one_example(row: Any) -> None:
    with pytest.raises(TypeError, match=r"number of one example, in 0\.\.2, got"):
        feature_graph(model(), dictionary("shared"), padded(), logit_diff(1, 2), row=row)
