"""Training: planted features are found, and every kind and activation trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dictionary_toys import MLP_IN, MLP_OUT, model, states
from loopscope.interp.dictionaries.controls import pca_dictionary, random_dictionary
from loopscope.interp.dictionaries.dictionary import KINDS, Dictionary, Kind
from loopscope.interp.dictionaries.reading import Reading
from loopscope.interp.dictionaries.trainer import DictionaryTraining, jump_relu
from loopscope.interp.dictionaries.training import fit_dictionary, train_dictionary
from toy import LOOPS, padded, toy

pytestmark = pytest.mark.shapes
PLANTED, WIDTH, ROUNDS = 6, 11, 3
READING = Reading("blocks.0.hook_resid_post", "blocks.0.hook_resid_post", ROUNDS)
FEW: dict[str, Any] = {"n_features": 13, "k": 3, "steps": 5, "batch_size": 7}


def planted() -> tuple[Tensor, Tensor]:
    """Directions, and states that are each one of them, of a random length, around a mean."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(WIDTH, PLANTED, generator=generator))[0].T
    which = torch.randint(PLANTED, (300, ROUNDS), generator=generator)
    lengths = 1 + torch.rand(300, ROUNDS, 1, generator=generator)
    return directions, 5 + lengths * directions[which]


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_planted_directions_are_found(activation: Any) -> None:
    directions, data = planted()
    # a seed from which the bias gets to 5, and not to the states' mean, which does nearly as well
    training = DictionaryTraining(24, 1, activation, steps=400, batch_size=64, lr=1e-2, seed=2)
    found = fit_dictionary(data, READING, "shared", training)
    left = data - found.decode(found.encode(data))
    spread = (data - data.mean((0, 1))).square().sum()
    assert 1 - left.square().sum() / spread > 0.95
    if activation != "jumprelu":  # whose penalty bears with a few features more
        assert (found.directions(0) @ directions.T).amax(0).min() > 0.9
    assert (found.encode(data) > 0).float().sum(2).mean() < 2.5
    assert found.losses[0, -1] < 0.1 * found.losses[0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_on_a_model(kind: Kind) -> None:
    sites = {"hook": MLP_IN, "target": MLP_OUT} if kind == "transcoder" else {}
    before = torch.get_rng_state()
    own: list[Dictionary] = [
        train_dictionary(
            model(), padded(), LOOPS, kind=kind, training=DictionaryTraining(**FEW), **sites
        )
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(own[0].coders[-1].W_enc, own[1].coders[-1].W_enc)
    assert own[0].losses.shape == (LOOPS if kind == "per_iteration" else 1, 5)
    assert len(own[0].frame()) == own[0].losses.numel()
    assert own[0].decode(own[0].encode(states())).shape == states().shape


def test_an_iteration_of_small_states_counts_as_much_as_one_of_large_ones() -> None:
    _, data = planted()
    scaled = (data - 5) * torch.tensor([1.0, 0.2, 5.0])[:, None]
    training = DictionaryTraining(24, 2, steps=300, batch_size=64, lr=1e-2)
    found = fit_dictionary(scaled, READING, "shared", training)
    left = (scaled - found.decode(found.encode(scaled))).square().sum((0, 2))
    spread = (scaled - scaled.mean(0)).square().sum((0, 2))
    assert (left / spread).max() < 0.5


def test_batches_from_anywhere_are_gone_through_again() -> None:
    _, data = planted()
    few = DictionaryTraining(**FEW)
    found = fit_dictionary(list(data.split(150)), READING, "crosscoder", few)
    assert found.losses.shape == (1, 5)
    with pytest.raises(ValueError, match="came to an end before the steps did"):
        fit_dictionary(iter(data.split(150)), READING, "shared", few)


def test_batch_topk_keeps_k_features_on_average() -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(400, ROUNDS, WIDTH, generator=generator)
    found = fit_dictionary(
        data, READING, "shared", DictionaryTraining(31, 3, "batch_topk", steps=200, batch_size=64)
    )
    assert (found.encode(data) > 0).sum(2).float().mean() == pytest.approx(3, abs=0.2)


def test_units_come_from_all_states_in_memory() -> None:
    _, data = planted()
    data[:, 1] *= torch.arange(300)[:, None] % 2  # half of the reads differ at iteration 1
    few = DictionaryTraining(**{**FEW, "steps": 1, "batch_size": 1})
    for kind in KINDS[:3]:
        found = fit_dictionary(data, READING, kind, few)
        assert found.losses.isfinite().all()
        assert found.losses[0, 0] > 1e-6


def test_a_threshold_has_the_gradient_of_a_wide_step() -> None:
    before = torch.tensor([[0.95, 1.05, 2.0]], dtype=torch.float64, requires_grad=True)
    threshold = torch.ones(3, dtype=torch.float64, requires_grad=True)
    code, on = jump_relu(before, threshold, 0.2)
    assert code.tolist() == [[0, 1.05, 2]]
    assert on.tolist() == [[0, 1, 1]]
    slopes = torch.autograd.grad(code.sum(), [before, threshold], retain_graph=True)
    torch.testing.assert_close(slopes[0], torch.tensor([[0, 1, 1]]).double())
    torch.testing.assert_close(slopes[1], torch.tensor([-0.95 / 0.2, -1.05 / 0.2, 0]).double())
    (counted,) = torch.autograd.grad(on.sum(), threshold)
    torch.testing.assert_close(counted, torch.tensor([-5.0, -5, 0]).double())


def test_bfloat16_states_train_in_float32() -> None:
    own = train_dictionary(
        toy(dtype=torch.bfloat16), padded(), LOOPS, training=DictionaryTraining(**FEW)
    )
    assert own.coders[0].W_enc.dtype == torch.float32
    assert own.losses.isfinite().all()


def test_what_cannot_be_trained_is_refused() -> None:
    few = DictionaryTraining(**FEW)
    with pytest.raises(ValueError, match="must be given for a transcoder and only then"):
        train_dictionary(model(), padded(), LOOPS, kind="transcoder")
    with pytest.raises(ValueError, match=r"must be \[read, 3 iterations, width\]"):
        fit_dictionary(torch.zeros(5, 2, 3), READING, "shared", few)
    with pytest.raises(ValueError, match="one row for each of the 5 reads"):
        fit_dictionary(torch.ones(5, 3, 2), READING, "transcoder", few, torch.ones(4, 3, 2))
    batches, longer = [torch.rand(5, 3, 2)], [torch.rand(6, 3, 2)]
    with pytest.raises(ValueError, match="as many reads as its batch of states, got 6 and 5"):
        fit_dictionary(batches, READING, "transcoder", few, longer)
    with pytest.raises(ValueError, match="kind='shared' with it"):
        fit_dictionary(batches, READING, "shared", few, batches)
    with pytest.raises(ValueError, match="kind='transcoder' without it"):
        fit_dictionary(batches, READING, "transcoder", few)
    for alone in (torch.rand(0, 3, 2), torch.ones(4, 3, 2), [torch.rand(1, 3, 2), *batches]):
        with pytest.raises(ValueError, match="at least 2 reads that differ"):
            fit_dictionary(alone, READING, "shared", few)
    with pytest.raises(ValueError, match="hold nan"):
        fit_dictionary(torch.full((5, 3, 2), torch.nan), READING, "shared", few)
    with pytest.raises(ValueError, match="n_features=3, got 4"):
        DictionaryTraining(3, 4)
    with pytest.raises(ValueError, match="activation must be 'topk'"):
        DictionaryTraining(activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be at least 1"):
        DictionaryTraining(steps=0)
    with pytest.raises((ValueError, TypeError), match="per_iteration"):
        fit_dictionary(torch.ones(5, 3, 2), READING, "one", few)  # type: ignore[arg-type]


def test_states_may_come_with_their_graph() -> None:
    own, training = states(), DictionaryTraining(**FEW)
    reading = Reading("blocks.1.hook_resid_post", "blocks.1.hook_resid_post", LOOPS)
    wanted = own.clone().requires_grad_()
    found = fit_dictionary(wanted * 1, reading, training=training)
    assert torch.equal(found.losses, fit_dictionary(own, reading, training=training).losses)
    assert wanted.grad is None
    for control in (pca_dictionary(wanted, reading, 3), random_dictionary(wanted, reading, 9, 3)):
        assert not control.coders[0].b_dec.requires_grad


def test_a_dictionary_made_in_inference_mode_passes_gradients_on() -> None:
    with torch.inference_mode():
        own = train_dictionary(model(), padded(), LOOPS, training=DictionaryTraining(**FEW))
    scale = torch.ones(1, requires_grad=True, dtype=torch.float64)
    own.encode(states() * scale).sum().backward()
    assert scale.grad is not None
