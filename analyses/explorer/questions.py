"""The questions that the explorer is asked: checked, encoded, and with the answer whose margin is
measured.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from loopscope.analyses.common.pairs_of import other_head
from loopscope.analyses.common.subject import Subject, own_answers, token_id, words
from loopscope.interp.common.inputs import Metric
from loopscope.interp.common.metrics import logit_margin
from loopscope.interp.drawing.labels import visible
from loopscope.models.basis.tokens import Batch, Vocabulary

MAX_TOKENS = 40  # what a figure of the page can show
SENTENCES = ("The capital of France is", "CC(=O)N")
"""Texts to start with where there are no questions: the first one that the vocabulary can write."""


@dataclass(frozen=True)
class Query:
    """A question that the model can be asked.

    Attributes:
        text: The text; tokens of a graph task stand without spaces.
        batch: The same, encoded; one row.
        tokens: The name of every column, padding included.
        answer: The token whose margin is measured.
        answer_id: Its id.
        known: Whether it is the true answer; otherwise it is what the model says at its trained
            number of iterations.
    """

    text: str
    batch: Batch
    tokens: tuple[str, ...]
    answer: str
    answer_id: int
    known: bool

    @property
    def readout(self) -> int:
        """The column where the answer is read."""
        return int(self.batch.readout[0])

    @property
    def metric(self) -> Metric:
        """The margin of the answer, in logits."""
        return logit_margin(self.batch.readout.new_tensor([self.answer_id]))

    @property
    def columns(self) -> list[str]:
        """A name for each column, different for all."""
        return [f"{position} {visible(token)}" for position, token in enumerate(self.tokens)]


def ask(subject: Subject, text: str, n_loops: int, read: int | None = None) -> Query:
    """The question that a text asks, with the answer to measure.

    Args:
        text: Tokens such as "<e_12><r_3>", between which spaces do not matter; or any sentence for
            a language model.
        read: The column where the answer is read; None, or one that the text does not have, for
            the checkpoint's own.
        n_loops: Iterations after which the model's own answer is taken where the true one is
            unknown.

    Raises:
        ValueError: An unknown token, no token at all, or more than this model or this page takes.
    """
    model = subject.model
    batch = subject.batch(text)
    count = int(batch.mask.sum())
    if count > MAX_TOKENS:
        raise ValueError(f"a text on this page has at most {MAX_TOKENS} tokens, got {count}")
    if isinstance(model.vocab, Vocabulary):
        text = "".join(model.to_str_tokens(text))
    model.checked_inputs(batch.tokens, batch.mask, n_loops)
    tokens = words(model, batch.tokens[0])
    usual = int(batch.readout[0])
    column = usual if read is None or not 0 <= read < len(tokens) else read
    batch = replace(batch, readout=torch.full_like(batch.readout, column))
    true = _true_answer(subject, text) if count > 1 and column == usual else None
    if true is not None:
        return Query(text, batch, tokens, true, token_id(model, true), known=True)
    top = own_answers(model, batch, n_loops)
    return Query(text, batch, tokens, words(model, top)[0], int(top[0]), known=False)


def _true_answer(subject: Subject, text: str) -> str | None:
    try:
        return subject.answer_of(text)
    except ValueError:
        return None


def ask_beside(
    subject: Subject, text: str, other: Query, n_loops: int, read: int | None = None
) -> Query:
    """The question B that goes with a question A; it is read at the same column.

    Raises:
        ValueError: As for `ask`, or B is not as long as A, so that its activations have no place in
            A's run.
    """
    query = ask(subject, text, n_loops, read)
    lengths = [int(q.batch.mask.sum()) for q in (query, other)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"B must have as many tokens as A, which has {lengths[1]}, got {lengths[0]}; nothing is"
            " patched until it has"
        )
    return query


def contrast(subject: Subject, text: str, turn: int = 0) -> str:
    """A question to compare one with: first the same relations from another entity, then others of
    its length, then itself.
    """
    others = [
        q.text
        for group in subject.questions.values()
        for q in group
        if _length(q.text) == _length(text) and q.text != text
    ]
    with suppress(ValueError):
        others.insert(0, other_head(subject, text))
    return others[turn % len(others)] if others else text


def _length(text: str) -> int:
    return text.count("<")


def beginning(subject: Subject, text: str | None, second: str | None) -> tuple[str, str]:
    """The texts A and B with which the page starts: the user's, else a question with one to compare
    it with, else a sentence.

    Raises:
        ValueError: A text that cannot be asked.
    """
    if text is None and subject.questions:
        text = subject.example().text
    if text is None:
        text = next(filter(partial(_can_be_asked, subject), SENTENCES), None) or _any_text(subject)
    return text, contrast(subject, text) if second is None else second


def _can_be_asked(subject: Subject, text: str) -> bool:
    try:
        return bool(subject.batch(text).mask.sum() > 1)
    except ValueError:
        return False


def _any_text(subject: Subject) -> str:
    """Some words of the vocabulary."""
    vocab = subject.model.vocab
    plain = [word for word in (vocab.words if vocab else ()) if not word.startswith("<")]
    return "".join(plain[:5])


def hint(subject: Subject) -> str:
    """The tokens that questions are made of, as ranges of each kind; nothing without questions."""
    to_words, vocab = subject.model.to_str_tokens, subject.model.vocab
    texts = [question.text for group in subject.questions.values() for question in group]
    used = set().union(*map(to_words, texts))
    kinds: dict[str, list[str]] = {}
    for word in vocab.words if vocab else ():
        if word in used:
            kinds.setdefault(word.rstrip("0123456789>"), []).append(word)
    return ", ".join(
        f"{words[0]} to {words[-1]}" if len(words) > 1 else words[0] for words in kinds.values()
    )
