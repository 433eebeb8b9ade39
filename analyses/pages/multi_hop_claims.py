"""The paper's claims about multi-hop questions, measured on the multi-hop miniatures."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np

from loopscope.analyses.common.claims import EXTRAPOLATES, LEARNED, Claim, read_log, short, verdict
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.figures.answers import recurrence
from loopscope.analyses.figures.answers.recurrence import RecurrenceConfig, RecurrenceGrid
from loopscope.analyses.figures.answers.recurrence_grids import leading
from loopscope.analyses.figures.circuit import shortcut
from loopscope.analyses.figures.circuit.shortcut import ShortcutConfig

FIXED = ("mini/multi_hop/r2", "mini/multi_hop/r4", "mini/multi_hop/r6")
DYNAMIC = "mini/multi_hop/r_dyn"
RANDOM_GRAPH, PERMUTATIONS = ShortcutConfig.checkpoints
LOOPS = 24


@cache
def grid(name: str) -> RecurrenceGrid:
    """Accuracy for each hop count and number of iterations."""
    return recurrence.run(RecurrenceConfig(checkpoint=name, n_loops=LOOPS))


def _best(name: str) -> list[float]:
    return [round(share, 4) for share in grid(name).accuracy.max(1).values.tolist()]


def _falls(name: str) -> list[float]:
    """How far accuracy falls from its best r to the last, for each hop count."""
    return [
        round(fall, 4)
        for fall in (grid(name).accuracy.max(1).values - grid(name).accuracy[:, -1]).tolist()
    ]


def _trained(name: str) -> int:
    hops = grid(name).trained_hops
    assert hops is not None, "the card of a shipped checkpoint says how many hops it was trained on"
    return hops


def extrapolation() -> Claim:
    """Hop counts beyond training."""
    parts, counts = [], []
    for name in (*FIXED, DYNAMIC):
        trained = _trained(name)
        beyond = _best(name)[trained:]
        counts.append(leading(beyond, EXTRAPOLATES))
        parts.append(
            f"{short(name)}: trained to {trained}, reaches {trained + counts[-1]} ({_list(beyond)}"
            f" on {trained + 1} and more)"
        )
    shown = verdict(counts[-1] >= 2, counts[-1] == 1)
    rule = (
        f"the dynamic one has at least {EXTRAPOLATES:g} on 2 hop counts beyond training (partly:"
        " on 1)"
    )
    return Claim(
        "More iterations at inference solve more hops than were trained (figures 5, 7)",
        "; ".join(parts),
        rule,
        shown,
    )


def two_hops_only() -> Claim:
    """The first stage's checkpoint on deeper questions."""
    early = f"{DYNAMIC}/2_hops"
    best = _best(early)
    shown = verdict(best[2] <= 0.2, best[2] <= 0.4)
    found = (
        f"after the stage of 2 hops: {best[1]:.2f} on 2 hops, {_list(best[2:5])} on 3, 4 and 5,"
        " best over r"
    )
    return Claim(
        "Trained on 2 hops only, a model does not extrapolate (figure 19)",
        found,
        "at most 0.2 on 3 hops (partly: 0.4)",
        shown,
    )


def depth_grows() -> Claim:
    """The deepest hop counts that are answered, by R."""
    depths = [leading(_best(name), LEARNED) for name in FIXED]
    growing = sum(later > earlier for earlier, later in pairwise(depths))
    shown = verdict(growing == len(depths) - 1, depths[-1] > depths[0])
    found = ", ".join(f"{short(name)}: {depth}" for name, depth in zip(FIXED, depths, strict=True))
    dynamic = leading(_best(DYNAMIC), LEARNED)
    rule = (
        f"hops with at least {LEARNED:g} in a row grow with every step of R (partly: from first to"
        " last)"
    )
    return Claim(
        "The learnable depth grows with the training R (figure 5)",
        f"{found}; dynamic (2 to 8): {dynamic}",
        rule,
        shown,
    )


def overthinking() -> Claim:
    """The largest fall after the best r."""
    answered = [
        (fall, hop, best, name)
        for name in FIXED
        for hop, (fall, best) in enumerate(zip(_falls(name), _best(name), strict=True), start=1)
        if best >= EXTRAPOLATES
    ]
    fall, hop, best, name = max(answered)
    at = int(grid(name).accuracy[hop - 1].argmax()) + 1
    shown = verdict(fall >= 0.2, fall >= 0.1)
    found = f"{short(name)} on {hop} hops: {best:.2f} at r = {at}, {best - fall:.2f} at r = {LOOPS}"
    rule = (
        f"a fixed one loses at least 0.2 by r = {LOOPS} on some hop count that it answers (partly:"
        " 0.1)"
    )
    return Claim(
        "Too many iterations undo right answers: overthinking (figures 5, 8)", found, rule, shown
    )


