"""Dictionaries that nothing was learned for: principal components, and random directions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.dictionaries.coder import Coder
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.reading import Reading, checked_states
from loopscope.models.basis.draws import normal_rows, seeded
from loopscope.models.basis.numbers import checked_count


def pca_dictionary(states: Float[Tensor, "read loop d_in"], reading: Reading, k: int) -> Dictionary:
    """The principal components of the states of all iterations, each in both directions, as a
    dictionary of 2 * d_in features of which the k largest are on.

    Args:
        k: Features of a code.

    Raises:
        ValueError: States that are not finite, or of another number of iterations.
    """
    vectors, mean = _centred(states, reading)
    found = torch.linalg.eigh(vectors.T @ vectors).eigenvectors.T
    return _shared(torch.cat([found, -found]), mean, reading, k)


def random_dictionary(
    states: Float[Tensor, "read loop d_in"],
    reading: Reading,
    n_features: int,
    k: int,
    seed: int = 0,
) -> Dictionary:
    """Random directions as a dictionary, around the mean of the states of all iterations.

    Args:
        n_features: Directions.
        k: Features of a code.
        seed: Of the directions.

    Raises:
        TypeError, ValueError: As for `pca_dictionary`, and a seed that is no integer.
    """
    vectors, mean = _centred(states, reading)
    n_features, k = checked_count(n_features, "n_features"), checked_count(k, "k")
    drawn = normal_rows(n_features, vectors.shape[1], seeded(seed)).to(vectors)
    return _shared(drawn / drawn.norm(dim=1, keepdim=True), mean, reading, k)


def _centred(states: Float[Tensor, "read loop d_in"], reading: Reading) -> tuple[Tensor, Tensor]:
    vectors = checked_states(states, reading.n_loops).flatten(0, 1)
    mean = vectors.mean(0)
    return vectors - mean, mean


def _shared(directions: Tensor, mean: Tensor, reading: Reading, k: int) -> Dictionary:
    bias = directions.new_zeros(len(directions))
    coder = Coder(directions.T.contiguous(), bias, directions, mean, k)
    return Dictionary("shared", (coder,), reading, mean.new_zeros(1, 0))
