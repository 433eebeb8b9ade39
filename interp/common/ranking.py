"""The order of tokens by their logits, with one rule of ties.

Tokens are ordered by falling logit, and tokens of equal logits by rising id. Every method takes its
top tokens and its ranks from here: rank 0 is the top token, and no two tokens share a rank. NaN and
+inf have no place in the order, so logits that hold one of them are refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.models.basis.numbers import checked_integer

Place = Callable[[tuple[int, ...]], str]


def top_token(
    logits: Float[Tensor, "*any d_vocab"], place: Place | None = None
) -> Int[Tensor, "*any"]:
    """The first token of the order.

    Args:
        logits: Float[Tensor, "*any d_vocab"].
        place: The words of an error for the row at an index; None names the row by its index.

    Raises:
        ValueError: Logits that have no order.
    """
    check_order(logits, place)
    return logits.argmax(-1)  # the first of equal maxima, as PyTorch documents it


def top_tokens(
    logits: Float[Tensor, "*any d_vocab"], k: int, place: Place | None = None
) -> Int[Tensor, "*any k"]:
    """The first k tokens of the order; the other arguments are those of `top_token`.

    Raises:
        ValueError: Logits that have no order, or k outside 1..d_vocab.
    """
    d_vocab, k = logits.shape[-1], checked_integer(k, "k")
    if not 1 <= k <= d_vocab:
        raise ValueError(f"k must be in 1..{d_vocab} (d_vocab={d_vocab}), got {k}")
    if k == 1:
        return top_token(logits, place)[..., None]
    check_order(logits, place)
    rows = logits.reshape(-1, d_vocab)
    values, tokens = rows.topk(min(k + 1, d_vocab))
    tied = (values[:, 1:] == values[:, :-1]).any(-1)
    tokens = tokens[:, :k].clone()
    tokens[tied] = in_order(rows[tied])[:, :k]
    return tokens.reshape(*logits.shape[:-1], k)


def in_order(logits: Float[Tensor, "*any d_vocab"]) -> Int[Tensor, "*any d_vocab"]:
    """All tokens in their order."""
    return logits.sort(dim=-1, descending=True, stable=True).indices


def rank_of(
    logits: Float[Tensor, "*any d_vocab"], tokens: Int[Tensor, "*any"], place: Place | None = None
) -> Int[Tensor, "*any"]:
    """How many tokens come before one token of each row; the other arguments are those of
    `top_token`.

    Raises:
        ValueError: Logits that have no order.
    """
    check_order(logits, place)
    tokens = tokens[..., None]
    own, ids = logits.gather(-1, tokens), torch.arange(logits.shape[-1], device=logits.device)
    return ((logits > own) | ((logits == own) & (ids < tokens))).sum(-1)


def has_no_order(logits: Float[Tensor, "*any d_vocab"]) -> Bool[Tensor, "*any"]:
    """Whether the largest logit of a row is NaN or infinite; -inf alone excludes a token."""
    return ~logits.amax(-1).isfinite()  # amax passes NaN on


def check_order(logits: Float[Tensor, "*any d_vocab"], place: Place | None = None) -> None:
    """Refuse logits that have no order; the arguments and the error are those of `top_token`."""
    wrong = has_no_order(logits)
    if not bool(wrong.any()):
        return
    index = tuple(wrong.nonzero()[0].tolist())
    raise ValueError(
        f"tokens can be ranked by finite logits only, but those of"
        f" {place(index) if place else f'row {list(index)}'} have the maximum"
        f" {logits[index].amax().item()}; first_nonfinite(model, inputs) names the first activation"
        " that is not finite"
    )
