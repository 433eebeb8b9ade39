"""Direct logit attribution: what each component of each iteration adds to the logit of an
answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.collecting import collect
from loopscope.interp.common.frozen_norm import frozen_norm, watching
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    in_chunks,
    rows_at_once,
)
from loopscope.interp.common.metrics import Answers, one_per_row
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.state import Slot, Visit, checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class LogitComponent:
    """One term of the residual stream: the output of one component.

    Attributes:
        name: The hook point at which the term is read.
        kind: "embed", "pos_embed", "head", "attn_bias", "mlp", or "attn" for all heads and the bias
            together. Outside the loop the stage stands in front ("prelude.mlp").
        loop, layer, head: The iteration, block and head, from 0; None for a term without one.
    """

    name: str
    kind: str
    loop: int | None
    layer: int | None
    head: int | None


@dataclass(frozen=True)
class DirectLogits(OneScreen):
    """The logit of an answer, or the difference of two logits, split into one term per component.

    Attributes:
        components: The components, in the order in which they run.
        values: Float[Tensor, "component batch"], the term of each component, in logits.
        constant: Float[Tensor, " batch"], the part that no component writes: the biases of the
            final norm (through the unembedding) and of the unembedding.
        logits: Float[Tensor, " batch"], the model's own logit or difference: the sum of all terms
            and the constant.
    """

    components: tuple[LogitComponent, ...]
    values: Float[Tensor, "component batch"]
    constant: Float[Tensor, " batch"]
    logits: Float[Tensor, " batch"]

    def frame(self) -> pd.DataFrame:
        """One row per component, and a last row for the constant. The columns are component, loop,
        layer, head and value (in logits, a mean over the batch).
        """
        rows = [(c.kind, c.loop, c.layer, c.head) for c in self.components]
        frame = pd.DataFrame(
            [*rows, ("constant", None, None, None)], columns=["component", "loop", "layer", "head"]
        )
        frame["value"] = torch.cat([self.values, self.constant[None]]).mean(1).cpu().numpy()
        return frame.astype(dict.fromkeys(("loop", "layer", "head"), "Int64"))

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the term of each component, visits by heads and MLPs."""
        from loopscope.interp.drawing.effects import direct_logits

        return direct_logits(self, title)


@torch.no_grad()
@evaluated
def direct_logit_attribution(
    model: LoopedModel,
    inputs: Inputs,
    answers: Answers,
    *,
    against: Answers | None = None,
    n_loops: int | None = None,
    readout: ReadoutColumn = None,
    heads: bool = True,
    batch_size: int = 512,
) -> DirectLogits:
    """Split the logit of an answer into one term per component and iteration: direct logit
    attribution.

    A component's term is its output at the answer position, through the final norm and the
    unembedding. The final norm divides every term by the scale that it had in the run.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        answers: The token of each row whose logit is split; an int means the same token in all
            rows.
        against: Tokens whose logit is subtracted, so that the difference is split; None means no
            token.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        heads: True gives each head a term of its own, and the attention's output bias another.
            False gives each attention layer one term.
        batch_size: How many rows run at a time.

    Returns:
        The terms, by component and row.

    Raises:
        ValueError: The residual stream is not a plain sum of component outputs, the logits are
            capped, a head's output is not linear in the stream, or a token is outside the
            vocabulary.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    require_additive(model, "direct_logit_attribution")
    if not model.linear_head:
        raise ValueError(
            "direct_logit_attribution needs logits that are linear in the normalised stream, but"
            f" {type(model).__name__} caps its logits; edge_attribution and attribution_patch work"
            " on it"
        )
    batch, n_loops = as_batch(model, inputs, readout), checked_loops(n_loops, model.cfg.n_loops)
    rows, size = len(batch), rows_at_once(model, batch, batch_size)
    sides = [
        one_per_row("answers", side, rows, model.cfg.d_vocab, batch.tokens.device)
        for side in (answers, against)
        if side is not None
    ]
    tokens = torch.stack(sides, dim=1)
    W_U, b_U = widened(model.W_U), widened(model.b_U)
    signs = torch.tensor([1.0, -1.0], dtype=W_U.dtype, device=model.device)[: tokens.shape[1]]
    pieces = []
    for part, chosen in zip(in_chunks(batch, size, "logits"), tokens.split(size), strict=True):
        terms, resid, logits = _run(model, part, n_loops, heads)
        linear, offset = _through_final_norm(model, torch.stack(list(terms.values())), resid)
        direction = einsum(W_U.T[chosen], signs, "batch token d_model, token -> batch d_model")
        values = einsum(
            widened(linear), direction, "component batch d_model, batch d_model -> component batch"
        )
        constant = direction @ widened(offset) + b_U[chosen] @ signs
        pieces.append((values, constant, widened(logits).gather(1, chosen) @ signs))
    values, constant, picked = (torch.cat(piece, dim=-1) for piece in zip(*pieces, strict=True))
    check_sum(torch.cat([values, constant[None]]), picked, "the logit", model.W_U.dtype)
    return DirectLogits(tuple(terms), values, constant, picked)


def require_additive(model: LoopedModel, method: str) -> None:
    """Refuse a model whose residual stream is not a plain sum of component outputs.

    Raises:
        ValueError: The family declares that the stream is no such sum; the message says what else
            happens to it.
    """
    if model.additive_residual:
        return
    injected = any("hook_injected" in slot.opening for slot in model.plan(2))
    reason = (
        "adds the input again before each iteration"
        if injected
        else "normalises or mixes the stream after components have added to it"
    )
    raise ValueError(
        f"{method} needs a residual stream that is the sum of its components' outputs, each added"
        f" once, but this model {reason} (its additive_residual is False); activation_patch and"
        " attribution_patch work on it"
    )


def check_sum(
    parts: Float[Tensor, "part ..."], total: Tensor, what: str, dtype: torch.dtype
) -> None:
    """Raise unless the parts sum to the total, of the shape "...", up to the square root of the
    precision of the number format in which the model ran.

    Raises:
        ValueError: They do not: a hook writes to the stream, or the family does what its
            `additive_residual` denies.
    """
    off, scale = (parts.sum(0) - total).abs(), parts.abs().sum(0)
    if bool((off > torch.finfo(dtype).eps ** 0.5 * scale).any()):
        raise ValueError(
            f"the components' outputs must sum to {what}, but are off by up to"
            f" {float(off.max()):.3g}; something else writes to the residual stream: a hook at"
            " resid_pre, resid_mid or resid_post that is attached now, or the family itself"
        )


def component_kind(slot: Slot, what: str) -> str:
    """The name of a component of a block: "mlp" in the loop, "prelude.mlp" in another stage."""
    return what if slot.loop is not None else f"{slot.stage}.{what}"


def _through_final_norm(
    model: LoopedModel,
    stack: Float[Tensor, "component batch d_model"],
    resid: Float[Tensor, "batch 1 d_model"],
) -> tuple[Float[Tensor, "component batch d_model"], Float[Tensor, " d_model"]]:
    """Each term behind the frozen final norm, and the norm's bias."""
    seen: list[Tensor] = []
    model.normalize(resid, watching(model.final_scale_site, lambda value, hook: seen.append(value)))
    scale = (
        torch.cat(seen).transpose(0, 1) if seen else resid.new_ones(())
    )  # frozen_norm refuses a norm that shows none
    return frozen_norm(model.normalize, model.final_scale_site, stack, scale)


