"""The pages that commands write are what the commands write today, and their tables say what the
text says of them.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from loopscope.analyses import trials
from loopscope.analyses.common.claims import verdict
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.records import markdown_table
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.pages import families, findings, replication
from loopscope.analyses.pages.entity_path import HOPS, Pairs, steps
from loopscope.models.core.registry import FAMILIES
from paths import DOCS
from shipped_pages import PAGE, assert_same_page, shipped


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


def test_the_page_of_families_is_what_its_own_table_and_facts_make() -> None:
    """What the table says is compared with a run of every method in tests/shapes."""
    assert families.page(shipped()) == PAGE.read_text()


def test_every_family_runs_or_refuses_with_a_reason() -> None:
    support = shipped()
    runs = support.methods.set_index("method")
    assert set(runs.index) == set(trials.methods())
    assert set(runs.columns) == set(support.facts["family"]) == set(FAMILIES)
    assert {key for key, said in runs.stack().items() if said == "no"} == set(support.reasons)
    of = {method: set(row.index[row == "yes"]) for method, row in runs.iterrows()}
    assert of["gate_logits"] == {"ouro", "melt"}
    assert set(FAMILIES) - of["generate"] == {"albert", "trm", "hrm"}
    additive = support.facts.set_index("family")["additive_residual"]
    assert of["direct_logit_attribution"] == set(additive.index[additive == "yes"])
    for method in (
        "logit_lens",
        "readout_lens",
        "activation_patch",
        "attribution_patch",
        "gradients",
        "dynamics",
        "untied",
    ):
        assert of[method] == set(FAMILIES)


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
    front = steps(pairs)
    assert [step.loop * 2 + step.layer for step in front] == [0, 1, 2, 3, 4]
    assert all(step.before < 0.1 for step in front)
    text = (DOCS / "findings.md").read_text()
    assert len(re.findall(r"^\| [1-5] \| [1-5] \| [0-2] \| ", text, flags=re.M)) >= HOPS
