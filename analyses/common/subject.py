"""The checkpoint under study, with its questions and its graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.pair_files import KINDS, PairRow, read_pairs
from loopscope.checkpoints.load import load, read_card
from loopscope.checkpoints.locate import locate, shipped_names
from loopscope.interp.common.ranking import top_token
from loopscope.models.basis.arguments import ArgumentError, parts_of
from loopscope.models.basis.tokens import Batch, Readout, Vocabulary
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops
from loopscope.tasks.graphs import PermutationGraph, TableGraph, read_graph
from loopscope.tasks.questions import Question, by_hops, read_questions


@dataclass(frozen=True)
class Subject:
    """A loaded checkpoint and what is known beside it.

    Attributes:
        name: Of a shipped checkpoint as the user gave it, else the file's or folder's.
        model: In eval mode, on the chosen device.
        questions: By hop count; empty where there are none.
        graph: None where the checkpoint has none.
        card: What card.json says.
        pairs: The rows of a CSV or JSONL of pairs; empty where the questions are no such file.
    """

    name: str
    model: LoopedModel
    questions: dict[int, list[Question]]
    graph: PermutationGraph | TableGraph | None
    card: dict[str, Any]
    pairs: tuple[PairRow, ...] = ()

    @property
    def trained_hops(self) -> int | None:
        """Deepest hop count seen in training, where the card says."""
        return self.card.get("trained_hops")

    def encode(self, questions: Sequence[Question]) -> tuple[Batch, Int[Tensor, " batch"]]:
        """A batch of questions, and their answers' ids."""
        answers = [token_id(self.model, question.answer) for question in questions]
        return self.batch([question.text for question in questions]), torch.tensor(
            answers, device=self.model.device
        )

    def batch(self, texts: str | Sequence[str]) -> Batch:
        """A batch of texts; a text of a language model is read at its last token where the
        checkpoint does not say where answers are read.
        """
        return encoded(self.model, texts)

    def answer_of(self, text: str) -> str:
        """The right answer of a question, from the graph or from the data.

        Raises:
            ValueError: Neither knows it.
        """
        if self.graph is not None:
            return self.graph.walk(text)[-1]
        for group in self.questions.values():
            for question in group:
                if question.text == text:
                    return question.answer
        raise ValueError(
            f"the answer of {text!r} is unknown: the checkpoint has no graph.json, and its data has"
            " no such question"
        )

    def of_hops(self, hops: int | None = None) -> list[Question]:
        """All questions of a hop count, by default about half of what was trained."""
        if hops is None:
            middle = (self.trained_hops or max(self.questions)) // 2 + 1
            hops = min(self.questions, key=lambda h: abs(h - middle))
        if hops not in self.questions:
            raise ValueError(
                f"the data has questions of {min(self.questions)} to {max(self.questions)} hops,"
                f" got hops={hops}"
            )
        return self.questions[hops]

    def example(self, hops: int | None = None) -> Question:
        """A question of a hop count, one that passes no entity twice if there is one."""
        group = self.of_hops(hops)
        distinct = [
            q
            for q in group
            if self.graph is not None and len(set(self.graph.walk(q.text))) == q.hops + 1
        ]
        return (distinct or group)[0]


def encoded(model: LoopedModel, texts: str | Sequence[str]) -> Batch:
    """A batch of texts, as `Subject.batch` makes it."""
    if model.read_at is None and not isinstance(model.vocab, Vocabulary | None):
        return replace(model.texts, read_at=Readout("last_real")).encode(texts)
    return model.encode(texts)


def token_id(model: LoopedModel, word: str) -> int:
    """The id of a token given as a word, or as an id where there is no vocabulary.

    Raises:
        ValueError: Not one token of the vocabulary.
    """
    if model.vocab is not None:
        return _one_token(model, word)
    if not word.removeprefix("#").isdecimal() or int(word.removeprefix("#")) >= model.cfg.d_vocab:
        raise ValueError(
            f"this checkpoint has no vocabulary, so tokens are ids in 0..{model.cfg.d_vocab - 1},"
            f" got {word!r}"
        )
    return int(word.removeprefix("#"))


def _one_token(model: LoopedModel, word: str) -> int:
    """The id of a word that is one token; a word of the vocabulary's own list always is."""
    try:
        return model.to_single_token(word)
    except ValueError as error:
        words = model.vocab.words if model.vocab else ()
        if word in words:
            return list(words).index(word)
        hint = f"; {' ' + word!r}, with a space before it, is one" * (f" {word}" in words)
        raise ArgumentError(*parts_of(error), hint) from None


@torch.no_grad()
def answer_logits(model: LoopedModel, batch: Batch, n_loops: int) -> Float[Tensor, "batch d_vocab"]:
    """Logits at the readout of a call with `n_loops` iterations."""
    state = model.begin(batch.tokens, batch.mask, n_loops=n_loops, **batch.options)
    logits: Tensor = model.readout(model.advance(state), batch.readout)
    return logits


