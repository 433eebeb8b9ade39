"""The checkpoint under study, with its questions and its graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.analyses.common.configs import SourceConfig
from loopscope.checkpoints.load import load, read_card
from loopscope.checkpoints.locate import locate, shipped_names
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.tasks.graphs import PermutationGraph, TableGraph, read_graph
from loopscope.tasks.questions import Question, by_hops, read_questions


@dataclass(frozen=True)
class Subject:
    """A loaded checkpoint and what is known beside it.

    Attributes:
        name: Of a shipped checkpoint as the user gave it, else the file's or folder's.
        model: In eval mode, on the chosen device.
        questions: By hop count.
        graph: None where the checkpoint has none.
        card: What card.json says.
    """

    name: str
    model: LoopedModel
    questions: dict[int, list[Question]]
    graph: PermutationGraph | TableGraph | None
    card: dict[str, Any]

    @property
    def trained_hops(self) -> int | None:
        """Deepest hop count seen in training, where the card says."""
        return self.card.get("trained_hops")

    def encode(self, questions: Sequence[Question]) -> tuple[Batch, Int[Tensor, " batch"]]:
        """A batch of questions, and their answers' ids."""
        answers = [self.model.to_single_token(question.answer) for question in questions]
        return self.model.encode([question.text for question in questions]), torch.tensor(
            answers, device=self.model.device
        )

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


def load_model(config: SourceConfig) -> LoopedModel:
    """Load the model that a config names onto its device.

    Raises:
        ValueError: This machine has no such device.
    """
    try:
        torch.zeros(1, device=config.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"the device {config.device!r} cannot be used on this machine"
            f" ({str(error).splitlines()[0].rstrip('.')}); pass --device cpu"
        ) from None
    return load(config.checkpoint, **config.told()).to(config.device)


def open_subject(config: SourceConfig) -> Subject:
    """Load the checkpoint that a config names, with its questions.

    Raises:
        ValueError: There are no questions, the checkpoint does not say where answers are read, or
            this machine has no such device.
    """
    if config.per_hop is not None and config.per_hop < 1:
        raise ValueError(
            f"at least one question of each hop count is needed, got --per-hop {config.per_hop}"
        )
    files = locate(config.checkpoint)
    model = load_model(config)
    data = config.data or files.questions
    if data is None:
        raise ValueError(
            f"{config.checkpoint} has no test.json beside its weights; pass --data with the"
            " questions to ask"
        )
    groups = by_hops(read_questions(data))
    kept = {hops: group[: config.per_hop] for hops, group in groups.items()}
    model.encode(
        [next(iter(kept.values()))[0].text]
    )  # refuses here, before any work, when the readout or vocabulary is unknown
    graph = read_graph(files.graph) if files.graph else None
    name = (
        config.checkpoint if config.checkpoint in shipped_names() else Path(config.checkpoint).name
    )
    return Subject(name, model, kept, graph, read_card(config.checkpoint))
