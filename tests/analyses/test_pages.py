"""The pages that commands write are what the commands write today, and their tables say what the
text says of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from loopscope.analyses.common.claims import verdict
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.records import markdown_table
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.pages import findings, replication
from loopscope.analyses.pages.findings import HOPS, Pairs
from loopscope.models.core.registry import FAMILIES
from paths import DOCS
from same_page import assert_same_page


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return Pairs.of(open_subject(SourceConfig()), HOPS)


def test_pages_may_differ_by_rounding_and_by_no_word_or_number() -> None:
    shipped = "| r2 | 0.94 | at r = 2 | 2,250 updates |"
    assert_same_page(shipped.replace("0.94", "0.92"), shipped)
    for other in ("| r4 | 0.94", "| r2 | 0.89", "| r2 | 1.94"):
        with pytest.raises(AssertionError):
            assert_same_page(shipped.replace("| r2 | 0.94", other), shipped)
    with pytest.raises(AssertionError):
        assert_same_page(shipped.replace("updates", "steps"), shipped)
    with pytest.raises(AssertionError):
        assert_same_page(shipped.replace("2,250", "2,300"), shipped)


@pytest.mark.slow
def test_claims_are_what_the_command_writes(tmp_path: Path) -> None:
    path = replication.write(tmp_path / "replication.md")
    assert_same_page(path.read_text(), (DOCS / "replication.md").read_text())


@pytest.fixture(scope="module")
def families_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Written by the command itself, where shapes are not checked, which takes several times
    longer.
    """
    path = tmp_path_factory.mktemp("pages") / "families.md"
    subprocess.run(
        [sys.executable, "-m", "loopscope", "families", "--out", str(path)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return path.read_text()


@pytest.mark.slow
def test_families_are_what_the_command_writes(families_page: str) -> None:
    assert_same_page(families_page, (DOCS / "families.md").read_text())


@pytest.mark.slow
def test_every_family_runs_or_refuses_with_a_reason(families_page: str) -> None:
    lines = [
        line.strip("| ").split(" | ") for line in families_page.splitlines() if line.startswith("|")
    ]
    facts = {line[0]: line[1:] for line in lines[2:] if len(line) == 7}
    header = next(line for line in lines if "`gate_logits`" in line)
    runs = {
        line[0]: dict(zip(header[1:], line[1:], strict=True))
        for line in lines
        if len(line) == len(header) and line[0] in FAMILIES
    }
    assert set(facts) == set(runs) == set(FAMILIES)
    assert {family for family, row in runs.items() if row["`gate_logits`"] == "yes"} == {
        "ouro",
        "melt",
    }
    assert {family for family, row in runs.items() if row["`generate`"] == "no"} == {
        "albert",
        "trm",
        "hrm",
    }
    additive = {family for family, row in facts.items() if row[2] == "yes"}
    assert {
        family for family, row in runs.items() if row["`direct_logit_attribution`"] == "yes"
    } == additive
    everywhere = next(
        line for line in families_page.splitlines() if line.startswith("On every family")
    )
    for method in (
        "logit_lens",
        "readout_lens",
        "activation_patch",
        "attribution_patch",
        "gradients",
        "dynamics",
        "untied",
    ):
        assert f"`{method}`" in everywhere
    reasons = families_page.partition("## Why not")[2].strip().splitlines()
    for method in header[1:]:
        for family in FAMILIES:
            said = [
                line
                for line in reasons
                if method in line.partition(" on ")[0]
                and re.search(rf"\b{family}\b", line.partition(":")[0])
            ]
            assert len(said) == (runs[family][method] == "no"), (method, family)


def test_a_verdict_is_yes_partly_or_no() -> None:
    assert [
        verdict(shown, partly)
        for shown, partly in ((True, True), (True, False), (False, True), (False, False))
    ] == ["yes", "yes", "partly", "no"]


def test_a_table_has_two_decimals_and_no_negative_zero() -> None:
    frame = pd.DataFrame(
        {"n": [1, 2], "x": np.array([0.999, -0.001], dtype=np.float32), "word": ["a", "b"]}
    )
    assert markdown_table(frame).splitlines() == [
        "| n | x | word |",
        "| --- | --- | --- |",
        "| 1 | 1.00 | a |",
        "| 2 | 0.00 | b |",
    ]


@pytest.mark.slow
def test_findings_are_what_the_command_writes(tmp_path: Path) -> None:
    path = findings.write(tmp_path / "findings.md")
    assert_same_page(path.read_text(), (DOCS / "findings.md").read_text())


def test_paired_questions_share_no_entity_on_the_way(pairs: Pairs) -> None:
    graph, model = pairs.subject.graph, pairs.subject.model
    assert graph is not None
    assert torch.equal(pairs.clean.tokens[:, 1:], pairs.corrupted.tokens[:, 1:])
    for clean, corrupted, entities in zip(
        pairs.clean.tokens, pairs.corrupted.tokens, pairs.entities, strict=True
    ):
        ways = [graph.walk("".join(model.to_str_tokens(row))) for row in (clean, corrupted)]
        assert all(ours != theirs for ours, theirs in zip(*ways, strict=True))
        assert model.to_str_tokens(entities) == ways[0][1:]


def test_the_front_moves_one_position_per_block(pairs: Pairs) -> None:
    front = findings.steps(pairs)
    assert [step.loop * 2 + step.layer for step in front] == [0, 1, 2, 3, 4]
    assert all(step.before < 0.1 for step in front)
    text = (DOCS / "findings.md").read_text()
    assert len(re.findall(r"^\| [1-5] \| [1-5] \| [0-2] \| ", text, flags=re.M)) >= HOPS
