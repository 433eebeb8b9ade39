"""The golden outputs of one reference at toy size, against our model of the same folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import LoopCache
from paths import GOLDEN

FLOAT32 = 5e-5
Compute = Callable[..., Tensor]


class GoldenCase:
    """One case's inputs and our model of it; `begin` are the options that its run takes besides the
    tokens.
    """

    def __init__(
        self,
        name: str,
        *,
        n_loops: int | None = None,
        tokens: str = "input_ids",
        begin: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.name = name
        self.golden = load_file(GOLDEN / name / "golden.safetensors")
        self.meta = json.loads((GOLDEN / name / "meta.json").read_text())
        self.model: LoopedModel = load(GOLDEN / name, **options)
        self.tokens = self.golden[tokens]
        self.n_loops = n_loops or self.model.cfg.n_loops
        self.begin = {option: self.golden[key] for option, key in (begin or {}).items()}

    @cached_property
    def cache(self) -> LoopCache:
        """Everything of the case's own run."""
        with torch.no_grad():
            return self.model.run_with_cache(
                self.tokens, n_loops=self.n_loops, names_filter="**", **self.begin
            )[1]

    def stored(self, key: str) -> Tensor:
        """An input of the case, as it is."""
        return self.golden[key]

    def activation(self, name: str) -> Tensor:
        return self.cache[name]

    def heads_first(self, name: str) -> Tensor:
        """Queries, keys, values or z in the references' order: batch head pos d_head."""
        return self.cache[name].transpose(1, 2)

    @torch.no_grad()
    def logits(self, n_loops: int | None = None, **changes: Any) -> Tensor:
        return self.model(self.tokens, n_loops=n_loops or self.n_loops, **{**self.begin, **changes})


def row(case: GoldenCase, table: Mapping[str, Compute], key: str) -> Tensor | None:
    """What our code computes for a golden key; None where no row of the table is meant for it."""
    for pattern, compute in table.items():
        found = re.fullmatch(pattern, key)
        if found:
            return compute(case, *found.groups())
    return None


def excused_keys(name: str) -> set[str]:
    """The case's keys that tests/golden/UNUSED.md lists with a reason."""
    lines = (GOLDEN / "UNUSED.md").read_text().splitlines()
    found = [re.fullmatch(r"- ([^/\s]+)/(\S+): (.+)", line) for line in lines]
    return {match[2] for match in found if match and match[1] == name}


def check_case(
    case: GoldenCase,
    table: Mapping[str, Compute],
    record_error: Callable[[str, str, float], None],
    bounds: Mapping[str, float] | None = None,
) -> None:
    """Every stored tensor is met to 5e-5 of its largest magnitude (whole numbers exactly), or
    excused with a reason; nothing both. `bounds` are those of single keys.
    """
    excused, wrong = excused_keys(case.name), {}
    assert excused <= set(case.golden), "a key that is excused does not exist"
    for key, golden in case.golden.items():
        value = row(case, table, key)
        if value is None:
            assert key in excused, (
                f"{key!r} has neither a row in the table nor a reason in UNUSED.md"
            )
            continue
        assert key not in excused, f"{key!r} has both a row in the table and a reason in UNUSED.md"
        assert value.shape == golden.shape, (key, value.shape, golden.shape)
        if not golden.is_floating_point():
            assert torch.equal(value, golden), key
            continue
        scale = golden.double().abs().max().item() or 1.0
        error = (value.double() - golden.double()).abs().max().item() / scale
        record_error(case.name, "float32", error)
        if not error <= (bounds or {}).get(key, FLOAT32):
            wrong[key] = error
    assert not wrong, wrong
