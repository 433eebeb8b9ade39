"""Path patches that are refused, and nothing that is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.interp.patching.paths import path_patch, path_patch_sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import LOOPS, POS, hook_count, padded, projection

READ, METRIC = Receiver("readout"), projection()
SENDER, RECEIVER = Sender("head", 0, 1, 3), Receiver("q", 2, 0, 1)


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
        (SENDER, Receiver("k", 2, 0, 5), {}, r"heads must be in 0\.\.4, got 5"),
        (SENDER, Receiver("q", 2, 0, -1), {}, r"heads must be in 0\.\.4, got -1"),
        (SENDER, Receiver("q", -1, 0, 1), {}, r"loops must be in 0\.\.3, got -1"),
        (SENDER, [], {}, "at least one receiver is needed, got none"),
        (
            SENDER,
            [READ, RECEIVER],
            {},
            "so it must stand alone, got readout, q loop 2 layer 0 head 1",
        ),
        (SENDER, READ, {"direction": "sideways"}, "direction"),
        (SENDER, READ, {"freeze": "mlp"}, "freeze"),
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
        path_patch(plain, padded(1), corrupted, METRIC, SENDER, READ, LOOPS)


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
        path_patch(plain, padded(1), padded(2), broken, SENDER, RECEIVER, LOOPS)
    assert hook_count(plain) == 0
    calls: list[int] = []
    plain.add_hook("hook_embed", lambda value, hook: calls.append(1))
    path_patch(plain, padded(1), padded(2), METRIC, SENDER, RECEIVER, LOOPS)
    assert hook_count(plain) == 2  # PyTorch's and TransformerLens's record of one hook
    assert calls
