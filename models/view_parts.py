"""The parts of an unrolled view: its config and cache, modules that show another module's weights,
and the folding of norms.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import ActivationCache

from loopscope.models.blocks.components import LayerNorm, Reader
from loopscope.models.blocks.decoder_block import Block as OutputFirstBlock
from loopscope.models.core.hooks import LoopHookPoint, live
from loopscope.models.families.recurrent_depth import FusedBlock as InputFirstBlock
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.families.smollm import SMolLM

Flat = RecurrentDepth | SMolLM
FlatBlock = InputFirstBlock | OutputFirstBlock


@dataclass(frozen=True)
class UnrolledConfig:
    """The fields of a TransformerLens config that its tools read; n_layers counts visits."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    act_fn: str
    normalization_type: str
    eps: float
    positional_embedding_type: str
    device: torch.device
    dtype: torch.dtype
    original_architecture: str
    attn_only: bool = False
    use_attn_result: bool = False
    default_prepend_bos: bool = False


class UnrolledCache(ActivationCache):
    """TransformerLens's cache; it refuses decompositions where the residual is not a plain sum of
    component outputs.
    """

    def _refuse(self, method: str) -> None:
        if not cast(Any, self.model).additive_residual:
            raise ValueError(
                f"{method} needs a residual stream that is the sum of its components, but this"
                " model adds the input again before each iteration, so the sum would be wrong"
            )

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse("decompose_resid")
        return super().decompose_resid(*args, **kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse("get_full_resid_decomposition")
        return super().get_full_resid_decomposition(*args, **kwargs)

    def logit_attrs(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse("logit_attrs")
        return super().logit_attrs(*args, **kwargs)


class _Part(nn.Module):
    """A place of hook points that also shows some weights of the shared module, without owning
    them.
    """

    def __init__(self, weights: nn.Module, shown: tuple[str, ...]) -> None:
        super().__init__()
        self.__dict__["_weights"] = weights
        self.__dict__["_shown"] = shown

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_shown", ()):
            return getattr(self.__dict__["_weights"], name)
        return super().__getattr__(name)


class UnrolledBlock(nn.Module):
    """One visit of a block, with the block's weights under TransformerLens's names."""

    hook_out_is_single_residual_stream = True

    attn: _Part
    mlp: _Part

    def __init__(self, block: FlatBlock) -> None:
        super().__init__()
        self.attn = _Part(block.attn, ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"))
        self.mlp = _Part(block.mlp, ("W_gate", "W_in", "W_out", "b_gate", "b_in", "b_out"))


class FinalNorm(nn.Module):
    """The source's final norm, with hook points of this view."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.__dict__["_norm"] = norm  # the source's own, not a part of this module
        for site in norm.sites:
            point = LoopHookPoint()
            point.name = site
            self.add_module(site.rpartition(".")[2], point)

    @property
    def points(self) -> dict[str, LoopHookPoint]:
        """The hook points by name."""
        return {str(point.name): point for point in self.children()}  # type: ignore[misc]  # all are points

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.__dict__["_norm"](x, live(self.points))
        return normalized


class Unembed(nn.Module):
    """The head of a looped model.

    Args:
        source: The looped model.
        folded: Weight and bias that take the place of the model's own.
    """

    _source: Flat

    def __init__(self, source: Flat, folded: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.__dict__["_source"] = source  # no module of this one
        self._folded = folded

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self._source.W_U if self._folded is None else self._folded[0]

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self._source.b_U.detach() if self._folded is None else self._folded[1]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W_U + self.b_U


@torch.no_grad()
def folded_head(model: Flat) -> tuple[Tensor, Tensor]:
    """The head's weight and bias with the final norm's folded into them."""
    return model.final_norm.w[:, None] * model.W_U, model.b_U + model.final_norm.b @ model.W_U


@torch.no_grad()
def folded(model: Flat) -> Flat:
    """A copy whose norms have weight one and bias zero, with theirs folded into the projections
    that read them.
    """
    twin = copy.deepcopy(model)
    if twin.any_hook():
        twin.reset_hooks(including_permanent=True)
    for block in twin.blocks:
        for norm, readers in cast(FlatBlock, block).norm_readers:
            assert isinstance(norm, LayerNorm), "the flat families are pre-LayerNorm"
            for reader in readers:
                _fold(norm, reader)
    for norm in (m for m in twin.modules() if isinstance(m, LayerNorm)):
        norm.w.fill_(1.0)
        norm.b.zero_()
    return twin


def _fold(norm: LayerNorm, reader: Reader) -> None:
    """Move a norm's weight and bias into a map that reads its output."""
    stored, bias = getattr(reader.owner, reader.weight), getattr(reader.owner, reader.bias)
    matrix = stored if reader.input_first else stored.T
    moved = norm.b @ matrix
    matrix *= norm.w[:, None]
    setattr(reader.owner, reader.bias, nn.Parameter(moved if bias is None else bias + moved))
