"""Records of path patches, sweeps over senders, and the inputs that both take."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from loopscope.checkpoints.load import load
from loopscope.checkpoints.locate import SHIPPED
from loopscope.interp.common.metrics import logit_margin
from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.interp.patching.paths import PathPatch, path_patch, path_patch_sweep
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.tasks.questions import read_questions
from toy import (
    BATCH,
    HEADS,
    LAYERS,
    LOOPS,
    BatchCentred,
    ShortEnding,
    assert_close,
    full,
    is_close,
    odd_one,
    padded,
    projection,
    random_tokens,
    run,
    toy,
    with_words,
)

READ, METRIC = Receiver("readout"), projection()
SENDER = Sender("head", 0, 1, 3)


def test_the_record(plain: RecurrentDepth) -> None:
    sender, receivers = (
        Sender("head", 0, 1, 3, position=2),
        (Receiver("q", 1, 1, 4), Receiver("mlp", 2, 0)),
    )
    found = path_patch(plain, padded(1), padded(2), METRIC, sender, receivers, LOOPS)
    frame = found.frame()
    assert list(frame.columns) == [
        "sender",
        "receivers",
        "example",
        "metric",
        "clean",
        "corrupted",
        "value",
    ]
    assert set(frame["sender"]) == {"head loop 0 layer 1 head 3 position 2"}
    assert set(frame["receivers"]) == {"q loop 1 layer 1 head 4, mlp loop 2 layer 0"}
    assert set(frame["metric"]) == {found.metric} == {"projection"}
    assert frame["example"].tolist() == list(range(BATCH))
    for column, values in (
        ("clean", found.clean),
        ("corrupted", found.corrupted),
        ("value", found.values),
    ):
        assert frame[column].tolist() == values.tolist()
    for batch, values in ((padded(1), found.clean), (padded(2), found.corrupted)):
        assert_close(values, METRIC(run(plain, batch)[torch.arange(BATCH), batch.readout]))


@pytest.mark.shapes
def test_the_effect_is_counted_from_the_run_that_is_patched() -> None:
    values, clean, corrupted = torch.tensor([2.0]), torch.tensor([7.0]), torch.tensor([1.0])
    found = PathPatch(SENDER, (READ,), values, clean, corrupted, "margin", "denoise", "attention")
    assert found.effect().item() == 1.0
    assert replace(found, direction="noise").effect().item() == -5.0


def check_sweep(
    frame: pd.DataFrame, model: RecurrentDepth, receivers: Receiver | list[Receiver]
) -> None:
    for row in frame.iloc[::7].itertuples():
        sender = Sender(
            row.kind, int(row.loop), int(row.layer), None if row.head is pd.NA else int(row.head)
        )
        one = path_patch(model, padded(1), padded(2), METRIC, sender, receivers, LOOPS)
        assert row.value == pytest.approx(one.values.mean().item(), rel=1e-9)
        assert (row.clean, row.corrupted) == pytest.approx(
            (one.clean.mean().item(), one.corrupted.mean().item()), rel=1e-9
        )


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_sweep_is_one_path_after_another(batch_size: int) -> None:
    model = toy("learned", True)
    receivers = [Receiver("q", 2, 1, 3), Receiver("v", 2, 0, 1)]
    frame = path_patch_sweep(
        model, padded(1), padded(2), METRIC, receivers, LOOPS, batch_size=batch_size
    )
    assert list(frame.columns) == [
        "kind",
        "visit",
        "loop",
        "layer",
        "head",
        "position",
        "receivers",
        "metric",
        "clean",
        "corrupted",
        "value",
    ]
    places = [(t, layer) for t in range(2) for layer in range(LAYERS)]
    assert list(zip(frame["loop"], frame["layer"], strict=True)) == [
        place for place in places for _ in range(HEADS + 1)
    ]
    assert frame["kind"].tolist() == (["head"] * HEADS + ["mlp"]) * len(places)
    assert frame["head"].tolist()[: HEADS + 1] == [*range(HEADS), pd.NA]
    assert set(frame["receivers"]) == {"q loop 2 layer 1 head 3, v loop 2 layer 0 head 1"}
    check_sweep(frame, model, receivers)


def test_senders_may_be_chosen_in_any_order(plain: RecurrentDepth) -> None:
    chosen = [
        Sender("mlp", 1, 0, position=4),
        SENDER,
        Sender("attn", 1, 0),
        Sender("head", 1, 0, 2, position=3),
    ]
    frame = path_patch_sweep(
        plain, padded(1), padded(2), METRIC, READ, LOOPS, senders=chosen, direction="noise"
    )
    options = {"n_loops": LOOPS, "direction": "noise"}
    each = [
        path_patch(plain, padded(1), padded(2), METRIC, sender, READ, **options)
        .values.mean()
        .item()
        for sender in chosen
    ]
    assert frame["value"].tolist() == pytest.approx(each, rel=1e-9)
    assert frame["kind"].tolist() == ["mlp", "head", "attn", "head"]
    assert frame["position"].tolist() == [4, pd.NA, pd.NA, 3]


def test_senders_are_run_apart_where_rows_depend_on_each_other() -> None:
    model = odd_one(BatchCentred)
    check_sweep(
        path_patch_sweep(model, padded(1), padded(2), METRIC, Receiver("q", 1, 1, 3), LOOPS),
        model,
        Receiver("q", 1, 1, 3),
    )


def test_iterations_default_to_what_is_recorded_and_may_end_early(plain: RecurrentDepth) -> None:
    expected = path_patch(plain, padded(1), padded(2), METRIC, SENDER, READ, LOOPS).values
    assert_close(path_patch(plain, padded(1), padded(2), METRIC, SENDER, READ).values, expected)
    assert not is_close(
        path_patch(plain, padded(1), padded(2), METRIC, SENDER, READ, 2).values, expected
    )
    short = odd_one(ShortEnding)
    assert path_patch(short, padded(1), padded(2), METRIC, SENDER, READ, 2).values.isfinite().all()


def test_inputs_may_be_texts_or_tokens_with_a_column(plain: RecurrentDepth) -> None:
    model = with_words(plain)
    clean, corrupted = ["<t_3><t_9><t_4>", "<t_8><t_1>"], ["<t_3><t_2><t_4>", "<t_5><t_1>"]
    expected = path_patch(
        model, model.encode(clean), model.encode(corrupted), METRIC, SENDER, READ, 2
    ).values
    assert_close(path_patch(model, clean, corrupted, METRIC, SENDER, READ, 2).values, expected)
    found = path_patch(
        model, random_tokens(1), random_tokens(2), METRIC, SENDER, READ, 2, readout=-1
    ).values
    assert_close(found, path_patch(model, full(1), full(2), METRIC, SENDER, READ, 2).values)


def test_heads_of_a_trained_model_reach_the_answer_directly_late_rather_than_early() -> None:
    model = load("ltg_trained")
    questions = [
        question
        for question in read_questions(SHIPPED / "ltg_trained" / "test.json")
        if question.hops == 4
    ][:30]
    clean = model.encode([question.text for question in questions])
    answers = torch.tensor([model.to_single_token(question.answer) for question in questions])
    corrupted = replace(clean, tokens=clean.tokens.roll(1, 0))
    frame = path_patch_sweep(model, clean, corrupted, logit_margin(answers), READ, 8)
    moved = (frame["value"] - frame["corrupted"]).groupby(frame["loop"]).sum()
    assert moved[:2].abs().max() < moved.max()
    assert moved.idxmax() >= 2
