"""Scores of a language model: predictions of the next token, and the strings that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from loopscope.interp.common.ranking import top_token
from loopscope.interp.generation import Sampling, generate
from loopscope.models.core.base import LoopedModel
from loopscope.tasks.molecules import valid
from loopscope.tasks.smiles import BOS, EOS, SmilesVocabulary, well_formed
from loopscope.training.language.data import PAD_ID, as_tokens


def next_token_loss(model: LoopedModel, tokens: Int[Tensor, "string pos"]) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the tokens after the first, padding left out."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs, mask=inputs != PAD_ID)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD_ID)


@dataclass(frozen=True)
class PassScores:
    """Scores of next-token prediction, read out after each iteration.

    Attributes:
        nats: Cross-entropy per token after 1, 2, ... iterations.
        accuracy: Share of tokens that are the most likely one.
    """

    nats: tuple[float, ...]
    accuracy: tuple[float, ...]


@torch.no_grad()
def score_passes(
    model: LoopedModel, rows: UInt8[np.ndarray, "string pos"], n_loops: int, batch_size: int = 250
) -> PassScores:
    """The scores after each of `n_loops` iterations of one run, at every token of some strings."""
    sums, count = torch.zeros(2, n_loops, dtype=torch.float64, device=model.device), 0
    ordered = rows[np.argsort(np.count_nonzero(rows, axis=1), kind="stable")]
    for start in range(0, len(rows), batch_size):
        tokens = as_tokens(ordered[start : start + batch_size])
        inputs, real = tokens[:, :-1], tokens[:, 1:] != PAD_ID
        targets = tokens[:, 1:][real]
        count += len(targets)
        state = model.begin(inputs, inputs != PAD_ID, n_loops=n_loops)
        for loop, end in enumerate(model.iteration_ends(n_loops)):
            state = model.advance(state, end)
            logits = model.readout(model.finish(state))[real]
            sums[0, loop] += F.cross_entropy(logits, targets, reduction="sum")
            sums[1, loop] += (top_token(logits) == targets).sum()
    nats, right = (sums / count).tolist()
    return PassScores(tuple(nats), tuple(right))


def sample_strings(
    model: LoopedModel, count: int, seed: int, *, context: int, temperature: float | int = 1.0
) -> list[str]:
    """Strings drawn from a model token by token, without <bos>; a finished one ends in <eos>.

    Args:
        context: Tokens of the longest string, <bos> and <eos> among them.

    Raises:
        ValueError: The model has no SMILES vocabulary, or the temperature is not positive.
    """
    words = model.vocab
    if not isinstance(words, SmilesVocabulary):
        raise ValueError(
            "strings are sampled from a model with a SMILES vocabulary, and model.vocab is none"
        )
    if temperature <= 0:
        raise ValueError(f"the temperature must be above 0, got {temperature}")
    start, end = words.ids(BOS)[0], words.ids(EOS)[0]
    drawn = generate(
        model,
        torch.full((count, 1), start, device="cpu"),
        context - 1,
        sampling=Sampling(temperature=float(temperature), seed=seed),
        stop_at=end,
    ).new.tolist()
    return [words.text(row[: row.index(end) + 1] if end in row else row) for row in drawn]


def shares(samples: Sequence[str]) -> dict[str, float]:
    """The shares of samples that end, and of those that end: well formed, valid, distinct valid."""
    ended = [text.removesuffix(EOS) for text in samples if text.endswith(EOS)]
    good = [text for text in ended if valid(text)]
    counts = {
        "ended": len(ended),
        "well_formed": sum(map(well_formed, ended)),
        "valid": len(good),
        "distinct": len(set(good)),
    }
    return {name: round(number / len(samples), 4) for name, number in counts.items()}
