"""Questions and numbers of the explorer, against the slow and obvious."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from explored import A_TEXT, around, two_questions
from language_toys import CAT, DOG, ouro_folder
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import Subject, answer_logits, open_subject
from loopscope.analyses.explorer.model import (
    heads_of,
    lens_table,
    loops_of,
    margins,
    patch_cell,
    patch_grid,
)
from loopscope.analyses.explorer.questions import (
    MAX_TOKENS,
    SENTENCES,
    Query,
    ask,
    ask_beside,
    beginning,
    contrast,
    hint,
)
from loopscope.analyses.explorer.sentences import top_table
from loopscope.interp.common.metrics import margin
from loopscope.models.core.base import LoopedModel
from toy import HEADS, LOOPS, ShortEnding, odd_one, toy

MOST = 6  # more iterations than the toy records


@pytest.fixture
def subject() -> Subject:
    return around(toy())


@pytest.fixture
def pair(subject: Subject) -> tuple[Query, Query]:
    return two_questions(subject)


@pytest.fixture(scope="module")
def shipped() -> Subject:
    return open_subject(SourceConfig())


# Questions


def test_a_question_has_the_answer_that_is_known_else_the_models_own(subject: Subject) -> None:
    known = ask(subject, "  <w_1> <w_2><w_3> ", LOOPS)
    assert (known.text, known.answer, known.known, known.answer_id) == (
        "<w_1><w_2><w_3>",
        "<w_9>",
        True,
        9,
    )
    assert known.columns == ["0 <w_1>", "1 <w_2>", "2 <w_3>", "3 <pad>"]
    own = ask(subject, A_TEXT, LOOPS)
    logits = subject.model(own.batch.tokens, n_loops=LOOPS, mask=own.batch.mask)[0, 5]
    assert (own.readout, own.known, own.answer_id) == (5, False, int(logits.argmax()))
    assert own.answer == f"<w_{own.answer_id}>"
    assert any(ask(subject, A_TEXT, loops).answer != own.answer for loops in range(1, LOOPS)), (
        "the number of iterations must matter"
    )


def test_the_graph_knows_the_answer_but_not_of_a_lone_entity(shipped: Subject) -> None:
    question = shipped.questions[4][7]
    assert (ask(shipped, question.text, 8).answer, ask(shipped, question.text, 8).known) == (
        question.answer,
        True,
    )
    assert not ask(shipped, "<e_3>", 8).known
    assert not ask(shipped, "<r_3><e_3>", 8).known


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<w_3><w_77>", "'<w_77>' is not one of the 29 tokens"),
        ("", "at least one token, got an empty one"),
        ("<w_1>" * (MAX_TOKENS + 1), "at most 40 tokens, got 41"),
    ],
)
def test_a_text_that_cannot_be_asked_is_refused(subject: Subject, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ask(subject, text, LOOPS)


def test_a_text_longer_than_learned_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="at most n_ctx=11 positions in this model, got 12"):
        ask(around(toy("learned")), "<w_1>" * 12, LOOPS)


def test_b_must_be_as_long_as_a(subject: Subject) -> None:
    with pytest.raises(ValueError, match="B must have as many tokens as A, which has 5, got 2"):
        ask_beside(subject, "<w_1><w_2>", ask(subject, A_TEXT, LOOPS), LOOPS)


def test_a_contrast_is_as_long_and_has_another_answer_where_that_is_known(
    shipped: Subject, subject: Subject
) -> None:
    question = shipped.questions[5][0]
    first, second = (contrast(shipped, question.text, turn) for turn in (0, 1))
    assert shipped.answer_of(first) != question.answer
    assert first.partition(">")[2] == question.text.partition(">")[2]
    assert second in [other.text for other in shipped.questions[5][1:]]
    assert contrast(subject, "<w_1><w_2><w_3>") == "<w_1><w_2><w_4>"
    assert contrast(subject, A_TEXT) == A_TEXT


def test_the_hint_names_the_tokens_of_questions(shipped: Subject, subject: Subject) -> None:
    assert hint(shipped) == "<e_0> to <e_39>, <r_0> to <r_9>"
    assert hint(subject) == "<w_1> to <w_4>"


def test_a_language_model_is_asked_any_sentence() -> None:
    subject = open_subject(SourceConfig(checkpoint=ouro_folder()), needs_questions=False)
    query = ask(subject, CAT, 4)
    assert (query.text, query.readout, query.known) == (CAT, 5, False)
    assert query.columns[1] == "1 ␣cat"
    with pytest.raises(ValueError, match="which has 6, got 2; nothing is patched until it has"):
        ask_beside(subject, "a dog", query, 4)
    assert beginning(subject, CAT, DOG) == (CAT, DOG)
    first, second = beginning(subject, None, None)
    assert (first, second) == (SENTENCES[0], SENTENCES[0])
    smiles = open_subject(SourceConfig(checkpoint="mini/smiles"), needs_questions=False)
    assert beginning(smiles, None, None)[0] == SENTENCES[1]
    record = margins(subject.model, query, 3)
    table = str(top_table(query, record, 2))
    assert table.count("Tr(") == 1 + 2
    assert hint(subject) == ""


# Computing, against the slow and obvious


def test_the_lens_is_the_head_of_each_residual(subject: Subject, pair: tuple[Query, Query]) -> None:
    model, query = subject.model, pair[0]
    table = lens_table(model, query, 3)
    assert table.blocks == tuple(f"loops.{t}.blocks.{i}" for t in range(3) for i in range(2))
    assert table.closing == (1, 3, 5)
    _, cache = model.run_with_cache(query.batch.tokens, n_loops=3, mask=query.batch.mask)
    for row, (loop, layer) in enumerate((loop, layer) for loop in range(3) for layer in range(2)):
        probs = model.unembed(model.normalize(cache["resid_post", loop, layer]))[0].softmax(-1)
        best = probs.topk(5)
        torch.testing.assert_close(table.prob[row], best.values, atol=1e-9, rtol=0)
        assert [list(cell) for cell in table.top[row]] == [
            model.to_str_tokens(ids) for ids in best.indices
        ]


@pytest.mark.parametrize("family", [None, ShortEnding])
def test_the_margin_after_t_iterations_is_that_of_a_call_with_t(family: Any) -> None:
    subject = around(toy() if family is None else odd_one(family))
    query = ask(subject, A_TEXT, LOOPS)
    record = margins(subject.model, query, MOST)
    for loop in range(MOST):
        logits = subject.model(query.batch.tokens, n_loops=loop + 1, mask=query.batch.mask)[
            :, query.readout
        ].detach()
        assert float(record.margin[loop]) == pytest.approx(
            float(margin(logits, torch.tensor([query.answer_id]))), abs=1e-9
        )
        best = logits.softmax(-1)[0].topk(5)
        assert [word for word, _ in record.top[loop]] == [f"<w_{i}>" for i in best.indices.tolist()]
        assert [p for _, p in record.top[loop]] == pytest.approx(best.values.tolist(), abs=1e-9)
    assert record.best == int(record.margin.argmax()) + 1


def test_attention_panels_are_the_cached_patterns(
    subject: Subject, pair: tuple[Query, Query]
) -> None:
    model, query = subject.model, pair[0]
    _, cache = model.run_with_cache(
        query.batch.tokens, n_loops=3, mask=query.batch.mask, names_filter="**.hook_pattern"
    )
    heads, loops = heads_of(model, query, 3, 2, 1), loops_of(model, query, 3, 1, 3)
    torch.testing.assert_close(heads.pattern, cache["pattern", 2, 1][0], atol=1e-9, rtol=0)
    torch.testing.assert_close(
        loops.pattern,
        torch.stack([cache["pattern", loop, 1][0, 3] for loop in range(3)]),
        atol=1e-9,
        rtol=0,
    )
    assert heads.titles == tuple(f"head {head}" for head in range(HEADS))
    assert loops.titles == ("loop 0", "loop 1", "loop 2")


def test_attention_of_a_block_that_an_iteration_lacks(subject: Subject) -> None:
    short = around(odd_one(ShortEnding))
    query = ask(short, A_TEXT, LOOPS)
    assert loops_of(short.model, query, 3, 1, 0).titles == ("loop 0", "loop 1")
    with pytest.raises(ValueError, match=r"blocks must be in 0\.\.0, got 1"):
        heads_of(short.model, query, 3, 2, 1)


@torch.no_grad()
def naive(
    model: LoopedModel, a: Query, b: Query, n_loops: int, block: str, position: int
) -> Tensor:
    """Logits at the readout of A with one residual of B, in one plain run."""
    name = f"{block}.hook_resid_post"
    _, cache = model.run_with_cache(
        b.batch.tokens, n_loops=n_loops, mask=b.batch.mask, names_filter=name
    )

    def replace(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[0, position] = cache[name][0, position]
        return value

    logits = model.run_with_hooks(
        a.batch.tokens, n_loops=n_loops, mask=a.batch.mask, fwd_hooks=[(name, replace)]
    )
    return logits[:, a.readout]


def test_every_cell_of_the_map_is_that_patch_alone(
    subject: Subject, pair: tuple[Query, Query]
) -> None:
    model, (a, b) = subject.model, pair
    grid = patch_grid(model, a, b, 2)
    assert grid.blocks == tuple(f"loops.{t}.blocks.{i}" for t in range(2) for i in range(2))
    assert (grid.stride, tuple(grid.margin.shape)) == (1, (4, 6))
    answer = torch.tensor([a.answer_id])
    for row, block in enumerate(grid.blocks):
        for position in range(6):
            logits = naive(model, a, b, 2, block, position)
            before, after = patch_cell(model, a, b, 2, block, position)
            assert float(grid.margin[row, position]) == pytest.approx(
                float(margin(logits, answer)), abs=1e-9
            )
            assert after.margin == pytest.approx(float(margin(logits, answer)), abs=1e-9)
            assert before.margin == pytest.approx(grid.margin_a, abs=1e-9)
            best = logits[0].softmax(-1).topk(5)
            assert [token for token, _ in after.top] == model.to_str_tokens(best.indices)
            assert [prob for _, prob in after.top] == pytest.approx(best.values.tolist(), abs=1e-9)
    assert len({round(float(value), 6) for value in grid.change.flatten()}) > 10, (
        "the cells must differ for this to test anything"
    )
    assert grid.margin_b == pytest.approx(
        float(margin(answer_logits(model, b.batch, 2), answer)), abs=1e-9
    )


def test_a_question_put_into_itself_changes_nothing(
    subject: Subject, pair: tuple[Query, Query]
) -> None:
    before, after = patch_cell(subject.model, pair[0], pair[0], LOOPS, "loops.1.blocks.0", 2)
    assert before == after


def test_a_smaller_budget_leaves_out_iterations_and_then_all(
    subject: Subject, pair: tuple[Query, Query]
) -> None:
    whole = patch_grid(subject.model, *pair, LOOPS)
    found = {}
    for budget in (5e6, 4e6, 3e6, 2.3e6, 2e6):
        grid = patch_grid(subject.model, *pair, LOOPS, budget)
        found[grid.stride] = grid
        rows = [
            row
            for row, block in enumerate(whole.blocks)
            if grid.stride and int(block.split(".")[1]) % grid.stride == 0
        ]
        assert grid.blocks == tuple(whole.blocks[row] for row in rows)
        torch.testing.assert_close(
            grid.margin, whole.margin[rows].reshape(len(rows), 6).to(grid.margin), atol=1e-9, rtol=0
        )
        assert (grid.margin_a, grid.margin_b) == pytest.approx(
            (whole.margin_a, whole.margin_b), abs=1e-9
        )
    assert set(found) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("block", "position", "error", "sentence"),
    [
        ("loops.9.blocks.0", 0, KeyError, "n_loops=4 the iterations are loops.0 to loops.3"),
        ("loops.0.blocks.0", 6, ValueError, "0..5, got 6"),
    ],
)
def test_a_cell_that_does_not_exist_leaves_no_hook(
    subject: Subject,
    pair: tuple[Query, Query],
    block: str,
    position: int,
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        patch_cell(subject.model, *pair, LOOPS, block, position)
    assert not subject.model.any_hook()


@pytest.mark.shapes
def test_no_hook_stays_after_anything(subject: Subject, pair: tuple[Query, Query]) -> None:
    lens_table(subject.model, pair[0], LOOPS)
    heads_of(subject.model, pair[0], LOOPS, 0, 0)
    patch_grid(subject.model, *pair, LOOPS)
    patch_cell(subject.model, *pair, LOOPS, "loops.1.blocks.0", 2)
    assert not subject.model.any_hook()
