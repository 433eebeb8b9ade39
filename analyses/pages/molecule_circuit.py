"""The circuit of a molecule model: how it knows that a branch is open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.record import Circuit
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.hooks import NO_TAPS
from loopscope.models.core.state import checked_loops
from loopscope.tasks.smiles import BOS, EOS, SmilesVocabulary, pieces

CHECKPOINT = "mini/smiles"
OPEN, CLOSE, INSTEAD = "(", ")", "C"
FAR, FOUND_ON, DEEPEST = 6, 48, 3


def section() -> str:
    """The section of the page of findings."""
    subject = open_subject(SourceConfig(checkpoint=CHECKPOINT), needs_questions=False)
    rows = bracket_rows(subject.card["held_out_strings"])
    seen, others = (make_pairs(subject, part) for part in (rows[:FOUND_ON], rows[FOUND_ON:]))
    found = measure(subject, seen, CircuitConfig(wanted=WANTED))
    circuit, call = found.circuit, found.circuit.call
    again = evaluate_circuit(
        subject.model, others.clean_batch, others.corrupted_batch, circuit, others.metric()
    )
    head = strongest_head(circuit)
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
    )
    tables = {
        "SIZES": sizes(found),
        "FOLDED": folded(circuit),
        "BRACKETS": by_head(subject),
        "DEPTHS": by_depth(subject, head),
        "LOOPS": by_loop(subject, others, circuit, head),
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


def by_head(subject: Subject) -> pd.DataFrame:
    """For each head: the cosine of what it writes for an opening bracket alone with what it writes
    for a closing one, the norms of the two, and the largest norm for another token.
    """
    written = written_alone(subject)
    size = written.norm(dim=-1)
    opening, closing = (subject.model.to_single_token(word) for word in (OPEN, CLOSE))
    rest = [token for token in range(size.shape[1]) if token not in (opening, closing)]
    columns = {
        "cosine of the brackets": torch.cosine_similarity(
            written[:, opening], written[:, closing], dim=-1
        ),
        "norm for the opening one": size[:, opening],
        "norm for the closing one": size[:, closing],
        "largest norm for another token": size[:, rest].amax(1),
    }
    frame = pd.DataFrame({name: column.tolist() for name, column in columns.items()})
    return frame.rename_axis("head").reset_index()


@torch.no_grad()
def written_alone(subject: Subject) -> Float[Tensor, "head token d_model"]:
    """The output of each head in the first iteration for each token of the vocabulary, where the
    head attends to nothing else.
    """
    model = subject.model
    tokens = torch.arange(model.cfg.d_vocab)[:, None]
    _, cache = model.run_with_cache(tokens, n_loops=1, names_filter="hook_embed")
    block: Any = model.schedule(1)[0].block
    normed = block.ln1(cache["hook_embed"], NO_TAPS)[:, 0]
    written: Tensor = normed @ block.attn.W_V @ block.attn.W_O
    return written


def by_depth(subject: Subject, head: int) -> pd.DataFrame:
    """For each iteration: the mean of a head's output along what it writes for an opening bracket
    alone, by how many branches are open at a token of the held-out molecules; its correlation with
    that number; and the largest correlation, without its sign, of another head.
    """
    batch = subject.batch(subject.card["held_out_strings"])
    real = batch.mask.bool()
    depth = SmilesVocabulary().branch_depth(batch.tokens.numpy())[real.numpy()]
    rows = []
    for loop, along in enumerate(along_opening(subject, batch)):
        frame = pd.DataFrame(along[:, real].T.numpy().astype(float)).assign(depth=depth)
        means = frame.groupby("depth")[head].mean()
        alike = frame.corr()["depth"].drop("depth")
        values = {f"depth {at}": means[at] for at in range(DEEPEST + 1)}
        most = alike.drop(head).abs().max()
        rows.append({"loop": loop, **values, "correlation": alike[head], "another head": most})
    return pd.DataFrame(rows)


@torch.no_grad()
def along_opening(subject: Subject, batch: Batch) -> Float[Tensor, "loop head batch pos"]:
    """The output of each head along the direction that it writes for an opening bracket alone."""
    model = subject.model
    direction = written_alone(subject)[:, model.to_single_token(OPEN)]
    unit = direction / direction.norm(dim=-1, keepdim=True)
    block: Any = model.schedule(1)[0].block
    probe = torch.einsum("hdm, hm -> hd", block.attn.W_O, unit)
    _, cache = model.run_with_cache(batch.tokens, mask=batch.mask, names_filter="**.attn.hook_z")
    outputs = [cache["z", loop, 0] for loop in range(checked_loops(None, model.cfg.n_loops))]
    return torch.einsum("lbphd, hd -> lhbp", torch.stack(outputs), probe)


def by_loop(subject: Subject, pairs: TextPairs, circuit: Circuit, head: int) -> pd.DataFrame:
    """For each iteration: the share of the margin that the circuit loses without a head's edges of
    that iteration, and the most that it loses without another head's; the mean norm of the change
    that the head writes at the last token, the mean share of it that comes from the bracket's
    position, and its mean cosine with the change of the first iteration.
    """
    numbers = range(subject.model.cfg.n_heads)
    names = [f"{place.name}.attn.{number}" for number in numbers for place in circuit.schedule]
    lost = losses(subject, pairs, circuit, names).view(len(numbers), -1)
    sources = changes(subject, pairs, head)
    whole = sources.sum(2)
    size = whole.norm(dim=-1)
    bracket = (pairs.clean_batch.tokens != pairs.corrupted_batch.tokens).int().argmax(1)
    there = sources[:, torch.arange(len(bracket)), bracket]
    columns = {
        "lost without it": lost[head],
        "without another head": lost[[number for number in numbers if number != head]].amax(0),
        "norm of its change": size.mean(1),
        "from the bracket": ((there * whole).sum(-1) / size**2).mean(1),
        "as in loop 0": torch.cosine_similarity(whole, whole[:1], dim=-1).mean(1),
    }
    frame = pd.DataFrame({name: column.tolist() for name, column in columns.items()})
    return frame.rename_axis("loop").reset_index()


def losses(
    subject: Subject, pairs: TextPairs, circuit: Circuit, nodes: Sequence[str]
) -> Float[Tensor, " node"]:
    """The fall of a circuit's faithfulness when all edges of one node are taken out of it."""
    without = [circuit.take(circuit.away_from(node), f"without {node}") for node in nodes]
    both = pairs.clean_batch, pairs.corrupted_batch
    kept = evaluate_circuit(subject.model, *both, [circuit, *without], pairs.metric()).faithfulness
    return kept[0] - kept[1:]


