"""Path patching against paths worked out by hand, and where paths add up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.interp.patching.paths import path_patch, path_patch_sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.hooks import NO_TAPS, Taps
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    HEADS,
    LAYERS,
    LOOPS,
    POS,
    assert_close,
    cached,
    full,
    is_close,
    padded,
    projection,
    randomize_,
    run,
    toy,
    toy_config,
)

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
