"""Methods inside `torch.autocast`: hooks see what the run computes with, records are float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loopscope import activation_patch, logit_diff, logit_lens, probe, transfer_matrix
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BATCH, D_VOCAB, padded, toy

LOOPS, COLUMN = 2, 2
CLEAN, CORRUPTED = padded(1), padded(2)
EPS = 2.0**-8  # of bfloat16


@pytest.fixture(scope="module")
def plain() -> RecurrentDepth:
    return toy("learned").float()


@pytest.fixture(autouse=True)
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


def seen(model: RecurrentDepth, site: str) -> Tensor:
    """An activation of the clean run, kept by a hook written by hand."""
    kept: list[Tensor] = []

    def keep(value: Tensor, hook: object) -> None:
        kept.append(value)

    model.run_with_hooks(
        CLEAN.tokens, n_loops=LOOPS, mask=CLEAN.mask, fwd_hooks=[(f"loops.1.blocks.0.{site}", keep)]
    )
    return kept[0]


@pytest.mark.parametrize("site", ["attn.hook_z", "hook_resid_pre", "attn.hook_pattern"])
@pytest.mark.parametrize("whole", [False, True], ids=["packed", "continued"])
def test_a_patch_is_the_hook_written_by_hand(site: str, whole: bool, plain: RecurrentDepth) -> None:
    source, columns = seen(plain, site), torch.arange(BATCH)
    metric = logit_diff(3, 5)

    def put(value: Tensor, hook: object) -> Tensor:
        patched = value.clone()
        at = (slice(None),) * (2 if site.endswith("pattern") else 1)
        patched[(*at, COLUMN)] = source[(*at, COLUMN)]
        return patched

    with torch.no_grad():
        logits = plain.run_with_hooks(
            CORRUPTED.tokens,
            n_loops=LOOPS,
            mask=CORRUPTED.mask,
            fwd_hooks=[(f"loops.1.blocks.0.{site}", put)],
        )[columns, CORRUPTED.readout]
    hooks = [("hook_embed", lambda value, hook: None)] if whole else []
    with plain.hooks(hooks, n_loops=LOOPS):
        sweep = activation_patch(
            plain, CLEAN, CORRUPTED, metric, LOOPS,
            sites=[site.rpartition("hook_")[2]], loops=[1], layers=[0], positions=[COLUMN],
        )  # fmt: skip
    assert sweep.values.dtype == torch.float32
    off = (sweep.values[0] - metric(logits.float())).abs().max()
    effect = (sweep.values[0] - sweep.corrupted).abs().max()
    scale = EPS * logits.float().abs().max()
    assert off <= 8 * scale
    if site == "hook_resid_pre":
        assert effect > 8 * off + scale  # what is compared is not nothing


def test_a_value_of_another_number_format_is_refused(plain: RecurrentDepth) -> None:
    assert seen(plain, "attn.hook_z").dtype == torch.bfloat16
    hook = ("loops.0.blocks.1.attn.hook_z", lambda value, hook: value.float())
    with pytest.raises(ValueError, match=r"must return None or a tensor like its value"):
        plain.run_with_hooks(CLEAN.tokens, n_loops=LOOPS, fwd_hooks=[hook])


def test_statistics_are_float32(plain: RecurrentDepth) -> None:
    lens = logit_lens(plain, CLEAN, LOOPS)
    assert lens.entropy().dtype == torch.float32
    assert (lens.entropy() <= torch.tensor(float(D_VOCAB)).log() + 1e-5).all()
    batch = CLEAN.repeat(4)
    targets = torch.arange(len(batch)) % 2
    found = probe(plain, batch, targets, n_loops=LOOPS, control=False)
    assert {found.score.dtype, found.maps[0].weight.dtype} == {torch.float64}
    assert transfer_matrix(plain, batch, targets, LOOPS).score.dtype == torch.float64
