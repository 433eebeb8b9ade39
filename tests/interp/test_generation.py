"""Generation with a cache is what running everything again at each step gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from family_toys import TOYS, Toy, padded, random_tokens
from loopscope.checkpoints.load import load
from loopscope.interp.generation import Sampling, generate
from loopscope.models.basis.tokens import Batch, pad_right
from loopscope.models.core.attention import KeyValues
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.training_free.cache import decode_bypass, decode_looped, prefill
from toy import BatchCentred, assert_close, hook_count, odd_one, settling
from toy import padded as padded_toy

OWN_RULE = (
    "melt",
    "training_free",
)  # what later tokens see of earlier ones is not what the whole pass gives them
CACHED = [name for name in TOYS if not name.startswith(OWN_RULE)]


def step_by_step(
    model: LoopedModel, prompt: Tensor, options: dict, new: int, n_loops: int
) -> tuple[Tensor, Tensor]:
    """One row's most probable tokens, from whole runs."""
    found, tokens = [], prompt[None]
    for _ in range(new):
        logits = model(tokens, n_loops=n_loops, **options)[:, -1]
        found.append(logits[0])
        tokens = torch.cat([tokens, logits.argmax(-1)[:, None]], dim=1)
    return tokens[0, len(prompt) :], torch.stack(found)


@pytest.mark.parametrize("name", CACHED)
def test_cached_generation_of_ragged_prompts_equals_whole_runs(name: str) -> None:
    toy: Toy = TOYS[name]
    model = toy.make().requires_grad_(False)
    if not model.causal:
        with pytest.raises(ValueError, match="is not causal"):
            generate(model, padded(toy, model), 2)
        return
    batch = padded(toy, model)
    batch = Batch(
        batch.tokens,
        batch.mask,
        batch.readout,
        {k: v for k, v in batch.options.items() if not isinstance(v, Tensor)},
    )
    found = generate(model, batch, 3, n_loops=2)
    again = generate(model, batch, 3, n_loops=2, use_cache=False)
    assert torch.equal(found.new, again.new)
    assert_close(found.logits, again.logits)
    for row, length in enumerate(batch.mask.sum(1).tolist()):
        new, logits = step_by_step(model, batch.tokens[row, :length], dict(batch.options), 3, 2)
        assert torch.equal(found.new[row], new)
        assert_close(found.logits[row], logits)
        assert torch.equal(found.tokens[row, length : length + 3], new)
        assert found.mask[row].sum() == length + 3


def test_rows_that_depend_on_one_another_generate_as_in_whole_runs() -> None:
    model, batch = odd_one(BatchCentred), padded_toy()
    found = generate(model, batch, 3, n_loops=2)
    rows = [row[:n].tolist() for row, n in zip(batch.tokens, batch.mask.sum(1), strict=True)]
    for step in range(3):
        tokens, mask = pad_right(rows, max(map(len, rows)))
        logits = model(tokens, n_loops=2, mask=mask)[torch.arange(len(rows)), mask.sum(1) - 1]
        assert_close(found.logits[:, step], logits)
        rows = [[*row, int(top)] for row, top in zip(rows, logits.argmax(-1), strict=True)]


def ragged(name: str) -> tuple[LoopedModel, Batch]:
    toy = TOYS[name]
    model = toy.make().requires_grad_(False)
    return model, padded(toy, model)


@pytest.mark.parametrize("name", ["melt", "melt_raw"])
def test_melt_generates_as_its_rows_say_token_by_token(name: str) -> None:
    """The prompt is one chunk; every later token is a chunk of its own that sees what earlier ones
    left.
    """
    model, batch = ragged(name)
    found = generate(model, batch, 3, n_loops=2)
    for row, length in enumerate(batch.mask.sum(1).tolist()):
        seen: dict[str, KeyValues] = {}
        tokens = found.tokens[row : row + 1, : length + 3]
        for step in range(3):
            first = 0 if step == 0 else length + step - 1
            state = model.begin(tokens[:, : length + step], n_loops=2).rows(pos=slice(first, None))
            new: dict[str, KeyValues] = {}
            end = model.advance(state, supplied=seen or None, store=new)
            last = {
                f"loops.{t}.blocks.{layer}": new[f"loops.1.blocks.{layer}"]
                for t in range(2)
                for layer in range(2)
            }
            seen = {key: _cat(seen.get(key), value) for key, value in last.items()}
            assert_close(found.logits[row, step], model.readout(end)[0, -1])


def _cat(old: KeyValues | None, new: KeyValues) -> KeyValues:
    if old is None:
        return new
    return KeyValues(
        *(
            torch.cat([getattr(old, part), getattr(new, part)], 1)
            for part in ("k", "v", "positions", "mask")
        )
    )


@pytest.mark.parametrize("stash", ["first", "last"])
@pytest.mark.parametrize("decode", ["looped", "bypass"])
@pytest.mark.parametrize("name", ["training_free", "training_free_layers", "training_free_gpt2"])
def test_training_free_generates_by_its_canonical_entries(
    name: str, decode: str, stash: str
) -> None:
    model, batch = ragged(name)
    model.cfg = replace(model.cfg, stash=stash, decode=decode)
    found = generate(model, batch, 3, n_loops=3)
    for row, length in enumerate(batch.mask.sum(1).tolist()):
        state, cache = prefill(model, batch.tokens[row : row + 1, :length], n_loops=3, source=stash)
        for step in range(3):
            assert_close(found.logits[row, step], model.readout(state)[0, -1])
            token = found.new[row : row + 1, step : step + 1]
            if decode == "looped":
                state, cache = decode_looped(model, token, cache, n_loops=3, source=stash)
            else:
                state, cache = decode_bypass(model, token, cache)


