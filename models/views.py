"""The same computation without sharing: as a TransformerLens model, or with one copy of the weights
per visit.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedRootModule

from loopscope.models.core.attention import Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.compiled import EagerWhileHooked
from loopscope.models.core.hooks import (
    NO_TAPS,
    HookWatch,
    LoopHookPoint,
    add_point,
    live,
    new_point,
)
from loopscope.models.core.state import State, checked_loops
from loopscope.models.view_parts import (
    FinalNorm,
    Flat,
    FlatBlock,
    Unembed,
    UnrolledBlock,
    UnrolledCache,
    UnrolledConfig,
    folded,
    folded_head,
)


def untied(model: LoopedModel, n_loops: int | None = None) -> LoopedModel:
    """Copy a model so that every visit has weights of its own, to test a method where nothing is
    shared.

    The copy has the same schedule and computes the same logits.

    Args:
        model: The model to copy.
        n_loops: The number of iterations of the copy, which runs no other number. None means the
            number that the checkpoint records.

    Returns:
        A model of the same class with the same hook names. `copy.visit_blocks[i]` holds the weights
        of visit i.
    """
    _refuse_edited(model)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    twin = copy.deepcopy(model)
    if twin.any_hook():
        twin.reset_hooks(including_permanent=True)
    twin.cfg = replace(model.cfg, n_loops=n_loops)
    twin.visit_blocks = nn.ModuleList(
        copy.deepcopy(visit.block) for visit in twin.schedule(n_loops)
    )
    return twin


def unrolled(model: Flat, n_loops: int | None = None, *, fold_ln: bool = False) -> Unrolled:
    """View a looped model as one deep model under TransformerLens names: visit i of the schedule is
    `blocks.{i}`.

    Args:
        model: The model to view. Its family must be a flat stack of blocks over shared weights.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        fold_ln: Whether the norms' weights are folded into the weights that read them, in a copy.
            Then the attributions of all components and the biases sum to the logit.

    Returns:
        A model for TransformerLens's tools, which shares the looped model's weights.

    Raises:
        TypeError: The family is no flat stack of blocks over shared weights.
    """
    if not isinstance(model, Flat):
        raise TypeError(
            "unrolled needs a family whose blocks form one flat causal stack, as those of this"
            f" {type(model).__name__} do not; untied(model, n_loops) takes every family"
        )
    _refuse_edited(model)
    return Unrolled(model, checked_loops(n_loops, model.cfg.n_loops), fold_ln)


def _refuse_edited(model: LoopedModel) -> None:
    if model.edited is not None:
        raise ValueError(
            "a view shows the model's own schedule, which is edited now; make it outside"
            " schedule_edit"
        )


class Unrolled(EagerWhileHooked, HookedRootModule):
    """A looped model as one deep model under TransformerLens names; `unrolled` makes it.

    It shares the looped model's weights, or has folded copies with `fold_ln`, and runs the looped
    model's steps.
    """

    _source: Flat

    if TYPE_CHECKING:

        def __call__(self, *inputs: Any, **options: Any) -> Tensor: ...

    def __init__(self, model: Flat, n_loops: int, fold_ln: bool) -> None:
        super().__init__()
        source = folded(model) if fold_ln else model
        self.__dict__["_source"] = source
        self._n_loops, self._visits = n_loops, source.schedule(n_loops)
        self.additive_residual = model.additive_residual
        self.blocks = nn.ModuleList(
            UnrolledBlock(cast(FlatBlock, visit.block)) for visit in self._visits
        )
        self.ln_final = FinalNorm(source.final_norm)
        self.unembed = Unembed(source, folded_head(model) if fold_ln else None)
        self._edge = {name: self._point(name) for name in source.edge_sites()[0]}
        self._points = [
            {site: self._point(f"blocks.{v.index}.{site}") for site in v.sites}
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
        found = [
            *self._edge.values(),
            *(point for points in self._points for point in points.values()),
            *self.ln_final.points.values(),
        ]
        self.hook_dict = {
            str(point.name): point for point in found
        }  # not setup(), which would rename the shared modules
        self.mod_dict = dict(self.hook_dict)
        self.train(model.training)
        self.watch = HookWatch()
        for point in found:
            self.watch.add(point)

    def _point(self, name: str) -> LoopHookPoint:
        """A new hook point of the view, at its place."""
        point = new_point(name, False)
        add_point(self, point)
        return point

    def forward(
        self, tokens: Int[Tensor, "batch pos"], mask: Tensor | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits at all positions."""
        source = self._source
        if source.schedule(self._n_loops) is not self._visits:
            raise ValueError(
                "blocks of the looped model were replaced after unrolled(); unroll the model again"
            )
        tokens, real, _ = source.checked_inputs(tokens, mask, 1)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        hooked = self.any_hook()
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

    def run_with_cache(self, *args: Any, **kwargs: Any) -> tuple[Tensor, UnrolledCache]:
        """Run the model and keep activations, as in TransformerLens.

        The cache is an `ActivationCache`. It refuses decompositions of the residual stream that
        would be wrong for the model.
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
        """The tokens of a text or of token ids, each as a string."""
        return self._source.to_str_tokens(tokens)

    def tokens_to_residual_directions(
        self, tokens: str | int | Tensor
    ) -> Float[Tensor, "*tokens d_model"]:
        """The unembedding vectors of some tokens: the directions of the residual stream that raise
        their logits.
        """
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        return self.W_U.T[torch.as_tensor(ids, device=self.W_U.device)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the output biases of all components before a block."""
        total = torch.zeros_like(self.W_E[0])
        parts = [cast(UnrolledBlock, block) for block in self.blocks]
        for block in parts[:layer]:
            total = total + block.attn.b_O + (block.mlp.b_out if include_mlp_biases else 0)
        return total + parts[layer].attn.b_O if mlp_input else total


def _kind_of_positions(model: Flat) -> str:
    """TransformerLens's name for how a model knows positions."""
    if "hook_pos_embed" in model.edge_sites()[0]:
        return "standard"
    return "rotary" if model.positional else "none"