def own_answers(
    model: LoopedModel, batch: Batch, n_loops: int | None = None
) -> Int[Tensor, " batch"]:
    """The model's own top token of each input after `n_loops` iterations, by default those that
    the checkpoint records.
    """
    return top_token(answer_logits(model, batch, checked_loops(n_loops, model.cfg.n_loops)))


def words(model: LoopedModel, ids: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Token ids as a reader would write them: words where there is a vocabulary, else "#5" for id
    5.
    """
    return (
        tuple(f"#{i}" for i in ids.tolist())
        if model.vocab is None
        else tuple(model.to_str_tokens(ids))
    )


def load_model(config: SourceConfig) -> LoopedModel:
    """Load the model that a config names, as it says.

    Raises:
        ValueError: The model is in memory already, and the config says how to load it; or what
            `load` refuses, such as a device that this machine lacks.
    """
    held, told = config.in_memory(config.checkpoint), config.told()
    if held is None:
        return load(config.checkpoint, **told)
    asked = sorted(name for name, value in told.items() if value != SourceConfig().told().get(name))
    if held.alone and asked:
        raise ValueError(
            f"{asked[0]} says how a checkpoint is loaded, but this model is in memory already; give"
            f" {asked[0]} to load, or for the place where answers are read set model.read_at"
        )
    model: LoopedModel = held.model
    return model


def open_subject(config: SourceConfig, needs_questions: bool = True) -> Subject:
    """Load the checkpoint that a config names, with its questions.

    Raises:
        ValueError: There are no questions where they are needed, the checkpoint does not say where
            answers are read, or this machine has no such device.
    """
    if config.per_hop is not None and config.per_hop < 1:
        raise ValueError(
            f"at least one question of each hop count is needed, got --per-hop {config.per_hop}"
        )
    subject, beside = _without_questions(config)
    data = config.data or beside
    if data is not None:
        return _with_questions(subject, data, config)
    if needs_questions:
        raise without_questions(config)
    return subject


def without_questions(config: SourceConfig) -> ValueError:
    """The error about a checkpoint that has no questions where they are needed."""
    return ValueError(
        f"{config.checkpoint} has no test.json beside its weights; pass --data with the"
        " questions to ask, or a text of your own where the command takes one (--text, --clean)"
    )


def _without_questions(config: SourceConfig) -> tuple[Subject, Path | None]:
    """The checkpoint, and the file of its questions where it has one."""
    held = config.in_memory(config.checkpoint)
    if held is not None and held.alone:
        return Subject(config.checkpoint, load_model(config), {}, None, {}), None
    files = locate(config.checkpoint)
    subject = Subject(
        name=called(config.checkpoint),
        model=load_model(config),
        questions={},
        graph=read_graph(files.graph) if files.graph else None,
        card=read_card(config.checkpoint),
    )
    return subject, files.questions


def called(checkpoint: str) -> str:
    """The name of a checkpoint: a shipped one's own, else the file's or the folder's."""
    return checkpoint if checkpoint in shipped_names() else Path(checkpoint).name


def _with_questions(subject: Subject, data: Path, config: SourceConfig) -> Subject:
    """The subject with the questions of a file, at most so many of each hop count."""
    if data.suffix not in KINDS:
        kept = _kept(read_questions(data), config.per_hop)
        # refused here, before any work, when the readout or the vocabulary is unknown
        subject.batch([next(iter(kept.values()))[0].text])
        return replace(subject, questions=kept)
    pairs = read_pairs(data, config.columns)
    asked = _questions(subject, pairs)
    kept = _kept(asked, config.per_hop)
    chosen = {id(question) for group in kept.values() for question in group}
    rows = [pair for pair, each in zip(pairs, asked, strict=True) if id(each) in chosen]
    return replace(subject, questions=kept, pairs=tuple(rows))


def _questions(subject: Subject, pairs: list[PairRow]) -> list[Question]:
    """The clean texts as questions; where a row has no answer, the answer is the model's own top
    token.
    """
    for pair in pairs:
        _check_row(subject, pair)
    answers = [pair.answer or "" for pair in pairs]
    if not answers[0]:
        batch = subject.batch([pair.clean for pair in pairs])
        answers = list(words(subject.model, own_answers(subject.model, batch)))
    return [Question.of(pair.clean, word) for pair, word in zip(pairs, answers, strict=True)]


def _check_row(subject: Subject, pair: PairRow) -> None:
    """Refuse a row whose texts cannot be encoded or whose answers are no tokens, by its place."""
    try:
        subject.batch([pair.clean, *filter(None, (pair.corrupted,))])
        for word in filter(None, (pair.answer, pair.wrong)):
            token_id(subject.model, word)
    except ValueError as error:
        raise ArgumentError(f"{pair.where}: ", *parts_of(error)) from None


def _kept(questions: Sequence[Question], per_hop: int | None) -> dict[int, list[Question]]:
    return {hops: group[:per_hop] for hops, group in by_hops(questions).items()}
