"""What one feature does, each number against the same one made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dictionary_toys import FEATURES, coder, dictionary, model, states
from loopscope.interp.common.metrics import margin
from loopscope.interp.dictionaries.dictionary import KINDS, Dictionary, Kind
from loopscope.interp.dictionaries.effects import (
    activations,
    direct_effect,
    feature_effects,
    strongest_feature,
)
from loopscope.interp.dictionaries.splice import FeatureEdit, splice
from toy import D_MODEL, LENGTHS, LOOPS, assert_close, hook_count, padded, run

pytestmark = pytest.mark.shapes
ANSWERS = torch.arange(len(LENGTHS))


def at_readout(own: Dictionary, edit: FeatureEdit | None = None) -> torch.Tensor:
    """The logits at each row's readout, with a feature changed."""
    batch, rows = padded(), torch.arange(len(LENGTHS))
    reference = batch if own.kind == "crosscoder" else None
    with splice(model(), own, edit or (), reference=reference), torch.no_grad():
        return run(model(), batch)[rows, batch.readout]


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_the_codes_of_every_token(kind: Kind) -> None:
    own = dictionary(kind)
    found = activations(model(), own, padded(), 3)
    codes = own.encode(states(own.reading.hook)).expand(-1, LOOPS, -1)
    assert torch.equal(found[padded().mask.bool()], codes[..., 3])
    assert found[~padded().mask.bool()].isnan().all()
    strongest = strongest_feature(model(), own, padded(), [0, 1])
    assert codes[:, :2, strongest].max() == codes[:, :2].max()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_direct_effect_after_the_last_block_is_the_whole_effect(kind: Kind) -> None:
    own, batch = dictionary(kind), padded()
    sizes = activations(model(), own, batch, feature := 3)[:, :, -1]
    sizes = sizes.gather(1, batch.readout[:, None])[:, 0] + 1.0
    places = torch.stack([batch.readout, torch.full_like(batch.readout, LOOPS - 1)], 1)
    found = direct_effect(model(), own, batch, feature, places, sizes)
    without = []
    for row, size in enumerate(sizes.tolist()):
        edit = FeatureEdit(feature, [LOOPS - 1], int(batch.readout[row]), scale=1.0, add=-size)
        without.append((at_readout(own) - at_readout(own, edit))[row])
    mean = torch.stack(without).mean(0)
    assert_close(found, mean - mean.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_ablations_are_edits_in_the_rows_in_which_the_feature_is_on(kind: Kind) -> None:
    own = dictionary(kind)
    found = feature_effects(model(), own, padded(), ANSWERS, loop=2, k=2)
    size = activations(model(), own, padded(), found.feature)
    at = [2] if kind == "per_iteration" else list(range(LOOPS))
    on = (size[..., [2]].nan_to_num(0) > 0).any(2).any(1).nonzero().flatten()
    assert found.on.tolist() == on.tolist()
    for choice, place in (([2], 2), (at, LOOPS)):
        edit = FeatureEdit(found.feature, loops=choice)
        each = margin(at_readout(own, edit), ANSWERS) - margin(at_readout(own), ANSWERS)
        assert_close(found.margin[place], each[on].mean())
        tops = at_readout(own, edit).argmax(1) != at_readout(own).argmax(1)
        assert found.changed[place] == tops[on].double().mean()
    others = [loop for loop in range(LOOPS) if loop not in at]
    assert found.margin[others].isnan().all()
    assert not found.profile[others].any()
    assert hook_count(model()) == 0
    rows = list(zip(found.rows.tolist(), found.columns.tolist(), strict=True))
    assert len(rows) == min(2, len(on))
    for i, (row, column) in enumerate(rows):
        assert size[row, column, 2] == size[row, :, 2].nan_to_num(0).max()
        assert found.activation[i, column] == size[row, column, 2]
    assert found.loops.tolist() == [2] * len(rows)


def test_the_profile_is_the_mean_length_of_what_is_written() -> None:
    own = dictionary("crosscoder")
    found = feature_effects(model(), own, padded(), ANSWERS)
    code = own.encode(states())[:, 0, found.feature]
    directions = [own.directions(t)[found.feature] for t in range(LOOPS)]
    written = [(code[:, None] * each).norm(dim=1).mean() for each in directions]
    assert_close(found.profile, torch.stack(written))
    assert_close(found.share, (code > 0).float().mean().expand(LOOPS))


def test_what_no_feature_page_can_be_made_of_is_refused() -> None:
    shared = dictionary("shared")
    with pytest.raises(ValueError, match=f"feature must be in 0..{FEATURES - 1}"):
        feature_effects(model(), shared, padded(), ANSWERS, FEATURES)
    silent = replace(shared.coders[0], b_enc=shared.coders[0].b_enc - 1e9)
    with pytest.raises(ValueError, match="feature 3 is on in none of the 3 inputs"):
        feature_effects(model(), replace(shared, coders=(silent,)), padded(), ANSWERS, 3)
    narrow = {"W_dec": torch.ones(FEATURES, 3).double(), "b_dec": torch.zeros(3).double()}
    wide = replace(coder(D_MODEL, 0, centred=False), **narrow)
    other = Dictionary("transcoder", (wide,), dictionary("transcoder").reading, shared.losses)
    places = torch.zeros(len(LENGTHS), 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"as wide as the residual stream, {D_MODEL}, got 3"):
        direct_effect(model(), other, padded(), 3, places, torch.ones(len(LENGTHS)))
