"""Identity 5: a sweep equals the separate runs that it stands for, and nothing is computed
twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_MODEL,
    HEAD_SITES,
    LAYERS,
    SHORTEST,
    assert_close,
    cached,
    index_at,
    padded,
    projection,
    random_tokens,
    row_each,
    run,
    site_of,
    toy,
)

# Patches: each cell is one run


def rows_put(source: Tensor, index: tuple[slice | int, ...], start: int) -> Callable[..., Tensor]:
    """A hook that takes one place of some rows of its value from `source`."""

    def replace_there(value: Tensor, hook: object) -> Tensor:
        changed = value.clone()
        changed[start : start + len(source)][index] = source[index]
        return changed

    return replace_there


def site_names(model: LoopedModel) -> list[str]:
    return list(dict.fromkeys(map(site_of, model.hook_names(SHORTEST))))


@pytest.mark.parametrize(
    ("positions", "injection", "heads", "direction"),
    [
        ("none", False, None, "denoise"),
        ("sinusoidal", False, [1, 4], "noise"),
        ("learned", True, [1, 4], "denoise"),
        pytest.param("learned", True, None, "noise", marks=pytest.mark.slow),
        pytest.param("sinusoidal", False, None, "noise", marks=pytest.mark.slow),
        pytest.param("none", False, [1, 4], "noise", marks=pytest.mark.slow),
    ],
)
def test_each_cell_of_a_sweep_is_one_run_with_that_patch(
    positions: str, injection: bool, heads: list[int] | None, direction: str
) -> None:
    model = toy(positions, injection)
    clean, corrupted = padded(seed=1), padded(seed=2)
    sites = [site for site in site_names(model) if heads is None or site in HEAD_SITES]
    places = {"positions": [0, 5], "heads": heads}
    sweep = activation_patch(
        model,
        clean,
        corrupted,
        projection(),
        SHORTEST,
        sites=sites,
        **places,
        direction=direction,
        max_bytes=10_000,
    )
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    names = [name for name in model.hook_names(SHORTEST) if site_of(name) in sites]
    expected_cells = list(itertools.product(names, places["positions"], heads or [None]))
    assert [(cell.name, cell.position, cell.head) for cell in sweep.cells] == expected_cells
    values = {
        name: cached(model, source, name, SHORTEST)[name]
        for name in {cell.name for cell in sweep.cells}
    }
    read = torch.arange(BATCH), base.readout
    many = Batch(base.tokens.repeat(8, 1), base.mask.repeat(8, 1), base.readout.repeat(8))
    naive = []
    for cells in row_each(expected_cells, 8):  # three rows of a run for each cell
        hooks = [
            (name, rows_put(values[name], index_at(name, position, head), row * BATCH))
            for (name, position, head), row in cells.items()
        ]
        with model.hooks(hooks, n_loops=SHORTEST):
            logits = run(model, many, SHORTEST)
        scores = projection()(logits[torch.arange(8 * BATCH), many.readout]).split(BATCH)
        naive += scores[: len(cells)]
    assert_close(sweep.values, torch.stack(naive))
    assert_close(sweep.clean, projection()(run(model, clean, SHORTEST)[read]))
    assert_close(sweep.corrupted, projection()(run(model, corrupted, SHORTEST)[read]))
    assert sweep.values.std(0).min() > 0


# Iterations: all of them are one run


def counted_blocks(model: RecurrentDepth) -> list[int]:
    calls: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *arguments: calls.append(1))
    return calls


def test_recurrence_sweep_runs_each_iteration_once_and_equals_separate_runs() -> None:
    model, batch = toy(), padded()
    calls = counted_blocks(model)
    sweep = readout_lens(model, batch, 40, keep_logits=True).logits
    assert len(calls) == LAYERS * 40
    rows = torch.arange(BATCH), batch.readout
    for r in range(1, 41):
        assert_close(sweep[r - 1], model(batch.tokens, n_loops=r, mask=batch.mask)[rows])


def test_resumed_run_computes_only_what_is_left(plain: RecurrentDepth) -> None:
    state = plain.begin(random_tokens())
    calls = counted_blocks(plain)
    state = plain.advance(state, "loops.3")
    assert len(calls) == 6
    plain.readout(plain.advance(state))
    assert len(calls) == 8


def test_readout_at_positions_normalises_only_those_rows(plain: RecurrentDepth) -> None:
    batch, shapes = padded(), []
    state = plain.advance(plain.begin(batch.tokens, batch.mask))
    plain.final_norm.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape))
    )
    plain.readout(state, batch.readout)
    assert shapes == [(BATCH, 1, D_MODEL)]
