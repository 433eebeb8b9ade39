"""Inputs that are compared, a clean and a corrupted one each, and the answer that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.analyses.common.configs import PairConfig
from loopscope.analyses.common.inputs_of import AnswerTokens, Asked, Group, entities, true_answers
from loopscope.analyses.common.pair_files import PairRow
from loopscope.analyses.common.subject import Subject, open_subject, token_id
from loopscope.interp.common.inputs import Metric
from loopscope.interp.common.metrics import logit_diff, logit_margin
from loopscope.interp.drawing.labels import visible
from loopscope.models.basis.tokens import Batch


@dataclass(frozen=True)
class TextPairs:
    """Clean and corrupted inputs, row by row.

    Attributes:
        clean, corrupted: The texts.
        clean_batch, corrupted_batch: The encoded texts, each as long as its partner.
        answers: The answers of the clean texts.
        wrong: The answer with which each is compared; empty where it is the strongest other token.
        wrong_ids: Int[Tensor, " batch"], their ids.
    """

    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    clean_batch: Batch
    corrupted_batch: Batch
    answers: AnswerTokens
    wrong: tuple[str, ...]
    wrong_ids: Int[Tensor, " row"]

    def metric(self) -> Metric:
        """The logit of the answer minus that of the wrong one, or of the strongest other token."""
        if self.wrong:
            return logit_diff(self.answers.ids, self.wrong_ids)
        return logit_margin(self.answers.ids)

    def first(self, count: int = 1) -> TextPairs:
        """The first pairs alone; all where there are no more."""
        given = self.answers
        return TextPairs(
            self.clean[:count],
            self.corrupted[:count],
            self.clean_batch[:count],
            self.corrupted_batch[:count],
            AnswerTokens(given.words[:count], given.ids[:count], given.own),
            self.wrong[:count],
            self.wrong_ids[:count],
        )

    @property
    def measured(self) -> str:
        """The metric in words."""
        rival = f" against {visible(self.wrong[0])}" if len(set(self.wrong)) == 1 else ""
        return f"{self.answers.said}{rival or ' against wrong answers' * bool(self.wrong)}"


def open_pairs(config: PairConfig, n_loops: int | None = None) -> tuple[Subject, TextPairs]:
    """Load the checkpoint that a config names, and make the pairs that it is to be run on.

    Args:
        n_loops: Iterations after which the model's own answer is taken where none is known.

    Raises:
        ValueError: A corrupted text without its clean one, a pair of unequal lengths, or no pairs.
    """
    subject = open_subject(config, needs_questions=config.clean is None)
    return subject, make_pairs(subject, rows_of(subject, config), n_loops)


def rows_of(subject: Subject, config: PairConfig) -> list[PairRow]:
    """The pair that a config gives, else those of the data, else the questions of one hop count.

    Raises:
        ValueError: A corrupted text without its clean one.
    """
    if config.corrupted is not None and config.clean is None:
        raise ValueError("a corrupted text needs its clean one; pass --clean too")
    if config.clean is not None:
        rows = [PairRow(config.clean, config.corrupted)]
    elif subject.pairs:
        rows = list(subject.pairs)
    else:
        asked = subject.of_hops(config.hops)
        rows = [PairRow(each.text, answer=each.answer) for each in asked]
    return [
        PairRow(
            row.clean,
            row.corrupted,
            config.answer or row.answer,
            config.wrong or row.wrong,
            row.where,
        )
        for row in rows
    ]


def make_pairs(subject: Subject, rows: Sequence[PairRow], n_loops: int | None = None) -> TextPairs:
    """The pairs of an open checkpoint; what a row does not give is found where it can be.

    Raises:
        ValueError: A pair of unequal lengths, or a corrupted text that is neither given nor found.
    """
    clean = tuple(row.clean for row in rows)
    corrupted = tuple(row.corrupted or other_head(subject, row.clean) for row in rows)
    batches = subject.batch(clean), subject.batch(corrupted)
    lengths = [batch.mask.sum(1).tolist() for batch in batches]
    for row, one, other in zip(rows, *lengths, strict=True):
        if one != other:
            raise ValueError(unequal(row.where, one, other))
    answers = _answers(subject, rows, batches[0], n_loops)
    wrong = tuple(row.wrong for row in rows if row.wrong is not None)
    ids = torch.tensor(
        [token_id(subject.model, word) for word in wrong],
        device=subject.model.device,
        dtype=torch.int64,
    )
    return TextPairs(clean, corrupted, *batches, answers, wrong, ids)


def unequal(where: str, clean: int, corrupted: int) -> str:
    """The sentence about a pair whose texts have unequal numbers of tokens."""
    return (
        f"{where} has {clean} tokens in the clean text and {corrupted} in the corrupted one, but an"
        " activation has a place in the other run only where both have as many tokens"
    )


def _answers(
    subject: Subject, rows: Sequence[PairRow], batch: Batch, n_loops: int | None
) -> AnswerTokens:
    texts = tuple(row.clean for row in rows)
    given = tuple(row.answer for row in rows if row.answer is not None)
    known = given if len(given) == len(rows) else true_answers(subject, texts)
    group = Group(None, texts, batch, known)
    return Asked(subject, group).answers(group, None, n_loops)


def other_head(subject: Subject, text: str) -> str:
    """The same relations from another entity: the next one of the vocabulary that leads to another
    answer.

    Raises:
        ValueError: No entity of the vocabulary gives another answer that is known.
    """
    head, *relations = subject.model.to_str_tokens(text)
    known, wanted = entities(subject), true_answers(subject, [text])
    start = known.index(head) + 1 if head in known else 0
    for entity in known[start:] + known[:start]:
        candidate = "".join([entity, *relations])
        found = true_answers(subject, [candidate])
        if wanted and found and found != wanted:
            return candidate
    raise ValueError(
        f"no other head entity with a known, different answer was found for {text!r}; pass the"
        " corrupted text with --corrupted"
    )
