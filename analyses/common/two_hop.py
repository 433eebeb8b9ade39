"""Questions of two hops, with the bridge entity between them: what two figures ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.analyses.common.subject import Subject
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.state import checked_loops
from loopscope.tasks.questions import Question

GROUPS = ("train_inferred", "test_inferred_iid", "test_inferred_ood")
TARGETS, READ_AT = ("bridge", "target"), (1, 2)
"""The bridge is read at the first relation's column, the target at the second one's."""


@dataclass(frozen=True)
class TwoHopQuestions:
    """The questions of one group.

    Attributes:
        questions: As the data have them.
        batch: The inputs.
        targets: Int[Tensor, "batch target"], the bridge and the target of each.
    """

    questions: tuple[Question, ...]
    batch: Batch
    targets: Int[Tensor, "batch target"]


def ask(subject: Subject, group: str, at_most: int | None = None) -> TwoHopQuestions:
    """The two-hop questions of one group of a checkpoint's data, at most so many.

    Raises:
        ValueError: The checkpoint has no graph, which knows the bridges, or its data have no such
            questions.
    """
    if subject.graph is None:
        raise ValueError(
            f"{subject.name} has no graph.json, without which the bridge entities of its questions"
            " are unknown"
        )
    if at_most is not None and at_most < 1:
        raise ValueError(f"at least one question of each group is needed, got {at_most}")
    asked = [question for question in subject.questions.get(2, []) if question.kind == group]
    found = tuple(asked[:at_most])
    if not found:
        raise ValueError(
            f"the data of {subject.name} have no two-hop questions of the group {group!r}"
        )
    targets = [
        list(map(subject.model.to_single_token, subject.graph.walk(question.text)[1:]))
        for question in found
    ]
    batch = subject.model.encode([question.text for question in found])
    return TwoHopQuestions(found, batch, torch.tensor(targets, device=subject.model.device))


def shape_of(subject: Subject, n_loops: int | None = None) -> tuple[int, int]:
    """Iterations (by default the recorded ones) and layers of a checkpoint, all of whose blocks
    must be in the loop.

    Raises:
        ValueError: The iterations are neither given nor recorded, or there are blocks outside the
            loop.
    """
    n_loops, n_layers = (
        checked_loops(n_loops, subject.model.cfg.n_loops),
        subject.model.cfg.n_layers,
    )
    places = [(visit.loop, visit.layer) for visit in subject.model.schedule(n_loops)]
    if places != [(loop, layer) for loop in range(n_loops) for layer in range(n_layers)]:
        raise ValueError(
            f"{subject.name} has blocks outside its loop, so its depths are not those of iterations"
            " times layers"
        )
    return n_loops, n_layers


def with_other_start(subject: Subject, questions: Sequence[Question]) -> list[str]:
    """Each question with the head and the first relation of a later one of the list, such that
    bridge and target differ too.

    Raises:
        ValueError: No other question gives such a start.
    """
    assert subject.graph is not None, "asked questions have a graph"
    return [_other_start(subject, questions, i) for i in range(len(questions))]


def _other_start(subject: Subject, questions: Sequence[Question], i: int) -> str:
    assert subject.graph is not None, "asked questions have a graph"
    _, first, second = subject.model.to_str_tokens(questions[i].text)
    path = subject.graph.walk(questions[i].text)
    for other in (*questions[i + 1 :], *questions[:i]):
        start = subject.model.to_str_tokens(other.text)[:2]
        candidate = "".join([*start, second])
        try:
            differs = all(a != b for a, b in zip(path, subject.graph.walk(candidate), strict=True))
        except ValueError:  # the other bridge lacks the second relation
            continue
        if differs and start[1] != first:
            return candidate
    raise ValueError(
        f"no other question of the group gives {questions[i].text!r} another head, first relation,"
        " bridge and answer"
    )
