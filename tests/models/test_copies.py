"""A copy of a model, also by way of a file, is a model of its own: hooks and weights are apart."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopscope
from toy import D_VOCAB, random_tokens, toy

TOKENS = random_tokens()
LAST = "loops.1.blocks.0.hook_resid_post"


class Own(nn.Module):
    """A looped module of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layers = nn.Embedding(D_VOCAB, 6), nn.ModuleList([nn.Linear(6, 6)])
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, D_VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for _ in range(2):
            x = self.layers[0](x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MODELS: dict[str, Callable[[], Any]] = {
    "a family": lambda: toy(n_loops=2),
    "wrapped": lambda: loopscope.wrap(
        Own(), "layers", 2, norm="norm", head="head", batch_independent=False
    ),
    "untied": lambda: loopscope.untied(toy(), 2),
    "unrolled": lambda: loopscope.unrolled(toy(), 2),
    "folded": lambda: loopscope.unrolled(toy("learned"), 2, fold_ln=True),
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
}


def doubled(value: Tensor, hook: object) -> Tensor:
    return 2 * value


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(kind: str, way: str) -> None:
    model = MODELS[kind]()
    site = "blocks.2.hook_resid_post" if kind in ("unrolled", "folded") else LAST
    expected = model(TOKENS)
    changed = model.run_with_hooks(TOKENS, fwd_hooks=[(site, doubled)])
    assert not torch.equal(changed, expected)

    other = WAYS[way](model)
    assert type(other) is type(model)
    assert torch.equal(other(TOKENS), expected)
    assert torch.equal(other.run_with_hooks(TOKENS, fwd_hooks=[(site, doubled)]), changed)
    (logits, cache), (same, kept) = (each.run_with_cache(TOKENS) for each in (other, model))
    assert torch.equal(logits, same)
    assert torch.equal(cache[site], kept[site])

    other.add_hook(site, doubled)
    assert torch.equal(other(TOKENS), changed)
    assert torch.equal(model(TOKENS), expected)
    model.add_hook(site, doubled)
    other.reset_hooks()
    assert torch.equal(other(TOKENS), expected)
    assert torch.equal(model(TOKENS), changed)
    model.reset_hooks()

    source = getattr(other, "_source", other)
    for parameter in source.parameters():
        parameter.zero_()
    assert not torch.equal(other(TOKENS), expected)
    assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_copy_keeps_the_hooks_and_the_mode(kind: str) -> None:
    model = MODELS[kind]()
    site = "blocks.2.hook_resid_post" if kind in ("unrolled", "folded") else LAST
    model.add_hook(site, doubled)
    expected = model(TOKENS)
    model.train()
    other = copy.deepcopy(model)
    assert other.training
    assert torch.equal(other(TOKENS), expected)


@torch.enable_grad()
def test_a_view_of_weights_with_gradients_is_copied_with_them() -> None:
    model = loopscope.unrolled(toy(), 2)
    other = copy.deepcopy(model)
    assert other.W_U.data_ptr() == other._source.W_U.data_ptr() != model.W_U.data_ptr()
    other(TOKENS).sum().backward()
    assert other._source.embedding.grad is not None
    assert model._source.embedding.grad is None


@torch.no_grad()
def test_a_copy_of_a_compiled_module_runs_its_own_weights() -> None:
    model = MODELS["wrapped"]()
    model.compile(backend="eager")
    expected = model(TOKENS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS), expected)
        for parameter in other.parameters():
            parameter.zero_()
        assert not torch.equal(other(TOKENS), expected)


def test_a_wrapped_copy_keeps_its_facts_and_its_parts() -> None:
    model = MODELS["wrapped"]()
    other = pickle.loads(pickle.dumps(model))
    assert (other.causal, other.batch_independent) == (True, False)
    assert type(other).__name__ == "WrappedOwn"
    assert other.module.layers[0] is other.schedule()[0].block
    assert other.layout.embedding is other.module.words
    assert other.hook_names() == model.hook_names()
    assert type(MODELS["wrapped"]()) is not type(loopscope.wrap(Own(), "layers", 2))
