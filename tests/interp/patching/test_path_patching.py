"""Path patching: against paths worked out by hand, where paths add up, and what is refused and
cleaned up.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.checkpoints.locate import SHIPPED
from loopscope.interp.common.metrics import logit_margin
from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.interp.patching.paths import PathPatch, path_patch, path_patch_sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.hooks import NO_TAPS, Taps
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.tasks.questions import read_questions
from toy import (
    BATCH,
    HEADS,
    LAYERS,
    LOOPS,
    POS,
    BatchCentred,
    ShortEnding,
    assert_close,
    cached,
    full,
    hook_count,
    is_close,
    odd_one,
    padded,
    projection,
    random_tokens,
    randomize_,
    run,
    toy,
    toy_config,
    with_words,
)  # fmt: skip

READ = Receiver("readout")
SENDERS = [
    Sender("head", 0, 1, 3),
    Sender("head", 1, 0, 2, position=3),
    Sender("attn", 1, 0),
    Sender("mlp", 0, 0),
    Sender("mlp", 1, 0, position=4),
]
RECEIVERS = [
    Receiver("q", 2, 0, 1),
    Receiver("k", 1, 1, 4),
    Receiver("v", 3, 1, 0, position=2),
    Receiver("mlp", 2, 1),
    Receiver("mlp", 1, 1, position=3),
]
METRIC = projection()


@pytest.fixture(params=[("none", False), ("learned", True)], ids=["plain", "injected"])
def model(request: pytest.FixtureRequest) -> RecurrentDepth:
    return toy(*request.param)


def contribution(model: RecurrentDepth, values: dict[str, Tensor], sender: Sender) -> Tensor:
    """What a sender adds to the residual stream."""
    place = f"loops.{sender.loop}.blocks.{sender.layer}"
    if sender.kind != "head":
        return values[f"{place}.hook_{sender.kind}_out"]
    return (
        values[f"{place}.attn.hook_z"][:, :, sender.head]
        @ model.blocks[sender.layer].attn.W_O[sender.head]
    )


def sent(model: RecurrentDepth, base: Batch, source: Batch, sender: Sender) -> Tensor:
    """By how much the sender's output changes the residual stream after it."""
    names = [f"loops.{sender.loop}.**.hook_{site}" for site in ("z", "attn_out", "mlp_out")]
    change = contribution(model, cached(model, source, names), sender) - contribution(
        model, cached(model, base, names), sender
    )
    if sender.position is not None:
        change[:, [p for p in range(POS) if p != sender.position]] = 0
    return change


def new_input(model: RecurrentDepth, resid: Tensor, receiver: Receiver) -> Tensor:
    """What a receiver makes of a residual stream: its queries, keys or values, or the MLP's
    output.
    """
    block = model.blocks[receiver.layer]
    if receiver.kind == "mlp":
        return block.mlp(block.ln2(resid, NO_TAPS), NO_TAPS)
    weight, bias = (
        getattr(block.attn, f"{part}_{receiver.kind.upper()}")[receiver.head] for part in "Wb"
    )
    return block.ln1(resid, NO_TAPS) @ weight + bias


def with_received(
    model: RecurrentDepth, base: Batch, received: list[tuple[Receiver, Tensor]]
) -> Tensor:
    """The metric of the base run with the receivers' new values put in."""
    hooks = []
    for receiver, new in received:
        site = "hook_mlp_out" if receiver.kind == "mlp" else f"attn.hook_{receiver.kind}"
        columns = slice(None) if receiver.position is None else receiver.position
        index = (
            (slice(None), columns)
            if receiver.head is None
            else (slice(None), columns, receiver.head)
        )

        def put(
            value: Tensor,
            hook: object,
            index: tuple = index,
            new: Tensor = new,
            columns: slice | int = columns,
        ) -> Tensor:
            changed = value.clone()
            changed[index] = new[:, columns]
            return changed

        hooks.append((f"loops.{receiver.loop}.blocks.{receiver.layer}.{site}", put))
    logits = model.run_with_hooks(base.tokens, n_loops=LOOPS, mask=base.mask, fwd_hooks=hooks)
    return METRIC(logits[torch.arange(BATCH), base.readout])


