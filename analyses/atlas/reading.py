"""Measurements of what can be read from states, and of what the answers do."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from loopscope.analyses.atlas.material import Numbers, asked, opened
from loopscope.analyses.atlas.rules import OTHER_DEPTHS, REALIGNED
from loopscope.analyses.common.claims import EXTRAPOLATES
from loopscope.analyses.common.configs import DEFAULT_CHECKPOINT
from loopscope.analyses.common.subject import Subject
from loopscope.analyses.figures.answers.recurrence_grids import leading
from loopscope.analyses.figures.circuit import realignment
from loopscope.analyses.pages import multi_hop_claims
from loopscope.interp.lens.decoding import rank_trajectory
from loopscope.interp.lens.lens import logit_lens
from loopscope.interp.probes.differences import difference_probe

_HOPS = 4
_SHUFFLES = 10


def deeper() -> Numbers:
    """Hop counts beyond training that are answered."""
    record = multi_hop_claims.grid(DEFAULT_CHECKPOINT)
    assert record.trained_hops is not None, "the card says how many hops were trained"
    reached = [
        leading(record.accuracy[:, :most].amax(1).tolist(), EXTRAPOLATES) - record.trained_hops
        for most in (record.accuracy.shape[1], 4)
    ]
    return dict(
        zip(
            ("hop counts beyond training", "the same with at most 4 iterations"),
            map(float, reached),
            strict=True,
        )
    )


def latent_chain() -> Numbers:
    """Whether the entity before the answer comes up before it."""
    subject = opened()
    assert subject.graph is not None, "the shipped checkpoints have their graphs"
    (batch, answers), generator = asked(_HOPS), torch.Generator().manual_seed(0)
    walks = [subject.graph.walk(question.text) for question in subject.of_hops(_HOPS)]
    ids = torch.tensor([list(map(subject.model.to_single_token, walk)) for walk in walks])
    first = subject.model.to_single_token("<e_0>")
    steps = torch.randint(1, subject.graph.n_entities, answers.shape, generator=generator)
    other = (ids[:, -2] - first + steps) % subject.graph.n_entities + first
    at_answer = rank_trajectory(
        logit_lens(subject.model, batch), torch.stack([ids[:, -2], other, answers], dim=1)
    ).rank
    earlier = rank_trajectory(
        logit_lens(subject.model, batch, positions=[_HOPS - 1]), ids[:, -2:-1]
    ).rank
    before = (at_answer[..., 2] == 0).cumsum(0) == 0  # the answer has not been on top yet
    return {
        "previous entity first, at the answer's position": _share(before, at_answer[..., 0]),
        "previous entity first, one position earlier": _share(before, earlier[..., 0]),
        "a random entity first, at the answer's position": _share(before, at_answer[..., 1]),
    }


def _share(before: Bool[Tensor, "visit read"], rank: Tensor) -> float:
    """The share of reads in which a token is on top at a visit before the answer is."""
    return float((before & (rank == 0)).any(0).double().mean())


def relational() -> Numbers:
    """Probes of the difference of two states, and of each alone."""
    subject = opened()
    graph, model = subject.graph, subject.model
    assert graph is not None, "the shipped checkpoints have their graphs"
    texts = [question.text for hops in range(2, 9) for question in subject.of_hops(hops)]
    others = [_with_next_head(text, graph.n_entities) for text in texts]
    preferred = _answers(subject, texts) > _answers(subject, others)
    place = f"{model.schedule()[-1].name}.{model.lens_site}"
    first, second = model.encode(texts), model.encode(others)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(texts), generator=generator) for _ in range(_SHUFFLES)]
    records = [
        difference_probe(model, first, second, wanted, place)
        for wanted in (preferred, *(preferred[order] for order in orders))
    ]
    score, alone = float(records[0].accuracy()), float(records[0].accuracy_alone())
    return {
        "difference of two states": score,
        "comparing two single probes": alone,
        "difference minus comparing two single probes": score - alone,
        "a single probe alone": float(records[0].separate),
        "scores that flip with the pair": float(records[0].flips()),
        "difference with shuffled preferences": sum(float(x.accuracy()) for x in records[1:])
        / _SHUFFLES,
    }


def _answers(subject: Subject, texts: list[str]) -> Tensor:
    """The answers' ids, one per text."""
    return torch.tensor([subject.model.to_single_token(subject.answer_of(text)) for text in texts])


def _with_next_head(text: str, n_entities: int) -> str:
    """A question with the next entity of the graph as its head."""
    head, relations = text.split(">", 1)
    return f"<e_{(int(head.removeprefix('<e_')) + 1) % n_entities}>{relations}"


def realigned() -> Numbers:
    """The realignment of the bridge's state in the model of 4 iterations."""
    return _realigned({"": REALIGNED})


def realigned_depths() -> Numbers:
    """The same in the models of 2 and of 8 iterations."""
    return _realigned(OTHER_DEPTHS)


def _realigned(checkpoints: Mapping[str, str]) -> Numbers:
    """The numbers of checkpoints, each under the words before it."""
    config = realignment.RealignmentConfig(checkpoints=tuple(checkpoints.values()))
    frame = realignment.run(config).frame()
    table = frame[frame["group"] == "OOD"]
    return {
        before + what: value
        for before, name in checkpoints.items()
        for what, value in _of_one(table[table["checkpoint"] == name]).items()
    }


def _of_one(table: pd.DataFrame) -> Numbers:
    """The numbers of one checkpoint."""
    score, low, high = (
        dict(zip(table["bar"], table[name].tolist(), strict=True))
        for name in ("accuracy", "low", "high")
    )
    return {
        "base": score["base"],
        "realigned": score["realigned"],
        "realigned, low end of the 95 % interval": low["realigned"],
        "realigned, high end": high["realigned"],
        "realigned minus base": score["realigned"] - score["base"],
        "random entity": score["random entity"],
        "second-best token": score["second-best token"],
        "rescaled minus base, without its sign": abs(score["rescaled"] - score["base"]),
    }
