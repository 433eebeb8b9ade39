"""The pages that commands write are what the commands write today, and their tables say what the text says of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses import findings, replication
from analyses.claims import verdict
from analyses.configs import SourceConfig
from analyses.findings import HOPS, Pairs
from analyses.records import markdown_table
from analyses.subject import open_subject

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return Pairs.of(open_subject(SourceConfig()), HOPS)


@pytest.mark.slow
def test_claims_are_what_the_command_writes(tmp_path: Path) -> None:
    assert replication.write(tmp_path / "replication.md").read_text() == (DOCS / "replication.md").read_text()


def test_a_verdict_is_yes_partly_or_no() -> None:
    assert [verdict(shown, partly) for shown, partly in ((True, True), (True, False), (False, True), (False, False))] == [
        "yes", "yes", "partly", "no",
    ]  # fmt: skip


def test_a_table_has_two_decimals_and_no_negative_zero() -> None:
    frame = pd.DataFrame({"n": [1, 2], "x": np.array([0.999, -0.001], dtype=np.float32), "word": ["a", "b"]})
    assert markdown_table(frame).splitlines() == ["| n | x | word |", "| --- | --- | --- |", "| 1 | 1.00 | a |", "| 2 | 0.00 | b |"]


@pytest.mark.slow
def test_findings_are_what_the_command_writes(tmp_path: Path) -> None:
    assert findings.write(tmp_path / "findings.md").read_text() == (DOCS / "findings.md").read_text()


def test_paired_questions_share_no_entity_on_the_way(pairs: Pairs) -> None:
    graph, model = pairs.subject.graph, pairs.subject.model
    assert graph is not None
    assert torch.equal(pairs.clean.tokens[:, 1:], pairs.corrupted.tokens[:, 1:])
    for clean, corrupted, entities in zip(pairs.clean.tokens, pairs.corrupted.tokens, pairs.entities, strict=True):
        ways = [graph.walk("".join(model.to_str_tokens(row))) for row in (clean, corrupted)]
        assert all(ours != theirs for ours, theirs in zip(*ways, strict=True))
        assert model.to_str_tokens(entities) == ways[0][1:]


def test_the_front_moves_one_position_per_block(pairs: Pairs) -> None:
    front = findings.steps(pairs)
    assert [step.loop * 2 + step.layer for step in front] == [0, 1, 2, 3, 4]
    assert all(step.before < 0.1 for step in front)
    text = (DOCS / "findings.md").read_text()
    assert len(re.findall(r"^\| [1-5] \| [1-5] \| ", text, flags=re.M)) >= HOPS
