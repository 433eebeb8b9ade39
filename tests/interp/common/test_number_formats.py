"""Every method in every family runs to its frame and its picture in every number format, with
statistics in float32 or wider.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

from family_toys import TOYS, padded
from loopscope.interp.attribution.direct_logit import direct_logit_attribution
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.circuits.edge_attribution import edge_attribution
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.edit.injection import swap_input
from loopscope.interp.edit.steering import set_to, steering_vector
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.interp.patching.paths import path_patch, path_patch_sweep
from loopscope.interp.patching.tracing import causal_tracing, denoising_map, noising_map
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

LOOPS, ANSWERS = 1, [3, 5, 7]
METRIC = logit_diff(ANSWERS, 2)
FORMATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# the whole table is for the slow tests; each block and each kind of schedule stands in this part
IN_SHORT = {(family, torch.bfloat16) for family in ("ouro", "hrm_text", "hyperloop", "smollm")}


@dataclass(frozen=True)
class Case:
    """A model in one number format with two inputs."""

    model: LoopedModel
    clean: Batch
    corrupted: Batch

    @property
    def first(self) -> str:
        """The first visit of the last iteration."""
        inside = [visit for visit in self.model.schedule(LOOPS) if visit.loop == LOOPS - 1]
        return inside[0].name

    def few(self) -> dict[str, object]:
        """Where a sweep is made, so that it is short."""
        return {"sites": ["resid_pre", "mlp_out"], "visits": self.first, "positions": [0, 2]}


@cache
def case(family: str, dtype: torch.dtype) -> Case:
    toy = TOYS[family]
    model = toy.make()
    inputs = []
    for seed in range(2):
        batch = padded(toy, model, seed)
        options = {
            name: value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in batch.options.items()
        }
        inputs.append(replace(batch, options=options))
    return Case(model.to(dtype), *inputs)


class Pictured(Protocol):
    """A record with a frame and a picture."""

    def frame(self) -> pd.DataFrame: ...

    def plot(self) -> go.Figure: ...


def pictured(record: Pictured) -> pd.DataFrame:
    """The frame of a record that has been drawn, with numbers that JSON can hold."""
    assert len(json.loads(record.plot().to_json())["data"]) > 0
    return record.frame()


def logits(case: Case) -> Tensor:
    batch = case.clean
    with torch.no_grad():
        return case.model(batch.tokens, n_loops=LOOPS, mask=batch.mask, **batch.options)


def edited(case: Case) -> pd.DataFrame:
    """Logits with everything changed that the interventions can change."""
    vector = steering_vector(
        case.model, case.clean, case.corrupted, "resid_pre", n_loops=LOOPS, visit=case.first
    )
    mlp, batch = Component("mlp", visits=case.first), case.corrupted
    with ablate(case.model, mlp, how="mean", reference=batch, n_loops=LOOPS):
        one = logits(case)
    with set_to(case.model, vector, visits=case.first, positions=[1], n_loops=LOOPS):
        two = logits(case)
    assert one.dtype == two.dtype == logits(case).dtype
    return pd.DataFrame({"ablated": one.float().flatten(), "set": two.float().flatten()})


def swapped(case: Case) -> pd.DataFrame:
    with swap_input(case.model, case.corrupted, n_loops=LOOPS):
        return pd.DataFrame({"value": logits(case).float().flatten()})


def swept(case: Case) -> pd.DataFrame:
    sweep = activation_patch(case.model, case.clean, case.corrupted, METRIC, LOOPS, **case.few())
    low, high = sweep.bootstrap(resamples=20)
    assert (low <= high).all()
    assert sweep.grid(sweep.cells[-1].site).values.isfinite().all()
    assert len(sweep.plot().data) == 2
    return sweep.frame().assign(share=sweep.normalized().numpy())


METHODS: dict[str, Callable[[Case], pd.DataFrame]] = {
    "activation_patch": swept,
    "attribution_patch": lambda x: pictured(
        attribution_patch(x.model, x.clean, x.corrupted, METRIC, LOOPS, steps=2, **x.few())
    ),
    "causal_tracing": lambda x: pictured(
        causal_tracing(x.model, x.clean, x.corrupted, ANSWERS, 1, LOOPS)
    ),
    "denoising_map": lambda x: pictured(
        denoising_map(x.model, x.clean, x.corrupted, ANSWERS, [1], LOOPS)
    ),
    "noising_map": lambda x: pictured(
        noising_map(x.model, x.clean, x.corrupted, ANSWERS, [1], LOOPS)
    ),
    "path_patch": lambda x: pictured(
        path_patch(
            x.model,
            x.clean,
            x.corrupted,
            METRIC,
            Sender("mlp", visit=x.first),
            Receiver("readout"),
            LOOPS,
        )
    ),
    "path_patch_sweep": lambda x: path_patch_sweep(
        x.model,
        x.clean,
        x.corrupted,
        METRIC,
        Receiver("readout"),
        LOOPS,
        senders=[Sender("attn", visit=x.first), Sender("mlp", visit=x.first)],
    ),
    "edge_attribution": lambda x: pictured(
        edge_attribution(x.model, x.clean, x.corrupted, METRIC, LOOPS)
    ),
    "direct_logit_attribution": lambda x: pictured(
        direct_logit_attribution(x.model, x.clean, ANSWERS, n_loops=LOOPS, heads=False)
    ),
    "interventions": edited,
    "swap_input": swapped,
}


def without_a_middle(model: LoopedModel) -> bool:
    """Whether attention and MLP of some block read the same stream."""
    return any("hook_resid_mid" not in slot.sites for slot in model.plan(LOOPS))


# A method refuses a family for what the family is, in every format alike
NOT_ADDITIVE = r"needs a residual stream that is the sum of its components' outputs"
REFUSALS: dict[str, tuple[Callable[[LoopedModel], bool], str]] = {
    "edge_attribution": (
        lambda model: not model.additive_residual or without_a_middle(model),
        f"{NOT_ADDITIVE}|every block must have the site 'hook_resid_mid'",
    ),
    "direct_logit_attribution": (
        lambda model: not (model.additive_residual and model.linear_head),
        f"{NOT_ADDITIVE}|needs logits that are linear in the normalised stream",
    ),
    "swap_input": (
        lambda model: not any("hook_input" in slot.opening for slot in model.plan(LOOPS)),
        "nothing is injected into this model's iterations",
    ),
}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=() if (family, dtype) in IN_SHORT else pytest.mark.slow)
        for family in TOYS
        for dtype in FORMATS
    ],
)
def test_every_method_runs_to_its_frame(family: str, dtype: torch.dtype) -> None:
    given = case(family, dtype)
    for name, method in METHODS.items():
        refused, message = REFUSALS.get(name, (lambda model: False, ""))
        if refused(given.model):
            with pytest.raises(ValueError, match=message):
                method(given)
            continue
        frame = method(given)
        numbers = frame.select_dtypes("number")
        assert len(frame), name
        assert all(
            kind in ("Int64", "int64", "float32", "float64") for kind in numbers.dtypes.map(str)
        )
        floats = frame.select_dtypes("float").drop(columns=["standard_error"], errors="ignore")
        assert floats.notna().all(axis=None), (name, floats)
    assert not given.model.any_hook()
