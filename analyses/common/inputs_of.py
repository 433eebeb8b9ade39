"""The inputs of a checkpoint: its own questions, or the user's texts or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.subject import Subject, load_model, open_subject
from loopscope.checkpoints.load import read_card
from loopscope.checkpoints.locate import locate, shipped_names
from loopscope.models.basis.tokens import Batch, pad_right
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_tokens
from loopscope.tasks.graphs import read_graph


@dataclass(frozen=True)
class Group:
    """Inputs that belong together.

    Attributes:
        hops: Hop count of the questions; None for texts and token ids.
        texts: The inputs, as a reader would write them.
        batch: The encoded inputs.
        answers: The questions' answers; empty for texts and token ids.
    """

    hops: int | None
    texts: tuple[str, ...]
    batch: Batch
    answers: tuple[str, ...] = ()


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

    def _questions(self, hops: int) -> Group:
        questions = self.subject.of_hops(hops)
        texts, answers = (
            tuple(getattr(question, name) for question in questions) for name in ("text", "answer")
        )
        return Group(hops, texts, self.subject.model.encode(texts), answers)


def open_inputs(config: InputsConfig) -> Asked:
    """Load the checkpoint that a config names, and make what it is to be run on.

    Raises:
        ValueError: Both texts and token ids, or hops for them; no questions where none of them are
            given; or a checkpoint that does not say where answers are read.
    """
    if config.text and config.tokens:
        raise ValueError(
            "inputs are texts or the token ids of one input, not both; pass --text or --tokens"
        )
    if not (config.text or config.tokens):
        return Asked(open_subject(config), None)
    if config.hops is not None:
        raise ValueError(
            "--hops chooses among the checkpoint's questions; leave it out with --text or --tokens"
        )
    subject = _without_questions(config)
    if config.text:
        return Asked(subject, Group(None, config.text, subject.model.encode(config.text)))
    batch = _batch_of_ids(subject.model, config.tokens)
    return Asked(
        subject,
        Group(
            None, (" ".join(words(subject.model, batch.tokens[0, : len(config.tokens)])),), batch
        ),
    )


def words(model: LoopedModel, ids: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Token ids as a reader would write them: words where there is a vocabulary, else "#5" for id
    5.
    """
    return (
        tuple(f"#{i}" for i in ids.tolist())
        if model.vocab is None
        else tuple(model.to_str_tokens(ids))
    )


def token_id(model: LoopedModel, word: str) -> int:
    """The id of a token given as a word, or as an id where there is no vocabulary.

    Raises:
        ValueError: Not one token of the vocabulary.
    """
    if model.vocab is not None:
        return model.to_single_token(word)
    if not word.isdecimal() or int(word) >= model.cfg.d_vocab:
        raise ValueError(
            f"this checkpoint has no vocabulary, so tokens are ids in 0..{model.cfg.d_vocab - 1},"
            f" got {word!r}"
        )
    return int(word)


def _without_questions(config: InputsConfig) -> Subject:
    files = locate(config.checkpoint)
    model = load_model(config)
    name = (
        config.checkpoint if config.checkpoint in shipped_names() else Path(config.checkpoint).name
    )
    return Subject(
        name,
        model,
        {},
        read_graph(files.graph) if files.graph else None,
        read_card(config.checkpoint),
    )


def _batch_of_ids(model: LoopedModel, ids: Sequence[int]) -> Batch:
    """The batch of one input given as token ids, as `encode` makes it of a text."""
    if model.read_at is None:
        raise ValueError(
            "this checkpoint does not say where its answers are read; pass --readout last_real,"
            " first_pad or column:K"
        )
    columns, width = model.read_at.place([len(ids)], model.cfg.n_ctx, model.positional)
    tokens, mask = pad_right([list(ids)], width)
    return Batch(checked_tokens(tokens, model.cfg.d_vocab), mask, torch.tensor(columns)).to(
        model.device
    )
