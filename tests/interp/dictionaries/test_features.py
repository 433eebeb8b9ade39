"""Quality, labels, attribution and examples: worked examples, identities and oracles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dictionary_toys import FEATURES, dictionary, model, states
from loopscope.interp.attribution.gradients import gradients
from loopscope.interp.dictionaries.attribution import feature_attribution
from loopscope.interp.dictionaries.coder import Coder
from loopscope.interp.dictionaries.controls import pca_dictionary
from loopscope.interp.dictionaries.dictionary import KINDS, Dictionary, Kind
from loopscope.interp.dictionaries.examples import top_examples
from loopscope.interp.dictionaries.labels import feature_labels
from loopscope.interp.dictionaries.quality import dictionary_quality, presence
from loopscope.interp.dictionaries.reading import Reading
from loopscope.interp.dictionaries.splice import FeatureEdit, splice
from toy import D_MODEL, LENGTHS, LOOPS, assert_close, padded, projection, run, with_words

pytestmark = pytest.mark.shapes
READING = Reading("blocks.0.hook_resid_post", "blocks.0.hook_resid_post", 2)
EYE = torch.eye(3)
IDENTITY = Dictionary(
    "shared",
    (Coder(EYE, torch.zeros(3), EYE, torch.zeros(3), threshold=torch.zeros(3)),),
    READING,
    torch.zeros(1, 0),
)


def test_a_dictionary_that_loses_nothing_recovers_everything() -> None:
    whole = pca_dictionary(states(), Reading.of(model(), LOOPS), D_MODEL)
    found = dictionary_quality(model(), whole, padded())
    assert found.n_reads == sum(LENGTHS)
    assert_close(found.explained, torch.ones(LOOPS, dtype=torch.float64))
    assert found.overall == pytest.approx(1.0)
    assert found.recovered_all == pytest.approx(1.0)
    assert_close(found.recovered, torch.ones(LOOPS, dtype=torch.float64))
    assert_close(found.active, torch.full((LOOPS,), float(D_MODEL), dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_counted_where_they_are_on(kind: Kind) -> None:
    own = dictionary(kind)
    found = dictionary_quality(model(), own, padded())
    on = (own.encode(states()) > 0).expand(-1, LOOPS, -1) & presence(own)
    if kind != "transcoder":  # which reads another site
        assert_close(found.on, on.double().mean(0))
        alone = on.any(0) if kind == "per_iteration" else on.flatten(0, 1).any(0)
        assert found.dead() == int((~alone).sum())
    assert (found.first <= found.on).all()
    if own.same_features:
        assert found.first.sum(0).max() <= 1
        assert 0 < found.shared() <= 1
        assert found.shared(1) == 1
    else:
        assert found.shared() != found.shared()
    assert list(found.frame()["loop"]) == list(range(LOOPS))
    assert len(found.features()) == int(found.live().sum())
    if kind == "per_iteration":
        assert len(found.features()) == int(found.frame()["live"].sum())
    else:
        assert found.features()["turns_on"].max() <= LOOPS - 1
    assert len(found.plot().data) >= 5


def test_a_mean_in_place_of_the_states_recovers_nothing() -> None:
    mean = states().mean((0, 1))
    silent = Coder(
        torch.zeros(D_MODEL, 1).double(),
        torch.zeros(1).double(),
        torch.zeros(1, D_MODEL).double(),
        mean,
        threshold=torch.zeros(1).double(),
    )
    own = Dictionary("shared", (silent,), Reading.of(model(), LOOPS), torch.zeros(1, 0))
    found = dictionary_quality(model(), own, padded())
    assert found.overall == pytest.approx(0.0, abs=1e-9)
    assert found.dead() == 1


def test_the_best_feature_of_a_label_is_chosen_on_other_reads() -> None:
    labels = torch.tensor([[0, 1], [0, 1], [1, 0], [1, -1], [1, 0]])
    x = torch.tensor(
        [
            [[9.0, 1, 0], [0, 9, 0]],
            [[8.0, 0, 0], [0, 8, 0]],
            [[2.0, 5, 0], [7, 0, 0]],
            [[0.0, 6, 0], [9, 9, 9]],
            [[0.0, 7, 0], [6, 1, 0]],
        ]
    )
    found = feature_labels(IDENTITY, x, labels, x, labels)
    assert found.feature.tolist() == [[0, 1], [0, 1]]
    assert found.f1.tolist() == [[1, 1], [1, 1]]
    assert found.threshold[0, 0] >= 2
    assert found.threshold[0, 1] >= 0.7
    assert found.kept(0, 1) == 1
    held = x.clone()
    held[1, 0, 0], held[2, 0, 0] = 0.0, 9.0  # one of label 0 missed, one of label 1 taken for it
    worse = feature_labels(IDENTITY, x, labels, held, labels)
    assert worse.chosen.tolist() == [[1, 1], [1, 1]]
    assert worse.f1[0].tolist() == [0.5, 1]
    assert worse.mean().tolist() == [0.75, 1]
    assert len(worse.frame()) == 4
    assert worse.plot().data[0].z[0][0] == 0.5


def test_a_label_that_does_not_occur_has_no_f1() -> None:
    x = torch.rand(4, 2, 3)
    labels = torch.tensor([[0, 0], [0, 2], [2, 2], [2, 0]])
    found = feature_labels(IDENTITY, x, labels, x, labels)
    assert found.f1[:, 1].isnan().all()
    assert found.feature[:, 1].tolist() == [-1, -1]
    assert found.mean().isfinite().all()
    same = found.feature[0] == found.feature[1]
    assert found.kept(0, 1) == same[[0, 2]].double().mean()  # label 1 does not occur
    absent = replace(found, chosen=torch.full_like(found.chosen, torch.nan))
    assert absent.kept(0, 1) != absent.kept(0, 1)
    with pytest.raises(ValueError, match=r"labels must be one per read and iteration, \[4, 2\]"):
        feature_labels(IDENTITY, x, labels[:, :1], x, labels)
    with pytest.raises(ValueError, match="not all -1"):
        feature_labels(IDENTITY, x, labels, x, torch.full((4, 2), -1))
    with pytest.raises(ValueError, match="the states to find features in hold nan"):
        feature_labels(IDENTITY, x, labels, x * torch.nan, labels)


@pytest.mark.parametrize("kind", KINDS)
def test_attributions_sum_to_the_gradient_times_the_state(kind: Kind) -> None:
    own = dictionary(kind)
    found = feature_attribution(model(), own, padded(), projection())
    values, grads = gradients(model(), padded(), projection(), own.reading.written, LOOPS)
    whole = torch.stack([(values[n] * grads[n]).sum(-1) for n in own.reading.written], 2)
    assert_close(found.values.sum(-1) + found.bias + found.rest, whole)
    top = found.top(3)
    assert top["effect"].abs().is_monotonic_decreasing
    first = top.iloc[0]
    assert (
        first.effect
        == found.values[
            int(first.example), int(first.position), int(first.loop), int(first.feature)
        ].item()
    )
    assert len(found.frame()) == int((found.values != 0).sum())
    assert len(found.plot().data[0].z[0]) == LOOPS
    with pytest.raises(ValueError, match="the number of effects"):
        found.top(0)


def test_an_attribution_is_the_slope_of_the_edit() -> None:
    own, step = dictionary("shared"), 1e-5
    found = feature_attribution(model(), own, padded(), projection(), positions=None)
    batch = padded()
    row, feature = 0, int(found.values[0, 0, 1].abs().argmax())
    at = int(batch.readout[row])

    def metric(scale: float) -> float:
        edit = FeatureEdit(feature, loops=[1], positions=[at], scale=scale)
        with splice(model(), own, edit), torch.no_grad():
            return float(projection()(run(model(), batch)[row, at][None]))

    slope = (metric(1 + step) - metric(1 - step)) / (2 * step)
    assert slope == pytest.approx(found.values[row, 0, 1, feature].item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["shared", "crosscoder"])
def test_the_strongest_tokens_of_a_feature(kind: Kind) -> None:
    own = dictionary(kind)
    found = top_examples(model(), own, padded(), [3, 11], k=4)
    codes = own.encode(states())
    for i, feature in enumerate((3, 11)):
        expected = codes[..., feature].flatten().sort(descending=True).values[:4]
        assert torch.equal(found.activation[i], expected)
    frame = found.frame()
    lengths_of = [LENGTHS[example] for example in frame["example"]]
    assert (frame["position"] < lengths_of).all()
    assert frame["text"][0].startswith("#")
    lengths = [own.directions(loop)[[3, 11]].norm(dim=1) for loop in range(LOOPS)]
    assert_close(found.profile, (codes.mean(0)[:, [3, 11]] * torch.stack(lengths)).T)
    assert len(found.plot().data) == 2
    with pytest.raises(ValueError, match=f"features must be in 0..{FEATURES - 1}"):
        top_examples(model(), own, padded(), [FEATURES])
    with pytest.raises(ValueError, match="the number of activations"):
        top_examples(model(), own, padded(), [0], k=1000)


def test_a_feature_of_an_iteration_is_looked_for_there() -> None:
    own = dictionary("per_iteration")
    codes = own.encode(states())[:, 2]
    feature = int(codes.sum(0).argmax())
    found = top_examples(model(), own, padded(), [feature], k=2, loop=2)
    expected = codes[:, feature].sort(descending=True).values
    assert torch.equal(found.activation[0], expected[:2])
    assert found.loop.tolist() == [[2, 2]]
    assert (found.profile[0] > 0).tolist() == [False, False, True, False]
    both = dictionary("shared"), dictionary("crosscoder")
    for each in both:
        at = top_examples(model(), each, padded(), [3], k=1, loop=1).loop
        assert at.tolist() == [[1]]
    with pytest.raises(ValueError, match="loop= must be given for a per_iteration"):
        top_examples(model(), own, padded(), [3])


def test_examples_are_shown_in_words() -> None:
    from toy import toy

    named, own = with_words(toy()), dictionary("shared")
    blank: Dictionary = replace(own, reading=replace(own.reading, mark=""))
    text: str = top_examples(named, blank, padded(), [0], k=1).texts[1]
    tokens: Tensor = padded().tokens[1][: LENGTHS[1]]
    assert text == "".join(f"<t_{token}>" for token in tokens.tolist())


def test_examples_of_no_feature_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one feature, got none"):
        top_examples(model(), dictionary("shared"), padded(), [])


def test_an_attribution_inside_inference_mode_has_its_gradients() -> None:
    own, batch, metric = dictionary("shared"), padded(), projection()
    expected = feature_attribution(model(), own, batch, metric)
    with torch.inference_mode():
        found = feature_attribution(model(), own, batch, metric)
    assert torch.equal(found.values, expected.values)
