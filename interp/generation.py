"""Generating tokens with a key-value cache, hooks included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.common.finite import first_nonfinite
from loopscope.interp.common.inputs import Inputs, as_batch, begin_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.precision import widened
from loopscope.interp.common.ranking import check_order, has_no_order, in_order, top_token
from loopscope.interp.common.shown import OneScreen
from loopscope.models.basis.draws import checked_seed, seeded
from loopscope.models.basis.numbers import checked_count, checked_integer, checked_number
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.attention import KeyValues
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.state import checked_loops

StopAt = int | str | Sequence[int | str] | Int[Tensor, " token"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Attributes:
        temperature: The number that divides the logits; 0 takes the most probable token.
        top_k: How many of the most probable tokens may be drawn; None means all.
        top_p: Only the most probable tokens that together reach this probability may be drawn; 1
            means all.
        seed: The seed of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checked_number(self.temperature, "temperature", least=0)
        if self.top_k is not None:
            checked_count(self.top_k, "top_k")
        checked_number(self.top_p, "top_p", above=0, most=1)
        checked_seed(self.seed)

    def choose(
        self, logits: Float[Tensor, "batch d_vocab"], generator: torch.Generator
    ) -> Int[Tensor, " batch"]:
        """Choose one token for each row. Ties are broken as in `Lens.rank`.

        Raises:
            ValueError: A logit is not finite, so the tokens have no order.
        """
        if self.temperature == 0:
            return top_token(logits)
        check_order(logits)
        order = in_order(widened(logits).cpu())
        ordered = widened(logits).cpu().gather(-1, order) / self.temperature
        if self.top_k is not None:
            ordered[:, self.top_k :] = -torch.inf
        probs = ordered.softmax(-1)
        if self.top_p < 1:
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, probs)
        return torch.multinomial(probs, 1, generator=generator)[:, 0]


@dataclass(frozen=True)
class Generated(OneScreen):
    """Prompts with the tokens that were generated after them.

    Attributes:
        tokens: Int[Tensor, "batch pos"], each prompt and its new tokens, padded on the right with
            0.
        mask: Int[Tensor, "batch pos"], 1 for tokens of the prompt and new tokens, 0 for padding.
        new: Int[Tensor, "batch new"], the new tokens alone; 0 after a row has stopped.
        logits: Float[Tensor, "batch new d_vocab"], from which each new token was chosen.
        text: Each prompt with its new tokens as a text; empty if the model has no vocabulary.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    new: Int[Tensor, "batch new"]
    logits: Float[Tensor, "batch new d_vocab"]
    text: tuple[str, ...] = ()


@torch.no_grad()
@evaluated
def generate(
    model: LoopedModel,
    inputs: Inputs,
    max_new_tokens: int,
    n_loops: int | None = None,
    *,
    sampling: Sampling | None = None,
    stop_at: StopAt | None = None,
    use_cache: bool = True,
) -> Generated:
    """Generate tokens after each prompt, with a key-value cache; prompts may have different
    lengths.

    Hooks that are on the model act in every step. With the cache a step computes only the new
    tokens, so its activations have the shape "batch 1 ...", except in the first step, which
    computes the prompts. The family decides which of the earlier tokens' values later tokens see
    (`LoopedModel.extend`).

    Args:
        inputs: A `Batch`, texts, or unpadded token ids. The options of a batch apply to every step.
        max_new_tokens: The largest number of tokens to generate, at least 1.
        n_loops: The number of iterations for every token; None means the number that the checkpoint
            records.
        sampling: How tokens are chosen; None takes the most probable one.
        stop_at: The tokens after which a row stops: a token id, the text of one token, or a list of
            these. None never stops early.
        use_cache: False computes every step from the first token on. It is slow, and gives the same
            tokens for a family with one key and value per visit. A family whose rows depend on each
            other always runs so, since its new tokens stand at different columns.

    Returns:
        The prompts with their new tokens.

    Raises:
        TypeError: `stop_at` is neither a token nor a list of tokens.
        ValueError: The family is not causal, the model has fewer positions than are needed,
            `stop_at` is outside the vocabulary, or a logit is not finite.
    """
    if not model.causal:
        raise ValueError(
            f"this {type(model).__name__} is not causal: a new token would change what was computed"
            " before it, so it cannot generate"
        )
    max_new_tokens = checked_count(max_new_tokens, "max_new_tokens")
    batch = as_batch(model, inputs, readout=-1 if isinstance(inputs, Tensor) else None)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    furthest = int(batch.mask.sum(1).max()) + max_new_tokens - 1
    if model.cfg.n_ctx is not None and furthest > model.cfg.n_ctx:
        raise ValueError(
            f"the prompt and {max_new_tokens} new tokens need {furthest} positions, but this model"
            f" has n_ctx={model.cfg.n_ctx}"
        )
    sampling, stops = sampling or Sampling(), _stops(model, stop_at)
    run = _Run(model, _widened(batch, max_new_tokens), n_loops, use_cache)
    generator = seeded(sampling.seed)
    going = torch.ones(len(batch), dtype=torch.bool, device=model.device)
    new, logits = [], []
    for _ in tqdm(range(max_new_tokens), desc="generate", leave=False, disable=max_new_tokens < 8):
        logits.append(run.logits())
        if bool((has_no_order(logits[-1]) & going).any()):
            raise ValueError(run.unordered(logits[-1], going))
        rows = torch.where(going[:, None], logits[-1], torch.zeros_like(logits[-1]))
        chosen = sampling.choose(rows, generator).to(model.device) * going
        new.append(chosen)
        run.append(chosen, going)
        going = going & ~torch.isin(chosen, stops)
        if not bool(going.any()):
            break
    width = int(run.batch.mask.sum(1).max())
    return Generated(
        run.batch.tokens[:, :width],
        run.batch.mask[:, :width],
        torch.stack(new, 1),
        torch.stack(logits, 1),
        run.texts(),
    )


