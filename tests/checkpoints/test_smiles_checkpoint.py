"""The shipped language model writes molecules, and each of its passes makes it better at it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loopscope.checkpoints.load import load, read_card
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.smollm import SMolLM
from loopscope.tasks.smiles import BOS, SmilesVocabulary, well_formed
from loopscope.training.language.data import to_rows
from loopscope.training.language.recipes import LANGUAGE_RECIPES
from loopscope.training.language.scores import sample_strings, score_passes

NAME = "mini/smiles"


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    return load(NAME)


@pytest.fixture(scope="module")
def strings() -> list[str]:
    return [
        text.removeprefix(BOS).removesuffix("<eos>") for text in read_card(NAME)["held_out_strings"]
    ]


def test_it_is_one_shared_block_with_eight_passes(model: LoopedModel) -> None:
    assert isinstance(model, SMolLM)
    assert (model.cfg.n_layers, model.cfg.n_loops, model.cfg.d_model) == (1, 8, 64)
    assert isinstance(model.vocab, SmilesVocabulary)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


def test_every_pass_predicts_better_than_the_one_before_and_the_last_as_the_card_says(
    model: LoopedModel, strings: list[str]
) -> None:
    scores = score_passes(model, to_rows(strings, LANGUAGE_RECIPES[NAME].context), 8)
    assert all(now < before for before, now in zip(scores.nats, scores.nats[1:], strict=False))
    assert abs(scores.nats[-1] - read_card(NAME)["held_out_nats"]) < 0.05


@pytest.mark.slow
def test_samples_are_well_formed_and_those_of_half_the_passes_less_so(model: LoopedModel) -> None:
    def share(n_loops: int) -> float:
        model.cfg = load(NAME, n_loops=n_loops).cfg
        texts = sample_strings(model, 60, 1, context=64)
        return float(
            np.mean(
                [
                    well_formed(text.removesuffix("<eos>"))
                    for text in texts
                    if text.endswith("<eos>")
                ]
                or [False]
            )
        )

    truncated, whole = share(3), share(8)
    assert whole > 0.85
    assert truncated < whole


def test_a_string_ends_only_where_rings_and_branches_are_closed(
    model: LoopedModel, strings: list[str]
) -> None:
    words = model.vocab
    assert isinstance(words, SmilesVocabulary)
    batch = model.encode([f"{BOS}{text}" for text in strings[:60]])
    with torch.no_grad():
        ends = model(batch.tokens, mask=batch.mask).softmax(-1)[..., words.ids("<eos>")[0]].numpy()
    tokens, real = batch.tokens.numpy(), batch.mask.numpy() == 1
    unfinished = real & ((words.open_rings(tokens) > 0) | (words.branch_depth(tokens) > 0))
    assert unfinished.sum() > 300
    at_the_end = ends[np.arange(len(ends)), batch.readout.numpy()]
    assert at_the_end.mean() > 50 * ends[unfinished].mean()
