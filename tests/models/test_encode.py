"""From texts and tokens to batches: padding, vocabularies, and the column where each answer is
read.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopscope.interp.common.inputs import as_batch
from loopscope.models.basis.tokens import Batch, Readout, Vocabulary, pad_right
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BATCH, N_CTX, POS, assert_close, is_close, padded, random_tokens, toy, with_words

TEXTS = ["<t_3><t_9><t_4>", "<t_8>", "<t_1><t_2><t_3><t_4><t_5>"]
ROWS = [[3, 9, 4], [8], [1, 2, 3, 4, 5]]

# Texts


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize(
    ("read_at", "columns", "width"), [("last_real", [2, 0, 4], 5), ("first_pad", [3, 1, 5], 6)]
)
def test_encode_appends_the_column_that_it_reads(
    read_at: str, columns: list[int], width: int, positions: str
) -> None:
    batch = with_words(toy(positions), read_at).encode(TEXTS)
    assert batch.tokens.tolist() == [row + [0] * (width - len(row)) for row in ROWS]
    assert batch.mask.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in ROWS]
    assert batch.readout.tolist() == columns


@pytest.mark.parametrize(
    ("positions", "column", "columns", "width"),
    [
        ("none", 9, 5, 6),
        ("learned", 9, 9, 10),
        ("sinusoidal", 9, 9, 10),
        ("none", 4, 4, 5),
        ("learned", 4, 4, 5),
    ],
)
def test_fixed_column_is_trimmed_only_without_positions(
    positions: str, column: int, columns: int, width: int
) -> None:
    batch = with_words(toy(positions), f"column:{column}").encode(TEXTS)
    assert batch.tokens.shape == (3, width)
    assert batch.readout.tolist() == [columns] * 3


def test_inputs_beyond_the_fixed_column_are_refused() -> None:
    with pytest.raises(
        ValueError, match="read at column 3, so inputs have at most 4 tokens, got 5"
    ):
        with_words(toy(), "column:3").encode(TEXTS)


def test_first_pad_is_clamped_to_the_last_position() -> None:
    texts = ["".join(f"<t_{i}>" for i in range(1, N_CTX + 1)), "<t_1><t_2>"]
    batch = with_words(toy("learned"), "first_pad").encode(texts)
    assert batch.tokens.shape == (2, N_CTX)
    assert batch.readout.tolist() == [N_CTX - 1, 2]
    free = with_words(toy(), "first_pad").encode(texts)
    assert free.tokens.shape == (2, N_CTX + 1)
    assert free.readout.tolist() == [N_CTX, 2]


def test_trimmed_pad_column_equals_the_trained_width() -> None:
    """Without positions every pad column carries the same state, so column 49 of 50 may be read
    right after the longest input.
    """
    model = with_words(toy(), "column:49")
    batch = model.encode(TEXTS)
    assert batch.tokens.shape == (3, 6)
    trimmed = model.readout(model.advance(model.begin(batch.tokens, batch.mask)), batch.readout)
    tokens, mask = pad_right(ROWS, 50)
    assert_close(trimmed, model(tokens, mask=mask)[:, 49])


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_pad_columns_differ_with_positions(positions: str) -> None:
    model = toy(positions)
    tokens, mask = pad_right(ROWS, N_CTX)
    logits = model(tokens, mask=mask)
    assert not is_close(logits[:, 9], logits[:, 10])


def test_one_text_is_a_batch_of_one() -> None:
    model = with_words(toy())
    assert torch.equal(model.encode("<t_3><t_9>").tokens, torch.tensor([[3, 9]]))
    assert torch.equal(model.to_tokens("<t_3><t_9>"), torch.tensor([[3, 9]]))
    assert torch.equal(model.to_tokens(TEXTS)[1], torch.tensor([8, 0, 0, 0, 0]))


def test_encode_without_a_readout_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"does not say where its answers are read; load it with readout='last_real'",
    ):
        with_words(toy(), None).encode(TEXTS)


def test_encode_without_a_vocabulary_is_refused() -> None:
    model = toy()
    model.read_at = Readout("last_real")
    with pytest.raises(ValueError, match="this checkpoint has no vocabulary; load it with vocab="):
        model.encode(TEXTS)
    with pytest.raises(ValueError, match="this checkpoint has no vocabulary"):
        model.to_tokens(TEXTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<t_3><t_77>", r"'<t_77>' is not one of the 29 tokens of this vocabulary \(such as <t_1>"),
        ("t_3", "'t_3' is not one of"),
        ("<t_3", "'<' is not one of"),
        ("", "at least one token, got an empty one"),
    ],
)
def test_text_outside_the_vocabulary_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_words(toy()).encode([text])


def test_encode_of_no_text_is_refused() -> None:
    """With a sentence of ours, not with that of an empty maximum."""
    with pytest.raises(ValueError, match="at least one"):
        with_words(toy()).encode([])


def test_tokens_and_back() -> None:
    model = with_words(toy())
    assert model.to_str_tokens("<t_3><t_9>") == ["<t_3>", "<t_9>"]
    assert model.to_str_tokens(torch.tensor([3, 0, 28])) == ["<t_3>", "<pad>", "<t_28>"]
    assert model.to_single_token("<t_9>") == 9
    with pytest.raises(ValueError, match="'<t_3><t_9>' is 2 tokens, not one"):
        model.to_single_token("<t_3><t_9>")


# Vocabularies, batches and readouts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["<a>", "<b>", "<a>"], "'<a>' occurs more often"),
        (["<a>", "<pad>"], "must have id 0, got 1"),
    ],
)
def test_wrong_vocabularies_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vocabulary(words)


def test_pad_comes_first_in_a_vocabulary() -> None:
    assert (
        Vocabulary(["<a>", "<b>"]).words
        == Vocabulary(["<pad>", "<a>", "<b>"]).words
        == ("<pad>", "<a>", "<b>")
    )


def test_batches_are_cut_and_moved() -> None:
    batch = padded()
    assert len(batch) == BATCH
    part = batch[1:]
    assert torch.equal(part.tokens, batch.tokens[1:])
    assert torch.equal(part.mask, batch.mask[1:])
    assert torch.equal(part.readout, batch.readout[1:])
    assert torch.equal(batch[torch.tensor([2, 0])].readout, batch.readout[[2, 0]])
    assert batch.to("meta").tokens.device.type == "meta"


@pytest.mark.parametrize("text", ["last_real", "first_pad", "column:49", "column:0"])
def test_readouts_are_written_and_read(text: str) -> None:
    assert str(Readout.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "middle", "column", "column:", "column:-1", "column:x", "last_real:3", "Last_real"]
)
def test_wrong_readouts_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=f"readout must be 'last_real', 'first_pad' or 'column:K', got '{text}'"
    ):
        Readout.parse(text)


@pytest.mark.parametrize(
    ("kind", "column"), [("column", None), ("column", -1), ("last_real", 3), ("first_pad", 0)]
)
def test_readout_column_goes_with_its_kind_only(kind: str, column: int | None) -> None:
    with pytest.raises(
        ValueError, match="a fixed readout column must be given with kind 'column' only"
    ):
        Readout(kind, column)


# What the methods take as inputs


def test_tokens_with_a_readout_column_are_a_batch(plain: RecurrentDepth) -> None:
    tokens = random_tokens()
    batch = as_batch(plain, tokens, -1)
    assert torch.equal(batch.readout, torch.full((BATCH,), POS - 1))
    assert torch.equal(batch.mask, torch.ones(BATCH, POS))
    assert as_batch(plain, tokens, torch.tensor([0, -2, 3])).readout.tolist() == [0, POS - 2, 3]
    assert as_batch(with_words(plain), TEXTS).readout.tolist() == [2, 0, 4]
    again = as_batch(plain, batch)
    assert isinstance(again, Batch)
    assert torch.equal(again.readout, batch.readout)


def test_inputs_that_do_not_say_where_they_are_read_are_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(
        ValueError, match="tokens do not say where the answer is read; pass readout="
    ):
        as_batch(plain, random_tokens())
    with pytest.raises(ValueError, match="a Batch says where its answers are read"):
        as_batch(plain, padded(), 3)


@pytest.mark.parametrize("column", [7, -8, torch.tensor([0, 7, 0])])
def test_readout_columns_outside_the_input_are_refused(
    column: int | Tensor, plain: RecurrentDepth
) -> None:
    with pytest.raises(
        ValueError, match="readout column must be within the 7 positions of the input"
    ):
        as_batch(plain, random_tokens(), column)