def by_hand(
    model: RecurrentDepth, base: Batch, source: Batch, sender: Sender, receivers: list[Receiver]
) -> Tensor:
    change, stream = sent(model, base, source, sender), cached(model, base, "**.hook_resid_*")
    received = []
    for receiver in receivers:
        site = "hook_resid_mid" if receiver.kind == "mlp" else "hook_resid_pre"
        received.append(
            (
                receiver,
                new_input(
                    model,
                    stream[f"loops.{receiver.loop}.blocks.{receiver.layer}.{site}"] + change,
                    receiver,
                ),
            )
        )
    return with_received(model, base, received)


# Values


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("number", range(5))
def test_a_path_by_hand(number: int, shift: int, model: RecurrentDepth) -> None:
    """The receiver's input is the base run's residual stream plus the change of what the sender
    adds.
    """
    sender, receiver = SENDERS[number], RECEIVERS[(number + shift) % 5]
    found = path_patch(model, padded(1), padded(2), METRIC, sender, receiver, LOOPS)
    assert_close(found.values, by_hand(model, padded(2), padded(1), sender, [receiver]))
    if sender.position is None or receiver.position is None:
        assert not is_close(found.values, found.corrupted)


@pytest.mark.parametrize("positions", ["sinusoidal", "none"])
@pytest.mark.parametrize("injection", [False, True])
def test_noise_puts_the_corrupted_path_into_the_clean_run(injection: bool, positions: str) -> None:
    model, sender, receiver = toy(positions, injection), SENDERS[0], RECEIVERS[0]
    found = path_patch(
        model, padded(1), padded(2), METRIC, sender, receiver, LOOPS, direction="noise"
    )
    assert_close(found.values, by_hand(model, padded(1), padded(2), sender, [receiver]))
    assert_close(found.effect(), found.values - found.clean)


def test_the_path_within_one_visit(model: RecurrentDepth) -> None:
    """Attention and the MLP after it in the same block."""
    for sender in (Sender("head", 2, 1, 3), Sender("attn", 2, 1)):
        found = path_patch(
            model, padded(1), padded(2), METRIC, sender, Receiver("mlp", 2, 1), LOOPS
        )
        assert_close(
            found.values, by_hand(model, padded(2), padded(1), sender, [Receiver("mlp", 2, 1)])
        )


def test_several_receivers_get_their_inputs_apart(model: RecurrentDepth) -> None:
    sender = Sender("head", 0, 0, 2)
    together = path_patch(model, padded(1), padded(2), METRIC, sender, RECEIVERS, LOOPS)
    assert_close(together.values, by_hand(model, padded(2), padded(1), sender, RECEIVERS))
    assert together.receivers == tuple(RECEIVERS)


def test_all_heads_of_a_receiver(plain: RecurrentDepth) -> None:
    each = [Receiver("q", 2, 0, head) for head in range(HEADS)]
    found = path_patch(plain, padded(1), padded(2), METRIC, SENDERS[0], each, LOOPS)
    assert_close(
        path_patch(
            plain, padded(1), padded(2), METRIC, SENDERS[0], Receiver("q", 2, 0), LOOPS
        ).values,
        found.values,
    )


@pytest.mark.parametrize("sender", SENDERS, ids=str)
def test_the_path_to_the_readout_is_the_direct_effect_with_the_norm_worked_out_again(
    sender: Sender, model: RecurrentDepth
) -> None:
    clean, corrupted = padded(1), padded(2)
    last = cached(model, corrupted, "loops.3.hook_state_out")["loops.3.hook_state_out"]
    logits = model.unembed(model.normalize(last + sent(model, corrupted, clean, sender)))
    found = path_patch(model, clean, corrupted, METRIC, sender, READ, LOOPS)
    assert_close(found.values, METRIC(logits[torch.arange(BATCH), corrupted.readout]))


