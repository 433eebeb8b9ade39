"""Draws: of seeds of any integer type, and the same under other defaults of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dictionary_toys import dictionary, model, states
from loopscope.interp.dictionaries.controls import random_dictionary
from loopscope.interp.dictionaries.trainer import DictionaryTraining
from loopscope.interp.dictionaries.training import fit_dictionary
from loopscope.interp.dynamics.basins import basins
from loopscope.interp.dynamics.lyapunov import lyapunov_spectrum
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.generation import Sampling, generate
from loopscope.interp.lens.tuned_training import train_tuned_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.probes.probe import probe
from loopscope.interp.probes.states import split_rows
from loopscope.interp.store.collect import collect
from loopscope.models.basis.draws import other_rows, seeded
from toy import LOOPS, SHORT, full, padded, run

pytestmark = pytest.mark.shapes
INPUTS, REFERENCE, BOTH = padded(), full(1), (full(1), full(2))
TARGETS = torch.tensor([0.5, -1.0, 2.0, 1.5, -0.5, 0.1, -2.0, 0.7, -1.1])


def ablated() -> Tensor:
    what = Component("attn")
    with ablate(model(), what, how="resample", reference=REFERENCE, n_loops=LOOPS, seed=3):
        return run(model(), INPUTS)


def fitted() -> Tensor:
    training = DictionaryTraining(13, 3, steps=2, batch_size=7)
    return fit_dictionary(states(), dictionary("shared").reading, training=training).losses


def shuffled(folder: Path) -> Tensor:
    store = collect(model(), INPUTS, n_loops=LOOPS, to=folder, per_file=2)
    parts = [*store.batches(5, seed=3), *store.batches(5)]
    return torch.cat([part.values for part in parts])


def intervals() -> Tensor:
    sweep = activation_patch(model(), *BOTH, lambda logits: logits[:, 3], 1, positions=[2])
    return torch.cat([sweep.values.flatten(), *(x.flatten() for x in sweep.bootstrap(resamples=7))])


def probed() -> Tensor:
    nine = INPUTS.repeat(3)
    numbers = probe(model(), nine, TARGETS, n_loops=SHORT, permutations=2)
    classes = probe(model(), nine, TARGETS.sign().long(), n_loops=SHORT)
    found = torch.cat([numbers.score, numbers.permuted.flatten(), classes.score])
    assert found.is_meta or found.isfinite().all()
    return found


def generated() -> Tensor:
    sampling = Sampling(temperature=1.3, seed=3)
    return generate(model(), INPUTS, 2, SHORT, sampling=sampling).new


DRAWS: Mapping[str, Callable[[Path], Tensor]] = {
    "ActivationStore.batches": shuffled,
    "Sweep.bootstrap": lambda _: intervals(),
    "ablate": lambda _: ablated(),
    "basins": lambda _: basins(model(), INPUTS, 2, 0.1, LOOPS).distance,
    "fit_dictionary": lambda _: fitted(),
    "generate": lambda _: generated(),
    "lyapunov_spectrum": lambda _: lyapunov_spectrum(model(), INPUTS, 2, SHORT).exponents,
    "other_rows": lambda _: other_rows(7, 3),
    "probe": lambda _: probed(),
    "random_dictionary": lambda _: (
        random_dictionary(states(), dictionary("shared").reading, 13, 3).coders[0].W_dec
    ),
    "split_rows": lambda _: torch.cat(split_rows(11, 0.4, 3)),
    "train_tuned_lens": lambda _: train_tuned_lens(model(), INPUTS, LOOPS, steps=2).losses,
}


@contextmanager
def other_defaults() -> Iterator[None]:
    """Numbers are made in float64, on a device on which nothing can be computed, if no other number
    format or device is named.
    """
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_same_under_other_defaults(name: str, tmp_path: Path) -> None:
    expected = DRAWS[name](tmp_path)
    with other_defaults():
        found = DRAWS[name](tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_seed_is_an_integer_of_any_type() -> None:
    assert torch.rand(1, generator=seeded(np.int64(3))) == torch.rand(1, generator=seeded(3))
    for wrong in (1.0, None, "first", True, torch.tensor([1, 2])):
        with pytest.raises(TypeError, match="a seed must be an integer, got"):
            seeded(wrong)  # type: ignore[arg-type]


def test_a_seed_has_at_most_64_bits() -> None:
    for most in (-(2**63), 2**64 - 1):
        assert torch.rand(1, generator=seeded(most)) == torch.rand(1, generator=seeded(most))
    for wrong in (-(2**63) - 1, 2**64):
        with pytest.raises(ValueError, match=r"must be in -2\*\*63..2\*\*64 - 1, got -?\d+$"):
            seeded(wrong)


@pytest.mark.parametrize("count", [2, 3, 11])
def test_no_row_is_its_own_substitute(count: int) -> None:
    orders = [other_rows(count, seed) for seed in range(20)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(count))
        assert not (order == torch.arange(count)).any()
    assert torch.equal(orders[3], other_rows(count, 3))
    assert count == 2 or len({tuple(order.tolist()) for order in orders}) > 1


def test_there_is_no_other_row_than_the_only_one() -> None:
    with pytest.raises(ValueError, match="at least two are needed, got 1"):
        other_rows(1, 0)
