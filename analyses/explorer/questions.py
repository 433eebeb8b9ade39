"""The questions that the explorer is asked: checked, encoded, and with the answer whose margin is
measured.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from loopscope.analyses.common.pairs_of import other_head
from loopscope.analyses.common.subject import Subject, answer_logits
from loopscope.interp.common.ranking import top_token
from loopscope.models.basis.tokens import Batch

MAX_TOKENS = 40  # what a figure of the page can show


@dataclass(frozen=True)
class Query:
    """A question that the model can be asked.

    Attributes:
        text: Its tokens, without spaces.
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
    def columns(self) -> list[str]:
        """A name for each column, different for all."""
        return [f"{position} {token}" for position, token in enumerate(self.tokens)]


def ask(subject: Subject, text: str, n_loops: int) -> Query:
    """The question that a text asks, with the answer to measure.

    Args:
        text: Tokens such as "<e_12><r_3>"; spaces between them do not matter.
        n_loops: Iterations after which the model's own answer is taken where the true one is
            unknown.

    Raises:
        ValueError: An unknown token, no token at all, or more than this model or this page takes.
    """
    model = subject.model
    words = model.to_str_tokens(text)
    if len(words) > MAX_TOKENS:
        raise ValueError(
            f"a question on this page has at most {MAX_TOKENS} tokens, got {len(words)}"
        )
    text = "".join(words)
    batch = model.encode(text)
    model.checked_inputs(batch.tokens, batch.mask, n_loops)
    tokens = tuple(model.to_str_tokens(batch.tokens[0]))
    true = _true_answer(subject, text) if len(words) > 1 else None
    answer_id = (
        model.to_single_token(true)
        if true
        else int(top_token(answer_logits(model, batch, n_loops))[0])
    )
    answer = model.to_str_tokens(torch.tensor([answer_id]))[0]
    return Query(text, batch, tokens, answer, answer_id, true is not None)


def _true_answer(subject: Subject, text: str) -> str | None:
    try:
        return subject.answer_of(text)
    except ValueError:
        return None


def ask_beside(subject: Subject, text: str, other: Query, n_loops: int) -> Query:
    """The question B that goes with a question A.

    Raises:
        ValueError: As for `ask`, or B is not as long as A, so that its activations have no place in
            A's run.
    """
    query = ask(subject, text, n_loops)
    lengths = [int(q.batch.mask.sum()) for q in (query, other)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"B must have as many tokens as A, which has {lengths[1]}, got {lengths[0]}"
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


def hint(subject: Subject) -> str:
    """The tokens that questions are made of, as ranges of each kind."""
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