@pytest.mark.parametrize("receiver", [Receiver("v", 2, 1, 3), Receiver("mlp", 2, 1), READ], ids=str)
def test_mlps_recompute_when_only_attention_is_frozen(
    receiver: Receiver, model: RecurrentDepth
) -> None:
    """Block by block by hand: attention adds what it adds in the base run, MLPs run."""
    clean, corrupted, sender = padded(1), padded(2), Sender("head", 0, 1, 3)
    base = cached(model, corrupted, ["**.hook_attn_out", "**.hook_resid_mid"])
    injected = model.begin(corrupted.tokens, n_loops=1).resid if model.cfg.input_injection else 0.0
    resid = base["loops.0.blocks.1.hook_resid_mid"] + sent(model, corrupted, clean, sender)
    resid, received = (
        resid + model.blocks[1].mlp(model.blocks[1].ln2(resid, NO_TAPS), NO_TAPS),
        None,
    )
    for t in range(1, LOOPS):
        resid = resid + injected
        for layer, block in enumerate(model.blocks):
            if (t, layer) == (receiver.loop, receiver.layer) and receiver.kind == "v":
                received = new_input(model, resid, receiver)
            resid = resid + base[f"loops.{t}.blocks.{layer}.hook_attn_out"]
            added = block.mlp(block.ln2(resid, NO_TAPS), NO_TAPS)
            if (t, layer) == (receiver.loop, receiver.layer) and receiver.kind == "mlp":
                received = added
            resid = resid + added
    if receiver is READ:
        expected = METRIC(
            model.unembed(model.normalize(resid))[torch.arange(BATCH), corrupted.readout]
        )
    else:
        expected = with_received(model, corrupted, [(receiver, received)])
    found = path_patch(model, clean, corrupted, METRIC, sender, receiver, LOOPS, freeze="attention")
    assert_close(found.values, expected)
    assert found.freeze == "attention"
    assert not is_close(
        found.values, path_patch(model, clean, corrupted, METRIC, sender, receiver, LOOPS).values
    )


