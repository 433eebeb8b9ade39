"""The circuit of the molecule model: its pairs, and what is measured of its heads."""

from __future__ import annotations

import re
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.hook_points import HookPoint

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.pairs_of import TextPairs, make_pairs
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.pages import molecule_circuit as page
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.circuits.scores import circuit_scores
from loopscope.interp.circuits.selection import select_circuit
from loopscope.interp.common.metrics import logit_diff
from loopscope.models.basis.tokens import Batch
from paths import DOCS
from toy import assert_close


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_subject(SourceConfig(checkpoint=page.CHECKPOINT), needs_questions=False)


@pytest.fixture(scope="module")
def pairs(subject: Subject) -> TextPairs:
    return make_pairs(subject, page.bracket_rows(["<bos>N(CCCCC)C<eos>", "<bos>CCO(CCCC=O)C<eos>"]))


@pytest.fixture(scope="module")
def circuit(subject: Subject, pairs: TextPairs) -> Circuit:
    both = pairs.clean_batch, pairs.corrupted_batch
    scores = circuit_scores(subject.model, *both, pairs.metric(), method="eap")
    return select_circuit(scores, 60)


def test_a_pair_is_a_far_bracket_where_nothing_else_is_open() -> None:
    found = page.bracket_rows(
        [
            "<bos>N(CCCCC)C1CC1(F)CO<eos>",  # the second branch is short
            "<bos>C1N(CCCCC)CC1<eos>",  # in an open ring
            "<bos>C(CCCC(C)C)C<eos>",  # a branch in a branch
            "<bos>C(c1ccccc1)C(=O)(CCCCC#N)C<eos>",  # two far ones
        ]
    )
    assert [(row.clean, row.corrupted) for row in found] == [
        ("<bos>N(CCCCC", "<bos>NCCCCCC"),
        ("<bos>C(CCCC(C)C", "<bos>CCCCCC(C)C"),
        ("<bos>C(c1ccccc1", "<bos>CCc1ccccc1"),
        ("<bos>C(c1ccccc1)C(=O)(CCCCC#N", "<bos>C(c1ccccc1)C(=O)CCCCCC#N"),
    ]
    assert {(row.answer, row.wrong) for row in found} == {(")", "<eos>")}


def test_the_pairs_metric_is_the_bracket_against_the_end(
    subject: Subject, pairs: TextPairs
) -> None:
    ids = [subject.model.to_single_token(word) for word in (")", "<eos>")]
    logits = torch.randn(2, subject.model.cfg.d_vocab, generator=torch.Generator().manual_seed(0))
    assert_close(pairs.metric()(logits), logits[:, ids[0]] - logits[:, ids[1]])
    assert_close(pairs.metric()(logits), logit_diff(*ids)(logits))


@pytest.mark.shapes
def test_a_loss_is_the_fall_of_the_circuit_without_the_nodes_edges(
    subject: Subject, pairs: TextPairs, circuit: Circuit
) -> None:
    node = next(name for name in circuit.nodes if ".attn." in name)
    edges = [
        number
        for number, edge in enumerate(circuit.edges)
        if not any(end.startswith(f"{node}.") or end == node for end in edge)
    ]
    assert 0 < len(edges) < len(circuit)
    both = pairs.clean_batch, pairs.corrupted_batch
    kept = evaluate_circuit(
        subject.model, *both, [circuit, circuit.take(edges, "")], pairs.metric()
    ).faithfulness
    absent = "loops.7.blocks.0.attn.0"
    assert absent not in circuit.nodes
    assert_close(
        page.losses(subject, pairs, circuit, [node, absent]),
        torch.stack([kept[0] - kept[1], torch.zeros(())]),
    )


def heads_values(subject: Subject, batch: Batch, loop: int) -> torch.Tensor:
    """hook_z of one iteration."""
    seen: list[torch.Tensor] = []
    name = f"loops.{loop}.blocks.0.attn.hook_z"
    with subject.model.hooks([(name, lambda value, hook: seen.append(value))]):
        subject.model(batch.tokens, mask=batch.mask)
    return seen[0]


