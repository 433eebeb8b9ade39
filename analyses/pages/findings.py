"""The circuit that carries the answer through a miniature: where entities appear, what moves them,
what breaks and what restores it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.common.configs import DEFAULT_CHECKPOINT, SourceConfig
from loopscope.analyses.common.records import markdown_table, write_text
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.pages import found_circuits, molecule_circuit
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.common.metrics import logit_margin
from loopscope.interp.common.ranking import top_token
from loopscope.interp.drawing.labels import spoken
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.edit.substitutes import How
from loopscope.interp.lens.decoding import decodability
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.state import checked_loops

HOPS, CLEAR = 5, 0.9


@dataclass(frozen=True)
class Pairs:
    """Questions of one hop count, each with the same relations asked of another entity, so that all
    that lies on the way differs.

    Attributes:
        clean, corrupted: The inputs.
        answers: Int[Tensor, " batch"], of the clean ones.
        entities: Int[Tensor, "batch target"], the clean ones' entities after 1, 2, ... hops; the
            last is the answer.
        n_loops: Iterations of every run.
    """

    subject: Subject
    clean: Batch
    corrupted: Batch
    answers: Tensor
    entities: Tensor
    n_loops: int

    @classmethod
    def of(cls, subject: Subject, hops: int) -> Pairs:
        """All questions of a hop count; the other entity is the next one of the graph."""
        assert subject.graph is not None, "the shipped miniatures have their graphs"
        questions, model = subject.of_hops(hops), subject.model
        clean, answers = subject.encode(questions)
        corrupted = clean.tokens.clone()
        first = model.to_single_token("<e_0>")
        corrupted[:, 0] = (corrupted[:, 0] - first + 1) % subject.graph.n_entities + first
        walks = [
            [model.to_single_token(entity) for entity in subject.graph.walk(question.text)[1:]]
            for question in questions
        ]
        n_loops = checked_loops(None, model.cfg.n_loops)
        return cls(
            subject, clean, replace(clean, tokens=corrupted), answers, torch.tensor(walks), n_loops
        )

    def sweep(self, site: str, heads: Literal["all"] | None = None) -> Sweep:
        """The clean activation put into the corrupted run, one place at a time."""
        model, metric, also = self.subject.model, logit_margin(self.answers), {"right": self.right}
        return activation_patch(
            model,
            self.clean,
            self.corrupted,
            metric,
            self.n_loops,
            sites=site,
            heads=heads,
            also=also,
        )

    @cached_property
    def residual(self) -> Sweep:
        """The state after every block."""
        return self.sweep("resid_post")

    @cached_property
    def heads(self) -> Sweep:
        """Every head's output, one head at a time."""
        return self.sweep("z", heads="all")

    def right(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """1 where the clean answer is on top."""
        return (top_token(logits) == self.answers).to(logits)

    def accuracy(self) -> float:
        """The share of right answers."""
        return float(
            readout_lens(self.subject.model, self.clean, self.n_loops)
            .correct(self.answers)[-1]
            .float()
            .mean()
        )

    def accuracy_without(self, component: Component, how: How = "mean") -> float:
        """The share of right answers with a component replaced by its mean, or with "zero" with an
        iteration left out.
        """
        reference = None if how == "zero" else self.clean
        with ablate(
            self.subject.model, component, how=how, n_loops=self.n_loops, reference=reference
        ):
            return self.accuracy()


@dataclass(frozen=True)
class Step:
    """Where the entity after some hops first stands on top at its own relation.

    Attributes:
        hop: Which entity, from 1; its relation stands at this position.
        loop, layer: The block after which the logit lens reads it for at least 0.9 of the
            questions.
        share: For how many there.
        before: For how many one block earlier.
    """

    hop: int
    loop: int
    layer: int
    share: float
    before: float


def steps(pairs: Pairs) -> list[Step]:
    """The front along which the answer is worked out."""
    model = pairs.subject.model
    read = decodability(
        model, pairs.clean, pairs.entities, list(range(1, HOPS + 1)), pairs.n_loops
    ).accuracy
    schedule, found = model.schedule(pairs.n_loops), []
    for target, shares in enumerate(read.T):
        clear = [i for i, share in enumerate(shares.tolist()) if share >= CLEAR]
        if not clear:
            raise ValueError(
                f"the entity after {target + 1} hops is never on top for {CLEAR:g} of the questions"
                " at its relation"
            )
        visit = schedule[clear[0]]
        assert visit.loop is not None, "every block of this family is in an iteration"
        earlier = float(shares[clear[0] - 1]) if clear[0] else 0.0
        found.append(Step(target + 1, visit.loop, visit.layer, float(shares[clear[0]]), earlier))
    return found


def restored(pairs: Pairs, front: list[Step]) -> pd.DataFrame:
    """For each block of the first loops, the position at which the clean state restores most,
    and how much.
    """
    effect, right = pairs.residual.grid(), pairs.residual.also["right"].grid(normalized=False)
    rows = []
    for loop in range(front[-1].loop + 2):
        for layer in range(len(effect.layers)):
            shares = effect.values[loop, layer, :, 0]
            best = int(shares.argmax())
            answered = float(right.values[loop, layer, best, 0])
            elsewhere = float(torch.cat([shares[:best], shares[best + 1 :]]).abs().max())
            rows.append((loop, layer, best, float(shares[best]), answered, elsewhere))
    return pd.DataFrame(
        rows,
        columns=[
            "loop",
            "block",
            "position",
            "margin restored",
            "answered right",
            "largest elsewhere",
        ],
    )


def writers(pairs: Pairs, front: list[Step]) -> pd.DataFrame:
    """The writers of each entity at the front: effects of the clean output of attention and of
    the MLP, and accuracy without them.
    """
    attention, mlp = pairs.sweep("attn_out").grid(), pairs.sweep("mlp_out").grid()
    rows = []
    for step in front:
        at = (step.loop, step.layer, step.hop, 0)
        without = [
            pairs.accuracy_without(Component(kind, (step.loop,), (step.layer,)))
            for kind in ("attn", "mlp")
        ]
        rows.append(
            (
                step.hop,
                step.loop,
                step.layer,
                float(attention.values[at]),
                float(mlp.values[at]),
                *without,
            )
        )
    columns = [
        "hop",
        "loop",
        "block",
        "attention restores",
        "MLP restores",
        "accuracy without attention",
        "without MLP",
    ]
    return pd.DataFrame(rows, columns=columns)


def movers(pairs: Pairs, front: list[Step]) -> pd.DataFrame:
    """Each head at the front: how much it attends one position back, what its clean output
    restores, accuracy without it.
    """
    model, n_loops = pairs.subject.model, pairs.n_loops
    heads = pairs.heads.grid()
    _, cache = model.run_with_cache(
        pairs.clean.tokens,
        n_loops=n_loops,
        mask=pairs.clean.mask,
        names_filter="**.attn.hook_pattern",
    )
    rows = []
    for step in front:
        pattern = cache["pattern", step.loop, step.layer].mean(0)
        for head in range(model.cfg.n_heads):
            itself = Component("head", loops=(step.loop,), layers=(step.layer,), heads=(head,))
            back = float(pattern[head, step.hop, step.hop - 1])
            effect = float(heads.values[step.loop, step.layer, step.hop, head])
            without = [pairs.accuracy_without(itself, how) for how in ("mean", "mean_per_position")]
            rows.append((step.hop, step.loop, step.layer, head, back, effect, *without))
    columns = [
        "hop",
        "loop",
        "block",
        "head",
        "attention one back",
        "restores",
        "accuracy with its mean",
        "with its mean per position",
    ]
    return pd.DataFrame(rows, columns=columns)


def estimates(pairs: Pairs) -> pd.DataFrame:
    """How well attribution patching ranks the cells of two sweeps: Spearman's correlation with the
    exact patches.
    """
    model, metric, rows = pairs.subject.model, logit_margin(pairs.answers), []
    swept: list[tuple[str, Literal["all"] | None, Sweep]] = [
        ("resid_post", None, pairs.residual),
        ("z", "all", pairs.heads),
    ]
    for site, heads, sweep in swept:
        exact = sweep.values.mean(1)
        for steps in (0, 8):
            found = attribution_patch(
                model,
                pairs.clean,
                pairs.corrupted,
                metric,
                pairs.n_loops,
                sites=site,
                heads=heads,
                steps=steps,
            )
            both = pd.DataFrame(
                {"exact": exact.cpu().numpy(), "estimate": found.values.mean(1).cpu().numpy()}
            )
            rows.append((site, len(both), steps, float(both.rank().corr().to_numpy()[0, 1])))
    return pd.DataFrame(rows, columns=["site", "cells", "steps", "rank correlation"])


def page(checkpoint: str = DEFAULT_CHECKPOINT) -> str:
    """Everything, as Markdown."""
    pairs = Pairs.of(open_subject(replace(SourceConfig(), checkpoint=checkpoint)), HOPS)
    front = steps(pairs)
    table = pd.DataFrame([(s.hop, s.hop, s.loop, s.layer, s.share, s.before) for s in front])
    table.columns = [
        "entity after hop",
        "at position",
        "loop",
        "block",
        "on top",
        "one block earlier",
    ]
    skipped = {
        t: pairs.accuracy_without(Component("iteration", loops=(t,)), "zero")
        for t in range(pairs.n_loops)
    }
    by_head = movers(pairs, front)
    tables = [
        table,
        restored(pairs, front),
        writers(pairs, front),
        by_head,
        estimates(pairs),
    ]
    worst = min(skipped, key=lambda t: skipped[t])
    words = {
        "checkpoint": checkpoint,
        "hops": HOPS,
        "count": len(pairs.answers),
        "loops": pairs.n_loops,
        "accuracy": f"{pairs.accuracy():.2f}",
        "last": spoken(f"loops.{front[-1].loop}.blocks.{front[-1].layer}"),
        "worst": worst,
        "left": f"{skipped[worst]:.2f}",
    }
    text = _TEXT.format(**words)
    for mark, frame in zip(
        ("FRONT", "RESTORED", "WRITERS", "MOVERS", "ESTIMATES"), tables, strict=True
    ):
        text = text.replace(mark, markdown_table(frame))
    found = found_circuits.section(pairs.subject, HOPS, by_head)
    return text + found + molecule_circuit.section()


def write(path: Path) -> Path:
    """Measure everything and write the page, whole or not at all."""
    return write_text(path, page())


_TEXT = """# How a small looped model computes its answer: the circuit of `{checkpoint}`

Written by `loopscope findings`. This page follows one computation from input to answer. The short
result: each block follows one relation, and the entity that has been reached moves one position to
the right per block.

The model is given {count} held-out queries of {hops} hops (`<e><r><r>...`: the head entity stands
at position 0, the relation of hop k at position k). It runs {loops} iterations of its two blocks,
and answers a share of {accuracy} of the queries right. For patching, each query is paired with the
same relations asked of another head entity. Every relation is a permutation of the entities, so the
two queries of a pair have a different entity after each hop. Loops, blocks, positions and heads
count from 0, as in the hook names. The [glossary](glossary.md) explains the other words.

## Where each entity appears

The entity after hop k appears at position k. The table shows the first block after which the
[logit lens](glossary.md#logit-lens) has that entity as its top token there, for at least 0.9 of the
queries. *On top* is the share of queries at that block, *one block earlier* the share one block
before. The answer is there after {last}.

FRONT

## Which states bring the answer back

The clean state of one position after one block is put into the run of the corrupted query. Each row
is one block; *position* is the one at which this brings back most of the answer. *Margin restored*
is the effect (0: the margin of the corrupted run, 1: that of the clean run), *answered right* the
share of queries whose clean answer is then on top, and *largest elsewhere* the largest effect of
any other position. After most blocks,
nearly all of the answer is at one position.

RESTORED

## Attention or MLP: which one writes the next entity

The places are those of the first table. *Attention restores* and *MLP restores*: the share of the
margin that comes back if only the output of attention, or only that of the MLP, is the clean one at
that position. *Accuracy without*: the accuracy on the clean queries if that output is replaced, at
all positions of that block and loop, by its mean over queries and positions.

WRITERS

## Which heads move it

The same places, one head at a time. The columns are:

* *attention one back*: the head's mean attention from the position to the one before it;
* *restores*: the share of the margin that its clean output alone brings back;
* *accuracy with its mean*: accuracy on the clean queries if the head's output is replaced by its
  mean over queries and positions;
* *with its mean per position*: the same with one mean for each position.

What a head restores depends on the entity. But some head may restore nothing and be replaceable by
its mean at each position, though not by one mean for all positions. Such a head says only at which
position a token stands. A model without position embeddings has to work this out for itself.

MOVERS

## What does not break it

If any one iteration is left out (the state passes it unchanged), the accuracy is still at least
{left} (the lowest for loop {worst}). So the blocks do not count iterations: the same step is taken
one iteration later.

## How far to trust estimates

[Attribution patching](howto/interventions/estimate_a_sweep.md) estimates every cell of a patching
sweep from gradients: from one gradient, in the corrupted run (0 steps), or from the mean gradient
at several steps between the corrupted and the clean activation. The table shows Spearman's rank
correlation between the estimated and the exact margins over all cells.

ESTIMATES
"""
