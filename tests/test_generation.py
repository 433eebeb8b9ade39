"""Generation with a cache is what running everything again at each step gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from family_toys import TOYS, Toy, padded, random_tokens
from interp.generation import Sampling, generate
from models.base import LoopedModel
from models.tokens import Batch
from toy import assert_close, hook_count, settling
from toy import padded as padded_toy

RECOMPUTES = ("melt", "training_free")  # their rule for the cache is not what the whole pass does; see their own tests
CACHED = [name for name in TOYS if not name.startswith(RECOMPUTES)]


def step_by_step(model: LoopedModel, prompt: Tensor, options: dict, new: int, n_loops: int) -> tuple[Tensor, Tensor]:
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
    batch = Batch(batch.tokens, batch.mask, batch.readout, {k: v for k, v in batch.options.items() if not isinstance(v, Tensor)})
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
    first, second, other = (generate(model, padded_toy(), 4, sampling=Sampling(3.0, seed=seed)).new for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [({"temperature": -1.0}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p must be a probability above 0, got 0")],
)
def test_sampling_that_cannot_be_is_refused(sampling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**sampling)


def test_too_many_positions_are_refused() -> None:
    toy = TOYS["ouro"]
    model = toy.make()
    with pytest.raises(ValueError, match="60 new tokens need 66 positions, but this model has n_ctx=64"):
        generate(model, random_tokens(model), 60)