def robustness() -> Claim:
    """Falls after the best r, dynamic against fixed."""
    falls = {
        name: sum(_falls(name)[: _trained(name)]) / _trained(name) for name in (*FIXED, DYNAMIC)
    }
    better = sum(falls[DYNAMIC] < falls[name] for name in FIXED)
    shown = verdict(better == len(FIXED), better > 0)
    found = ", ".join(f"{short(name)}: {fall:.3f}" for name, fall in falls.items())
    rule = "the dynamic one loses less than each fixed one (partly: than some)"
    return Claim(
        "Training with a drawn number of iterations makes a model robust to many of them (figures"
        " 5, 8)",
        f"mean loss of accuracy from the best r to r = {LOOPS} on trained hops: {found}",
        rule,
        shown,
    )


def halting() -> Claim:
    """The halting rule against the best r."""
    record, trained = grid(DYNAMIC), _trained(DYNAMIC)
    gaps = (record.accuracy.max(1).values - record.halted)[:trained]
    gap, worst, used = (
        round(float(gaps.mean()), 4),
        float(gaps.max()),
        float(record.halted_loops[:trained].mean()),
    )
    shown = verdict(gap <= 0.05, gap <= 0.1)
    found = (
        f"on trained hops {gap:.3f} below the best r on average, at most {worst:.2f}; {used:.1f}"
        " iterations used"
    )
    rule = "at most 0.05 below on average (partly: 0.1)"
    return Claim("Adaptive halting comes close to the best r (figures 9, 10)", found, rule, shown)


def ever_faster() -> Claim:
    """Updates until each hop count is answered."""
    log = read_log(DYNAMIC)
    updates: dict[int, int] = {}
    for hops in range(2, _trained(DYNAMIC) + 1):
        reached = [
            line["update"] for line in log if line["accuracy"].get(str(hops), 0.0) >= LEARNED
        ]
        updates[hops] = min(reached)
    first, rest = updates[2], (max(updates.values()) - updates[2]) / (len(updates) - 1)
    shown = verdict(rest <= first / 4, rest < first)
    last = max(updates.values())
    found = (
        f"2 hops after {first:,} updates; each further hop count after {rest:,.0f} more on average,"
        f" the last at {last:,}"
    )
    rule = "a further hop count costs at most a quarter of the first (partly: less than the first)"
    return Claim(
        "The first hops cost most of the training, later ones come quickly (figure 6)",
        found,
        rule,
        shown,
    )


def shortcut_on_random_graph() -> Claim:
    """Where the effects of random states are, on a graph whose walks meet and on one whose walks
    never do.
    """
    deepest = shortcut.run(ShortcutConfig(average=True))
    found = dict(zip((RANDOM_GRAPH, PERMUTATIONS), deepest.maps, strict=True))
    hops = found[RANDOM_GRAPH].hops
    alike = (
        shortcut.run(ShortcutConfig(checkpoints=(PERMUTATIONS,), average=True, hops=hops))
        .maps[0]
        .last_half()
    )
    share, other = (round(found[name].last_half(), 4) for name in (RANDOM_GRAPH, PERMUTATIONS))
    above = share - max(other, alike)
    text = (
        "share of the total effect on the last half of the positions, mean over"
        f" {len(found[RANDOM_GRAPH].texts)} questions: {share:.2f} on the random graph ({hops}"
        f" hops), {other:.2f} on the permutation graph ({found[PERMUTATIONS].hops} hops;"
        f" {alike:.2f} on {hops}). On the random graph, {hops} relations lead two heads to one"
        f" entity in {_meeting(hops):.2f} of the cases"
    )
    return Claim(
        "On a random graph the effects of random states sit at the end of the relation sequence: a"
        " shortcut (figure 21)",
        text,
        "at least 0.1 above the permutation graph (partly: 0.05)",
        verdict(above >= 0.1, above >= 0.05),
    )


def _meeting(hops: int) -> float:
    """Share of pairs of heads that a question's relations lead to one entity, over the questions of
    a hop count.
    """
    subject = open_subject(SourceConfig(checkpoint=RANDOM_GRAPH))
    assert subject.graph is not None, "the shipped checkpoints have their graphs"
    met = []
    for question in subject.of_hops(hops):
        tails = np.arange(subject.graph.n_entities)
        for relation in question.text.split("<r_")[1:]:
            tails = subject.graph.table[int(relation.rstrip(">")), tails]
        same = np.bincount(tails)
        met.append((same * (same - 1)).sum() / (len(tails) * (len(tails) - 1)))
    return float(np.mean(met))


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
