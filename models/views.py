"""The same computation without sharing: as a TransformerLens model, or with one copy of the weights
per visit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule

from loopscope.models.blocks.components import LayerNorm
from loopscope.models.core.attention import Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import NO_TAPS, HookWatch, LoopHookPoint, add_point, live
from loopscope.models.core.state import State, checked_loops

READERS = (("ln1", "attn", ("Q", "K", "V")), ("ln2", "mlp", ("gate", "in")))
"""Which views of a block's weights read which of its norms; a block without a view has no such
projection."""


def untied(model: LoopedModel, n_loops: int | None = None) -> LoopedModel:
    """The same schedule with one copy of the block weights per visit, as an oracle for everything
    that sharing could break.

    Args:
        n_loops: The only number of iterations that the copy runs.

    Returns:
        A model of the same class and hook names. `copy.visit_blocks[i]` holds the weights of visit
        i.
    """
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    twin = copy.deepcopy(model)
    twin.reset_hooks(including_permanent=True)
    twin.cfg = replace(model.cfg, n_loops=n_loops)
    twin.visit_blocks = nn.ModuleList(
        copy.deepcopy(visit.block) for visit in twin.schedule(n_loops)
    )
    twin._schedules = {}
    return twin


def unrolled(model: LoopedModel, n_loops: int | None = None, *, fold_ln: bool = False) -> Unrolled:
    """The same computation under TransformerLens names: visit i of the schedule is `blocks.{i}`.

    Args:
        n_loops: Iterations; None means what the checkpoint records.
        fold_ln: Fold the norms' weights into what reads them, in a copy of the weights; then the
            attributions of all components plus the biases sum to the logit.

    Raises:
        TypeError: A family that is not a flat stack of blocks over shared weights.
    """
    if not model.cfg.flat:
        raise TypeError(
            f"unrolled serves flat causal families, got {type(model).__name__}; check it against"
            " untied(model, n_loops)"
        )
    return Unrolled(model, checked_loops(n_loops, model.cfg.n_loops), fold_ln)


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
        if not cast("Unrolled", self.model).additive_residual:
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


class _UnrolledBlock(nn.Module):
    hook_out_is_single_residual_stream = True

    attn: _Part
    mlp: _Part

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attn = _Part(block.attn, ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"))
        self.mlp = _Part(block.mlp, ("W_gate", "W_in", "W_out", "b_gate", "b_in", "b_out"))


class _FinalNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.__dict__["_norm"] = norm  # the source's own, not a part of this module
        self.hook_scale = LoopHookPoint()
        self.hook_normalized = LoopHookPoint()

    def forward(self, x: Tensor) -> Tensor:
        taps = live(
            {
                "ln_final.hook_scale": self.hook_scale,
                "ln_final.hook_normalized": self.hook_normalized,
            }
        )
        normalized: Tensor = self.__dict__["_norm"](x, taps)
        return normalized


class _Unembed(nn.Module):
    def __init__(
        self, weight: Float[Tensor, "d_model d_vocab"], bias: Float[Tensor, " d_vocab"]
    ) -> None:
        super().__init__()
        self.W_U, self.b_U = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W_U + self.b_U


class Unrolled(HookedRootModule):
    """The model that `unrolled` returns. It shares the looped model's weights (folded copies with
    fold_ln) and runs its steps.
    """

    _source: LoopedModel

    def __init__(self, model: LoopedModel, n_loops: int, fold_ln: bool) -> None:
        super().__init__()
        source = _folded(model) if fold_ln else model
        self.__dict__["_source"] = source
        self._visits = source.schedule(n_loops)
        self.additive_residual = model.additive_residual
        self.blocks = nn.ModuleList(_UnrolledBlock(visit.block) for visit in self._visits)
        norm = cast(LayerNorm, model.final_norm)
        self.ln_final = _FinalNorm(cast(LayerNorm, source.final_norm))
        weight = (norm.w[:, None] * model.W_U).detach() if fold_ln else model.W_U
        bias = norm.b @ model.W_U if fold_ln else model.b_U
        self.unembed = _Unembed(weight, bias.detach())
        self._edge = {name: add_point(self, name, False) for name in source.edge_sites()[0]}
        self._points = [
            {site: add_point(self, f"blocks.{v.index}.{site}", False) for site in v.sites}
            for v in self._visits
        ]
        shared = ("d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "act_fn", "eps")
        self.cfg = UnrolledConfig(
            n_layers=len(self._visits),
            **{name: getattr(model.cfg, name) for name in shared},
            n_ctx=model.cfg.n_ctx or 2**31,
            normalization_type="LNPre" if fold_ln else "LN",
            positional_embedding_type=_kind_of_positions(model),
            original_architecture=model.cfg.family,
            device=model.device,
            dtype=model.W_E.dtype,
        )
        inner = {
            f"ln_final.{site}": getattr(self.ln_final, site)
            for site in ("hook_scale", "hook_normalized")
        }
        for name, point in inner.items():
            point.name = name
        found = [
            *self._edge.values(),
            *(point for points in self._points for point in points.values()),
            *inner.values(),
        ]
        self.hook_dict = {
            str(point.name): point for point in found
        }  # not setup(), which would rename the shared modules
        self.mod_dict = dict(self.hook_dict)
        self.train(model.training)
        self._watch = HookWatch()
        for point in found:
            self._watch.add(point)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], mask: Tensor | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits at all positions."""
        source = self._source
        tokens, real, _ = source.checked_inputs(tokens, mask, 1)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        hooked = bool(self._watch)
        resid, parts = source.embed(tokens, positions, live(self._edge))
        rows = Rows.make(State(0, 1, resid, positions, real, parts), type(source).visible)
        for visit, points in zip(self._visits, self._points, strict=True):
            if visit.opening:
                resid, parts = source.enter(visit, resid, parts, NO_TAPS)
            resid, parts = source.visit_block(
                visit, resid, parts, rows, live(points) if hooked else NO_TAPS
            )
            if visit.closing:
                resid, parts = source.leave(visit, resid, parts, NO_TAPS)
        logits: Tensor = self.unembed(self.ln_final(resid))
        return logits

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise TypeError(
            "an unrolled view has no weights of its own; convert or move the looped model and"
            " unroll it again"
        )

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's, with an `ActivationCache` that refuses decompositions which would
        be wrong.
        """
        logits, cache = super().run_with_cache(*args, **kwargs)
        return logits, UnrolledCache(
            cache, self, has_batch_dim=not kwargs.get("remove_batch_dim", False)
        )

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self._source.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.unembed.b_U

    def to_tokens(
        self, text: str | list[str], prepend_bos: bool = False
    ) -> Int[Tensor, "batch pos"]:
        """Token ids; these models have no BOS token, so prepend_bos changes nothing."""
        return self._source.to_tokens(text)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token."""
        return self._source.to_single_token(text)

    def to_str_tokens(self, tokens: str | Tensor) -> list[str]:
        """The tokens as strings."""
        return self._source.to_str_tokens(tokens)

    def tokens_to_residual_directions(
        self, tokens: str | int | Tensor
    ) -> Float[Tensor, "*tokens d_model"]:
        """The unembedding vectors of some tokens."""
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        return self.W_U.T[torch.as_tensor(ids, device=self.W_U.device)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the output biases of all components before a block."""
        total = torch.zeros_like(self.W_E[0])
        parts = [cast(_UnrolledBlock, block) for block in self.blocks]
        for block in parts[:layer]:
            total = total + block.attn.b_O + (block.mlp.b_out if include_mlp_biases else 0)
        return total + parts[layer].attn.b_O if mlp_input else total


def _kind_of_positions(model: LoopedModel) -> str:
    """TransformerLens's name for how a model knows positions."""
    if "hook_pos_embed" in model.edge_sites()[0]:
        return "standard"
    return "rotary" if model.positional else "none"


@torch.no_grad()
def _folded(model: LoopedModel) -> LoopedModel:
    """A copy whose norms have weight one and bias zero, with theirs folded into the projections
    that read them.
    """
    twin = copy.deepcopy(model)
    twin.reset_hooks(including_permanent=True)
    blocks = cast(nn.ModuleList, twin.blocks if twin.visit_blocks is None else twin.visit_blocks)
    for linear in (m for m in blocks.modules() if isinstance(m, nn.Linear)):
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    for block in blocks:
        for site, part, readers in READERS:
            _fold(getattr(block, site), getattr(block, part), readers)
    for norm in (m for m in twin.modules() if isinstance(m, LayerNorm)):
        norm.w.fill_(1.0)
        norm.b.zero_()
    return twin


def _fold(norm: LayerNorm, part: nn.Module, readers: tuple[str, ...]) -> None:
    """Move a norm's weight and bias into the projections of a sub-layer, through its views."""
    for reader in readers:
        weight: Tensor | None = getattr(part, f"W_{reader}", None)
        if weight is not None:
            getattr(part, f"b_{reader}").add_(norm.b @ weight)
            weight.mul_(norm.w[:, None])
