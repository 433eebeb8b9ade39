"""Lanes that share a tile attend as each would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loopscope.interp.patching import packed
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.core.attention import KeyValues
from loopscope.models.core.packed_rows import Tiles, _filled
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import padded, projection

WIDTH, HEADS, KV_HEADS, D_HEAD, EXAMPLES = 13, 4, 2, 3, 3
EXAMPLE, START, STOP = [0, 0, 1, 0, 2, 1, 0], [0, 4, 12, 3, 1, 0, 11], [12, 12, 12, 10, 7, 9, 11]


def test_a_lane_goes_into_the_first_tile_of_its_example_that_has_room() -> None:
    lanes = [(20, 0), (10, 0), (5, 1), (3, 0), (2, 0), (30, 1)]
    assert _filled(lanes, 32) == ([0, 20, 32, 64, 30, 96], [0, 1, 0, 1])


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _alone(q: Tensor, keys: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of one row, head by head, over some keys with their values."""
    k, v = (
        torch.stack(each).repeat_interleave(HEADS // KV_HEADS, dim=1)
        for each in zip(*keys, strict=True)
    )
    pattern = torch.einsum("hd,khd->hk", q, k).mul(D_HEAD**-0.5).softmax(-1)
    return torch.einsum("hk,khd->hd", pattern, v)


@pytest.mark.parametrize("lanes", [7, 4])
@pytest.mark.parametrize("hidden", [None, 2])
def test_a_row_sees_the_base_run_before_its_lane_and_its_own_lane(
    lanes: int, hidden: int | None
) -> None:
    example, start, stop = map(torch.tensor, (EXAMPLE, START, STOP))
    sees = torch.ones(EXAMPLES, 1, WIDTH, WIDTH, dtype=torch.bool).tril()
    if hidden is not None:
        sees[1, 0, hidden + 1 :, hidden] = False
    tiles = Tiles.make(example, start, stop - start + 1, sees if hidden else sees[:1])
    rows = [(i, c) for i in range(lanes) for c in range(START[i], STOP[i] + 1)]
    at = {row: index for index, row in enumerate(rows)}
    q = _random(len(rows), HEADS, D_HEAD)
    k, v = _random(len(rows), KV_HEADS, D_HEAD), _random(len(rows), KV_HEADS, D_HEAD).flip(0)
    before = [_random(EXAMPLES, WIDTH, KV_HEADS, D_HEAD).roll(i, 0) for i in (0, 1)]
    nowhere = torch.zeros(EXAMPLES, WIDTH, dtype=torch.bool)
    base = KeyValues(before[0], before[1], nowhere.long(), nowhere)

    found = tiles.attend(q[None], k[None], v[None], base, 0.0, None)[0]

    for (lane, column), own, query in zip(rows, found, q, strict=True):
        e = EXAMPLE[lane]
        seen = [c for c in range(column + 1) if sees[e if hidden else 0, 0, column, c]]
        keys = [
            (before[0][e, c], before[1][e, c])
            if c < START[lane]
            else (k[at[lane, c]], v[at[lane, c]])
            for c in seen
        ]
        assert torch.allclose(own, _alone(query, keys), atol=1e-12)


def test_a_sweep_in_tiles_is_the_sweep_on_the_grid(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = plain.double(), padded(1), padded(2), projection(), 3
    calls: list[int] = []
    attend = Tiles.attend

    def counted(self: Tiles, *args: Any) -> torch.Tensor:
        calls.append(1)
        return attend(self, *args)

    monkeypatch.setattr(Tiles, "attend", counted)
    tiled = activation_patch(*given, sites=("resid_pre", "z"), heads="all")
    in_tiles = len(calls)
    monkeypatch.setattr(packed, "ROWS", 2)
    on_grid = activation_patch(*given, sites=("resid_pre", "z"), heads="all")
    assert len(calls) == in_tiles > 0
    assert (tiled.values - on_grid.values).abs().max() < 1e-9