@pytest.mark.shapes
def test_changes_by_source_sum_to_what_the_head_changes(subject: Subject, pairs: TextPairs) -> None:
    found = page.changes(subject, pairs, 1)
    ends, rows = pairs.clean_batch.readout, torch.arange(2)
    assert ends.tolist() == [7, 10]
    for loop in (0, 2):
        clean, corrupted = (
            heads_values(subject, batch, loop)[rows, ends, 1]
            for batch in (pairs.clean_batch, pairs.corrupted_batch)
        )
        weights = subject.model.blocks[0].attn.W_O[1]  # type: ignore[index, union-attr]
        assert_close(found[loop].sum(1), (clean - corrupted) @ weights)
    assert_close(found[:, 0, 8:], torch.zeros(8, 3, 64))  # padding


@pytest.mark.shapes
def test_what_is_moved_from_a_position_is_gone_without_its_value(
    subject: Subject, pairs: TextPairs
) -> None:
    batch, loop, at = pairs.clean_batch, 1, 2

    def emptied(value: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        return value.index_fill(1, torch.tensor([at]), 0.0)

    whole = heads_values(subject, batch, loop)
    with subject.model.hooks([(f"loops.{loop}.blocks.0.attn.hook_v", emptied)]):
        rest = heads_values(subject, batch, loop)
    weights = subject.model.blocks[0].attn.W_O[3]  # type: ignore[index, union-attr]
    missing = (whole - rest)[torch.arange(2), batch.readout, 3] @ weights
    assert_close(page.moved(subject, batch, 3)[loop, :, at], missing)


@pytest.mark.shapes
def test_heads_alone_write_what_a_text_of_one_token_makes_them_write(subject: Subject) -> None:
    model, found = subject.model, page.written_alone(subject)
    weights = model.blocks[0].attn.W_O  # type: ignore[index, union-attr]
    tokens = [model.to_single_token(word) for word in ("(", ")", "c")]
    for token in tokens:
        one = torch.tensor([[token]])
        z = heads_values(subject, Batch(one, torch.ones_like(one), torch.tensor([0])), 0)
        assert_close(found[:, token], torch.einsum("hd,hdm->hm", z[0, 0], weights))
    table = page.by_head(subject).set_index("head")
    first, second, _ = found[2, tokens].double()
    norms = first.norm(), second.norm()
    assert table["cosine of the brackets"][2] == pytest.approx(
        float(first @ second / norms[0] / norms[1])
    )
    assert table["norm for the opening one"][2] == pytest.approx(float(norms[0]))
    assert table["norm for the closing one"][2] == pytest.approx(float(norms[1]))
    others = [found[2, n].norm() for n in range(34) if n not in tokens[:2]]
    assert table["largest norm for another token"][2] == pytest.approx(float(max(others)))


@pytest.mark.shapes
def test_outputs_along_the_opening_brackets_direction_are_told_by_depth(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["<bos>CC(C(C(C)C)C)C<eos>", "<bos>N(CC(C)(C(=O)(C(C))))<eos>"]
    depths = [
        [0, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 2, 2, 1, 2, 2, 3, 3, 3, 2, 3, 3, 4, 4, 3, 2, 1, 0, 0],
    ]
    monkeypatch.setitem(subject.card, "held_out_strings", texts)
    batch = subject.batch(texts)
    along = page.along_opening(subject, batch)
    weights = subject.model.blocks[0].attn.W_O  # type: ignore[index, union-attr]
    opening = page.written_alone(subject)[3, subject.model.to_single_token("(")]
    written = heads_values(subject, batch, 2)[:, :, 3] @ weights[3]
    assert_close(along[2, 3], written @ (opening / opening.norm()))
    row = page.by_depth(subject, 3).iloc[2]
    depth = np.concatenate(depths)
    by_head = [
        np.concatenate([v[: len(d)] for v, d in zip(rows, depths, strict=True)])
        for rows in along[2]
    ]
    for at in range(4):
        assert row[f"depth {at}"] == pytest.approx(by_head[3][depth == at].mean())
    alike = [np.corrcoef(depth, values)[0, 1] for values in by_head]
    assert row["correlation"] == pytest.approx(alike[3])
    assert row["another head"] == pytest.approx(max(map(abs, alike[:3])))


@pytest.mark.shapes
def test_the_table_by_loop_measures_the_change_and_what_the_bracket_gives_to_it(
    subject: Subject, pairs: TextPairs, circuit: Circuit
) -> None:
    table = page.by_loop(subject, pairs, circuit, 3)
    by_source = page.changes(subject, pairs, 3).double()
    first, here = by_source[0].sum(1), by_source[1].sum(1)
    sizes = here.norm(dim=-1)
    shares = [
        float(by_source[1, row, at] @ here[row] / sizes[row] ** 2)
        for row, at in enumerate((2, 4))  # where the brackets are
    ]
    alike = (first * here).sum(-1) / first.norm(dim=-1) / sizes
    row = table.iloc[1]
    assert row["norm of its change"] == pytest.approx(float(sizes.mean()))
    assert row["from the bracket"] == pytest.approx(sum(shares) / 2)
    assert row["as in loop 0"] == pytest.approx(float(alike.mean()))
    lost = page.losses(
        subject, pairs, circuit, [f"loops.1.blocks.0.attn.{head}" for head in range(4)]
    )
    assert row["lost without it"] == pytest.approx(float(lost[3]))
    assert row["without another head"] == pytest.approx(float(lost[:3].max()))


def test_the_strongest_head_has_the_largest_sum_of_scores(circuit: Circuit) -> None:
    sums = [
        sum(
            abs(score)
            for edge, score in zip(circuit.edges, circuit.scores, strict=True)
            if edge.writer.endswith(f".attn.{head}")
        )
        for head in range(4)
    ]
    assert page.strongest_head(circuit) == sums.index(max(sums))


def test_the_sentences_of_the_page_say_what_its_tables_say() -> None:
    text = (DOCS / "findings.md").read_text()
    text = text[text.index("## The circuit of a language model") :]
    found, folded, heads, depths, loops = tables_of(text)
    head = int(re.search(r"Head (\d) has the largest score", text)[1])  # type: ignore[index]
    # "Attention has done its part after half of the loops; then the MLP carries the answer on"
    late = [f"loop {loop}" for loop in range(4, 8)]
    attention = folded["component"].str.contains(".attn.", regex=False)
    assert (folded.loc[attention, late] == 0).all(axis=None)
    assert (folded.loc[~attention, late] >= 0.05).all(axis=None)
    # "opposite, as in other heads too; only this head writes far more than for any other token"
    assert (heads["cosine of the brackets"] < -0.6).sum() > 1
    assert heads["cosine of the brackets"].idxmin() == head
    brackets = heads[["norm for the opening one", "norm for the closing one"]].min(axis=1)
    ratio = brackets / heads["largest norm for another token"]
    assert ratio[head] > 1.5
    assert ratio.drop(head).max() < 1.2
    # "In the first loops its output grows with the number of open branches"
    first = depths[:3]
    means = first[[f"depth {at}" for at in range(4)]]
    assert (means.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)
    assert (first["correlation"] > first["another head"] + 0.1).all()
    # "needs this head in the first three loops, most of all in the first, and hardly any other"
    lost = loops["lost without it"]
    assert lost[0] > 2 * lost[1:].max()
    assert lost[:3].min() > 0.1 > 0.05 > lost[3:].max()
    assert loops["without another head"].max() < 0.05
    # "In loop 0 it reads the bracket itself. In the next two it writes more, from elsewhere"
    assert loops["from the bracket"][0] > 0.9
    assert (loops["from the bracket"][1:3] < 0.5).all()
    assert (loops["norm of its change"][1:3] > 1.5 * loops["norm of its change"][0]).all()
    assert (loops["as in loop 0"][1:3] > 0.5).all()
    # "In the last loops it writes against the change of loop 0, and nothing is lost without it"
    assert (loops["as in loop 0"][5:] < -0.2).all()
    assert (lost[5:] == 0).all()
    # "the circuit keeps the share on other pairs, and nothing is left without it"
    assert found["left without them"].iloc[1:].max() == 0


def tables_of(text: str) -> list[pd.DataFrame]:
    """The tables of a Markdown text."""
    frames = []
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        lines = [re.sub(r" *\| *", "|", line).strip("|") for line in table.splitlines()]
        frames.append(pd.read_csv(StringIO("\n".join(lines[:1] + lines[2:])), sep="|"))
    return frames
