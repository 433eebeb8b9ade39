"""The tokens in which features are strongest, and their profile over the iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.columns import read_columns
from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import in_range, one_in_range
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.reading import loop_states
from loopscope.models.basis.numbers import checked_count
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class TopExamples(OneScreen):
    """The strongest activations of some features, over tokens and iterations.

    Attributes:
        features: The features, from 0.
        example, position, loop: Int[Tensor, "feature k"], the row, the column and the iteration of
            each activation. The code of a crosscoder belongs to all iterations, so its loop is 0
            unless one was asked for.
        activation: Float[Tensor, "feature k"], largest first; 0 if a feature is on at fewer than k
            places.
        profile: Float[Tensor, "feature loop"], the mean length of the vector that each feature adds
            at each iteration, over all tokens.
        texts: The text of each example; empty if the model has no vocabulary.
    """

    features: tuple[int, ...]
    example: Int[Tensor, "feature k"]
    position: Int[Tensor, "feature k"]
    loop: Int[Tensor, "feature k"]
    activation: Float[Tensor, "feature k"]
    profile: Float[Tensor, "feature loop"]
    texts: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """One row per activation. The columns are feature, rank (0 is the largest), example,
        position, loop, activation and text.
        """
        k = self.example.shape[1]
        columns = {
            "feature": [feature for feature in self.features for _ in range(k)],
            "rank": list(range(k)) * len(self.features),
            "example": self.example.flatten().tolist(),
            "position": self.position.flatten().tolist(),
            "loop": self.loop.flatten().tolist(),
            "activation": self.activation.flatten().tolist(),
        }
        frame = pd.DataFrame(columns)
        return frame.assign(text=[self.texts[i] for i in frame.example])

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the profile of each feature over the iterations."""
        from loopscope.interp.drawing.dictionaries import profiles

        return profiles(self, title)


@torch.no_grad()
@evaluated
def top_examples(
    model: LoopedModel,
    dictionary: Dictionary,
    inputs: Inputs,
    features: Sequence[int],
    k: int = 5,
    *,
    loop: int | None = None,
    readout: ReadoutColumn = None,
) -> TopExamples:
    """Find the tokens at which some features are strongest.

    Args:
        dictionary: A dictionary of this model.
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        features: The features to look at, from 0.
        k: How many activations to find for each feature.
        loop: The iteration to look at, from 0; None means all. It must be given for a per_iteration
            dictionary, in which a feature belongs to one iteration.

    Returns:
        The activations of each feature, largest first.

    Raises:
        ValueError: No feature is given, a feature or the iteration is out of range, `loop` is
            missing, k is larger than the number of activations, or the dictionary is of another
            model.
    """
    dictionary.check(model)
    k = checked_count(k, "k")
    batch, reading = as_batch(model, inputs, readout), dictionary.reading
    chosen = in_range("features", features, dictionary.n_features)
    if not chosen:
        raise ValueError("features must name at least one feature, got none")
    loops = _searched(dictionary, loop)
    states = loop_states(model, batch, reading.n_loops, hook=reading.hook)
    codes = dictionary.encode(states)[..., chosen].expand(-1, reading.n_loops, -1)
    searched = codes[:, loops].flatten(0, 1)
    if not 1 <= k <= len(searched):
        raise ValueError(f"k must be in 1..{len(searched)}, the number of activations, got {k}")
    values, places = searched.T.topk(k, dim=1)
    read, turn = places // len(loops), places % len(loops)
    columns, shown = read_columns(batch, "all"), batch.mask.bool()
    rows = torch.arange(len(batch), device=columns.device)[:, None].expand_as(columns)
    return TopExamples(
        features=tuple(chosen),
        example=rows[shown][read],
        position=columns[shown][read],
        loop=turn.new_tensor(loops)[turn],
        activation=values,
        profile=_profile(dictionary, codes.mean(0), chosen, loop),
        texts=tuple(
            _text(model, tokens[mask.bool()])
            for tokens, mask in zip(batch.tokens, batch.mask, strict=True)
        ),
    )


def _searched(dictionary: Dictionary, loop: int | None) -> list[int]:
    """The iterations at which activations are looked for."""
    if loop is not None:
        return [one_in_range("loop", loop, dictionary.n_loops)]
    if not dictionary.same_features:
        raise ValueError(
            "loop= must be given for a per_iteration dictionary, whose features belong to one"
            " iteration each"
        )
    return [0] if dictionary.kind == "crosscoder" else list(range(dictionary.n_loops))


def _profile(
    dictionary: Dictionary, means: Float[Tensor, "loop some"], chosen: list[int], loop: int | None
) -> Float[Tensor, "some loop"]:
    """The mean length of what each feature writes; 0 where a feature is no feature of the
    iteration.
    """
    found = torch.zeros_like(means)
    for at in range(dictionary.n_loops):
        if dictionary.same_features or at == loop:
            found[at] = means[at] * dictionary.directions(at)[chosen].norm(dim=1)
    return found.T


def _text(model: LoopedModel, tokens: Int[Tensor, " pos"]) -> str:
    """An input in words, or by ids where there is no vocabulary."""
    if model.vocab is None:
        return " ".join(f"#{token}" for token in tokens.tolist())
    return "".join(model.to_str_tokens(tokens))
