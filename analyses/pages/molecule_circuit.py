"""The circuit of a molecule model: how it knows that a branch is open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.pair_files import PairRow
from loopscope.analyses.common.pairs_of import TextPairs, make_pairs
from loopscope.analyses.common.records import markdown_table
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.figures.circuit.circuit import CircuitConfig, measure
from loopscope.analyses.pages.found_circuits import WANTED, folded, sizes
from loopscope.interp.circuits.building import graph_with
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.gradients import Written
from loopscope.interp.circuits.record import Circuit
from loopscope.models.core.hooks import NO_TAPS
from loopscope.models.core.state import checked_loops
from loopscope.tasks.smiles import BOS, EOS, SmilesVocabulary, pieces

CHECKPOINT = "mini/smiles"
OPEN, CLOSE, INSTEAD = "(", ")", "C"
FAR, FOUND_ON = 6, 48


def section() -> str:
    """The section of the page of findings."""
    subject = open_subject(SourceConfig(checkpoint=CHECKPOINT), needs_questions=False)
    rows = bracket_rows(subject.card["held_out_strings"])
    seen, others = (make_pairs(subject, part) for part in (rows[:FOUND_ON], rows[FOUND_ON:]))
    found = measure(subject, seen, CircuitConfig(wanted=WANTED))
    circuit, call = found.circuit, found.circuit.call
    head = strongest_head(circuit)
    again = evaluate_circuit(
        subject.model, others.clean_batch, others.corrupted_batch, circuit, others.metric()
    )
    signs, table = opposites(subject), by_loop(subject, seen, circuit, head)
    looks = (table["attention to the bracket"] / table["to another token"]).max()
    text = _TEXT.format(
        checkpoint=CHECKPOINT,
        pairs=len(rows),
        far=FAR - 1,
        found_on=FOUND_ON,
        others=len(rows) - FOUND_ON,
        clean=f"{call.clean:.1f}",
        corrupted=f"{call.corrupted:.1f}",
        edges=len(circuit),
        possible=circuit.n_possible,
        share=f"{circuit.share:.1%}",
        wanted=WANTED,
        left=f"{float(found.left[found.own]):.2f}",
        kept_again=f"{float(again.faithfulness[0]):.2f}",
        left_again=f"{float(again.completeness[0]):.2f}",
        head=head,
        looks=f"{looks:.1f}",
        own_sign=f"{float(signs[head]):.2f}",
        other_signs=", ".join(f"{sign:.2f}" for n, sign in enumerate(signs.tolist()) if n != head),
    )
    tables = {
        "SIZES": sizes(found),
        "FOLDED": folded(circuit),
        "AGAIN": table,
    }
    for mark, frame in tables.items():
        text = text.replace(mark, markdown_table(frame))
    return text


def bracket_rows(texts: Sequence[str]) -> list[PairRow]:
    """A pair for every branch of some molecules that is closed where nothing else is open, at least
    `FAR` tokens after it was opened.

    The clean text ends before the closing bracket, which is the answer. In the corrupted one the
    opening bracket is a carbon, so that the text may end there.
    """
    found = []
    for text in texts:
        parts = [part for part in pieces(text) if part not in (BOS, EOS)]
        for start, end in _branches(parts):
            if end - start >= FAR:
                before = [BOS, *parts[:end]]
                without = [BOS, *parts[:start], INSTEAD, *parts[start + 1 : end]]
                found.append(PairRow("".join(before), "".join(without), CLOSE, EOS))
    return found


def _branches(parts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The opening and the closing bracket of each branch that is closed where nothing else is open,
    by their places among the tokens.
    """
    words = SmilesVocabulary()
    ids = np.array(words.ids("".join(parts)))
    depth = words.branch_depth(ids)
    whole = (depth == 0) & (words.open_rings(ids) == 0)
    start = 0
    for at, part in enumerate(parts):
        if part == OPEN and depth[at] == 1:
            start = at
        elif part == CLOSE and whole[at]:
            yield start, at


def strongest_head(circuit: Circuit) -> int:
    """The head whose edges out, over all iterations, have the largest score."""
    table = circuit.folded()
    heads = table[table["component"].str.contains(".attn.", regex=False)]
    return int(heads.nlargest(1, "score")["component"].item().rpartition(".")[2])


def by_loop(subject: Subject, pairs: TextPairs, circuit: Circuit, head: int) -> pd.DataFrame:
    """For each iteration: the share of the margin that the circuit loses without a head's edges of
    that iteration, the head's attention from the last token to the opening bracket and to another
    token on average, and how alike the changes are that the head and the other heads write there to
    those that they write in the first iteration.
    """
    names = [f"{place.name}.attn.{head}" for place in circuit.schedule]
    lost = losses(subject, pairs, circuit, names)
    attention = attention_to_change(subject, pairs, head)
    alike = likeness(subject, pairs, circuit)
    others = [number for number in range(alike.shape[1]) if number != head]
    return pd.DataFrame(
        {
            "loop": [place.loop for place in circuit.schedule],
            "lost without it": lost.tolist(),
            "attention to the bracket": attention[:, 0].tolist(),
            "to another token": attention[:, 1].tolist(),
            "writes as in loop 0": alike[:, head].tolist(),
            "other heads": alike[:, others].mean(1).tolist(),
        }
    )


