"""The paper's claims about two-hop questions, measured on the systematicity miniatures."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from loopscope.analyses.common.claims import EXTRAPOLATES, LEARNED, Claim, read_log, verdict
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.models.core.state import checked_loops
from loopscope.tasks.questions import Question
from loopscope.tasks.two_hop import TEST_GROUPS

LOOPED = tuple(f"mini/systematicity/r4_l2/{stage}" for stage in ("train", "id", "ood"))
ITERATIONS = (1, 2, 4, 8)
VANILLA = tuple(f"mini/systematicity/r1_l8/{stage}" for stage in ("train", "id"))


@cache
def _subject(name: str) -> Subject:
    return open_subject(replace(SourceConfig(), checkpoint=name))


def _asked(name: str, group: str) -> list[Question]:
    return [
        question
        for questions in _subject(name).questions.values()
        for question in questions
        if question.kind == group
    ]


@cache
def by_group(name: str) -> dict[str, float]:
    """Accuracy for each group of questions, with the number of iterations of training."""
    subject, found = _subject(name), {}
    n_loops = checked_loops(None, subject.model.cfg.n_loops)
    for group in TEST_GROUPS:
        batch, answers = subject.encode(_asked(name, group))
        found[group] = float(
            readout_lens(subject.model, batch, n_loops).correct(answers)[-1].float().mean()
        )
    return found


def three_stages() -> Claim:
    """In which order the log reaches training, in-distribution and OOD facts."""
    log, parts, found = read_log("mini/systematicity/r4_l2"), [], []
    for group, least in (
        ("train_inferred", LEARNED),
        ("test_inferred_iid", LEARNED),
        ("test_inferred_ood", EXTRAPOLATES),
    ):
        first = next((line for line in log if line["accuracy"][group] >= least), log[-1])
        shares = [
            first["accuracy"][each]
            for each in ("train_inferred", "test_inferred_iid", "test_inferred_ood")
        ]
        found.append(shares)
        parts.append(
            f"{least:g} on {group} after {first['update']:,} updates"
            f" ({' / '.join(f'{share:.2f}' for share in shares)})"
        )
    memorised, grokked, ood = (
        found[0][1] <= LEARNED / 2,
        found[1][2] <= found[2][2] / 2,
        found[2][2],
    )
    shown = verdict(memorised and grokked and ood >= EXTRAPOLATES, ood >= 0.3)
    rule = (
        "in-distribution accuracy at most 0.45 when training facts are known, OOD at most half of"
        " its end then, 0.6 at last (partly: 0.3)"
    )
    text = f"accuracy on training / in-distribution / OOD two-hop facts: {'; '.join(parts)}"
    return Claim(
        "Three stages: memorising, in-distribution, systematic generalisation (figure 3)",
        text,
        rule,
        shown,
    )


def _known_at(log: list[dict[str, Any]], least: float) -> float:
    """The update at which OOD facts are first known to this accuracy; infinite where they never
    are.
    """
    return next(
        (line["update"] for line in log if line["accuracy"]["test_inferred_ood"] >= least), math.inf
    )


def _when(update: float) -> str:
    return "never" if math.isinf(update) else f"after {update:,} updates"


def more_iterations() -> Claim:
    """OOD accuracy by the number of iterations of the same two layers, from the logs."""
    logs = {r: read_log(f"mini/systematicity/r{r}_l2") for r in ITERATIONS}
    last = {r: log[-1]["accuracy"]["test_inferred_ood"] for r, log in logs.items()}
    half = {r: _known_at(log, 0.5) for r, log in logs.items()}
    parts = [
        f"R={r}: {last[r]:.2f} after {logs[r][-1]['update']:,} updates, 0.5 {_when(half[r])}"
        for r in ITERATIONS
    ]
    needed = last[1] <= 0.1 and max(last.values()) >= 0.3
    more = min(last[r] for r in ITERATIONS[1:]) >= 0.3 and half[4] < half[2]
    rule = (
        "R=1 at most 0.1, every R above 1 at least 0.3, and R=4 at 0.5 after fewer updates than R=2"
        " (partly: R=1 at most 0.1, another 0.3)"
    )
    found = f"OOD accuracy of two layers, each run as long as its recipe says: {'; '.join(parts)}"
    return Claim(
        "Without recurrence nothing is learned OOD, and R=4 gets there faster than R=2 (figure 3)",
        found,
        rule,
        verdict(needed and more, needed),
    )


def vanilla() -> Claim:
    """The same depth without recurrence."""
    row, looped = by_group(VANILLA[-1]), by_group(LOOPED[-1])["test_inferred_ood"]
    inside, outside = row["test_inferred_iid"], row["test_inferred_ood"]
    shown = verdict(inside >= LEARNED and outside <= 0.1, outside < looped / 2)
    count = len(_asked(VANILLA[-1], "test_inferred_ood"))
    found = (
        f"8 layers once: {inside:.2f} in distribution, {outside:.2f} OOD; 2 layers 4 times:"
        f" {looped:.2f} OOD ({count} questions)"
    )
    rule = (
        "vanilla at least 0.9 in distribution and at most 0.1 OOD (partly: less than half of the"
        " looped one's)"
    )
    return Claim(
        "A vanilla model of the same effective depth does not generalise OOD (figure 3)",
        found,
        rule,
        shown,
    )


@cache
def _bridge_accuracy(name: str, group: str) -> list[float]:
    """How often the entity in between is the top token at the first relation, after each visit."""
    subject = _subject(name)
    assert subject.graph is not None, "the shipped checkpoints have their graphs"
    asked = _asked(name, group)
    bridges = torch.tensor(
        [subject.model.to_single_token(subject.graph.walk(question.text)[1]) for question in asked]
    )
    lens = logit_lens(subject.model, subject.encode(asked)[0], positions=[1])
    return [float(share) for share in lens.correct(bridges).float().mean(1)]


def bridge() -> Claim:
    """The logit lens at the first relation."""
    layers = _subject(LOOPED[-1]).model.cfg.n_layers
    looped = {
        group: _bridge_accuracy(LOOPED[-1], f"test_inferred_{group}") for group in ("iid", "ood")
    }
    inside, outside = (max(shares[:layers]) for shares in looped.values())
    later = [max(shares[layers:]) for shares in looped.values()]
    deep = _bridge_accuracy(VANILLA[-1], "test_inferred_ood")
    shown = verdict(min(inside, outside) >= LEARNED, min(inside, outside) >= 0.5)
    found = (
        f"share of questions with the bridge as top token at the first relation: {inside:.2f} in"
        f" distribution and {outside:.2f} OOD within loop 0, at most {later[0]:.2f} and"
        f" {later[1]:.2f} in later loops; vanilla OOD at most {max(deep):.2f}, after block"
        f" {deep.index(max(deep))}"
    )
    rule = "at least 0.9 within loop 0 on both (partly: 0.5)"
    return Claim(
        "The bridge entity is decodable in the first iteration (figures 4, 11)", found, rule, shown
    )
