"""The page of methods is what its command writes; the examples show what their text says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import loopscope
from loopscope.analyses.pages import methods
from paths import DOCS

EXAMPLES = (DOCS / "examples.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """What the page's examples leave behind, run in order."""
    names: dict[str, Any] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", EXAMPLES, flags=re.S)):
        exec(compile(block, f"examples.md, block {number}", "exec"), names)
    return names


def test_the_page_is_what_the_command_writes() -> None:
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == methods.page()


def test_every_public_call_of_interp_has_a_row_that_says_what_it_does() -> None:
    rows = [row for table in methods.run().values() for row in table.itertuples(index=False)]
    calls = {name for name, home in loopscope._HOME.items() if ".interp." in home}
    assert {row.call.strip("`") for row in rows} == calls
    assert min(len(row[1]) for row in rows) > 9
    assert all(row.returns for row in rows if row.call[1].islower())


def test_a_sentence_becomes_a_figure(shown: dict[str, Any]) -> None:
    assert "CC(=O)N, answer" in shown["figure"].layout.title.text
    assert shown["figure"].data[0].text == shown["picture"].data[0].text


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