def test_an_ordinary_model_generates_as_it_does_unlooped() -> None:
    model, batch = ragged("training_free_blend")
    found, whole = (
        generate(model, batch, 3, n_loops=1),
        generate(model, batch, 3, n_loops=1, use_cache=False),
    )
    assert_close(found.logits, whole.logits)


def test_hooks_act_on_every_step_and_on_one_iteration_alone() -> None:
    model, batch = settling(), padded_toy()
    seen: list[tuple[int, ...]] = []

    def shift(value: Tensor, hook: object) -> Tensor:
        seen.append(tuple(value.shape))
        return value + torch.linspace(-3.0, 3.0, value.shape[-1], dtype=value.dtype)

    plain = generate(model, batch, 3, n_loops=3)
    with model.hooks([("loops.1.blocks.0.hook_resid_post", shift)], n_loops=3):
        steered = generate(model, batch, 3, n_loops=3)
        whole = generate(model, batch, 3, n_loops=3, use_cache=False)
    assert [shape[1] for shape in seen[:3]] == [batch.tokens.shape[1], 1, 1]
    assert_close(steered.logits, whole.logits)
    assert not torch.allclose(steered.logits, plain.logits)
    assert hook_count(model) == 0


def test_a_row_that_has_stopped_gets_no_more_tokens() -> None:
    model, batch = settling(), padded_toy()
    free = generate(model, batch, 5)
    stop = int(free.new[0, 1])
    stopped = generate(model, batch, 5, stop_at=stop)
    for row in range(len(batch)):
        hits = (free.new[row] == stop).nonzero()
        kept = int(hits[0]) + 1 if len(hits) else 5
        assert torch.equal(stopped.new[row, :kept], free.new[row, :kept])
        assert not stopped.new[row, kept:].any()
        assert stopped.mask[row].sum() == batch.mask[row].sum() + kept


def test_sampling_is_seeded_and_follows_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, 4)
    draws = Sampling(temperature=0.5).choose(logits, torch.Generator().manual_seed(0))
    shares = draws.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), atol=0.03, rtol=0.0)
    two = Sampling(temperature=1.0, top_k=2).choose(logits, torch.Generator().manual_seed(0))
    assert set(two.tolist()) == {0, 1}
    nucleus = Sampling(temperature=1.0, top_p=0.7).choose(logits, torch.Generator().manual_seed(0))
    assert set(nucleus.tolist()) == {0, 1}
    model = settling()
    first, second, other = (
        generate(model, padded_toy(), 4, sampling=Sampling(3.0, seed=seed)).new
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p must be finite and above 0 and at most 1, got 0"),
    ],
)
def test_sampling_that_cannot_be_is_refused(sampling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**sampling)


def test_too_many_positions_are_refused() -> None:
    toy = TOYS["ouro"]
    model = toy.make()
    with pytest.raises(
        ValueError, match="60 new tokens need 66 positions, but this model has n_ctx=64"
    ):
        generate(model, random_tokens(model), 60)


@pytest.mark.parametrize(
    "stop_at", [28, [28], [3, 28], (28,), torch.tensor([28]), torch.tensor(28), np.int64(28)]
)
def test_a_row_stops_after_any_of_the_tokens(stop_at: object) -> None:
    model, batch = settling(), padded_toy()
    with model.hooks([("ln_final.hook_normalized", toward(model, 28))], n_loops=4):
        found = generate(model, batch, 3, stop_at=stop_at)
        assert torch.equal(found.new, torch.full((3, 1), 28))
        assert generate(model, batch, 3, stop_at=[27]).new.tolist() == [[28] * 3] * 3


def toward(model: LoopedModel, token: int) -> Callable[[Tensor, HookPoint], Tensor]:
    """Make a token the answer."""
    direction = 50.0 * model.W_U[:, token]
    return lambda value, hook: value + direction


def test_a_token_to_stop_at_may_be_given_as_its_text() -> None:
    model = load("ltg_trained")
    prompt = ["<e_24><r_0><r_7>"]
    free = generate(model, prompt, 3, 4).new[0].tolist()
    first = model.to_str_tokens(torch.tensor(free))[0]
    for stop_at in (first, [first], ["<e_1>", first], [free[0]]):
        assert generate(model, prompt, 3, 4, stop_at=stop_at).new.tolist() == [free[:1]]


@pytest.mark.parametrize(
    ("stop_at", "error", "words"),
    [
        ([29], ValueError, r"stop_at must be tokens in 0\.\.28 \(d_vocab=29\), got 29"),
        (-1, ValueError, r"stop_at must be tokens in 0\.\.28 \(d_vocab=29\), got -1"),
        (2.0, TypeError, r"stop_at must be a token id, the text of one token, .* got 2\.0"),
        ([[28]], TypeError, r"stop_at must be a token id, .* got \[28\]"),
    ],
)
def test_what_is_no_token_cannot_stop(stop_at: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        generate(settling(), padded_toy(), 2, stop_at=stop_at)
