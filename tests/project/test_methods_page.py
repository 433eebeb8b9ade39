"""The page of methods names every public method, its examples run, and they show what the text
around them says.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import loopscope
from paths import DOCS

PAGE = (DOCS / "methods.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `")]


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """What the page's examples leave behind, run in order."""
    names: dict[str, Any] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)):
        exec(compile(block, f"methods.md, block {number}", "exec"), names)
    return names


def test_every_public_method_has_a_row() -> None:
    calls = {
        name
        for name, home in loopscope._HOME.items()
        if home.startswith("interp.") and name[0].islower()
    }
    assert sorted(row.split("`")[1] for row in ROWS) == sorted(
        calls - {"logit_diff", "logit_margin"}
    )


def test_every_public_record_and_rule_is_named() -> None:
    named = set(re.findall(r"`(\w+)", "\n".join(ROWS)))
    assert {
        name
        for name, home in loopscope._HOME.items()
        if home.startswith("interp.") and name[0].isupper()
    } <= named


def test_rows_have_four_columns() -> None:
    assert {len(re.findall(r"[^ |][^|]* \|", row)) for row in ROWS} == {4}


def test_a_clean_state_brings_the_answer_back_along_one_path(shown: dict[str, Any]) -> None:
    values = shown["grid"].values[..., 0]
    assert values[0, 0, 0] == pytest.approx(1.0)  # the whole input
    assert values[3, 1, 2] > 0.9
    assert values[3, 1, :2].abs().max() < 0.1
    assert shown["grid"].positions == (0, 1, 2)


def test_late_mlps_reach_the_answer(shown: dict[str, Any]) -> None:
    largest = shown["paths"].nlargest(3, "effect")
    assert set(largest["kind"]) == {"mlp"}
    assert set(largest["layer"]) == {1}
    assert largest["loop"].min() >= 1


def test_an_iteration_without_its_mlps_answers_worse(shown: dict[str, Any]) -> None:
    assert shown["ablated"].shape == (3,)
    whole = loopscope.readout_lens(shown["model"], shown["clean"], 4).margin(shown["answers"])[-1]
    assert (whole - shown["ablated"]).min() > 5.0


def test_steering_gives_the_second_answer(shown: dict[str, Any]) -> None:
    assert shown["steered"].tolist() == [[shown["answers"][1].item()]]


def test_the_estimate_ranks_the_cells_of_the_sweep(shown: dict[str, Any]) -> None:
    ours, exact = (shown[name].normalized() for name in ("estimate", "sweep"))
    assert torch.corrcoef(torch.stack([ours, exact]))[0, 1] > 0.9
    assert set(shown["terms"]["component"]) == {"embed", "head", "attn_bias", "mlp", "constant"}
