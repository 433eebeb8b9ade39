"""The record of a lens: distributions over the vocabulary at successive visits of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.interp.common.inputs import LOGITS_AT_ONCE
from loopscope.interp.common.metrics import margin
from loopscope.interp.common.precision import widened
from loopscope.interp.common.ranking import rank_of, top_tokens
from loopscope.interp.common.shown import OneScreen
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

ReadVisit = tuple[int | None, int | None, str]
Targets = Int[Tensor, " read"] | Sequence[int]


class Reads(NamedTuple):
    """Some reads of one visit of a lens.

    Attributes:
        lens: The lens.
        visit: The visit's index in the lens.
        rows: The reads.
    """

    lens: Lens
    visit: int
    rows: slice

    def name(self, index: tuple[int, ...]) -> str:
        """The words of an error for one of the reads."""
        read = range(len(self.lens.example))[self.rows][index[0]]
        example, position = self.lens.example[read], self.lens.position[read]
        return f"visit {self.lens.names[self.visit]}, example {example}, position {position}"


Statistic = Callable[[Tensor, Reads], Tensor]


class TopTokens(NamedTuple):
    """The most likely tokens at each visit and read, most likely first.

    Attributes:
        tokens: Int[Tensor, "visit read k"], token ids.
        probs: Float[Tensor, "visit read k"], their probabilities.
    """

    tokens: Int[Tensor, "visit read k"]
    probs: Float[Tensor, "visit read k"]


@dataclass(frozen=True)
class Lens(OneScreen):
    """Predictions of a lens: one distribution over the vocabulary for each visit and read.

    A read is one position of one example; by default each example has one read, at its answer
    position. A visit is a block at one iteration, or for `readout_lens` a whole iteration. The
    logits are computed when a method needs them, a few at a time.

    Attributes:
        heads_input: Float[Tensor, "visit read d_model"], the input of the unembedding: the
            normalised residual stream.
        loops, layers: The iteration and the block of each visit, from 0; a whole iteration has no
            block (None).
        names: The name of each visit, e.g. "loops.3.blocks.0".
        example, position: Int[Tensor, " read"], the row and the column of each read.
        model: The model whose unembedding is used.
        logits: Float[Tensor, "visit read d_vocab"], kept only with keep_logits=True; else None.
    """

    heads_input: Float[Tensor, "visit read d_model"]
    loops: tuple[int | None, ...]
    layers: tuple[int | None, ...]
    names: tuple[str, ...]
    example: Int[Tensor, " read"]
    position: Int[Tensor, " read"]
    model: LoopedModel
    logits: Float[Tensor, "visit read d_vocab"] | None = None

    @classmethod
    def of(
        cls,
        model: LoopedModel,
        heads_input: Float[Tensor, "visit read d_model"],
        places: Sequence[ReadVisit],
        columns: Int[Tensor, "batch k"],
        keep_logits: bool = False,
    ) -> Lens:
        """Make the lens of some visits, whose reads are some columns of each example in order."""
        loops, layers, names = zip(*places, strict=True)
        rows = torch.arange(len(columns), device=columns.device)
        example = rows.repeat_interleave(columns.shape[1])
        lens = cls(heads_input, loops, layers, names, example, columns.flatten(), model)
        return replace(lens, logits=lens._each(lambda logits, at: logits)) if keep_logits else lens

    def margin(self, answers: Targets) -> Float[Tensor, "visit read"]:
        """The logit of the answer minus the largest other logit, in logits. `answers` has one token
        id per read.
        """
        answers = self.targets(answers)
        return self._each(lambda logits, at: margin(logits, answers[at.rows]))

    def rank(self, tokens: Targets) -> Int[Tensor, "visit read"]:
        """The rank of one token per read: how many tokens come before it; 0 is the top.

        Tokens are ordered by falling logit, and tokens of equal logits by rising id.

        Args:
            tokens: Int[Tensor, " read"], one token id per read.

        Raises:
            ValueError: A logit is not finite, so the tokens have no order.
        """
        tokens = self.targets(tokens)
        return self._each(lambda logits, at: rank_of(logits, tokens[at.rows], at.name))

    def prob(self, tokens: Targets) -> Float[Tensor, "visit read"]:
        """The probability of one token per read. `tokens` has one token id per read."""
        tokens = self.targets(tokens)
        return self._each(
            lambda logits, at: logits.softmax(-1).gather(-1, tokens[at.rows, None])[:, 0]
        )

    def correct(self, answers: Targets) -> Bool[Tensor, "visit read"]:
        """Whether the top token is the answer. Ties are broken as in `rank`."""
        return self.rank(answers) == 0

    def first_hit(self, answers: Targets) -> Float[Tensor, " read"]:
        """How many visits are run until the top token is the answer; NaN if it never is (t* of
        figure 8 of arXiv 2604.07822).
        """
        correct = self.correct(answers)
        first = (correct.int().argmax(0) + 1).float()
        return torch.where(correct.any(0), first, torch.nan)

    def top(self, k: int) -> TopTokens:
        """The k most likely tokens and their probabilities, in the order of `rank`."""
        tokens = self._each(lambda logits, at: top_tokens(logits, k, at.name))
        return TopTokens(tokens, self._each(lambda logits, at: logits.softmax(-1).topk(k).values))

    def entropy(self) -> Float[Tensor, "visit read"]:
        """Entropy of each distribution, in nats."""
        return self._each(lambda logits, at: torch.special.entr(logits.softmax(-1)).sum(-1))

    def kl(self) -> Float[Tensor, "visit read"]:
        """KL(p_t || p_{t-1}) in nats, where p_{t-1} is the prediction at the same block one
        iteration earlier. NaN in the first iteration and outside the loop.
        """
        earlier = self._one_loop_earlier()
        kind = torch.float64 if self.heads_input.dtype == torch.float64 else torch.float32
        none = self.heads_input.new_full((len(self.example),), torch.nan, dtype=kind)
        return torch.stack(
            [
                none if before is None else self._kl_between(now, before)
                for now, before in enumerate(earlier)
            ]
        )

    def logits_at(self, visits: Int[Tensor, " read"]) -> Float[Tensor, "read d_vocab"]:
        """The logits of each read at a visit that is chosen for it."""
        chosen = self.heads_input[visits, torch.arange(len(self.example), device=visits.device)]
        return self._head(chosen)

    def frame(self, answers: Targets | None = None) -> pd.DataFrame:
        """One row per visit and read. The columns are visit (its name), loop, layer, example,
        position, top (the most likely token), top_prob, entropy (nats) and kl (nats).

        With `answers`, one token per read, there are also margin (logits), rank and prob of the
        answer. loop, layer, example, position and rank count from 0.
        """
        n_visits, n_reads = self.heads_input.shape[:2]
        top = self.top(1)
        columns = {
            "example": self.example.repeat(n_visits),
            "position": self.position.repeat(n_visits),
            "top": top.tokens[..., 0],
            "top_prob": top.probs[..., 0],
            "entropy": self.entropy(),
            "kl": self.kl(),
        }
        if answers is not None:
            columns["margin"] = self.margin(answers)
            columns["rank"] = self.rank(answers)
            columns["prob"] = self.prob(answers)
        frame = visit_table(self.names, self.loops, self.layers, n_reads).assign(
            **{name: value.flatten().cpu().numpy() for name, value in columns.items()}
        )
        if self.model.vocab is not None:
            frame["top"] = [self.model.vocab.words[token] for token in frame["top"]]
        return frame

    def _table(self) -> pd.DataFrame:
        """The heat map of the first example in numbers: the top token and its probability, at most
        24 visits by 8 reads.
        """
        many = min(24, len(self.names))
        visits = torch.linspace(0, len(self.names) - 1, many, device="cpu").round().long()
        reads = (self.example == self.example[0]).nonzero()[:8, 0]
        chosen = visits.tolist()
        part = replace(
            self,
            heads_input=self.heads_input[visits][:, reads],
            loops=tuple(self.loops[i] for i in chosen),
            layers=tuple(self.layers[i] for i in chosen),
            names=tuple(self.names[i] for i in chosen),
            example=self.example[reads],
            position=self.position[reads],
            logits=None,
        ).frame()
        part["shown"] = [
            f"{top} {prob:.2f}" for top, prob in zip(part["top"], part["top_prob"], strict=True)
        ]
        return part.pivot(index="visit", columns="position", values="shown").loc[
            list(dict.fromkeys(part["visit"]))
        ]

    def targets(self, given: Targets) -> Int[Tensor, " read"]:
        """One token per read as a tensor; ValueError or TypeError for anything else."""
        tokens = torch.as_tensor(given, device=self.heads_input.device)
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"tokens must be integers, one per read, got {tokens.dtype}")
        n_reads, d_vocab = len(self.example), self.model.cfg.d_vocab
        if tokens.shape != (n_reads,):
            raise ValueError(
                f"one token per read is needed: the lens has {n_reads} reads, got the shape"
                f" {list(tokens.shape)}"
            )
        if bool(((tokens < 0) | (tokens >= d_vocab)).any()):
            raise ValueError(
                f"tokens must be in 0..{d_vocab - 1} (d_vocab={d_vocab}), got {tokens.min()} to"
                f" {tokens.max()}"
            )
        return tokens.long()

    @torch.no_grad()
    def _head(self, x: Tensor) -> Tensor:
        logits = self.model.unembed(x[:, None])[:, 0]
        return widened(logits)

    def _row_chunks(self) -> list[slice]:
        size = max(1, LOGITS_AT_ONCE // self.model.cfg.d_vocab)
        return [slice(start, start + size) for start in range(0, len(self.example), size)]

    def _each(self, statistic: Statistic) -> Tensor:
        """A statistic of the logits at every visit: Tensor[visit, read, ...]."""
        chunks = self._row_chunks()
        return torch.stack(
            [
                torch.cat([statistic(self._head(x[r]), Reads(self, visit, r)) for r in chunks])
                for visit, x in enumerate(self.heads_input)
            ]
        )

    def _one_loop_earlier(self) -> list[int | None]:
        """For each visit the same visit one iteration earlier: its name tells visits apart, since
        nested cycles visit several blocks under one loop and layer.
        """
        own = [
            (loop, name.removeprefix(f"loops.{loop}"))
            for loop, name in zip(self.loops, self.names, strict=True)
        ]
        index = {place: i for i, place in enumerate(own)}
        return [None if loop is None else index.get((loop - 1, name)) for loop, name in own]

    def _kl_between(self, now: int, before: int) -> Tensor:
        parts = []
        for rows in self._row_chunks():
            log_p = self._head(self.heads_input[now, rows]).log_softmax(-1)
            log_q = self._head(self.heads_input[before, rows]).log_softmax(-1)
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.cat(parts)

    def plot(self, answers: Targets | None = None, title: str = "") -> go.Figure:
        """A picture: the top token of each read after each visit, coloured by its probability.

        Args:
            answers: One token per read. If given, the answer's margin and rank are drawn as curves
                instead.
            title: The title of the figure; empty for none.
        """
        from loopscope.interp.drawing.lenses import lens

        return lens(self, answers, title)


def visit_table(
    names: Sequence[str], loops: Sequence[int | None], layers: Sequence[int | None], times: int
) -> pd.DataFrame:
    """The name, the loop and the layer of each visit, every row so many times."""
    frame = pd.DataFrame({"visit": names, "loop": loops, "layer": layers})
    frame = frame.astype({"loop": "Int64", "layer": "Int64"})
    return frame.loc[frame.index.repeat(times)].reset_index(drop=True)


def visits_of(model: LoopedModel, n_loops: int) -> list[ReadVisit]:
    """The loop, the layer and the name of each visit of a call."""
    return [(visit.loop, visit.layer, visit.name) for visit in model.schedule(n_loops)]
