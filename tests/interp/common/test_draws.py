"""Draws: of seeds of any integer type, and the same under other defaults of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dictionary_toys import dictionary, model, states
from loopscope.interp.dictionaries.controls import random_dictionary
from loopscope.interp.dictionaries.trainer import DictionaryTraining
from loopscope.interp.dictionaries.training import fit_dictionary
from loopscope.interp.dynamics.basins import basins
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.lens.tuned_training import train_tuned_lens
from loopscope.models.basis.draws import seeded
from toy import LOOPS, full, padded, run

pytestmark = pytest.mark.shapes
INPUTS, REFERENCE = padded(), full(1)


def resampled() -> Tensor:
    what = Component("attn")
    with ablate(model(), what, how="resample", reference=REFERENCE, n_loops=LOOPS, seed=3):
        return run(model(), INPUTS)


def fitted() -> Tensor:
    training = DictionaryTraining(13, 3, steps=2, batch_size=7)
    return fit_dictionary(states(), dictionary("shared").reading, training=training).losses


DRAWS: Mapping[str, Callable[[], Tensor]] = {
    "ablate": resampled,
    "basins": lambda: basins(model(), INPUTS, 2, 0.1, LOOPS).distance,
    "fit_dictionary": fitted,
    "random_dictionary": lambda: (
        random_dictionary(states(), dictionary("shared").reading, 13, 3).coders[0].W_dec
    ),
    "train_tuned_lens": lambda: train_tuned_lens(model(), INPUTS, LOOPS, steps=2).losses,
}


class Elsewhere(TorchFunctionMode):
    """A default device on which nothing can be drawn from a generator of the CPU."""

    def __torch_function__(
        self, fn: Callable[..., object], types: object, args: tuple = (), kwargs: object = None
    ) -> object:
        given = dict(kwargs or {})  # type: ignore[call-overload]
        if isinstance(given.get("generator"), torch.Generator):
            assert torch.device(given.get("device") or "meta").type == "cpu"
        return fn(*args, **given)


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_same_under_other_defaults(name: str) -> None:
    expected = DRAWS[name]()
    with Elsewhere(), float64_by_default():
        torch.testing.assert_close(DRAWS[name](), expected, rtol=1e-6, atol=1e-6)


def test_a_seed_is_an_integer_of_any_type() -> None:
    assert torch.rand(1, generator=seeded(np.int64(3))) == torch.rand(1, generator=seeded(3))
    for wrong in (1.0, None, "first"):
        with pytest.raises(TypeError, match="a seed must be an integer, got"):
            seeded(wrong)  # type: ignore[arg-type]
