"""Recipes: iterations, rates, curricula, and what the named ones promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loopscope.training.catalog import RECIPES, extrapolation
from loopscope.training.language.recipes import LANGUAGE_RECIPES
from loopscope.training.minis import PLACES, ship
from loopscope.training.puzzles.recipes import PUZZLE_RECIPES
from loopscope.training.recipes import Loops, Recipe, Stage, curriculum
from loopscope.training.setup import clip_, fresh_model


def test_loops_are_clipped_poisson_draws() -> None:
    rng = np.random.default_rng(0)
    draws = [Loops(mean=4.0, low=2, high=8).draw(rng) for _ in range(4000)]
    assert (min(draws), max(draws)) == (2, 8)
    assert 3.9 < np.mean(draws) < 4.2
    assert {Loops.fixed(6).draw(rng) for _ in range(20)} == {6}
    assert str(Loops(mean=4.0, low=2, high=8)) == "clip(Poisson(4), 2, 8)"
    with pytest.raises(ValueError, match="1 <= low <= high, got low=3, high=2"):
        Loops(mean=2.0, low=3, high=2)


def test_the_rate_rises_then_falls_linearly() -> None:
    stage = Stage(name="one", hops=(1,), max_updates=10, lr=1.0, lr_end=0.0, warmup=2)
    assert [round(stage.rate(update), 3) for update in (0, 1, 2, 5, 10, 12)] == [
        0.5,
        0.9,
        0.8,
        0.5,
        0.0,
        0.0,
    ]


def test_a_curriculum_replays_all_earlier_hops() -> None:
    stages = curriculum(2, 4, max_updates=5, gate=0.9, lr=1e-3, warmup=3)
    assert [stage.hops for stage in stages] == [(1, 2), (1, 2, 3), (1, 2, 3, 4)]
    assert [stage.gate_on for stage in stages] == ["2", "3", "4"]
    assert [stage.warmup for stage in stages] == [3, 0, 0]


def test_a_rate_may_stay_before_it_falls() -> None:
    stage = Stage(name="one", hops=(1,), max_updates=10, lr=1.0, lr_end=0.0, fall_from=0.6)
    assert [round(stage.rate(update), 3) for update in (0, 5, 6, 8, 10)] == [
        1.0,
        1.0,
        1.0,
        0.5,
        0.0,
    ]


def test_a_curriculum_can_restart_with_a_smaller_rate_at_each_stage() -> None:
    stages = curriculum(
        2,
        5,
        max_updates=5,
        lr=1e-4,
        lr_end=0.0,
        lr_decay=0.5,
        lr_floor=2e-5,
        warmup=3,
        restart=True,
        forced_first=7,
    )
    assert [round(stage.lr * 1e5, 3) for stage in stages] == [10, 5, 2.5, 2]
    assert [stage.warmup for stage in stages] == [3, 3, 3, 3]
    assert [stage.restart for stage in stages] == [False, True, True, True]
    assert [stage.min_updates for stage in stages] == [7, 0, 0, 0]


def test_papers_and_codes_defaults_are_both_named() -> None:
    paper, code = RECIPES["paper/systematicity/r4_l4"], RECIPES["code/systematicity/r4_l4"]
    assert (paper.batch_size, paper.weight_decay) == (512, 0.01)
    assert (code.batch_size, code.weight_decay, code.label_smoothing, code.dropout) == (
        128,
        0.1,
        0.1,
        0.1,
    )
    dynamic = RECIPES["paper/multi_hop/r_dyn"]
    assert str(dynamic.loops) == "clip(Poisson(4), 2, 8)"
    assert dynamic.halting_gate
    assert not RECIPES["paper/multi_hop/r4"].halting_gate
    slower = extrapolation("own", Loops.fixed(4), max_hops=4, lr_decay=0.9, forced_first=133_000)
    assert [round(stage.lr * 1e5, 2) for stage in slower.stages] == [10, 9, 8.1]
    assert slower.stages[0].min_updates == 133_000


def test_recipes_that_contradict_themselves_are_refused() -> None:
    recipe = RECIPES["mini/multi_hop/r4"]
    with pytest.raises(ValueError, match="padded_to must be given"):
        replace(recipe, readout="last_column")
    with pytest.raises(ValueError, match=r"each with a name of its own, got \['a', 'a'\]"):
        replace(recipe, stages=(Stage(name="a", hops=(1,), max_updates=1, lr=1.0, lr_end=1.0),) * 2)


def test_the_multi_hop_miniatures_are_of_one_graph_and_size() -> None:
    minis = [recipe for name, recipe in RECIPES.items() if name.startswith("mini/multi_hop/")]
    assert len({(r.task, r.n_layers, r.d_model, r.n_heads) for r in minis}) == 1
    assert {recipe.name.rpartition("/")[2] for recipe in minis} == {"r_dyn", "r2", "r4", "r6"}


@pytest.mark.parametrize(
    "recipe",
    [recipe for name, recipe in RECIPES.items() if name.startswith("mini/")],
    ids=lambda r: str(r.name),
)
def test_a_miniature_has_at_most_a_million_parameters(recipe: Recipe) -> None:
    assert sum(p.numel() for p in fresh_model(recipe).parameters()) <= 1_000_000


def test_every_miniature_is_trained_and_shipped_from_stages_that_it_has() -> None:
    assert set(PLACES) == {
        name for name in (*RECIPES, *LANGUAGE_RECIPES, *PUZZLE_RECIPES) if name.startswith("mini/")
    }
    for name, places in PLACES.items():
        recipe = RECIPES.get(name) or LANGUAGE_RECIPES.get(name) or PUZZLE_RECIPES[name]
        assert set(places) <= {stage.name for stage in recipe.stages}


def test_shipping_copies_the_log_and_the_stages_of_a_finished_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage in ("2_hops", "6_hops", "final"):
        (run / stage).mkdir(parents=True)
        (run / stage / "model.safetensors").write_text(stage)
    (run / "log.jsonl").write_text("{}")
    ship("mini/multi_hop/r_dyn", run, tmp_path / "shipped")
    home = tmp_path / "shipped" / "mini" / "multi_hop" / "r_dyn"
    files = {
        str(path.relative_to(home)): path.read_text() for path in home.rglob("*") if path.is_file()
    }
    weights = {
        "model.safetensors": "final",
        "2_hops/model.safetensors": "2_hops",
        "6_hops/model.safetensors": "6_hops",
    }
    assert files == {"log.jsonl": "{}"} | weights
    (run / "final" / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="has no finished checkpoint 'final'; train the recipe mini/multi_hop/r_dyn",
    ):
        ship("mini/multi_hop/r_dyn", run, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("most", [1e-3, 0.7, 50.0, 1e9])
def test_gradients_are_clipped_as_pytorch_clips_them(most: float) -> None:
    layers = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        layer(torch.arange(10.0).view(2, 5)).square().sum().backward()
    clip_(layers[0].parameters(), most)
    torch.nn.utils.clip_grad_norm_(layers[1].parameters(), most)
    for ours, theirs in zip(*(layer.parameters() for layer in layers), strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_a_gradient_that_is_no_number_stays_one() -> None:
    layer = torch.nn.Linear(2, 1)
    layer(torch.tensor([[float("nan"), 1.0]])).sum().backward()
    clip_(layer.parameters(), 1.0)
    assert layer.weight.grad is not None
    assert layer.weight.grad.isnan().all()