def _run(
    model: LoopedModel, batch: Batch, n_loops: int, heads: bool
) -> tuple[
    dict[LogitComponent, Tensor], Float[Tensor, "batch 1 d_model"], Float[Tensor, "batch d_vocab"]
]:
    """Every term of the residual stream at the readout, that stream, and the logits."""
    visits = model.schedule(n_loops)
    before, attn_site = model.edge_sites()[0], "attn.hook_z" if heads else "hook_attn_out"
    _require_sites(visits, attn_site, heads)
    inside = [f"{visit.name}.{site}" for visit in visits for site in (attn_site, "hook_mlp_out")]
    seen, state = collect(
        model,
        batch,
        [*before, *inside],
        n_loops,
        reduce=lambda value, name: at_columns(value, batch.readout),
    )
    terms = {
        LogitComponent(name, name.removeprefix("hook_"), None, None, None): seen[name]
        for name in before
    }
    for visit in visits:
        attn, mlp = _term(visit, attn_site, "attn"), _term(visit, "hook_mlp_out", "mlp")
        terms |= _heads(visit, seen[attn.name]) if heads else {attn: seen[attn.name]}
        terms[mlp] = seen[mlp.name]
    return (
        terms,
        at_columns(state.resid, batch.readout)[:, None],
        model.readout(state, batch.readout),
    )


def _term(visit: Visit, site: str, what: str, head: int | None = None) -> LogitComponent:
    return LogitComponent(
        f"{visit.name}.{site}", component_kind(visit, what), visit.loop, visit.layer, head
    )


def _heads(visit: Visit, z: Float[Tensor, "batch head d_head"]) -> dict[LogitComponent, Tensor]:
    """The output of each head of a visit in the residual stream, and the output bias where there is
    one.
    """
    attn = cast(Any, visit.block).attn
    results = einsum(z, attn.W_O, "batch head d_head, head d_head d_model -> head batch d_model")
    terms = {
        _term(visit, "attn.hook_z", "head", head): result for head, result in enumerate(results)
    }
    bias = getattr(attn, "b_O", None)  # families without biases have none
    if bias is not None:
        terms[_term(visit, "hook_attn_out", "attn_bias")] = bias.expand_as(results[0])
    return terms


def _require_sites(visits: list[Visit], attn_site: str, heads: bool) -> None:
    for visit in visits:
        for site in (attn_site, "hook_mlp_out"):
            if site not in visit.sites:
                raise ValueError(
                    f"every block must have the site {site!r} to be split into components, but"
                    f" {visit.name} has none"
                )
        if heads and "attn.hook_out" in visit.sites:
            raise ValueError(
                f"{visit.name} normalises its attention's output, so its heads do not add up; pass"
                " heads=False"
            )