def _stops(model: LoopedModel, stop_at: StopAt | None) -> Int[Tensor, " token"]:
    """The ids of the tokens after which a row stops."""
    if stop_at is None:
        return torch.tensor([], dtype=torch.long, device=model.device)
    given = stop_at.tolist() if isinstance(stop_at, Tensor) else stop_at
    entries = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    ids = [model.to_single_token(x) if isinstance(x, str) else _whole(x) for x in entries]
    for token in ids:
        if not 0 <= token < model.cfg.d_vocab:
            raise ValueError(
                f"stop_at must be tokens in 0..{model.cfg.d_vocab - 1}"
                f" (d_vocab={model.cfg.d_vocab}), got {token}"
            )
    return torch.tensor(ids, dtype=torch.long, device=model.device)


def _whole(token: SupportsIndex) -> int:
    try:
        return checked_integer(token, "stop_at")
    except TypeError:
        raise TypeError(
            f"stop_at must be a token id, the text of one token, or several of these, got {token!r}"
        ) from None


class _Run:
    """Prompts that grow, and the keys and values of what has been run of them."""

    def __init__(self, model: LoopedModel, batch: Batch, n_loops: int, use_cache: bool) -> None:
        own_rule = type(model).extend is not LoopedModel.extend
        if use_cache and own_rule and model.edited is not None:
            raise ValueError(
                f"what later tokens of a {type(model).__name__} read of earlier ones follows its"
                " own schedule, so no text is generated in an edited one; pass use_cache=False"
            )
        self.model, self.batch, self.n_loops = model, batch, n_loops
        self.use_cache = use_cache and (own_rule or model.batch_independent)
        self.store: dict[str, KeyValues] = {}

    def logits(self) -> Float[Tensor, "batch d_vocab"]:
        """The logits after each row's last token."""
        lengths = self.batch.mask.sum(1)
        state = begin_batch(self.model, _columns(self.batch, int(lengths.max())), self._loops())
        if not self.use_cache:
            return self.model.readout(self.model.advance(state), lengths - 1)
        if self.store:
            state, lengths = (
                state.map(lambda x: at_columns(x, lengths - 1)[:, None]),
                torch.ones_like(lengths),
            )
        end, new = self.model.extend(state, self.store)
        self.store = {
            name: self.store[name].followed_by(kept) if name in self.store else kept
            for name, kept in new.items()
        }
        return self.model.readout(end, lengths - 1)

    def texts(self) -> tuple[str, ...]:
        """Each row's text; none where the model has no vocabulary."""
        if self.model.vocab is None:
            return ()
        lengths = self.batch.mask.sum(1).tolist()
        rows = (row[:length] for row, length in zip(self.batch.tokens, lengths, strict=True))
        return tuple(map(self.model.texts.to_text, rows))

    def unordered(self, logits: Float[Tensor, "batch d_vocab"], going: Tensor) -> str:
        """The words for logits from which no token can be chosen, with the first place of the run
        that is not finite.
        """
        row = int((has_no_order(logits) & going).nonzero()[0, 0])
        lengths = self.batch.mask.sum(1)
        batch = _columns(self.batch, int(lengths.max()))
        place = first_nonfinite(self.model, replace(batch, readout=lengths - 1), self.n_loops)
        where = (
            "a run without the cache is finite"
            if place is None
            else f"the first place that is not finite is {place.name}, row {place.row}, position"
            f" {place.position}"
        )
        return (
            f"a token can be chosen from finite logits only, but those of row {row} after position"
            f" {int(lengths[row]) - 1} have the maximum {logits[row].amax().item()}; {where}"
        )

    def _loops(self) -> int:
        return self.model.loops_after_prompt(self.n_loops) if self.store else self.n_loops

    def append(self, chosen: Int[Tensor, " batch"], going: Bool[Tensor, " batch"]) -> None:
        """Put a token behind each row that has not stopped."""
        lengths, rows = self.batch.mask.sum(1), torch.arange(len(chosen), device=chosen.device)
        tokens, mask = self.batch.tokens.clone(), self.batch.mask.clone()
        tokens[rows[going], lengths[going]] = chosen[going]
        mask[rows[going], lengths[going]] = 1
        self.batch = replace(self.batch, tokens=tokens, mask=mask)


def _widened(batch: Batch, more: int) -> Batch:
    """The batch with room for more tokens on the right, where whole-number options are 0."""
    width = batch.tokens.shape[1]

    def option(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != width:
            return value
        if value.is_floating_point():
            raise ValueError(
                f"{name}= covers the prompt's {width} positions only; give it for all"
                f" {width + more} positions, or pass seed="
            )
        return F.pad(value, (0, more))

    options: Mapping[str, Any] = {
        name: option(name, value) for name, value in batch.options.items()
    }
    tokens, mask = F.pad(batch.tokens, (0, more)), F.pad(batch.mask, (0, more))
    return Batch(tokens, mask, batch.readout, options)


def _columns(batch: Batch, width: int) -> Batch:
    """The first columns of a batch."""
    full = batch.tokens.shape[1]
    options = {
        name: (
            value[:, :width]
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == full
            else value
        )
        for name, value in batch.options.items()
    }
    return Batch(batch.tokens[:, :width], batch.mask[:, :width], batch.readout, options)
