"""Dictionaries inside a run, each against the same change made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dictionary_toys import dictionary, model
from loopscope.interp.dictionaries.dictionary import KINDS, Dictionary, Kind
from loopscope.interp.dictionaries.splice import FeatureEdit, splice
from toy import (
    BATCH,
    LOOPS,
    POS,
    assert_close,
    cached,
    full,
    hook_count,
    padded,
    randomize_,
    run,
    run_hooked,
    toy,
)

pytestmark = pytest.mark.shapes


def reference(own: Dictionary) -> object:
    return full() if own.kind == "crosscoder" else None


def codes_at(own: Dictionary, loop: int) -> Tensor:
    """The codes of a clean run at one iteration, "batch pos feature"."""
    found = cached(model(), full(), own.reading.names)
    states = torch.stack([found[name] for name in own.reading.names], 2).flatten(0, 1)
    return own.encode(states).expand(-1, LOOPS, -1)[:, loop].unflatten(0, (BATCH, POS))


@pytest.mark.parametrize("kind", KINDS)
def test_with_its_error_a_dictionary_changes_nothing(kind: Kind) -> None:
    own = dictionary(kind)
    clean = run(model(), full())
    with splice(model(), own, reference=reference(own)):
        assert torch.equal(run(model(), full()), clean)
    with splice(model(), own, error=False, reference=reference(own)):
        assert not torch.allclose(run(model(), full()), clean)
    assert hook_count(model()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_error_the_sum_of_the_features_is_left(kind: Kind) -> None:
    own = dictionary(kind)
    codes = codes_at(own, 2)
    written = codes @ own.directions(2) + own.bias(2)
    by_hand = run_hooked(model(), full(), own.reading.written[2], lambda value, hook: written)
    with splice(model(), own, loops=2, error=False, reference=reference(own)):
        assert_close(run(model(), full()), by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_taken_out_and_added_at_one_iteration_and_column(kind: Kind) -> None:
    own = dictionary(kind)
    codes = codes_at(own, LOOPS - 1)
    feature = int(codes[:, 2].sum((0, 1)[:1]).argmax())

    def by_hand(value: Tensor, hook: object) -> Tensor:
        changed = value.clone()
        direction = own.directions(LOOPS - 1)[feature]
        changed[:, 2] += (1.5 - codes[:, 2, feature, None]) * direction
        return changed

    expected = run_hooked(model(), full(), own.reading.written[-1], by_hand)
    edit = FeatureEdit(feature, loops=LOOPS - 1, positions=2, add=1.5)
    with splice(model(), own, edit, reference=reference(own)):
        assert_close(run(model(), full()), expected)


def test_a_feature_of_each_row_hands_its_activation_to_another() -> None:
    own = dictionary("shared")
    codes = codes_at(own, LOOPS - 1)
    out = codes[:, 3].topk(2).indices
    into = (out + 1) % own.n_features
    new = codes.clone()
    for row in range(BATCH):
        new[row, 3, out[row]] = 0
        for source, target in zip(out[row].tolist(), into[row].tolist(), strict=True):
            new[row, 3, target] += codes[row, 3, source]
    delta = (new - codes) @ own.directions(0)
    expected = run_hooked(model(), full(), own.reading.names[-1], lambda value, hook: value + delta)
    edit = FeatureEdit(out, loops=[LOOPS - 1], positions=[3], into=into)
    with splice(model(), own, edit):
        assert_close(run(model(), full()), expected)


def test_runs_in_bfloat16() -> None:
    small = toy(dtype=torch.bfloat16)
    own = dictionary("shared")
    blank = replace(own, reading=replace(own.reading, mark=""))
    with splice(small, blank, FeatureEdit([0, 3], scale=2.0)):
        assert run(small, full()).isfinite().all()


def test_what_is_refused_leaves_no_hook() -> None:
    shared, crosscoder = dictionary("shared"), dictionary("crosscoder")
    with (
        pytest.raises(ValueError, match="must be given for a crosscoder and only then"),
        splice(model(), shared, reference=full()),
    ):
        pass
    rows = torch.zeros(2, 1, dtype=torch.int64)
    with (
        pytest.raises(ValueError, match="each of the 3 rows, got 2"),
        splice(model(), shared, FeatureEdit(rows)),
    ):
        run(model(), full())
    for edit, why in (
        (FeatureEdit(17), r"must be integers in 0\.\.16, got \[17\]"),
        (FeatureEdit(0, into=-1), r"must be integers in 0\.\.16, got \[-1\]"),
        (FeatureEdit([0, 1], into=[3]), "as many features as features does, got 1 and 2"),
        (FeatureEdit(0, loops=[0]), r"among those of splice, \[1\], got \[0\]"),
    ):
        with pytest.raises(ValueError, match=why), splice(model(), shared, edit, loops=[1]):
            pass
    with pytest.raises(ValueError, match="n_loops"), splice(model(), shared):
        run(model(), full(), LOOPS - 1)
    with (
        pytest.raises(ValueError, match="a reference must be the input of the run"),
        splice(model(), crosscoder, reference=full()),
    ):
        run(model(), full()[:2])
    with (
        pytest.raises(ValueError, match="with other weights"),
        splice(randomize_(toy(), seed=1), shared),
    ):
        pass
    assert hook_count(model()) == 0


def test_an_attention_is_run_between_reading_and_writing_of_a_block() -> None:
    own = dictionary("transcoder")
    with splice(model(), own, FeatureEdit(0, add=1.0)):
        whole = run(model(), full())
    assert not torch.allclose(whole, run(model(), full()))


def test_a_state_of_heads_is_no_vector() -> None:
    own = dictionary("shared")
    hook = "blocks.1.attn.hook_z"
    heads = replace(own, reading=replace(own.reading, hook=hook, target=hook, mark=""))
    with (
        pytest.raises(ValueError, match=r"reads vectors \[batch, pos, width\]"),
        splice(model(), heads),
    ):
        run(model(), padded())


def test_a_crosscoder_refuses_a_run_of_other_tokens() -> None:
    own, batch = dictionary("crosscoder"), padded(1)
    column = int(batch.readout[1])
    assert batch.mask[1, column]
    tokens = batch.tokens.clone()
    tokens[1, column] = tokens[1, column] % 28 + 1
    longer = replace(full(1), tokens=batch.tokens.where(batch.mask.bool(), 5))
    end = int(batch.mask[1].sum())
    with splice(model(), own, reference=batch):
        run(model(), batch)
        with pytest.raises(ValueError, match=rf"differ, first in row 1 at position {column};"):
            run(model(), replace(batch, tokens=tokens))
        with pytest.raises(ValueError, match=rf"differ, first in row 1 at position {end};"):
            run(model(), longer)  # rows go on where the reference's ended
    assert hook_count(model()) == 0
