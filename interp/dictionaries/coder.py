"""A coder: vectors as sparse sums of features.

Axes: d_in (of what is read), feature, d_out (of what is written).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.shown import OneScreen
from loopscope.models.basis.numbers import checked_integer


@dataclass(frozen=True)
class Coder(OneScreen):
    """The weights of a sparse autoencoder, or of a transcoder, which writes another hook than it
    reads.

    The code of x is c(W_enc^T (x - b_dec) + b_enc), and its reconstruction is W_dec^T code + b_dec.
    The function c keeps the `k` largest entries that are positive, or those above the threshold.

    Attributes:
        W_enc: Float[Tensor, "d_in feature"], the encoder's weights.
        b_enc: Float[Tensor, " feature"], the encoder's bias.
        W_dec: Float[Tensor, "feature d_out"], the direction that each feature writes.
        b_dec: Float[Tensor, " d_out"], the bias that is written.
        k: How many features are on in a code; None if a threshold decides.
        threshold: Float[Tensor, " feature"], the activation above which a feature is on; None if k
            decides.
        centred: Whether b_dec is subtracted from x before encoding.
    """

    W_enc: Float[Tensor, "d_in feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, " d_out"]
    k: int | None = None
    threshold: Float[Tensor, " feature"] | None = None
    centred: bool = True

    def __post_init__(self) -> None:
        if (self.k is None) == (self.threshold is None):
            raise ValueError("a coder needs k or a threshold, and not both")
        if self.k is not None:  # as a file can hold it
            object.__setattr__(self, "k", checked_integer(self.k, "k"))
        if self.k is not None and not 1 <= self.k <= self.n_features:
            raise ValueError(
                f"k must be in 1..{self.n_features}, the number of features, got {self.k}"
            )
        if self.centred and self.d_in != self.d_out:
            raise ValueError(
                f"b_dec can be taken from the input only where both are as wide, got d_in="
                f"{self.d_in} and d_out={self.d_out}; pass centred=False"
            )

    @property
    def d_in(self) -> int:
        """The width of the vectors that are read."""
        return int(self.W_enc.shape[0])

    @property
    def n_features(self) -> int:
        """The number of features."""
        return int(self.W_enc.shape[1])

    @property
    def d_out(self) -> int:
        """The width of the vectors that are written."""
        return int(self.W_dec.shape[1])

    def to(self, device: torch.device | str) -> Coder:
        """The same coder on a device."""
        return replace(
            self,
            W_enc=self.W_enc.to(device),
            b_enc=self.b_enc.to(device),
            W_dec=self.W_dec.to(device),
            b_dec=self.b_dec.to(device),
            threshold=None if self.threshold is None else self.threshold.to(device),
        )

    def encode(self, x: Float[Tensor, "*any d_in"]) -> Float[Tensor, "*any feature"]:
        """The sparse code of each vector, in float32 or wider.

        Raises:
            ValueError: The vectors have another width than the coder.
        """
        if x.shape[-1] != self.d_in:
            raise ValueError(
                f"this dictionary reads vectors of width {self.d_in}, got width {x.shape[-1]}"
            )
        W_enc, b_enc, x = self._as_wide(x)
        shift = self.b_dec.to(x.dtype) if self.centred else 0.0
        return self._sparse((x - shift) @ W_enc + b_enc)

    def _as_wide(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.W_enc.dtype), torch.float32)
        return self.W_enc.to(dtype), self.b_enc.to(dtype), x.to(dtype)

    def _sparse(self, before: Tensor) -> Tensor:
        if self.threshold is not None:
            return before.relu() * (before > self.threshold)
        values, features = before.topk(int(self.k or 0), dim=-1)
        return torch.zeros_like(before).scatter(-1, features, values.relu())

    def written(self, code: Float[Tensor, "*any feature"]) -> Float[Tensor, "*any d_out"]:
        """The sum of the features of a code, without the bias."""
        return code @ self.W_dec.to(code.dtype)

    def decode(self, code: Float[Tensor, "*any feature"]) -> Float[Tensor, "*any d_out"]:
        """The reconstruction of a code, with the bias."""
        return self.written(code) + self.b_dec.to(code.dtype)
