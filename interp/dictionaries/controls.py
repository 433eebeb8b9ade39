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
    """Make a control dictionary from the principal components of the states, without training.

    Each component gives two features, one for each direction, so there are 2 * d_in features. The
    components are those of the states of all iterations together. The k largest features are on.

    Args:
        states: Float[Tensor, "read loop d_in"], the states, such as `loop_states` gives.
        reading: The hook points of the states; see `Reading`.
        k: How many features are on in each code.

    Returns:
        A dictionary of the kind "shared".

    Raises:
        ValueError: A state is not finite, or the states have another number of iterations than
            `reading`.
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
    """Make a control dictionary from random directions, without training.

    The directions start at the mean of the states of all iterations. The k largest features are on.

    Args:
        states: Float[Tensor, "read loop d_in"], the states, such as `loop_states` gives.
        reading: The hook points of the states; see `Reading`.
        n_features: How many directions are drawn.
        k: How many features are on in each code.
        seed: The seed of the directions.

    Returns:
        A dictionary of the kind "shared".

    Raises:
        TypeError: The seed or a number of features is not an integer.
        ValueError: A state is not finite, or the states have another number of iterations than
            `reading`.
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
