"""The page of findings: the circuit that carries the answer through a miniature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from loopscope.analyses.common.configs import DEFAULT_CHECKPOINT, SourceConfig
from loopscope.analyses.common.records import markdown_table, write_text
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.pages import found_circuits, molecule_circuit
from loopscope.analyses.pages.entity_path import (
    HOPS,
    Pairs,
    estimates,
    movers,
    restored,
    steps,
    writers,
)
from loopscope.interp.drawing.labels import spoken
from loopscope.interp.edit.ablation import Component


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
