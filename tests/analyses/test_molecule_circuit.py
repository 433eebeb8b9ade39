"""The circuit of the molecule model: its pairs, and what is measured of its heads."""

from __future__ import annotations

import pytest
import torch

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.pairs_of import TextPairs, make_pairs
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.pages import molecule_circuit as page
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.circuits.scores import circuit_scores
from loopscope.interp.circuits.selection import select_circuit
from loopscope.interp.common.metrics import logit_diff
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


@pytest.mark.shapes
def test_attention_to_all_tokens_is_one(subject: Subject, pairs: TextPairs) -> None:
    found = page.attention_to_change(subject, pairs, 3)
    pattern: list[torch.Tensor] = []
    name = "loops.2.blocks.0.attn.hook_pattern"
    with subject.model.hooks([(name, lambda value, hook: pattern.append(value))]):
        subject.model(pairs.clean_batch.tokens, mask=pairs.clean_batch.mask)
    first, second = (pattern[0][row, 3, end] for row, end in ((0, 7), (1, 10)))
    assert pairs.clean_batch.readout.tolist() == [7, 10]
    assert_close(found[2, 0], (first[2] + second[4]) / 2)
    assert_close(found[2, 1], ((1 - first[2]) / 7 + (1 - second[4]) / 10) / 2)


@pytest.mark.shapes
def test_a_heads_change_is_like_itself_in_the_first_loop(
    subject: Subject, pairs: TextPairs, circuit: Circuit
) -> None:
    alike = page.likeness(subject, pairs, circuit)
    assert_close(alike[0], torch.ones(4))
    changes = []
    for loop in (0, 2):
        name = f"loops.{loop}.blocks.0.attn.hook_z"
        seen: list[torch.Tensor] = []
        for batch in (pairs.clean_batch, pairs.corrupted_batch):
            with subject.model.hooks([(name, lambda value, hook, seen=seen: seen.append(value))]):
                subject.model(batch.tokens, mask=batch.mask)
        z = (seen[0] - seen[1])[torch.arange(2), pairs.clean_batch.readout, 1]
        changes.append(z @ subject.model.blocks[0].attn.W_O[1])  # type: ignore[index, union-attr]
    expected = torch.cosine_similarity(*changes, dim=-1).mean()
    assert_close(alike[2, 1], expected)


@pytest.mark.shapes
def test_signs_are_cosines_of_what_heads_write_for_one_bracket_alone(subject: Subject) -> None:
    model, written = subject.model, []
    for word in ("(", ")"):
        tokens = torch.tensor([[model.to_single_token(word)]])
        seen: list[torch.Tensor] = []
        with model.hooks(
            [("loops.0.blocks.0.attn.hook_z", lambda v, hook, seen=seen: seen.append(v))]
        ):
            model(tokens)  # a single token attends to itself alone
        weights = model.blocks[0].attn.W_O  # type: ignore[index, union-attr]
        written.append(torch.einsum("hd,hdm->hm", seen[0][0, 0], weights))
    assert_close(page.opposites(subject), torch.cosine_similarity(*written, dim=-1))


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
