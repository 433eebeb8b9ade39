"""Identity 2: a patch with a point's own value changes nothing, and one with another value in the
same place does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    HEAD,
    LENGTHS,
    POSITION,
    SHORT,
    every_variant,
    expected_shape,
    index_at,
    noise,
    padded,
    put,
    row_each,
    run,
)


@every_variant
def test_a_patch_of_one_place_changes_nothing_by_its_own_value_and_something_by_another(
    model: RecurrentDepth,
) -> None:
    """One run changes one row at each of many sites."""
    batch, seen = padded(lengths=LENGTHS * 4), dict[str, Tensor]()
    places = {name: index_at(name, POSITION, HEAD)[1:] for name in model.hook_names(SHORT)}

    def patched(change: Callable[..., Tensor | None]) -> Tensor:
        hooks = [(name, partial(change, name=name, row=row)) for name, row in rows.items()]
        with model.hooks(hooks, n_loops=SHORT):
            return run(model, batch, SHORT)

    def keep(value: Tensor, hook: object, name: str, row: int) -> None:
        assert name not in seen
        assert value.shape == expected_shape(name, len(batch)), name
        seen[name] = value.clone()

    def own(value: Tensor, hook: object, name: str, row: int) -> Tensor:
        return put(seen[name], (row, *places[name]))(value, hook)

    def other(value: Tensor, hook: object, name: str, row: int) -> Tensor:
        return noise(value, (row, *places[name]))

    for rows in row_each(list(places), len(batch)):
        logits = patched(keep)
        assert torch.equal(patched(own), logits), list(rows)
        disturbed = patched(other)
        for name, row in rows.items():
            assert not torch.equal(disturbed[row], logits[row]), name
