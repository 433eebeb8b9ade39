"""Dictionaries of stored activations, against the same states in memory in the same order."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from dictionary_toys import FEATURES, MLP_IN, MLP_OUT, coder, dictionary, model, states
from loopscope.interp.dictionaries.dictionary import KINDS, Dictionary, Kind
from loopscope.interp.dictionaries.quality import dictionary_quality
from loopscope.interp.dictionaries.reading import Reading
from loopscope.interp.dictionaries.stored import StoredStates
from loopscope.interp.dictionaries.trainer import DictionaryTraining
from loopscope.interp.dictionaries.training import fit_dictionary, train_dictionary
from loopscope.interp.store.collect import collect
from loopscope.interp.store.reading import ActivationStore
from toy import D_MODEL, LENGTHS, LOOPS, assert_close, padded, randomize_, toy, with_words

pytestmark = pytest.mark.shapes
SITES = ("hook_resid_post", "hook_resid_mid", "hook_mlp_out")
FEW = DictionaryTraining(13, 3, steps=8, batch_size=5, seed=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Several files, each of one example."""
    row = max(LENGTHS) * LOOPS * D_MODEL * 8 * 2 * len(SITES)
    found: ActivationStore = collect(
        model(), padded(), SITES, LOOPS, to=tmp_path_factory.mktemp("kept") / "store",
        batch_size=1, max_bytes=row,
    )  # fmt: skip
    assert len(found) == sum(LENGTHS) > 2 * FEW.batch_size
    return found


def sites(kind: Kind) -> dict[str, Any]:
    return {"hook": MLP_IN, "target": MLP_OUT} if kind == "transcoder" else {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_trains_the_dictionary_that_its_states_train_in_memory(
    kind: Kind, store: ActivationStore
) -> None:
    own = train_dictionary(model(), store, kind=kind, training=FEW, **sites(kind))
    stored = StoredStates(store, model(), own.reading)
    read, written = zip(*islice(stored.without_end(5, FEW.seed), FEW.steps), strict=True)
    assert sum(map(len, read)) > len(store)  # gone through more than once
    targets = list(written) if kind == "transcoder" else None
    same = fit_dictionary(list(read), own.reading, kind, FEW, targets)
    for left, right in zip(own.coders, same.coders, strict=True):
        assert torch.equal(left.W_enc, right.W_enc)
        assert torch.equal(left.decode(left.encode(read_by(own))), right.decode(
            right.encode(read_by(own))))  # fmt: skip
    assert torch.equal(own.losses, same.losses)


def read_by(own: Dictionary) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, own.coders[0].d_in, generator=generator).double()


def test_reads_and_targets_come_in_one_order(store: ActivationStore) -> None:
    reading = Reading.of(model(), LOOPS, MLP_IN, MLP_OUT)
    for seed in (None, 0):
        for x, y in StoredStates(store, model(), reading).batches(4, seed):
            rows = torch.cdist(x.flatten(1), states(MLP_IN).flatten(1)).argmin(1)
            assert_close(states(MLP_IN)[rows], x)
            assert_close(states(MLP_OUT)[rows], y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_is_measured_as_its_states_are_in_memory(
    kind: Kind, store: ActivationStore
) -> None:
    own = dictionary(kind)
    found, expected = (dictionary_quality(model(), own, each) for each in (store, padded()))
    for name in ("explained", "active", "on", "first"):
        assert_close(getattr(found, name), getattr(expected, name))
    assert found.overall == pytest.approx(expected.overall, abs=1e-9)
    assert found.n_reads == expected.n_reads
    assert found.recovered.isnan().all()
    assert expected.recovered.isfinite().all()
    assert len(found.plot().data) == len(expected.plot().data)


def test_a_store_that_does_not_fit_is_refused(store: ActivationStore) -> None:
    with pytest.raises(ValueError, match="made with another model than this model's"):
        train_dictionary(randomize_(toy(), seed=1), store, training=FEW)
    with pytest.raises(ValueError, match="made with another tokenizer"):
        train_dictionary(with_words(toy()), store, training=FEW)
    with pytest.raises(ValueError, match="runs of 4 iterations, but the dictionary reads 3"):
        train_dictionary(model(), store, 3, training=FEW)
    with pytest.raises(
        KeyError, match=r"does not hold vectors of 'loops\.0\.blocks\.0\.hook_resid"
    ):
        train_dictionary(model(), store, hook="blocks.0.hook_resid_pre", training=FEW)
    with pytest.raises(ValueError, match="a store holds those that were collected"):
        dictionary_quality(model(), dictionary("shared"), store, positions=[0])
    narrow = Dictionary(
        "shared", (coder(D_MODEL - 1, 0),), replace(dictionary("shared").reading, mark=""),
        torch.zeros(1, 0),
    )  # fmt: skip
    assert narrow.n_features == FEATURES
    with pytest.raises(ValueError, match=f"reads states of width {D_MODEL - 1}, got width"):
        dictionary_quality(model(), narrow, store)
