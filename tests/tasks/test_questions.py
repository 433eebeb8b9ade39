"""Questions in the released file format; worked examples."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from loopscope.checkpoints.locate import SHIPPED
from loopscope.tasks.questions import Question, by_hops, read_questions

TRAINED = SHIPPED / "ltg_trained"


def item(text: str, answer: str, kind: str = "") -> dict[str, Any]:
    return {"input_text": text, "target_text": f"{text}{answer}</a>", "type": kind}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "test.json"


# One question


@pytest.mark.parametrize(
    ("text", "hops"),
    [("<e_12>", 0), ("<e_12><r_3>", 1), ("<e_12><r_3><r_7>", 2), ("<e_1>" + "<r_10>" * 40, 40)],
)
def test_a_question_has_its_text_answer_and_hops(text: str, hops: int) -> None:
    assert Question.from_item(item(text, "<e_99>")) == Question(text, "<e_99>", hops)


@pytest.mark.parametrize("kind", ["3hop_train", "atomic_facts", "", "17hop_test"])
def test_hops_are_counted_and_not_read_from_the_type(kind: str) -> None:
    assert Question.from_item(item("<e_1><r_2><r_3>", "<e_4>", kind)).hops == 2


def test_the_type_is_kept_and_does_not_count() -> None:
    question = Question.from_item(item("<e_1><r_2>", "<e_4>", "ood_atomic"))
    assert question.kind == "ood_atomic"
    assert question == Question("<e_1><r_2>", "<e_4>", 1)


def test_the_type_may_be_absent() -> None:
    assert Question.from_item(
        {"input_text": "<e_1><r_2>", "target_text": "<e_1><r_2><e_3></a>"}
    ) == Question("<e_1><r_2>", "<e_3>", 1)


def test_a_target_without_end_mark_gives_its_last_token() -> None:
    assert (
        Question.from_item({"input_text": "<e_1><r_2>", "target_text": "<e_1><r_2><e_3>"}).answer
        == "<e_3>"
    )


def test_text_after_the_last_token_of_a_target_is_no_answer() -> None:
    assert (
        Question.from_item(
            {"input_text": "<e_1><r_2>", "target_text": "<e_1><r_2><e_3>< a b"}
        ).answer
        == "<e_3>"
    )


def test_a_question_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError, match="hops"):
        Question("<e_1>", "<e_2>", 0).hops = 3  # type: ignore[misc]


# A file of questions


def test_questions_are_read_in_the_files_order(file: Path) -> None:
    texts = ["<e_2><r_0>", "<e_0><r_1><r_0>", "<e_1><r_1>"]
    file.write_text(json.dumps([item(text, "<e_0>") for text in texts]))
    for path in (file, str(file)):
        assert [question.text for question in read_questions(path)] == texts


def test_an_empty_file_of_questions_is_refused(file: Path) -> None:
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"test\.json must be a JSON list .*: got an empty list"):
        read_questions(file)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "questions",
        '[{"input_text": "<e_1>"',
        "7",
        "null",
        "[7]",
        '["<e_1><r_2>"]',
        '{"input_text": "<e_1>", "target_text": "<e_1><e_2></a>"}',
        '[{"input_text": "<e_1><r_2>"}]',
        '[{"target_text": "<e_1><r_2><e_3></a>"}]',
        '[{"input_text": "<e_1><r_2>", "target_text": "</a>"}]',
        '[{"input_text": "<e_1><r_2>", "target_text": ""}]',
    ],
)
def test_a_file_that_holds_no_questions_is_named(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(
        ValueError,
        match=r"test\.json must be a JSON list of items with 'input_text' and 'target_text': ",
    ):
        read_questions(file)


def test_questions_that_are_not_there_are_an_error(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"test\.json"):
        read_questions(file)


def test_by_hops_is_in_order_of_hops_and_then_of_the_file() -> None:
    names = [("<e_0>", 3), ("<e_1>", 1), ("<e_2>", 2), ("<e_3>", 1), ("<e_4>", 3)]
    grouped = by_hops([Question(text, "<e_9>", hops) for text, hops in names])
    assert list(grouped) == [1, 2, 3]
    assert {hops: [question.text for question in group] for hops, group in grouped.items()} == {
        1: ["<e_1>", "<e_3>"],
        2: ["<e_2>"],
        3: ["<e_0>", "<e_4>"],
    }


def test_by_hops_of_nothing_is_empty() -> None:
    assert by_hops([]) == {}


# The shipped questions


@pytest.fixture(scope="module")
def trained() -> list[Question]:
    return read_questions(TRAINED / "test.json")


def test_the_shipped_questions_have_as_many_tokens_as_hops_and_a_head(
    trained: list[Question],
) -> None:
    assert all(question.text.count("<") == question.hops + 1 for question in trained)
    counts = Counter(question.hops for question in trained)
    assert {hops: len(group) for hops, group in by_hops(trained).items()} == counts
    assert set(counts) >= set(range(1, 15))
