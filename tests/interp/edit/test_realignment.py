"""Realignment, against a plain hook, and the alignment of states with embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.edit.realignment import Realigned, realign
from loopscope.interp.lens.alignment import embedding_alignment
from loopscope.interp.lens.lens import logit_lens
from toy import BATCH, D_VOCAB, LAYERS, LENGTHS, LOOPS, POS, assert_close, hook_count, padded, toy

pytestmark = pytest.mark.shapes
AT, POSITIONS = 1, [1, 3]
PLACE = "loops.1.blocks.1.hook_resid_post"


@pytest.mark.parametrize("how", ["replace", "rescale", "blend"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_state_becomes_what_a_plain_hook_writes(how: Realigned, rank: int) -> None:
    model, batch = toy(), padded()

    def by_hand(state: Tensor, hook: HookPoint) -> Tensor:
        new = state.clone()
        for row in range(BATCH):
            for column in POSITIONS:
                logits = model.unembed(model.normalize(state[row : row + 1, column : column + 1]))
                own = model.W_E[logits.flatten().argsort(descending=True)[rank]]
                old = state[row, column]
                new[row, column] = {
                    "replace": own,
                    "rescale": old / old.norm() * own.norm(),
                    "blend": 0.3 * own + 0.7 * old,
                }[how]
        return new

    expected = model.run_with_hooks(batch, n_loops=LOOPS, fwd_hooks=[(PLACE, by_hand)])
    with realign(model, AT, POSITIONS, how, rank=rank, weight=0.3, n_loops=LOOPS):
        found = model(batch, n_loops=LOOPS)
    assert_close(found, expected)
    assert hook_count(model) == 0


def test_given_tokens_take_the_lenss_place() -> None:
    model, batch = toy(), padded()
    tokens = torch.tensor([4, 9, 2])
    with realign(model, AT, tokens=tokens, n_loops=LOOPS):
        _, cache = model.run_with_cache(batch.tokens, n_loops=LOOPS, mask=batch.mask)
    states = cache["loops.2.blocks.0.hook_resid_pre"]
    assert_close(states, model.W_E[tokens][:, None].expand_as(states))


def test_an_embedding_is_aligned_with_itself() -> None:
    model = toy()
    with realign(model, AT, tokens=[4, 9, 2], n_loops=LOOPS):
        found = embedding_alignment(model, padded(), LOOPS)
    visit = found.names.index("loops.1.blocks.1")
    itself = found.top[visit] == torch.tensor([4, 9, 2])[found.example]
    assert itself.any()
    assert_close(found.cosine[visit][itself], torch.ones(int(itself.sum())).double())
    assert_close(found.length[visit][itself], torch.ones(int(itself.sum())).double())


def test_the_alignment_is_that_of_the_lenss_token() -> None:
    model, batch = toy(), padded()
    found = embedding_alignment(model, batch, LOOPS, batch_size=2)
    assert found.top.shape == (LOOPS * LAYERS, sum(LENGTHS))
    lens = logit_lens(model, batch, LOOPS, positions="all")
    real = (torch.arange(POS) < torch.tensor(LENGTHS)[:, None]).flatten()
    assert torch.equal(found.top, lens.top(1).tokens[:, real, 0])
    _, cache = model.run_with_cache(batch.tokens, n_loops=LOOPS, mask=batch.mask)
    state = cache["loops.2.blocks.0.hook_resid_post"][1, 3]
    read = ((found.example == 1) & (found.position == 3)).nonzero().item()
    own = model.W_E[found.top[4, read]]
    assert_close(found.cosine[4, read], torch.cosine_similarity(state, own, dim=0))
    assert_close(found.length[4, read], state.norm() / own.norm())
    assert len(found.frame()) == found.top.numel()
    assert len(found.plot().data) == 2 * max(LENGTHS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"at": LOOPS}, "at must be in 0..3, got 4"),
        ({"weight": 1.5}, "weight must be finite and at least 0 and at most 1"),
        ({"rank": D_VOCAB}, "rank must be in"),
        ({"tokens": [1, 2, D_VOCAB]}, "tokens must be in"),
        ({"tokens": [1, 2]}, "the run has 3 rows"),
    ],
)
def test_what_cannot_be_realigned_is_refused(more: dict[str, object], message: str) -> None:
    model = toy()
    given = {"at": AT, "n_loops": LOOPS, **more}
    with (
        pytest.raises(ValueError, match=message),
        realign(model, **given),  # type: ignore[arg-type]
    ):
        model(padded(), n_loops=LOOPS)
    assert hook_count(model) == 0