def losses(
    subject: Subject, pairs: TextPairs, circuit: Circuit, nodes: Sequence[str]
) -> Float[Tensor, " node"]:
    """The fall of a circuit's faithfulness when all edges of one node are taken out of it."""
    without = [circuit.take(circuit.away_from(node), f"without {node}") for node in nodes]
    both = pairs.clean_batch, pairs.corrupted_batch
    kept = evaluate_circuit(subject.model, *both, [circuit, *without], pairs.metric()).faithfulness
    return kept[0] - kept[1:]


def attention_to_change(subject: Subject, pairs: TextPairs, head: int) -> Float[Tensor, "loop 2"]:
    """A head's mean attention from the last token to the one that the corrupted text changes, and
    to one of the others.
    """
    batch = pairs.clean_batch
    changed = (batch.tokens != pairs.corrupted_batch.tokens).int().argmax(1)
    rows = torch.arange(len(batch))
    _, cache = subject.model.run_with_cache(
        batch.tokens, mask=batch.mask, names_filter="**.attn.hook_pattern"
    )
    found = []
    for loop in range(checked_loops(None, subject.model.cfg.n_loops)):
        there = cache["pattern", loop, 0][rows, head, batch.readout, changed]
        elsewhere = (1 - there) / (batch.mask.sum(1) - 1)
        found.append(torch.stack([there.mean(), elsewhere.mean()]))
    return torch.stack(found)


@torch.no_grad()
def likeness(subject: Subject, pairs: TextPairs, circuit: Circuit) -> Float[Tensor, "loop head"]:
    """The mean cosine, over pairs, of the change that each head writes at the last token in an
    iteration with the one that it writes there in the first iteration.
    """
    graph = graph_with(subject.model, pairs.clean_batch, [circuit])
    batches = pairs.clean_batch, pairs.corrupted_batch
    clean, corrupted = (Written.of(subject.model, batch, graph).outputs for batch in batches)
    rows = torch.arange(clean.shape[1])
    change = (clean - corrupted)[:, rows, pairs.clean_batch.readout]
    heads = torch.stack([change[stage.writers] for stage in graph.stages if stage.heads])
    return torch.cosine_similarity(heads, heads[:1], dim=-1).mean(-1)


@torch.no_grad()
def opposites(subject: Subject) -> Float[Tensor, " head"]:
    """The cosine of what each head writes in the first iteration for an opening bracket with what
    it writes for a closing one, where it attends to nothing else.
    """
    model, block = subject.model, subject.model.schedule(1)[0].block
    tokens = torch.tensor([[model.to_single_token(word) for word in (OPEN, CLOSE)]])
    _, cache = model.run_with_cache(tokens, n_loops=1, names_filter="hook_embed")
    normed = block.ln1(cache["hook_embed"][0], NO_TAPS)  # type: ignore[operator]
    written = normed @ block.attn.W_V @ block.attn.W_O  # type: ignore[union-attr]
    return torch.cosine_similarity(written[:, 0], written[:, 1], dim=-1)


_TEXT = """
## The circuit of a language model: is a branch open?

`{checkpoint}` predicts the next token of molecules written as text. A branch that was opened by "("
must be closed by ")" after any number of tokens, and only then may the text end. {pairs} places of
the held-out molecules close a branch at least {far} tokens behind its bracket, where nothing else
is open. The clean text ends before the closing bracket; in the corrupted one the opening bracket is
a carbon, so that the text may end. The margin is the logit of ")" minus that of the end: {clean}
in the clean runs and {corrupted} in the corrupted ones. The texts have several lengths, so edges
are over all positions.

On {found_on} pairs the same search takes {edges} of {possible} edges ({share}) to keep {wanted} of
the difference; {left} is left without them. On the {others} pairs that it was not found on the
circuit keeps {kept_again}, and {left_again} is left without it.

SIZES

Folded over the iterations: the share of the circuit's score that each component writes in each
loop. Attention has done its part after half of the loops; then the MLP carries the answer on.

FOLDED

Head {head} has the largest score. What it writes for "(" is opposite to what it writes for ")":
their cosine is {own_sign} in the first loop ({other_signs} for the other heads). The bracket has at
most {looks} times the attention of another token, so the head rather counts than points. By loop:
the share of the margin that the circuit loses without the head's edges of that loop; its attention
from the last token to the bracket and to another token on average; and the mean cosine of the
change that it writes at the last token with the one that it writes there in loop 0, next to the
mean of the other heads. So the same head does its job again in the next two loops: it writes much
the same, and both times the circuit needs it, if less than the first time.

AGAIN
"""
