"""Logit lenses: what the model would answer after every visit, or after every iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.columns import at_positions, read_columns
from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch, begin_batch, in_chunks
from loopscope.interp.common.metrics import margin
from loopscope.interp.common.processes import over_ranks
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops
from loopscope.models.core.tokens import Batch

_CHUNK = 1 << 22  # logits held at a time
Place = tuple[int | None, int | None, str]
Statistic = Callable[[Tensor, slice], Tensor]


class TopTokens(NamedTuple):
    """The most likely tokens.

    Attributes:
        tokens: Int[Tensor, "visit read k"].
        probs: Float[Tensor, "visit read k"].
    """

    tokens: Int[Tensor, "visit read k"]
    probs: Float[Tensor, "visit read k"]


@dataclass(frozen=True)
class Lens:
    """Distributions over the vocabulary at successive places of a run.

    A read is one position of one example; by default there is one per example, at its readout.
    Statistics are worked out in chunks from what the head reads, so no more logits are held than
    asked for.

    Attributes:
        heads_input: Float[Tensor, "visit read d_model"], the normalised residual that the head
            reads.
        loops, layers: The iteration and block of each visit, from 0; layer is None for a whole
            iteration.
        names: What each visit is called, e.g. "loops.3.blocks.0".
        example, position: Int[Tensor, " read"].
        model: Whose head is used.
        logits: Float[Tensor, "visit read d_vocab"], only with keep_logits=True.
    """

    heads_input: Float[Tensor, "visit read d_model"]
    loops: tuple[int | None, ...]
    layers: tuple[int | None, ...]
    names: tuple[str, ...]
    example: Int[Tensor, " read"]
    position: Int[Tensor, " read"]
    model: LoopedModel
    logits: Float[Tensor, "visit read d_vocab"] | None = None

    def margin(self, answers: Tensor) -> Float[Tensor, "visit read"]:
        """Logit of the answer minus the largest other logit. `answers`: Int[Tensor, " read"]."""
        answers = self._targets(answers)
        return self._each(lambda logits, rows: margin(logits, answers[rows]))

    def rank(self, tokens: Tensor) -> Int[Tensor, "visit read"]:
        """How many tokens have a larger logit; 0 is the top. `tokens`: Int[Tensor, " read"]."""
        tokens = self._targets(tokens)
        return self._each(
            lambda logits, rows: (logits > logits.gather(-1, tokens[rows, None])).sum(-1)
        )

    def prob(self, tokens: Tensor) -> Float[Tensor, "visit read"]:
        """Probability of one token per read. `tokens`: Int[Tensor, " read"]."""
        tokens = self._targets(tokens)
        return self._each(
            lambda logits, rows: logits.softmax(-1).gather(-1, tokens[rows, None])[:, 0]
        )

    def correct(self, answers: Tensor) -> Tensor:
        """Bool[Tensor, "visit read"]: whether the top token is the answer."""
        return self.top(1).tokens[..., 0] == self._targets(answers)

    def first_hit(self, answers: Tensor) -> Float[Tensor, " read"]:
        """The first visit, counted from 1, whose top token is the answer; NaN where none is (t* of
        figure 8).
        """
        correct = self.correct(answers)
        first = correct.int().argmax(0) + 1.0
        return torch.where(correct.any(0), first, torch.nan)

    def top(self, k: int) -> TopTokens:
        """The k most likely tokens and their probabilities."""
        tokens = self._each(lambda logits, rows: logits.topk(k).indices)
        return TopTokens(tokens, self._each(lambda logits, rows: logits.softmax(-1).topk(k).values))

    def entropy(self) -> Float[Tensor, "visit read"]:
        """Entropy of each distribution, in nats."""
        return self._each(lambda logits, rows: torch.special.entr(logits.softmax(-1)).sum(-1))

    def kl(self) -> Float[Tensor, "visit read"]:
        """KL(p_t || p_{t-1}) in nats, p_{t-1} being the same layer one iteration earlier; NaN in
        the first iteration.
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
        """Logits of each read at a visit of its own."""
        chosen = self.heads_input[visits, torch.arange(len(self.example), device=visits.device)]
        return self._head(chosen)

    def frame(self, answers: Tensor | None = None) -> pd.DataFrame:
        """One row per visit and read: name, loop, layer, example, position, top token, its
        probability, entropy, kl.

        With `answers` also margin, rank and prob of the answer.
        """
        n_visits, n_reads = self.heads_input.shape[:2]
        top = self.top(1)
        columns: dict[str, Sequence[object] | Tensor] = {
            "name": [name for name in self.names for _ in range(n_reads)],
            "loop": [loop for loop in self.loops for _ in range(n_reads)],
            "layer": [layer for layer in self.layers for _ in range(n_reads)],
            "example": self.example.repeat(n_visits),
            "position": self.position.repeat(n_visits),
            "top": top.tokens[..., 0],
            "top_prob": top.probs[..., 0],
            "entropy": self.entropy(),
            "kl": self.kl(),
        }
        if answers is not None:
            columns |= {
                "margin": self.margin(answers),
                "rank": self.rank(answers),
                "prob": self.prob(answers),
            }
        plain = {
            k: v.flatten().cpu().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()
        }
        frame = pd.DataFrame(plain)
        if self.model.vocab is not None:
            frame["top"] = [self.model.vocab.words[i] for i in frame["top"]]
        return frame

    def _targets(self, tokens: Tensor) -> Tensor:
        tokens = torch.as_tensor(tokens, device=self.heads_input.device)
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
        return tokens

    @torch.no_grad()
    def _head(self, x: Tensor) -> Tensor:
        logits = self.model.unembed(x[:, None])[:, 0]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _row_chunks(self) -> list[slice]:
        size = max(1, _CHUNK // self.model.cfg.d_vocab)
        return [slice(start, start + size) for start in range(0, len(self.example), size)]

    def _each(self, statistic: Statistic) -> Tensor:
        """A statistic of the logits at every visit: Tensor[visit, read, ...]."""
        rows = self._row_chunks()
        return torch.stack(
            [
                torch.cat([statistic(self._head(visit[r]), r) for r in rows])
                for visit in self.heads_input
            ]
        )

    def _one_loop_earlier(self) -> list[int | None]:
        places = {place: i for i, place in enumerate(zip(self.loops, self.layers, strict=True))}
        return [
            None if loop is None else places.get((loop - 1, layer))
            for loop, layer in zip(self.loops, self.layers, strict=True)
        ]

    def _kl_between(self, now: int, before: int) -> Tensor:
        parts = []
        for rows in self._row_chunks():
            log_p = self._head(self.heads_input[now, rows]).log_softmax(-1)
            log_q = self._head(self.heads_input[before, rows]).log_softmax(-1)
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.cat(parts)


@torch.no_grad()
def logit_lens(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Literal["all"] | Sequence[int] | None = None,
    keep_logits: bool = False,
    batch_size: int = 512,
) -> Lens:
    """Final norm and head of the running residual after every visit (nostalgebraist's logit lens;
    figure 4 of arXiv 2604.07822).

    Under `accelerate launch` the examples are shared among the processes, and each returns the
    whole lens.

    Args:
        inputs: A batch, texts, or tokens with `readout`, the column at which answers are read.
        n_loops: Iterations; None means what the checkpoint records.
        positions: Columns to show instead of the readout; "all" for every one.
        keep_logits: Keep all logits on the record.
        batch_size: Rows run at a time.

    Returns:
        A `Lens` with one visit per block of every iteration.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    columns = read_columns(batch, positions)
    visits = model.schedule(n_loops)
    names = [f"{visit.name}.hook_resid_post" for visit in visits]

    def heads_input(examples: Batch) -> Float[Tensor, "visit read d_model"]:
        collected = []
        for part in in_chunks(examples, batch_size, "lens"):
            seen: list[Tensor] = []
            read = read_columns(part, positions)

            def keep(
                resid: Tensor, hook: HookPoint, seen: list[Tensor] = seen, read: Tensor = read
            ) -> None:
                seen.append(model.normalize(at_positions(resid, read)).flatten(0, 1))

            with model.hooks([(name, keep) for name in names], n_loops=n_loops):
                model.advance(begin_batch(model, part, n_loops))
            collected.append(torch.stack(seen))
        return torch.cat(collected, dim=1)

    places: list[Place] = [(visit.loop, visit.layer, visit.name) for visit in visits]
    return _lens(model, over_ranks(model, batch, heads_input, dim=1), places, columns, keep_logits)


@torch.no_grad()
def readout_lens(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    keep_logits: bool = False,
    batch_size: int = 512,
) -> Lens:
    """The family's own readout after each iteration, from one run: iteration t is what a call with
    n_loops=t+1 answers.

    Under `accelerate launch` the examples are shared among the processes, and each returns the
    whole lens.

    Args:
        inputs, n_loops, readout, keep_logits, batch_size: As for `logit_lens`.

    Returns:
        A `Lens` with one visit per iteration.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)

    def heads_input(examples: Batch) -> Float[Tensor, "visit read d_model"]:
        collected = []
        for part in in_chunks(examples, batch_size, "iterations"):
            state = begin_batch(model, part, n_loops)
            seen = []
            for loop, end in enumerate(model.iteration_ends(n_loops)):
                state = model.advance(state, end)
                seen.append(model.read_state(model.finish(state, loop), part.readout)[:, 0])
            collected.append(torch.stack(seen))
        return torch.cat(collected, dim=1)

    places: list[Place] = [(loop, None, f"loops.{loop}") for loop in range(n_loops)]
    return _lens(
        model,
        over_ranks(model, batch, heads_input, dim=1),
        places,
        batch.readout[:, None],
        keep_logits,
    )


def _lens(
    model: LoopedModel, heads_input: Tensor, places: list[Place], columns: Tensor, keep_logits: bool
) -> Lens:
    loops, layers, names = zip(*places, strict=True)
    example = (
        torch.arange(columns.shape[0], device=columns.device)[:, None]
        .expand(columns.shape)
        .flatten()
    )
    lens = Lens(heads_input, loops, layers, names, example, columns.flatten(), model)
    return replace(lens, logits=lens._each(lambda logits, rows: logits)) if keep_logits else lens