def changes(
    subject: Subject, pairs: TextPairs, head: int
) -> Float[Tensor, "loop pair pos d_model"]:
    """The change that a head writes at the last token, from the corrupted run to the clean one, by
    the position that it comes from.
    """
    clean, corrupted = (
        moved(subject, batch, head) for batch in (pairs.clean_batch, pairs.corrupted_batch)
    )
    return clean - corrupted


@torch.no_grad()
def moved(subject: Subject, batch: Batch, head: int) -> Float[Tensor, "loop batch pos d_model"]:
    """The part of a head's output at the last token that comes from each position."""
    model = subject.model
    sites = ["**.attn.hook_pattern", "**.attn.hook_v"]
    _, cache = model.run_with_cache(batch.tokens, mask=batch.mask, names_filter=sites)
    loops = range(checked_loops(None, model.cfg.n_loops))
    rows = torch.arange(len(batch))
    weights = torch.stack([cache["pattern", loop, 0][rows, head, batch.readout] for loop in loops])
    values = torch.stack([cache["v", loop, 0][:, :, head] for loop in loops])
    block: Any = model.schedule(1)[0].block
    written: Tensor = (weights[..., None] * values) @ block.attn.W_O[head]
    return written


_TEXT = """
## The circuit of a language model: is a branch open?

`{checkpoint}` predicts the next token of molecules written as text. In this notation "(" opens a
branch. The branch must be closed by ")" after any number of tokens, and only then may the text end.
The question is how the model remembers that a branch is open.

The held-out molecules have {pairs} places where a branch is closed at least {far} tokens after its
bracket and nothing else is open. The clean text ends just before the closing bracket. In the
corrupted text the opening bracket is replaced by a carbon, so that the text may end. The margin is
the logit of ")" minus the logit of the end: {clean} in the clean runs and {corrupted} in the
corrupted ones. The texts have several lengths, so an edge is taken over all positions.

On {found_on} pairs the same search takes {edges} of {possible} edges ({share}) to keep {wanted} of
the difference, and {left} is left without these edges. On the {others} other pairs, which the
search did not see, the circuit keeps {kept_again}, and {left_again} is left without it.

SIZES

The next table shows the share of the circuit's score that each component writes in each loop.
Attention has done its part after half of the loops; then the MLP carries the answer on.

FOLDED

Head {head} has the largest score. What does it write? Each head is given the single token "(" or
the single token ")", and writes something in loop 0. What head {head} writes for the two is
opposite, as in other heads too; only head {head} writes far more for both than for any other token.
The columns are the cosine between the two outputs, the norm of each, and the largest norm for
another token.

BRACKETS

In the first loops the head's output grows with the number of open branches. The table takes the
head's output along the direction that it writes for "(", as a mean over all tokens of the held-out
molecules with the same number of open branches (*depth*). *Correlation* is that of this output with
the depth. *Another head* is the largest correlation (without its sign) of any other head, each
along the direction that it writes for "(" itself.

DEPTHS

On the {others} other pairs the last table shows for each loop:

* *lost without it*: the share of the margin that the circuit loses without this head's edges of
  that loop, and *without another head*: the most that it loses without the edges of any other head;
* *norm of its change*: how much the head's output at the last token differs between the clean and
  the corrupted text;
* *from the bracket*: the share of this change that the head reads at the position of the bracket;
* *as in loop 0*: the cosine between this change and that of loop 0.

LOOPS

So the circuit needs this head in the first three loops, most of all in the first, and hardly any
other head. In loop 0 it reads the bracket itself. In the next two loops it writes more, in a
similar direction, but from elsewhere: most of the change comes from other tokens, whose states hold
a trace of the bracket by then. In the last loops it writes against the change of loop 0, and
nothing is lost without it.
"""