class WithoutFinalNorm(RecurrentDepth):
    """Its logits are linear in the residual stream."""

    def normalize(self, resid: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        return resid


@pytest.mark.parametrize("injection", [False, True])
def test_direct_paths_add_up_where_the_readout_is_linear(injection: bool) -> None:
    """The inputs differ everywhere but at the readout, so heads and MLPs make the whole difference
    there.
    """
    model = randomize_(WithoutFinalNorm(toy_config("none", injection)).eval()).double()
    clean, corrupted = full(1), full(2)
    corrupted.tokens[:, -1] = clean.tokens[:, -1]
    frame = path_patch_sweep(model, clean, corrupted, METRIC, READ, LOOPS)
    before = METRIC(run(model, corrupted)[:, -1]).mean().item()
    after = METRIC(run(model, clean)[:, -1]).mean().item()
    assert len(frame) == LOOPS * LAYERS * (HEADS + 1)
    assert (frame["value"] - before).sum() == pytest.approx(after - before, rel=1e-9)


@pytest.mark.parametrize("receiver", [Receiver("q", 2, 1, 3), Receiver("mlp", 1, 1), READ], ids=str)
def test_identical_inputs_send_nothing(receiver: Receiver, plain: RecurrentDepth) -> None:
    found = path_patch(plain, padded(), padded(), METRIC, Sender("head", 0, 1, 2), receiver, LOOPS)
    assert torch.equal(found.clean, found.corrupted)
    assert_close(found.values, found.clean)


def test_a_sender_that_is_equal_in_both_runs_sends_nothing(model: RecurrentDepth) -> None:
    """The inputs differ from column 4 on, so what is sent from column 3 is the same."""
    clean, corrupted = full(1), full(1)
    corrupted.tokens[:, 4:] = full(2).tokens[:, 4:]
    silent = path_patch(
        model,
        clean,
        corrupted,
        METRIC,
        Sender("mlp", 1, 0, position=3),
        Receiver("v", 2, 1, 3),
        LOOPS,
    )
    assert_close(silent.values, silent.corrupted)
    loud = path_patch(
        model,
        clean,
        corrupted,
        METRIC,
        Sender("mlp", 1, 0, position=5),
        Receiver("v", 2, 1, 3),
        LOOPS,
    )
    assert not is_close(loud.values, loud.corrupted)


def test_the_last_output_has_only_its_direct_path(model: RecurrentDepth) -> None:
    """Of the last MLP the path to the readout is all, so it equals plain patching."""
    name = "loops.3.blocks.1.hook_mlp_out"
    source = cached(model, padded(1), name)[name]
    logits = model.run_with_hooks(
        padded(2).tokens,
        n_loops=LOOPS,
        mask=padded(2).mask,
        fwd_hooks=[(name, lambda value, hook: source)],
    )
    found = path_patch(model, padded(1), padded(2), METRIC, Sender("mlp", 3, 1), READ, LOOPS)
    assert_close(found.values, METRIC(logits[torch.arange(BATCH), padded(2).readout]))


# Records and sweeps


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
    found = PathPatch(
        SENDERS[0], (READ,), values, clean, corrupted, "margin", "denoise", "attention"
    )
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
    chosen = [SENDERS[4], SENDERS[0], SENDERS[2], SENDERS[1]]
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
    expected = path_patch(plain, padded(1), padded(2), METRIC, SENDERS[0], READ, LOOPS).values
    assert_close(path_patch(plain, padded(1), padded(2), METRIC, SENDERS[0], READ).values, expected)
    assert not is_close(
        path_patch(plain, padded(1), padded(2), METRIC, SENDERS[0], READ, 2).values, expected
    )
    short = odd_one(ShortEnding)
    assert (
        path_patch(short, padded(1), padded(2), METRIC, SENDERS[0], READ, 2).values.isfinite().all()
    )


def test_inputs_may_be_texts_or_tokens_with_a_column(plain: RecurrentDepth) -> None:
    model = with_words(plain)
    clean, corrupted = ["<t_3><t_9><t_4>", "<t_8><t_1>"], ["<t_3><t_2><t_4>", "<t_5><t_1>"]
    expected = path_patch(
        model, model.encode(clean), model.encode(corrupted), METRIC, SENDERS[0], READ, 2
    ).values
    assert_close(path_patch(model, clean, corrupted, METRIC, SENDERS[0], READ, 2).values, expected)
    found = path_patch(
        model, random_tokens(1), random_tokens(2), METRIC, SENDERS[0], READ, 2, readout=-1
    ).values
    assert_close(found, path_patch(model, full(1), full(2), METRIC, SENDERS[0], READ, 2).values)


# What is refused


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [
        (Sender("head", 2, 0, 3), Receiver("q", 1, 1, 0)),
        (Sender("head", 1, 1, 3), Receiver("q", 1, 1, 0)),
        (Sender("attn", 1, 1), Receiver("v", 1, 1, 3)),
        (Sender("mlp", 1, 1), Receiver("mlp", 1, 1)),
        (Sender("mlp", 1, 1), Receiver("k", 1, 1, 0)),
        (Sender("mlp", 3, 0), Receiver("mlp", 0, 1)),
    ],
)
def test_a_receiver_must_be_later_than_the_sender(
    sender: Sender, receiver: Receiver, plain: RecurrentDepth
) -> None:
    message = (
        rf"a receiver must come later in the run than the sender, but \({receiver}\) is not later"
        rf" than \({sender}\)"
    )
    with pytest.raises(ValueError, match=message):
        path_patch(
            plain, padded(1), padded(2), METRIC, sender, [Receiver("q", 3, 1, 0), receiver], LOOPS
        )
    with pytest.raises(ValueError, match=message):
        path_patch_sweep(plain, padded(1), padded(2), METRIC, receiver, LOOPS, senders=[sender])
    assert hook_count(plain) == 0


