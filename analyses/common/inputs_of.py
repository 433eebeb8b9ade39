"""The inputs of a checkpoint: its own questions, or the user's texts or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.analyses.common.configs import InputsConfig, TextConfig
from loopscope.analyses.common.subject import (
    Subject,
    open_subject,
    own_answers,
    token_id,
    words,
)
from loopscope.interp.drawing.labels import visible
from loopscope.models.basis.tokens import Batch, Vocabulary, pad_right
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_tokens

OWN = "the model's own top token"
"""How titles and captions call an answer that nobody has given."""


@dataclass(frozen=True)
class Group:
    """Inputs that belong together.

    Attributes:
        hops: Hop count of the questions; None for texts and token ids.
        texts: The inputs, as a reader would write them.
        batch: The encoded inputs.
        answers: The answers; empty where none is known.
        own: Whether the answers are the model's own top tokens.
    """

    hops: int | None
    texts: tuple[str, ...]
    batch: Batch
    answers: tuple[str, ...] = ()
    own: bool = False

    def only(self) -> Group:
        """The first input alone."""
        return replace(self, texts=self.texts[:1], batch=self.batch[:1], answers=self.answers[:1])


@dataclass(frozen=True)
class AnswerTokens:
    """The answers of some inputs.

    Attributes:
        words: As a reader would write them.
        ids: Int[Tensor, " batch"].
        own: Whether they are the model's own top tokens, because no others are known.
    """

    words: tuple[str, ...]
    ids: Int[Tensor, " batch"]
    own: bool

    @property
    def said(self) -> str:
        """The answers in words, with their source where it is the model; several are counted."""
        many = f"{len(self.words)} answers"
        told = visible(self.words[0]) if len(set(self.words)) == 1 else many
        return f"{told} ({OWN})" if self.own else told


@dataclass(frozen=True)
class Asked:
    """A checkpoint and its inputs.

    Attributes:
        subject: The checkpoint; it has questions only where those are run.
        given: Texts or token ids as one group; None where the questions are run.
    """

    subject: Subject
    given: Group | None

    def groups(self, hops: int | None = None) -> tuple[Group, ...]:
        """The questions of every hop count, or of one, or what was given instead."""
        if self.given is not None:
            return (self.given,)
        chosen = sorted(self.subject.questions) if hops is None else [hops]
        return tuple(self._questions(hop) for hop in chosen)

    def group(self, hops: int | None = None) -> Group:
        """The questions of one hop count, by default about half of what was trained, or what was
        given instead.
        """
        return self.given or self._questions(self.subject.of_hops(hops)[0].hops)

    def one(self, hops: int | None = None) -> Group:
        """One input: a question of one hop count, by default about half of what was trained, or
        the first one that was given.
        """
        if self.given is not None:
            return self.given.only()
        question = self.subject.example(hops)
        batch = self.subject.batch([question.text])
        return Group(question.hops, (question.text,), batch, (question.answer,))

    def answers(
        self, group: Group, given: str | None = None, n_loops: int | None = None
    ) -> AnswerTokens:
        """The answer of each input: the one that the user gives, else the true one where all are
        known, else the model's own top token after `n_loops` iterations.
        """
        model, count = self.subject.model, len(group.batch)
        if given is not None:
            known: tuple[str, ...] = (given,) * count
        else:
            known = group.answers or true_answers(self.subject, group.texts)
        if not known:
            ids = own_answers(model, group.batch, n_loops)
            return AnswerTokens(words(model, ids), ids, own=True)
        ids = torch.tensor([token_id(model, word) for word in known], device=model.device)
        return AnswerTokens(known, ids, own=group.own and given is None)

    def _questions(self, hops: int) -> Group:
        questions = self.subject.of_hops(hops)
        texts, answers = (
            tuple(getattr(question, name) for question in questions) for name in ("text", "answer")
        )
        return Group(hops, texts, self.subject.batch(texts), answers)


def true_answers(subject: Subject, texts: Sequence[str]) -> tuple[str, ...]:
    """The right answer of each text, from the graph or the data; empty where one is unknown."""
    try:
        return tuple(subject.answer_of(text) for text in texts)
    except ValueError:
        return ()


def entities(subject: Subject) -> list[str]:
    """The entities of a graph task's vocabulary; none elsewhere."""
    vocab = subject.model.vocab
    return [word for word in (vocab.words if vocab else ()) if word.startswith("<e_")]


def open_inputs(config: InputsConfig | TextConfig) -> Asked:
    """Load the checkpoint that a config names, and make what it is to be run on.

    Raises:
        ValueError: Both texts and token ids, or hops for them; no questions where none of them are
            given; or a checkpoint that does not say where answers are read.
    """
    texts = (config.text,) if isinstance(config.text, str) else config.text or ()
    if texts and config.tokens:
        raise ValueError(
            "inputs are texts or the token ids of one input, not both; pass --text or --tokens"
        )
    if not (texts or config.tokens):
        return Asked(open_subject(config), None)
    if config.hops is not None:
        raise ValueError(
            "--hops chooses among the checkpoint's questions; leave it out with --text or --tokens"
        )
    subject = open_subject(config, needs_questions=False)
    return asked_of(subject, texts, config.tokens)


def asked_of(subject: Subject, texts: Sequence[str], tokens: Sequence[int] = ()) -> Asked:
    """An open checkpoint with texts, or with the token ids of one input, to run."""
    if texts:
        return Asked(subject, Group(None, tuple(texts), subject.batch(texts)))
    batch = _batch_of_ids(subject.model, tokens)
    written = " ".join(words(subject.model, batch.tokens[0, : len(tokens)]))
    return Asked(subject, Group(None, (written,), batch))


def _batch_of_ids(model: LoopedModel, ids: Sequence[int]) -> Batch:
    """The batch of one input given as token ids, as `encode` makes it of a text."""
    if model.read_at is None and isinstance(model.vocab, Vocabulary | None):
        raise ValueError(
            "this checkpoint does not say where its answers are read; pass --readout last_real,"
            " first_pad or column:K"
        )
    columns, width = [len(ids) - 1], len(ids)
    if model.read_at is not None:
        columns, width = model.read_at.place([len(ids)], model.cfg.n_ctx, model.positional)
    tokens, mask = pad_right([list(ids)], width)
    return Batch(checked_tokens(tokens, model.cfg.d_vocab), mask, torch.tensor(columns)).to(
        model.device
    )
