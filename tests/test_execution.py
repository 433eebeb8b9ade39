"""begin, advance, readout: what may enter a run, where it may stop, how much it computes, and where answers are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from interp.inputs import as_batch
from interp.lens import readout_lens
from models.recurrent_depth import RecurrentDepth, sinusoids
from models.registry import build, config_from_dict
from models.state import checked_loops, checked_mask, checked_tokens
from models.tokens import Batch, Readout, Vocabulary, pad_right
from models.views import untied
from toy import (
    BATCH,
    D_HEAD,
    D_MLP,
    D_MODEL,
    D_VOCAB,
    HEADS,
    LAYERS,
    LOOPS,
    N_CTX,
    POS,
    assert_close,
    full,
    is_close,
    padded,
    random_tokens,
    toy,
    toy_config,
    with_words,
)

# The whole computation, written down again


def vanilla_block(model: RecurrentDepth, layer: int, x: Tensor) -> Tensor:
    """A pre-LayerNorm GPT-2 block in plain PyTorch, without padding."""
    block = model.blocks[layer]
    normed = F.layer_norm(x, (D_MODEL,), block.ln1.w, block.ln1.b, model.cfg.eps)
    q, k, v = (part.unflatten(-1, (HEADS, D_HEAD)) for part in (normed @ block.attn.W_QKV + block.attn.b_QKV).chunk(3, dim=-1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / D_HEAD**0.5
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(later, -torch.inf).softmax(-1)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(-2)
    x = x + z @ block.attn.W_O_flat + block.attn.b_O
    pre = F.layer_norm(x, (D_MODEL,), block.ln2.w, block.ln2.b, model.cfg.eps) @ block.mlp.W_in + block.mlp.b_in
    gelu_new = 0.5 * pre * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (pre + 0.044715 * pre**3)))
    return x + gelu_new @ block.mlp.W_out + block.mlp.b_out


def written_down_again(model: RecurrentDepth, tokens: Tensor, n_loops: int) -> Tensor:
    x = model.embedding[tokens]
    if model.positional:
        x = x + model.W_pos[: tokens.shape[1]]
    embedded = x
    for loop in range(n_loops):
        if model.cfg.input_injection and loop > 0:
            x = x + embedded
        for layer in range(LAYERS):
            x = vanilla_block(model, layer, x)
    return F.layer_norm(x, (D_MODEL,), model.final_norm.w, model.final_norm.b, model.cfg.eps) @ model.embedding.T


def test_one_iteration_is_the_vanilla_transformer(model: RecurrentDepth) -> None:
    assert_close(model(random_tokens(), n_loops=1), written_down_again(model, random_tokens(), 1))


@pytest.mark.parametrize("n_loops", [2, 5])
def test_more_iterations_are_the_same_blocks_again(n_loops: int, model: RecurrentDepth) -> None:
    assert_close(model(random_tokens(), n_loops=n_loops), written_down_again(model, random_tokens(), n_loops))


def test_sinusoids_are_sines_in_even_and_cosines_in_odd_columns() -> None:
    table = sinusoids(N_CTX, D_MODEL)
    assert table.shape == (N_CTX, D_MODEL)
    for position, column in ((0, 0), (3, 0), (3, 1), (7, 8), (10, 33), (10, 34)):
        angle = torch.tensor(position * 10000.0 ** (-(column // 2 * 2) / D_MODEL))
        torch.testing.assert_close(table[position, column], angle.sin() if column % 2 == 0 else angle.cos())


# begin, advance, readout


def test_forward_is_begin_advance_readout(model: RecurrentDepth) -> None:
    batch = padded()
    state = model.advance(model.begin(batch.tokens, batch.mask, n_loops=3))
    logits = model(batch.tokens, n_loops=3, mask=batch.mask)
    assert logits.shape == (BATCH, POS, D_VOCAB)
    assert torch.equal(model.readout(state), logits)
    at = model.readout(state, batch.readout)
    assert at.shape == (BATCH, D_VOCAB)
    assert_close(at, logits[torch.arange(BATCH), batch.readout])
    assert_close(model.unembed(model.read_state(state)), logits)


def test_begin_holds_the_embedding(model: RecurrentDepth) -> None:
    batch = padded()
    state = model.begin(batch.tokens, batch.mask, n_loops=3)
    assert (state.visit, state.n_loops) == (0, 3)
    assert torch.equal(state.mask, batch.mask.bool())
    assert torch.equal(state.positions, torch.arange(POS).expand(BATCH, POS))
    embedded = model.W_E[batch.tokens] + (model.W_pos[:POS] if model.positional else 0)
    assert torch.equal(state.resid, embedded)


def test_state_is_frozen(plain: RecurrentDepth) -> None:
    state = plain.begin(random_tokens())
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'visit'"):
        state.visit = 3


def test_schedule_lists_the_visits_in_order(model: RecurrentDepth) -> None:
    visits = model.schedule(3)
    assert [visit.name for visit in visits] == [f"loops.{t}.blocks.{layer}" for t in range(3) for layer in range(LAYERS)]
    assert [(visit.index, visit.loop, visit.layer) for visit in visits] == [(i, i // LAYERS, i % LAYERS) for i in range(3 * LAYERS)]
    assert all(visit.block is model.blocks[visit.layer] for visit in visits)
    assert model.iteration_ends(3) == [2, 4, 6]
    assert model.schedule() == model.schedule(LOOPS)


@pytest.mark.parametrize(
    ("until", "stop"),
    [(0, 0), (3, 3), ("loops.1.blocks.1", 3), ("loops.0.blocks.0", 0), ("loops.2", 4), ("loops.3.blocks.1", 7), (8, 8), (None, 8)],
)
def test_advance_stops_before_a_visit(until: int | str | None, stop: int, model: RecurrentDepth) -> None:
    state = model.advance(model.begin(random_tokens()), until)
    assert state.visit == stop
    _, cache = model.run_with_cache(random_tokens(), names_filter="**.hook_resid_post")
    expected = model.begin(random_tokens()).resid if stop == 0 else list(cache.values())[stop - 1]
    assert_close(state.resid, expected)


def test_advance_to_where_a_state_stands_changes_nothing(plain: RecurrentDepth) -> None:
    state = plain.advance(plain.begin(random_tokens()), 3)
    assert plain.advance(state, 3) is state
    assert plain.advance(state, "loops.1.blocks.1") is state


@pytest.mark.parametrize("until", ["loops.4", "loops.0.blocks.2", "coda.0", "loop.0", ""])
def test_advance_to_an_unknown_visit_raises(until: str, plain: RecurrentDepth) -> None:
    with pytest.raises(KeyError, match=f"'{until}' is no visit of a schedule with n_loops=4"):
        plain.advance(plain.begin(random_tokens()), until)


@pytest.mark.parametrize("until", [2, -1, 9, "loops.1", "loops.0.blocks.1"])
def test_advance_backwards_or_beyond_raises(until: int | str, plain: RecurrentDepth) -> None:
    state = plain.advance(plain.begin(random_tokens()), 3)
    with pytest.raises(ValueError, match="stands before visit 3 of 8, so it cannot be run to visit"):
        plain.advance(state, until)


def test_untied_copy_runs_only_its_own_number_of_iterations(plain: RecurrentDepth) -> None:
    twin = untied(plain, 3)
    assert twin(random_tokens()).shape == (BATCH, POS, D_VOCAB)
    with pytest.raises(ValueError, match="runs only the n_loops=3 that it was made for, got 2"):
        twin(random_tokens(), n_loops=2)


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
def test_wrong_number_of_iterations_is_refused(call: str, n_loops: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CALLS[call](toy(), n_loops)


@pytest.mark.parametrize("call", CALLS)
def test_unknown_number_of_iterations_is_refused(call: str) -> None:
    with pytest.raises(ValueError, match="this checkpoint records no number of iterations; pass n_loops="):
        CALLS[call](toy(n_loops=None), None)


@pytest.mark.parametrize("n_loops", [2.0, "2", True])
def test_message_about_iterations_that_are_no_integer(n_loops: object) -> None:
    """As a user sees it, without the type checks of the test run."""
    with pytest.raises(TypeError, match=f"n_loops must be an integer, got {type(n_loops).__name__}"):
        inspect.unwrap(checked_loops)(n_loops, 4)


# Tokens and masks


@pytest.mark.parametrize(
    "call", [lambda m, t: m(t), lambda m, t: m.begin(t), lambda m, t: m.run_with_cache(t), lambda m, t: as_batch(m, t, 0)]
)
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.tensor([[1, 2, -1]]), ValueError, r"tokens must be in 0\.\.28 \(d_vocab=29\), got -1"),
        (torch.tensor([[1, 29, 2]]), ValueError, r"tokens must be in 0\.\.28 \(d_vocab=29\), got 29"),
        (torch.zeros(3, 0, dtype=torch.int64), ValueError, r"at least one of each, got \[3, 0\]"),
        (torch.zeros(0, 3, dtype=torch.int64), ValueError, r"at least one of each, got \[0, 3\]"),
    ],
)
def test_wrong_tokens_are_refused(tokens: Tensor, error: type[Exception], message: str, call: Callable, plain: RecurrentDepth) -> None:
    with pytest.raises(error, match=message):
        call(plain, tokens)


@pytest.mark.parametrize("tokens", [torch.zeros(3, 7), torch.zeros(3, 7, dtype=torch.bool), [[1, 2]], "<t_1>"])
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
        ([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1] * 7], "row 1 starts with padding; left padding is not supported, pad on the right"),
        ([[1] * 7, [1] * 7, [1, 1, 0, 1, 1, 0, 0]], "ones then zeros along pos, but row 2 has real tokens after padding"),
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
    for call in (plain.begin, lambda tokens, mask: plain(tokens, mask=mask), lambda tokens, mask: plain.run_with_cache(tokens, mask=mask)):
        with pytest.raises(ValueError, match=message):
            call(random_tokens(), torch.tensor(mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32])
def test_masks_of_any_type(dtype: torch.dtype, plain: RecurrentDepth) -> None:
    batch = padded()
    assert torch.equal(checked_mask(batch.mask.to(dtype), batch.tokens), batch.mask.bool())
    assert torch.equal(plain(batch.tokens, mask=batch.mask.to(dtype)), plain(batch.tokens, mask=batch.mask))


def test_mask_of_ones_is_no_mask(model: RecurrentDepth) -> None:
    assert torch.equal(model(random_tokens(), mask=torch.ones(BATCH, POS)), model(random_tokens()))


# A recurrence sweep is one run


def counted_blocks(model: RecurrentDepth) -> list[int]:
    calls: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *arguments: calls.append(1))
    return calls


def test_recurrence_sweep_runs_each_iteration_once_and_equals_separate_runs() -> None:
    model, batch = toy(), padded()
    calls = counted_blocks(model)
    sweep = readout_lens(model, batch, 40, keep_logits=True).logits
    assert len(calls) == LAYERS * 40
    rows = torch.arange(BATCH), batch.readout
    for r in range(1, 41):
        assert_close(sweep[r - 1], model(batch.tokens, n_loops=r, mask=batch.mask)[rows])


def test_resumed_run_computes_only_what_is_left(plain: RecurrentDepth) -> None:
    state = plain.begin(random_tokens())
    calls = counted_blocks(plain)
    state = plain.advance(state, "loops.3")
    assert len(calls) == 6
    plain.readout(plain.advance(state))
    assert len(calls) == 8


def test_readout_at_positions_normalises_only_those_rows(plain: RecurrentDepth) -> None:
    batch, shapes = padded(), []
    state = plain.advance(plain.begin(batch.tokens, batch.mask))
    plain.final_norm.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    plain.readout(state, batch.readout)
    assert shapes == [(BATCH, 1, D_MODEL)]


# Reading answers

TEXTS = ["<t_3><t_9><t_4>", "<t_8>", "<t_1><t_2><t_3><t_4><t_5>"]
ROWS = [[3, 9, 4], [8], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize(("read_at", "columns", "width"), [("last_real", [2, 0, 4], 5), ("first_pad", [3, 1, 5], 6)])
def test_encode_appends_the_column_that_it_reads(read_at: str, columns: list[int], width: int, positions: str) -> None:
    batch = with_words(toy(positions), read_at).encode(TEXTS)
    assert batch.tokens.tolist() == [row + [0] * (width - len(row)) for row in ROWS]
    assert batch.mask.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in ROWS]
    assert batch.readout.tolist() == columns


@pytest.mark.parametrize(
    ("positions", "column", "columns", "width"),
    [("none", 9, 5, 6), ("learned", 9, 9, 10), ("sinusoidal", 9, 9, 10), ("none", 4, 4, 5), ("learned", 4, 4, 5)],
)
def test_fixed_column_is_trimmed_only_without_positions(positions: str, column: int, columns: int, width: int) -> None:
    batch = with_words(toy(positions), f"column:{column}").encode(TEXTS)
    assert batch.tokens.shape == (3, width)
    assert batch.readout.tolist() == [columns] * 3


def test_inputs_beyond_the_fixed_column_are_refused() -> None:
    with pytest.raises(ValueError, match="read at column 3, so inputs have at most 4 tokens, got 5"):
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
    """Without positions every pad column carries the same state, so column 49 of 50 may be read right after the longest input."""
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
    with pytest.raises(ValueError, match=r"does not say where its answers are read; load it with readout='last_real'"):
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


@pytest.mark.parametrize(
    ("words", "message"), [(["<a>", "<b>", "<a>"], "'<a>' occurs more often"), (["<a>", "<pad>"], "must have id 0, got 1")]
)
def test_wrong_vocabularies_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vocabulary(words)


def test_pad_comes_first_in_a_vocabulary() -> None:
    assert Vocabulary(["<a>", "<b>"]).words == Vocabulary(["<pad>", "<a>", "<b>"]).words == ("<pad>", "<a>", "<b>")


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


@pytest.mark.parametrize("text", ["", "middle", "column", "column:", "column:-1", "column:x", "last_real:3", "Last_real"])
def test_wrong_readouts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"readout must be 'last_real', 'first_pad' or 'column:K', got '{text}'"):
        Readout.parse(text)


@pytest.mark.parametrize(("kind", "column"), [("column", None), ("column", -1), ("last_real", 3), ("first_pad", 0)])
def test_readout_column_goes_with_its_kind_only(kind: str, column: int | None) -> None:
    with pytest.raises(ValueError, match="a fixed readout column must be given with kind 'column' only"):
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
    with pytest.raises(ValueError, match="tokens do not say where the answer is read; pass readout="):
        as_batch(plain, random_tokens())
    with pytest.raises(ValueError, match="a Batch says where its answers are read"):
        as_batch(plain, padded(), 3)


@pytest.mark.parametrize("column", [7, -8, torch.tensor([0, 7, 0])])
def test_readout_columns_outside_the_input_are_refused(column: int | Tensor, plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match="readout column must be within the 7 positions of the input"):
        as_batch(plain, random_tokens(), column)


# Configurations and weight views


def test_weight_views_show_the_models_own_weights(plain: RecurrentDepth) -> None:
    attn, mlp = plain.blocks[1].attn, plain.blocks[1].mlp
    shapes = {
        "W_Q": (HEADS, D_MODEL, D_HEAD),
        "W_K": (HEADS, D_MODEL, D_HEAD),
        "W_V": (HEADS, D_MODEL, D_HEAD),
        "W_O": (HEADS, D_HEAD, D_MODEL),
        "b_Q": (HEADS, D_HEAD),
        "b_K": (HEADS, D_HEAD),
        "b_V": (HEADS, D_HEAD),
        "b_O": (D_MODEL,),
    }
    assert {name: tuple(getattr(attn, name).shape) for name in shapes} == shapes
    assert (tuple(mlp.W_in.shape), tuple(mlp.W_out.shape)) == ((D_MODEL, D_MLP), (D_MLP, D_MODEL))
    assert (tuple(plain.W_E.shape), tuple(plain.W_U.shape), tuple(plain.b_U.shape)) == ((D_VOCAB, D_MODEL), (D_MODEL, D_VOCAB), (D_VOCAB,))
    owners = {"W_Q": attn.W_QKV, "W_K": attn.W_QKV, "W_V": attn.W_QKV, "W_O": attn.W_O_flat, "b_Q": attn.b_QKV, "b_V": attn.b_QKV}
    for name, owner in owners.items():
        assert getattr(attn, name).untyped_storage().data_ptr() == owner.untyped_storage().data_ptr(), name
    with torch.no_grad():
        attn.W_K[3].zero_()
    assert attn.W_QKV[:, D_MODEL + 3 * D_HEAD : D_MODEL + 4 * D_HEAD].abs().max() == 0
    assert attn.W_Q.abs().min() > 0


def test_config_is_frozen_and_goes_through_a_dictionary() -> None:
    cfg = toy_config("learned", True)
    assert (cfg.d_head, cfg.n_layers, cfg.n_loops) == (D_HEAD, LAYERS, LOOPS)
    assert config_from_dict(cfg.to_dict()) == cfg
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'd_model'"):
        cfg.d_model = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_loops": 0}, "n_loops must be at least 1, got 0"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"n_heads": 4}, r"n_heads must divide d_model: 4 heads do not divide d_model=35; pass one of \[1, 5, 7, 35\]"),
        ({"n_ctx": 5}, "n_ctx must be given with positions and only then"),
        ({"positions": "learned"}, "n_ctx must be given with positions and only then"),
        ({"d_modle": 3}, "has no field 'd_modle'"),
        ({"family": "other"}, r"the family must be one of \['recurrent_depth'\], got 'other'"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({**toy_config().to_dict(), **changes})


def test_unknown_positions_are_refused() -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?s)positions.*rotary"):  # TypeError where the test run checks types
        toy_config("rotary")


def test_missing_field_is_refused() -> None:
    values = toy_config().to_dict()
    del values["d_mlp"]
    with pytest.raises(ValueError, match="needs the field 'd_mlp'"):
        config_from_dict(values)


def test_models_are_built_in_eval_mode() -> None:
    model = build(toy_config())
    assert not any(module.training for module in model.modules())


def test_until_is_no_truth_value(plain: RecurrentDepth) -> None:
    with pytest.raises(TypeError, match="until must be a visit's index"):
        plain.advance(plain.begin(random_tokens()), True)


def test_state_parts_are_what_an_analysis_may_read() -> None:
    injecting = toy("none", True)
    state = injecting.begin(random_tokens(), n_loops=2)
    parts = injecting.state_parts(state)
    assert set(parts) == {"resid", "input"}
    assert torch.equal(parts["input"], injecting.W_E[random_tokens()])
