"""A dictionary: sparse codes of the states of a token at every iteration.

Axes: read (a token of an example), loop, d_in, feature. `code` is the axis of a token's codes: one
for each iteration, or one for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.shown import OneScreen
from loopscope.interp.dictionaries.coder import Coder
from loopscope.interp.dictionaries.reading import Reading
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

Kind = Literal["per_iteration", "shared", "crosscoder", "transcoder"]
KINDS: tuple[Kind, ...] = ("per_iteration", "shared", "crosscoder", "transcoder")


@dataclass(frozen=True)
class Dictionary(OneScreen):
    """A sparse dictionary: it turns the states at one hook over the iterations into features and
    back.

    A *code* holds the activations of all features for one token at one iteration; a crosscoder has
    one code for all iterations of a token.

    Attributes:
        kind: "per_iteration" has one coder per iteration, so each feature belongs to one iteration.
            "shared" has one coder for the states of every iteration. "crosscoder" has one coder for
            all iterations of a token at once: it reads and writes their states joined into one
            vector, iteration by iteration. "transcoder" reads the input of a block and writes its
            output, with one coder for all iterations.
        coders: The encoder and decoder weights: one coder, or one for each iteration.
        reading: The hook points that are read and written, and the model.
        losses: Float[Tensor, "coder step"], for each training step the share of its batch's
            variance that the dictionary does not explain. The axis is empty if the dictionary was
            not trained here.
    """

    kind: Kind
    coders: tuple[Coder, ...]
    reading: Reading
    losses: Float[Tensor, "coder step"]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        needed = self.n_loops if self.kind == "per_iteration" else 1
        if len(self.coders) != needed:
            raise ValueError(
                f"a {self.kind} dictionary of {self.n_loops} iterations has {needed} coders, got"
                f" {len(self.coders)}"
            )

        if self.kind == "transcoder" and self.coders[0].centred:
            raise ValueError(
                "a transcoder's b_dec belongs to what is written, so its coder must have"
                " centred=False"
            )

    @property
    def n_loops(self) -> int:
        """The number of iterations that the dictionary reads."""
        return self.reading.n_loops

    @property
    def n_features(self) -> int:
        """The number of features of a code."""
        return self.coders[0].n_features

    @property
    def d_in(self) -> int:
        """The width of one state."""
        whole = self.coders[0].d_in
        return whole // self.n_loops if self.kind == "crosscoder" else whole

    @property
    def same_features(self) -> bool:
        """Whether a feature is the same at every iteration."""
        return self.kind != "per_iteration"

    def to(self, device: torch.device | str) -> Dictionary:
        """This dictionary on another device."""
        moved = tuple(coder.to(device) for coder in self.coders)
        return replace(self, coders=moved, losses=self.losses.to(device))

    def coder(self, loop: int) -> Coder:
        """The coder of one iteration."""
        return self.coders[loop if self.kind == "per_iteration" else 0]

    def encode(self, states: Float[Tensor, "read loop d_in"]) -> Float[Tensor, "read code feature"]:
        """Turn the states of tokens into codes.

        Args:
            states: Float[Tensor, "read loop d_in"], one row per token.

        Returns:
            Float[Tensor, "read code feature"]. The axis `code` has one entry per iteration; a
            crosscoder has a single one.

        Raises:
            ValueError: The states have another width or another number of iterations than the
                dictionary.
        """
        if states.ndim != 3:
            raise ValueError(
                f"states must be [read, {self.n_loops} iterations, {self.d_in}], got the shape"
                f" {list(states.shape)}"
            )
        if states.shape[1] != self.n_loops:
            raise ValueError(
                f"this dictionary reads {self.n_loops} iterations of each token, got"
                f" {states.shape[1]}"
            )
        if states.shape[2] != self.d_in:
            raise ValueError(
                f"this dictionary reads states of width {self.d_in}, got width {states.shape[2]}"
            )
        if self.kind == "crosscoder":
            return self.coders[0].encode(states.flatten(1))[:, None]
        if self.kind != "per_iteration":
            return self.coders[0].encode(states)
        each = [coder.encode(x) for coder, x in zip(self.coders, states.unbind(1), strict=True)]
        return torch.stack(each, 1)

    def decode(self, codes: Float[Tensor, "read code feature"]) -> Float[Tensor, "read loop d_out"]:
        """Turn codes back into states, the dictionary's reconstruction."""
        if self.kind == "crosscoder":
            whole = self.coders[0].decode(codes[:, 0])
            return whole.view(len(whole), self.n_loops, -1)
        if self.kind != "per_iteration":
            return self.coders[0].decode(codes)
        each = [coder.decode(x) for coder, x in zip(self.coders, codes.unbind(1), strict=True)]
        return torch.stack(each, 1)

    def directions(self, loop: int) -> Float[Tensor, "feature d_out"]:
        """The vector that each feature adds to the state at one iteration.

        Raises:
            ValueError: The iteration is out of range.
        """
        if not 0 <= loop < self.n_loops:
            raise ValueError(f"loop must be in 0..{self.n_loops - 1}, got {loop}")
        W_dec = self.coder(loop).W_dec
        return W_dec.unflatten(1, (self.n_loops, -1))[:, loop] if self._all_at_once else W_dec

    def bias(self, loop: int) -> Float[Tensor, " d_out"]:
        """The bias that the dictionary adds to the state at one iteration."""
        b_dec = self.coder(loop).b_dec
        return b_dec.unflatten(0, (self.n_loops, -1))[loop] if self._all_at_once else b_dec

    @property
    def _all_at_once(self) -> bool:
        return self.kind == "crosscoder"

    def check(self, model: LoopedModel) -> None:
        """Refuse a model that the dictionary was not trained on, or that it does not fit.

        Raises:
            KeyError: The model does not have a hook of the dictionary.
            ValueError: The model has other weights, another configuration or another width.
        """
        self.reading.check(model)

    def frame(self) -> pd.DataFrame:
        """One row per coder and training step. The columns are coder, step and unexplained (share
        of the batch's variance).
        """
        rows = [
            (coder, step, loss)
            for coder, losses in enumerate(self.losses.tolist())
            for step, loss in enumerate(losses)
        ]
        return pd.DataFrame(rows, columns=["coder", "step", "unexplained"])

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the share of the variance left unexplained over training."""
        from loopscope.interp.drawing.dictionaries import training

        return training(self, title)
