"""One feature: its activation in every token, its direct effect on the logits, and what its
ablation does to answers.

Axes: batch pos loop d_vocab; read (a token of an example), `place` (a token at an iteration).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.collecting import recorded
from loopscope.interp.common.columns import read_columns
from loopscope.interp.common.inputs import begin_batch, in_chunks, rows_apart, rows_at_once
from loopscope.interp.common.metrics import margin
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import one_in_range
from loopscope.interp.common.precision import widened
from loopscope.interp.common.ranking import top_token
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.reading import loop_states
from loopscope.interp.dictionaries.splice import FeatureEdit, splice
from loopscope.models.basis.numbers import checked_count
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

_READS = 4096  # reads encoded at a time


@dataclass(frozen=True)
class FeatureEffects:
    """The strongest activations of one feature in some inputs, and the effect of removing it.

    Attributes:
        feature: The number of the feature.
        on: Int[Tensor, " live"], the rows in which the feature is on.
        rows: Int[Tensor, " input"], the rows in which it is strongest, by falling activation.
        columns, loops: Int[Tensor, " input"], the column and the iteration of the largest
            activation in each of these rows.
        activation: Float[Tensor, "input pos"], the activation at that iteration; NaN at padding.
        profile: Float[Tensor, " loop"], the mean length of the vector that the feature adds, over
            tokens.
        share: Float[Tensor, " loop"], the share of tokens in which the feature is on.
        logits: Float[Tensor, " d_vocab"], the feature's direct effect on the logits; see
            `direct_effect`.
        margin: Float[Tensor, " loop_and_all"], the mean change of the answers' margin, in logits,
            if the feature is removed at one iteration, and in the last entry at all iterations. The
            mean is over the rows in which it is on. NaN if the iteration does not have the feature.
        changed: Float[Tensor, " loop_and_all"], the share of these rows whose top token changes.
    """

    feature: int
    on: Int[Tensor, " live"]
    rows: Int[Tensor, " input"]
    columns: Int[Tensor, " input"]
    loops: Int[Tensor, " input"]
    activation: Float[Tensor, "input pos"]
    profile: Float[Tensor, " loop"]
    share: Float[Tensor, " loop"]
    logits: Float[Tensor, " d_vocab"]
    margin: Float[Tensor, " loop_and_all"]
    changed: Float[Tensor, " loop_and_all"]


def feature_effects(
    model: LoopedModel,
    dictionary: Dictionary,
    batch: Batch,
    answers: Int[Tensor, " batch"],
    feature: int | None = None,
    *,
    loop: int | None = None,
    k: int = 6,
) -> FeatureEffects:
    """Find where a feature is strongest, and measure how the answers change without it.

    Args:
        answers: The token id of each row's answer, whose margin is measured.
        feature: The feature, from 0; None takes the one with the largest activation at `loop`.
        loop: The iteration at which the feature is looked for. None means all iterations, or for a
            per_iteration dictionary the last one.
        k: How many rows to show.

    Raises:
        ValueError: A feature or an iteration is out of range, the feature is on in no row, or the
            dictionary is of another model.
    """
    dictionary.check(model)
    n_loops, k = dictionary.n_loops, checked_count(k, "k")
    at = n_loops - 1 if loop is None else one_in_range("loop", loop, n_loops)
    searched = list(range(n_loops)) if loop is None and _at_all_loops(dictionary) else [at]
    if feature is None:
        feature = strongest_feature(model, dictionary, batch, searched)
    feature = one_in_range("feature", feature, dictionary.n_features)
    loops = list(range(n_loops)) if dictionary.same_features else [at]
    found = activations(model, dictionary, batch, feature)
    most = found[..., searched].nan_to_num(-1.0).flatten(1).max(1)
    live = (most.values > 0).nonzero().flatten()
    if not len(live):
        raise ValueError(
            f"feature {feature} is on in none of the {len(batch)} inputs, so its effects cannot be"
            " measured; choose another feature, or inputs in which it is on"
        )
    rows = live[most.values[live].argsort(descending=True, stable=True)][:k]
    columns, turn = most.indices[rows] // len(searched), most.indices[rows] % len(searched)
    places = turn.new_tensor(searched)[turn]
    choices = [*([each] for each in loops), loops]
    changes = ablation_effects(model, dictionary, batch, answers, feature, choices, live)
    return FeatureEffects(
        feature,
        on=live,
        rows=rows,
        columns=columns,
        loops=places,
        activation=found[rows, :, places],
        **_over_loops(dictionary, found, feature, loops),
        logits=direct_effect(
            model, dictionary, batch, feature, torch.stack([columns, places], 1),
            most.values[rows], rows,
        ),
        **dict(zip(("margin", "changed"), _spread(changes, [*loops, n_loops]), strict=True)),
    )  # fmt: skip


def _at_all_loops(dictionary: Dictionary) -> bool:
    """Whether a feature has an activation of its own at each iteration, and is the same one."""
    return dictionary.kind != "crosscoder" and dictionary.same_features


def _over_loops(
    dictionary: Dictionary, found: Float[Tensor, "batch pos loop"], feature: int, loops: list[int]
) -> dict[str, Float[Tensor, " loop"]]:
    """The mean length of what a feature writes, and the share of tokens in which it is on; 0 where
    it is no feature of the iteration.
    """
    lengths = found.new_zeros(dictionary.n_loops)
    lengths[loops] = torch.stack([dictionary.directions(t)[feature].norm() for t in loops]).to(
        lengths
    )
    share = (found > 0).sum((0, 1)).float() / (~found[..., 0].isnan()).sum()
    return {"profile": found.nanmean((0, 1)) * lengths, "share": share * (lengths > 0)}


def _spread(
    changes: Sequence[Float[Tensor, " choice"]], places: list[int]
) -> list[Float[Tensor, " loop_and_all"]]:
    """The changes at the iterations that were tried and at all of them; NaN at the others."""
    found = [each.new_full((places[-1] + 1,), torch.nan) for each in changes]
    for whole, each in zip(found, changes, strict=True):
        whole[places] = each
    return found


@torch.no_grad()
def activations(
    model: LoopedModel, dictionary: Dictionary, batch: Batch, feature: int
) -> Float[Tensor, "batch pos loop"]:
    """The activation of a feature in every token at every iteration; NaN for padding."""
    states = loop_states(model, batch, dictionary.n_loops, hook=dictionary.reading.hook)
    codes = torch.cat([dictionary.encode(part)[..., feature] for part in states.split(_READS)])
    columns, shown = read_columns(batch, "all"), batch.mask.bool()
    rows = torch.arange(len(batch), device=columns.device)[:, None].expand_as(columns)
    found = codes.new_full((*batch.tokens.shape, dictionary.n_loops), torch.nan)
    found[rows[shown], columns[shown]] = codes.expand(-1, dictionary.n_loops)
    return found


@torch.no_grad()
def strongest_feature(
    model: LoopedModel, dictionary: Dictionary, batch: Batch, loops: Sequence[int]
) -> int:
    """The feature with the largest activation in any token at some iterations."""
    states = loop_states(model, batch, dictionary.n_loops, hook=dictionary.reading.hook)
    parts = (dictionary.encode(part).expand(-1, dictionary.n_loops, -1) for part in
             states.split(_READS))  # fmt: skip
    return int(torch.stack([part[:, list(loops)].amax((0, 1)) for part in parts]).amax(0).argmax())


@torch.no_grad()
@evaluated
def direct_effect(
    model: LoopedModel,
    dictionary: Dictionary,
    batch: Batch,
    feature: int,
    places: Int[Tensor, "batch 2"],
    sizes: Float[Tensor, " batch"],
    of: Int[Tensor, " row"] | None = None,
) -> Float[Tensor, " d_vocab"]:
    """The logits that a feature adds by itself: those of the final norm and head for the residual
    stream at a token, minus those without what the feature writes there; as a mean over the rows
    and around the mean over the vocabulary.

    Args:
        places: The column and the iteration of each row.
        sizes: The activations there.
        of: The rows that these belong to; None means all of the batch.

    Raises:
        ValueError: A dictionary that does not write into the residual stream.
    """
    width = dictionary.directions(0).shape[1]
    if width != model.cfg.d_model:
        raise ValueError(
            "a direct effect on the logits needs a dictionary that writes vectors as wide as the"
            f" residual stream, {model.cfg.d_model}, got {width} at {dictionary.reading.target!r}"
        )
    if of is not None and rows_apart(model):
        batch, of = batch[of], None
    names = _residuals(model, dictionary)
    run = recorded(model, batch, names, dictionary.n_loops)
    rows = range(len(batch)) if of is None else of.tolist()
    found = []
    for row, (column, loop), size in zip(rows, places.tolist(), sizes, strict=True):
        resid = run[names[loop]][row, column]
        added = size * dictionary.directions(loop)[feature].to(sizes)
        without = widened(resid) - added.to(widened(resid))
        both = torch.stack([resid, without.to(resid.dtype)])[:, None]
        logits = widened(model.unembed(model.normalize(both)))[:, 0]
        found.append(logits[0] - logits[1])
    mean = torch.stack(found).mean(0)
    return mean - mean.mean()


def _residuals(model: LoopedModel, dictionary: Dictionary) -> list[str]:
    """The residual stream after each block into which the dictionary writes; outside of blocks what
    is written itself.
    """
    written, visits = dictionary.reading.written, model.schedule(dictionary.n_loops)
    after = [
        f"{visit.name}.{model.lens_site}"
        for name in written
        for visit in visits
        if name.startswith(f"{visit.name}.")
    ]
    return after if len(after) == len(written) else written


@torch.no_grad()
@evaluated
def ablation_effects(
    model: LoopedModel,
    dictionary: Dictionary,
    batch: Batch,
    answers: Int[Tensor, " batch"],
    feature: int,
    loops: Sequence[Sequence[int]],
    of: Int[Tensor, " row"] | None = None,
    batch_size: int = 512,
) -> tuple[Float[Tensor, " choice"], Float[Tensor, " choice"]]:
    """The changes of answers where a feature is taken out at some choices of iterations.

    Args:
        answers: The token whose margin is measured in each row.
        loops: Each choice of iterations at which the feature is taken out, at all tokens.
        of: The rows whose changes are averaged; None means all. The others are run only where rows
            depend on one another.

    Returns:
        The mean change of the answers' margin, in logits; and the share of top tokens that change.
    """
    if of is not None and rows_apart(model):
        batch, answers, of = batch[of], answers[of], None
    margins, changed = [], []
    size = rows_at_once(model, batch, batch_size)
    for part, right in zip(in_chunks(batch, size, "ablations"), answers.split(size), strict=True):
        clean = _answers(model, part, dictionary.n_loops)
        reference = part if dictionary.kind == "crosscoder" else None
        each = []
        for chosen in loops:
            edit = FeatureEdit(feature, loops=list(chosen))
            with splice(model, dictionary, edit, loops=list(chosen), reference=reference):
                each.append(_answers(model, part, dictionary.n_loops))
        logits = torch.stack(each)
        away = margin(logits, right.expand(len(each), -1)) - margin(clean, right)
        margins.append(away)
        changed.append(top_token(logits) != top_token(clean))
    kept = slice(None) if of is None else of
    away, turned = torch.cat(margins, 1)[:, kept], torch.cat(changed, 1)[:, kept]
    return away.mean(1), turned.to(away).mean(1)


def _answers(model: LoopedModel, batch: Batch, n_loops: int) -> Float[Tensor, "batch d_vocab"]:
    state = model.advance(begin_batch(model, batch, n_loops))
    return widened(model.readout(state, batch.readout))