@pytest.mark.parametrize(
    ("sender", "receivers", "options", "message"),
    [
        (Sender("head", 4, 0, 0), READ, {}, r"loops must be in 0\.\.3, got 4"),
        (Sender("head", 0, 2, 0), READ, {}, r"layers must be in 0\.\.1, got 2"),
        (Sender("head", 0, 0, 5), READ, {}, r"heads must be in 0\.\.4, got 5"),
        (Sender("mlp", 0, 0, position=7), READ, {}, r"positions must be in 0\.\.6, got 7"),
        (SENDERS[0], Receiver("k", 2, 0, 5), {}, r"heads must be in 0\.\.4, got 5"),
        (SENDERS[0], Receiver("q", 2, 0, -1), {}, r"heads must be in 0\.\.4, got -1"),
        (SENDERS[0], Receiver("q", -1, 0, 1), {}, r"loops must be in 0\.\.3, got -1"),
        (SENDERS[0], [], {}, "at least one receiver is needed, got none"),
        (
            SENDERS[0],
            [READ, RECEIVERS[0]],
            {},
            "so it must stand alone, got readout, q loop 2 layer 0 head 1",
        ),
        (SENDERS[0], READ, {"direction": "sideways"}, "direction"),
        (SENDERS[0], READ, {"freeze": "mlp"}, "freeze"),
    ],
)
def test_wrong_requests_are_refused(
    sender: Sender,
    receivers: Receiver | list[Receiver],
    options: dict,
    message: str,
    plain: RecurrentDepth,
) -> None:
    with pytest.raises(
        (ValueError, TypeError), match=message
    ):  # TypeError where the test run checks types
        path_patch(plain, padded(1), padded(2), METRIC, sender, receivers, LOOPS, **options)
    assert hook_count(plain) == 0


@pytest.mark.parametrize(
    ("corrupted", "message"),
    [
        (padded(2, width=POS + 2), r"must have one shape, got \[3, 7\] and \[3, 9\]"),
        (padded(2, lengths=(7, 5, 5)), "each clean input must be as long as its corrupted one"),
        (replace(padded(2), readout=torch.tensor([6, 3, 3])), "be read at the same column"),
    ],
)
def test_inputs_that_do_not_match_are_refused(
    corrupted: Batch, message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=message):
        path_patch(plain, padded(1), corrupted, METRIC, SENDERS[0], READ, LOOPS)


@pytest.mark.parametrize(
    ("end", "arguments", "message"),
    [
        (
            Sender,
            ("head", 0, 0),
            r"head= must be given for kind 'head' and only then, got head loop 0 layer 0",
        ),
        (Sender, ("mlp", 0, 0, 3), "head= must be given for kind 'head' and only then"),
        (Sender, ("q", 0, 0), "kind"),
        (Receiver, ("q", 1), r"a receiver needs loop= and layer=, or visit= alone, got q loop 1"),
        (
            Receiver,
            ("readout", 1),
            "the readout has no loop, layer, head or position, got readout loop 1",
        ),
        (Receiver, ("mlp", 1, 0, 3), "an MLP has no heads, got mlp loop 1 layer 0 head 3"),
        (Receiver, ("attn", 1, 0), "kind"),
    ],
)
def test_wrong_ends_are_refused(end: type, arguments: tuple, message: str) -> None:
    with pytest.raises(
        (ValueError, TypeError), match=message
    ):  # TypeError where the test run checks types
        end(*arguments)


def test_a_receiver_before_all_senders_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(
        ValueError,
        match=(
            r"no sender is earlier than all of the receivers \(q loop 0 layer 0 head 1, mlp loop 2"
            r" layer 0\)"
        ),
    ):
        path_patch_sweep(
            plain,
            padded(1),
            padded(2),
            METRIC,
            [Receiver("q", 0, 0, 1), Receiver("mlp", 2, 0)],
            LOOPS,
        )


def test_nothing_is_left_after_an_error(plain: RecurrentDepth) -> None:
    def broken(logits: Tensor) -> Tensor:
        raise RuntimeError("the metric failed")

    with pytest.raises(RuntimeError, match="the metric failed"):
        path_patch(plain, padded(1), padded(2), broken, SENDERS[0], RECEIVERS[0], LOOPS)
    assert hook_count(plain) == 0
    calls: list[int] = []
    plain.add_hook("hook_embed", lambda value, hook: calls.append(1))
    path_patch(plain, padded(1), padded(2), METRIC, SENDERS[0], RECEIVERS[0], LOOPS)
    assert hook_count(plain) == 2  # PyTorch's and TransformerLens's record of one hook
    assert calls


# A trained model


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
