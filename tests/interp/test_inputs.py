"""What may enter a run: numbers of iterations, tokens and masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loopscope.interp.common.inputs import as_batch
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.core.state import checked_loops, checked_mask, checked_tokens
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.views import untied
from toy import BATCH, D_MODEL, D_VOCAB, LOOPS, N_CTX, POS, full, padded, random_tokens, toy

# The number of iterations


def test_number_of_iterations_is_what_the_checkpoint_records(plain: RecurrentDepth) -> None:
    assert torch.equal(plain(random_tokens()), plain(random_tokens(), n_loops=LOOPS))
    assert plain.begin(random_tokens()).n_loops == LOOPS


CALLS: dict[str, Callable[[RecurrentDepth, object], object]] = {
    "forward": lambda model, n: model(random_tokens(), n_loops=n),
    "begin": lambda model, n: model.begin(random_tokens(), n_loops=n),
    "run_with_hooks": lambda model, n: model.run_with_hooks(random_tokens(), n_loops=n),
    "run_with_cache": lambda model, n: model.run_with_cache(random_tokens(), n_loops=n),
    "hook_names": lambda model, n: model.hook_names(n),
    "schedule": lambda model, n: model.schedule(n),
    "readout_lens": lambda model, n: readout_lens(model, full(), n),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("n_loops", "error", "message"),
    [
        (0, ValueError, "n_loops must be at least 1, got 0"),
        (-3, ValueError, "n_loops must be at least 1, got -3"),
        (True, TypeError, "n_loops must be an integer, got bool"),
        (2.0, TypeError, "n_loops"),
        ("2", TypeError, "n_loops"),
    ],
)
def test_wrong_number_of_iterations_is_refused(
    call: str, n_loops: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CALLS[call](toy(), n_loops)


@pytest.mark.parametrize("call", CALLS)
def test_unknown_number_of_iterations_is_refused(call: str) -> None:
    with pytest.raises(
        ValueError, match="this checkpoint records no number of iterations; pass n_loops="
    ):
        CALLS[call](toy(n_loops=None), None)


@pytest.mark.parametrize("n_loops", [2.0, "2", True])
def test_message_about_iterations_that_are_no_integer(n_loops: object) -> None:
    """As a user sees it, without the type checks of the test run."""
    with pytest.raises(
        TypeError, match=f"n_loops must be an integer, got {type(n_loops).__name__}"
    ):
        inspect.unwrap(checked_loops)(n_loops, 4)


def test_untied_copy_runs_only_its_own_number_of_iterations(plain: RecurrentDepth) -> None:
    twin = untied(plain, 3)
    assert twin(random_tokens()).shape == (BATCH, POS, D_VOCAB)
    with pytest.raises(ValueError, match="runs only the n_loops=3 that it was made for, got 2"):
        twin(random_tokens(), n_loops=2)


# Tokens and masks


@pytest.mark.parametrize(
    "call",
    [
        lambda m, t: m(t),
        lambda m, t: m.begin(t),
        lambda m, t: m.run_with_cache(t),
        lambda m, t: as_batch(m, t, 0),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (
            torch.tensor([[1, 2, -1]]),
            ValueError,
            r"tokens must be in 0\.\.28 \(d_vocab=29\), got -1",
        ),
        (
            torch.tensor([[1, 29, 2]]),
            ValueError,
            r"tokens must be in 0\.\.28 \(d_vocab=29\), got 29",
        ),
        (torch.zeros(3, 0, dtype=torch.int64), ValueError, r"at least one of each, got \[3, 0\]"),
        (torch.zeros(0, 3, dtype=torch.int64), ValueError, r"at least one of each, got \[0, 3\]"),
    ],
)
def test_wrong_tokens_are_refused(
    tokens: Tensor, error: type[Exception], message: str, call: Callable, plain: RecurrentDepth
) -> None:
    with pytest.raises(error, match=message):
        call(plain, tokens)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(3, 7), torch.zeros(3, 7, dtype=torch.bool), [[1.0, 2]], "<t_1>"]
)
def test_tokens_of_a_wrong_type_are_refused(tokens: object) -> None:
    with pytest.raises(TypeError, match=r"tokens must be an integer tensor \[batch, pos\], got"):
        checked_tokens(tokens, D_VOCAB)


def test_tokens_of_three_axes_are_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match=r"must have the shape \[batch, pos\].*got \[2, 3, 4\]"):
        plain.begin(torch.ones(2, 3, 4, dtype=torch.int64))


def test_tokens_of_one_axis_are_a_batch_of_one(model: RecurrentDepth) -> None:
    """A forward takes what `begin` takes."""
    tokens = random_tokens()
    assert torch.equal(model(tokens[1]), model(tokens[1:2]))
    state = model.begin(tokens[1], torch.tensor([1, 1, 1, 1, 0, 0, 0]))
    assert state.resid.shape == (1, POS, D_MODEL)
    assert torch.equal(state.mask, torch.tensor([[True] * 4 + [False] * 3]))


def test_tokens_may_be_int32(plain: RecurrentDepth) -> None:
    assert torch.equal(plain(random_tokens().int()), plain(random_tokens()))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_input_longer_than_positions_allow_is_refused(positions: str) -> None:
    model = toy(positions)
    assert model(random_tokens(pos=N_CTX)).shape == (BATCH, N_CTX, D_VOCAB)
    with pytest.raises(ValueError, match="at most n_ctx=11 positions in this model, got 12"):
        model(random_tokens(pos=N_CTX + 1))


def test_without_positions_any_length_goes(plain: RecurrentDepth) -> None:
    assert plain(random_tokens(pos=40), n_loops=1).shape == (BATCH, 40, D_VOCAB)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            [[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1] * 7],
            "row 1 starts with padding; left padding is not supported, pad on the right",
        ),
        (
            [[1] * 7, [1] * 7, [1, 1, 0, 1, 1, 0, 0]],
            "ones then zeros along pos, but row 2 has real tokens after padding",
        ),
        ([[0] * 7, [1] * 7, [1] * 7], "row 0 starts with padding"),
        ([[1] * 6] * 3, r"mask must have the tokens' shape \[3, 7\], got \[3, 6\]"),
        ([[1] * 7] * 2, r"mask must have the tokens' shape \[3, 7\], got \[2, 7\]"),
        ([1] * 7, r"mask must have the tokens' shape \[3, 7\], got \[1, 7\]"),
        ([[2] * 7] * 3, "must hold only ones"),
        ([[1, 1, 1, -1, 0, 0, 0]] * 3, "must hold only ones"),
        ([[1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]] * 3, "must hold only ones"),
    ],
)
def test_wrong_masks_are_refused(mask: list, message: str, plain: RecurrentDepth) -> None:
    for call in (
        plain.begin,
        lambda tokens, mask: plain(tokens, mask=mask),
        lambda tokens, mask: plain.run_with_cache(tokens, mask=mask),
    ):
        with pytest.raises(ValueError, match=message):
            call(random_tokens(), torch.tensor(mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32])
def test_masks_of_any_type(dtype: torch.dtype, plain: RecurrentDepth) -> None:
    batch = padded()
    assert torch.equal(checked_mask(batch.mask.to(dtype), batch.tokens), batch.mask.bool())
    assert torch.equal(
        plain(batch.tokens, mask=batch.mask.to(dtype)), plain(batch.tokens, mask=batch.mask)
    )


def test_mask_of_ones_is_no_mask(model: RecurrentDepth) -> None:
    assert torch.equal(model(random_tokens(), mask=torch.ones(BATCH, POS)), model(random_tokens()))


# Inputs of methods


def test_tokens_and_columns_may_be_lists(plain: RecurrentDepth) -> None:
    tokens = random_tokens()
    expected = as_batch(plain, tokens, torch.tensor([1, 6, 4]))
    for inputs, readout in (
        (tokens.tolist(), [1, 6, 4]),
        (tokens, [-6, 6, -3]),
        (tokens.int(), torch.tensor([1, -1, 4], dtype=torch.int32)),
    ):
        found = as_batch(plain, inputs, readout)
        assert torch.equal(found.tokens.long(), expected.tokens)
        assert torch.equal(found.readout, expected.readout)


@pytest.mark.parametrize(
    ("inputs", "readout", "error", "message"),
    [
        ([[1, 2], [3]], 0, TypeError, "inputs must be a Batch, texts, or unpadded tokens"),
        ([[1, 2], [3, 4]], [0, 1, 1], ValueError, r"there are 2 rows, got the shape \[3\]"),
        ([[1, 2], [3, 4]], 0.5, TypeError, r"the readout column must be an integer, got 0\.5"),
        ([[1, 2], [3, 4]], [0, 2], ValueError, "within the 2 positions of the input"),
        (["<a>", 3], 0, TypeError, "inputs must be a Batch, texts, or unpadded tokens"),
        ([[1.5, 2.0]], 0, TypeError, "tokens must be an integer tensor"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(
    inputs: object,
    readout: object,
    error: type[Exception],
    message: str,
    plain: RecurrentDepth,
) -> None:
    with pytest.raises(error, match=message):
        as_batch(plain, inputs, readout)


@pytest.mark.parametrize(
    ("readout", "error", "message"),
    [
        ([6, -1, 4], ValueError, "the readout columns of a Batch count from 0, got -1"),
        ([6, 7, 4], ValueError, "must be within the 7 positions of the input"),
        ([6, 3], ValueError, r"one readout column per row: there are 3 rows, got the shape \[2\]"),
        (6, ValueError, r"one readout column per row: there are 3 rows, got the shape \[\]"),
        ([6.0, 3.0, 4.0], TypeError, "must be an integer"),
    ],
)
def test_a_batch_is_read_at_a_column_of_each_row(
    readout: object, error: type[Exception], message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(error, match=message):
        as_batch(plain, replace(full(), readout=torch.as_tensor(readout)))


@pytest.mark.parametrize("inputs", [(text for text in ("<t_1>",)), None, 5])
def test_inputs_have_a_length(inputs: object, plain: RecurrentDepth) -> None:
    with pytest.raises(TypeError, match=r"inputs must be a Batch, .*, got a \w+; make a list"):
        as_batch(plain, inputs, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [None, "ltg_trained", torch.nn.Linear(3, 2)])
def test_a_method_asks_for_a_looped_model(model: object) -> None:
    with pytest.raises(TypeError, match=r"must be a looped model, got (NoneType|str|Linear); load"):
        readout_lens(model, full())  # type: ignore[arg-type]


def test_a_batch_has_a_row(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match="at least one input is needed, got a Batch without rows"):
        as_batch(plain, full()[:0])


@pytest.mark.parametrize("size", [0, -2, 1.5])
def test_a_batch_size_is_at_least_one(size: object, plain: RecurrentDepth) -> None:
    error = TypeError if isinstance(size, float) else ValueError
    with pytest.raises(error, match="batch_size must be"):
        readout_lens(plain, full(), batch_size=size)
