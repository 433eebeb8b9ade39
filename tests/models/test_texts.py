"""Calls as TransformerLens's users write them: texts and batches in, losses and texts out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from golden_cases import GOLDEN
from language_toys import make_tokenizer
from loopscope.checkpoints.load import load
from loopscope.interp.generation import generate
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.basis.tokens import Batch, Vocabulary
from loopscope.models.core.base import LoopedModel
from toy import padded, toy

TEXTS = ["the cat", "a dog sat on the mat"]


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoopedModel:
    folder = tmp_path_factory.mktemp("texts") / "ouro"
    shutil.copytree(GOLDEN / "ouro", folder)
    make_tokenizer(folder, 40, adds_bos=request.param)
    return load(folder).double().requires_grad_(False)


def test_special_tokens_are_those_of_the_tokenizer_unless_one_says_otherwise(
    model: LoopedModel,
) -> None:
    theirs = model.tokenizer
    for text in TEXTS:
        bare = theirs(text, add_special_tokens=False)["input_ids"]
        assert model.to_tokens(text)[0].tolist() == theirs(text)["input_ids"]
        assert model.to_tokens(text, prepend_bos=False)[0].tolist() == bare
        assert model.to_tokens(text, prepend_bos=True)[0].tolist() == [0, *bare]
        assert "".join(model.to_str_tokens(text, prepend_bos=True)) == f"<s>{text}"
    batch = model.encode(TEXTS, prepend_bos=True)
    assert batch.tokens[:, 0].tolist() == [theirs.bos_token_id] * 2
    assert batch.readout.tolist() == (batch.mask.sum(1) - 1).tolist()
    lens = readout_lens(model, TEXTS)
    assert torch.equal(lens.heads_input, readout_lens(model, model.encode(TEXTS)).heads_input)


def test_texts_batches_and_tokens_give_the_same_logits(model: LoopedModel) -> None:
    batch = model.encode(TEXTS)
    expected = model(batch.tokens, mask=batch.mask)
    assert torch.equal(model(TEXTS), expected)
    assert torch.equal(model(batch), expected)
    assert torch.equal(model.readout(model.advance(model.begin(batch))), expected)
    for inputs in (TEXTS, batch):
        logits, cache = model.run_with_cache(inputs, names_filter="hook_embed")
        assert torch.equal(logits, expected)
        assert cache["hook_embed"].shape[:2] == batch.tokens.shape
        assert torch.equal(model.run_with_hooks(inputs), expected)
    one, cache = model.run_with_cache(TEXTS[0], remove_batch_dim=True)
    assert torch.equal(one, model(TEXTS[0]))
    assert cache["hook_embed"].ndim == 2


def test_the_loss_is_the_mean_over_real_tokens_that_follow_another(model: LoopedModel) -> None:
    batch = model.encode(TEXTS)
    logits, loss = model(batch, return_type="both")
    nats = [
        F.cross_entropy(row[: n - 1], ids[1:n], reduction="none")
        for row, ids, n in zip(logits, batch.tokens, batch.mask.sum(1).tolist(), strict=True)
    ]
    torch.testing.assert_close(loss, torch.cat(nats).mean())
    assert torch.equal(model(TEXTS, return_type="loss"), loss)
    assert torch.equal(model(batch.tokens, mask=batch.mask, return_type="loss"), loss)
    assert model(TEXTS, return_type=None) is None


def test_ids_come_back_as_texts(model: LoopedModel) -> None:
    batch = model.encode(TEXTS, prepend_bos=False)
    assert model.to_string(batch.tokens[1]) == TEXTS[1]
    assert model.to_string(batch.tokens[1].tolist()) == TEXTS[1]
    assert model.to_string(batch.tokens[1:]) == TEXTS[1:]
    made = generate(model, TEXTS, 3)
    assert len(made.text) == 2
    for row, text in enumerate(made.text):
        assert text == model.to_string(made.tokens[row, : int(made.mask[row].sum())])
        assert TEXTS[row] in text
    with pytest.raises(ValueError, match=r"token ids must be in 0\.\.48, got 49"):
        model.to_string([49])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, b: m(b, mask=b.mask), "a Batch and texts have a mask of their own"),
        (lambda m, b: m(TEXTS, mask=b.mask), "a Batch and texts have a mask of their own"),
        (lambda m, b: m(b.tokens, prepend_bos=True), "prepend_bos goes with texts only"),
        (lambda m, b: m(TEXTS, return_type="logit"), "return_type must be 'logits', 'loss'"),
        (lambda m, b: m(b.tokens[:, :1], return_type="loss"), "inputs of at least two tokens"),
        (lambda m, b: m([]), r"tokens must be an integer tensor|at least one of each"),
    ],
)
def test_what_does_not_go_together_is_refused(
    call: Callable[[LoopedModel, Batch], Any], words: str, model: LoopedModel
) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call(model, model.encode(TEXTS))


def test_a_vocabulary_of_whole_words_has_no_token_that_begins_a_text() -> None:
    plain = toy()
    plain.vocab = Vocabulary([f"<e_{i}>" for i in range(28)])
    assert plain.tokenizer is None
    assert plain.to_string(plain.to_tokens("<e_1><e_5>")) == ["<e_1><e_5>"]
    assert plain("<e_1><e_5>").shape == (1, 2, 29)
    assert torch.equal(plain(padded()), plain(padded().tokens, mask=padded().mask))
    with pytest.raises(ValueError, match="no token of this vocabulary begins a text"):
        plain("<e_1>", prepend_bos=True)
