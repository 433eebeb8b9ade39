"""The page of the atlas: which questions, how one is told, and what the command writes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from loopscope.analyses.atlas.page import MEASURES, Answer, answers, chosen, page, section
from loopscope.analyses.atlas.rules import QUESTIONS
from loopscope.analyses.cli import main
from paths import DOCS
from shipped_pages import assert_same_page

CHEAP = ("cycle", "latent_chain", "realignment")
SHIPPED = (DOCS / "atlas.md").read_text()
(VOTE,) = chosen(["vote"])
GAIN, CONTROL = (bound.number for bound in VOTE.bounds)


def told(question: str) -> str:
    """The section of a question on the shipped page."""
    name = question.replace("_", " ")
    (found,) = [
        part for part in SHIPPED.split("\n## ") if part.split("\n")[0].endswith(f": {name}")
    ]
    return f"## {found.strip()}"


def test_papers_are_chosen_by_number_or_by_name() -> None:
    assert chosen([]) == QUESTIONS
    assert [q.name for q in chosen(["2601.10679", "cycle"])] == [
        "cycle",
        "trivial_puzzles",
        "spurious_ends",
        "vote",
    ]
    with pytest.raises(ValueError, match=r"no paper or question 'DiscoLoop'; it has 2604\.07822, "):
        chosen(["DiscoLoop"])


def test_every_question_has_a_measurement() -> None:
    assert list(MEASURES) == [question.name for question in QUESTIONS]


def test_a_section_tells_rule_number_verdict_and_control() -> None:
    answer = Answer(VOTE, {"one run": 0.5, GAIN: 0.25, CONTROL: 0.03125})
    assert answer.claim.verdict == "partly"
    assert answer.claim.found == f"one run: 0.5; {GAIN}: 0.25; {CONTROL}: 0.0312"
    text = section(answer)
    assert "**Partly.**" in text
    assert f"| {GAIN} | 0.25 | at least 0.02 (partly: 0.005) | yes |  |" in text
    assert f"| {CONTROL} | 0.0312 | at most 0.02 (partly: 0.05) | partly | control |" in text
    assert "Why not" not in text


def test_a_claim_that_is_not_shown_says_what_it_missed() -> None:
    answer = Answer(replace(VOTE, note="Told why."), {GAIN: math.nan, CONTROL: 0.0})
    assert f"Why not: {GAIN} is nan, where at least 0.005 was needed. Told why." in section(answer)


def test_a_page_counts_papers_and_not_claims() -> None:
    found = [
        Answer(question, dict.fromkeys((bound.number for bound in question.bounds), math.nan))
        for question in chosen(["2601.10679", "cycle"])
    ]
    found[-1] = Answer(VOTE, {GAIN: 1.0, CONTROL: 0.0})
    text = page(found)
    assert "1 of 2 papers have a claim that is shown, or partly." in text
    assert text.count("\n## ") == 4


def test_the_shipped_page_tells_every_question_and_its_controls() -> None:
    assert SHIPPED.count("\n## ") == len(QUESTIONS)
    for question in QUESTIONS:
        lines = told(question.name).splitlines()
        numbers = {line.split(" | ")[0].removeprefix("| "): line for line in lines if "|" in line}
        assert {bound.number for bound in question.bounds} <= set(numbers)
        for control in question.control:
            assert numbers[control].endswith("| control |")
    shown = re.search(r"^(\d+) of 12 papers", SHIPPED, flags=re.M)
    assert shown is not None
    assert int(shown[1]) >= 9


def test_the_command_refuses_a_paper_that_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["atlas", "--papers", "9999.00000", "--out", f"{tmp_path}/atlas.md"])
    assert "the atlas has no paper or question '9999.00000'" in capsys.readouterr().err


@pytest.mark.shapes
def test_a_measurement_gives_every_number_of_its_rule() -> None:
    (question,) = chosen(["latent_chain"])
    numbers = MEASURES["latent_chain"]()
    assert set(numbers) == {bound.number for bound in question.bounds}
    assert all(0 <= value <= 1 for value in numbers.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEAP)
def test_numbers_are_what_the_command_writes(name: str) -> None:
    (answer,) = answers(chosen([name]))
    assert_same_page(section(answer), told(name))
