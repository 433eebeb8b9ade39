"""A looped model with weights written by hand: it looks an entity up twice, one hop after another.

The input is three facts, a question and a blank: "0>2 1>0 2>1 ask:1 ?". Every token is a sum of
unit vectors of named parts of the stream, three directions each (one per entity):

* a fact x>y has x in `key` and y in `value`; the question has its entity in `now`;
* each position has a unit vector of its own in `place`.

One block, three iterations, norms left out. Head 0 looks up: what stands in `now` is compared with
every `key`, and the `value` found there is written into `next`. Head 1 carries: it attends to the
position before and writes that position's `next` into `now`. So in iteration 0 the question's
position has f(1) in `next`; in iteration 1 the blank has f(1) in `now`; in iteration 2 the blank
has f(f(1)) in `next`, which the answers' embeddings read. Heads 2 and 3 and the MLP read all of it
and write into `unread`, which nothing reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loopscope.models.basis.tokens import Batch
from loopscope.models.core.hooks import Taps
from loopscope.models.families.recurrent_depth import RecurrentDepth, RecurrentDepthConfig

ENTITIES, PLACES, D_MODEL, D_HEAD, D_MLP = 3, 5, 20, 5, 7
PARTS = {name: slice(3 * i, 3 * i + 3) for i, name in enumerate(("key", "value", "now", "next"))}
UNREAD, PLACE = slice(12, 15), slice(15, 20)
ASK, BLANK, ANSWER = 9, 12, 13  # ids: facts 3 x + y, questions, the blank, answers
LOOK, CARRY = 0, 1
EDGES = {
    ("embed", "loops.0.blocks.0.attn.0.q"),
    ("loops.0.blocks.0.attn.0", "loops.1.blocks.0.attn.1.v"),
    ("loops.1.blocks.0.attn.1", "loops.2.blocks.0.attn.0.q"),
    ("loops.2.blocks.0.attn.0", "final"),
}


class NoNorm(nn.Module):
    """Passes the stream on, through the hook points of a norm that are not its divisor."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.sites = f"{site}.hook_normalized", f"{site}.hook_out"

    def forward(self, x: Tensor, taps: Taps) -> Tensor:
        for site in self.sites:
            x = taps[site](x) if site in taps else x
        return x


def two_hops() -> RecurrentDepth:
    """The model."""
    cfg = RecurrentDepthConfig(
        n_layers=1, n_loops=3, d_model=D_MODEL, n_heads=4, d_mlp=D_MLP,
        d_vocab=ANSWER + ENTITIES, n_ctx=PLACES, positions="learned",
    )  # fmt: skip
    torch_state = torch.get_rng_state()
    torch.manual_seed(3)
    model = RecurrentDepth(cfg).double()
    torch.set_rng_state(torch_state)
    model.final_norm, block = NoNorm("ln_final"), model.blocks[0]
    block.ln1, block.ln2 = NoNorm("ln1"), NoNorm("ln2")
    one = torch.eye(ENTITIES, dtype=torch.float64)
    with torch.no_grad():
        model.embedding.zero_()
        for x in range(ENTITIES):
            for y in range(ENTITIES):
                model.embedding[3 * x + y, PARTS["key"]] = one[x]
                model.embedding[3 * x + y, PARTS["value"]] = one[y]
            model.embedding[ASK + x, PARTS["now"]] = one[x]
            model.embedding[ANSWER + x, PARTS["next"]] = one[x]
        model.W_pos.zero_()
        model.W_pos[:, PLACE] = torch.eye(PLACES, dtype=torch.float64)
        q, k, v = block.attn.W_QKV.view(D_MODEL, 3, 4, D_HEAD).unbind(1)
        out = block.attn.W_O_flat.view(4, D_HEAD, D_MODEL)
        for tensor in (q, k, v):
            tensor[:, :2].zero_()
            tensor[:, 2:].normal_(std=0.5, generator=torch.Generator().manual_seed(4))
        out.zero_()
        q[PARTS["now"], LOOK, :3], k[PARTS["key"], LOOK, :3] = 12 * one, one
        v[PARTS["value"], LOOK, :3], out[LOOK, :3, PARTS["next"]] = one, one
        places = torch.eye(PLACES, dtype=torch.float64)
        q[PLACE, CARRY], k[PLACE, CARRY] = 40 * places.roll(-1, 1), places
        v[PARTS["next"], CARRY, :3], out[CARRY, :3, PARTS["now"]] = one, one
        out[2:, :, UNREAD] = 1.0
        block.mlp.W_out[:, : UNREAD.start] = 0.0
        block.mlp.W_out[:, UNREAD.stop :] = 0.0
    return model.eval()


def asked(entities: list[int], facts: tuple[int, ...] = (2, 0, 1)) -> Batch:
    """Questions about some entities, with the facts x > facts[x] in front."""
    rows = [[3 * x + y for x, y in enumerate(facts)] + [ASK + entity, BLANK] for entity in entities]
    tokens = torch.tensor(rows)
    last = torch.full((len(rows),), PLACES - 1)
    return Batch(tokens, torch.ones_like(tokens), last)
