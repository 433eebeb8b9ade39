"""The trainer: what a run sees, that it resumes bit for bit, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoints.load import load, read_card
from models.recurrent_depth import RecurrentDepth
from tasks.facts import is_held_out
from tasks.graphs import read_graph
from tasks.questions import by_hops, read_questions
from training.recipes import RECIPES, Loops, Recipe, Stage, curriculum
from training.setup import Questions, fresh_model
from training.trainer import Trainer, train

TINY = Recipe(
    name="tiny",
    n_entities=7,
    n_relations=3,
    n_layers=1,
    d_model=15,
    n_heads=5,
    loops=Loops(mean=2.0, low=1, high=3),
    eval_loops=3,
    stages=(
        Stage(hops=(1, 2), max_updates=13, gate_hops=2, gate=1.0, lr=1e-2, lr_end=1e-2, warmup=5),
        Stage(hops=(1, 2, 3), max_updates=11, lr=1e-2, lr_end=1e-3),
    ),
    batch_size=12,
    weight_decay=0.1,
    eval_every=4,
    eval_questions=9,
)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


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
    stage = Stage(hops=(1,), max_updates=10, lr=1.0, lr_end=0.0, warmup=2)
    assert [round(stage.rate(update), 3) for update in (0, 1, 2, 5, 10, 12)] == [0.5, 0.9, 0.8, 0.5, 0.0, 0.0]


def test_a_curriculum_replays_all_earlier_hops() -> None:
    stages = curriculum(2, 4, max_updates=5, gate=0.9, lr=1e-3, warmup=3)
    assert [stage.hops for stage in stages] == [(1, 2), (1, 2, 3), (1, 2, 3, 4)]
    assert [stage.gate_hops for stage in stages] == [2, 3, 4]
    assert [stage.warmup for stage in stages] == [3, 0, 0]


def test_batches_depend_on_the_seed_and_the_update_alone() -> None:
    stage, twin = TINY.stages[1], Questions(TINY)
    for update in range(20):
        ours, theirs = Questions(TINY).batch(stage, update), twin.batch(stage, update)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert ours.n_loops == theirs.n_loops
    other = Questions(replace(TINY, seed=1)).batch(stage, 3)
    assert other.tokens.shape != twin.batch(stage, 3).tokens.shape or not torch.equal(other.tokens, twin.batch(stage, 3).tokens)


def test_training_never_sees_a_held_out_fact() -> None:
    questions, first_relation = Questions(TINY), 1 + TINY.n_entities
    for update in range(40):
        tokens = questions.batch(TINY.stages[1], update).tokens.numpy()
        assert not is_held_out(tokens[:, 0] - 1, tokens[:, 1:] - first_relation).any()
    tokens = questions.held_out(3, 30).tokens.numpy()
    assert is_held_out(tokens[:, 0] - 1, tokens[:, 1:] - first_relation).all()


def test_a_fresh_loop_is_the_identity() -> None:
    model = fresh_model(TINY)
    state = model.begin(torch.tensor([[1, 8, 9]]), n_loops=3)
    assert torch.equal(model.advance(state).resid, state.resid)


def test_loss_and_gradients_equal_those_of_padding_to_50() -> None:
    def gradients(
        model: RecurrentDepth, tokens: torch.Tensor, mask: torch.Tensor, column: int, answers: torch.Tensor
    ) -> list[torch.Tensor]:
        state = model.advance(model.begin(tokens, mask, n_loops=3))
        loss = F.cross_entropy(model.readout(state, torch.full((len(tokens),), column)), answers)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    model = fresh_model(TINY).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    batch = Questions(TINY).batch(TINY.stages[1], 5)
    length = batch.tokens.shape[1]
    padded = F.pad(batch.tokens, (0, 50 - length))
    mask = (torch.arange(50) < length).expand(padded.shape)
    one = F.pad(batch.tokens, (0, 1))
    for column, short, width in ((length - 1, batch.tokens, length), (length, one, length + 1)):
        ours = gradients(model, short, mask[:, :width], column, batch.answers)
        theirs = gradients(model, padded, mask, column if column < length else 49, batch.answers)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_a_run_improves_exports_and_logs(tmp_path: Path) -> None:
    recipe = replace(TINY, stages=(replace(TINY.stages[0], max_updates=200, gate=0.99), TINY.stages[1]))
    trainer = Trainer(recipe, tmp_path / "run")
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert [line["update"] for line in lines] == [4 * (i + 1) for i in range(len(lines))]
    model, card = load(tmp_path / "run" / "final"), read_card(tmp_path / "run" / "final")
    assert same(dict(model.state_dict()), weights(trainer))
    assert str(model.read_at) == card["readout"] == "last_real"
    assert card["trained_hops"] == 3
    assert card["updates"] == trainer.progress.update
    assert set(card["accuracy"]) == {str(k) for k in range(1, 10)}
    assert all(len(row) == 24 for row in card["accuracy"].values())
    assert read_card(tmp_path / "run" / "stage_2_hops")["trained_hops"] == 2
    asked = by_hops(read_questions(tmp_path / "run" / "final" / "test.json"))
    graph = read_graph(tmp_path / "run" / "final" / "graph.json")
    assert {hops: len(group) for hops, group in asked.items()} == dict.fromkeys(range(1, 10), 50)
    assert all(graph.walk(question.text)[-1] == question.answer for group in asked.values() for question in group)


def test_a_gate_ends_its_stage_early(tmp_path: Path) -> None:
    recipe = replace(TINY, stages=(replace(TINY.stages[0], max_updates=100, gate=-1.0), TINY.stages[1]))
    trainer = Trainer(recipe, tmp_path)
    trainer.run()
    assert trainer.progress.update == TINY.eval_every + TINY.stages[1].max_updates


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path).save()
    with pytest.raises(ValueError, match="holds a run already; pass --resume"):
        Trainer(TINY, tmp_path)
    with pytest.raises(ValueError, match="was written by a run of another recipe"):
        Trainer(replace(TINY, batch_size=13), tmp_path, resume=True)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tmp_path)
    trainer.save()
    before = (tmp_path / "state.pt").read_bytes()
    with torch.no_grad():
        trainer.model.embedding.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss became nan at update 0"):
        trainer.run()
    assert (tmp_path / "state.pt").read_bytes() == before


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_training import TINY
from training.trainer import Trainer
trainer = Trainer(TINY, Path(sys.argv[1]), resume=True)
trainer.save()
print("ready", flush=True)
trainer.run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.02, 0.07, 0.13])
def test_a_killed_run_resumes_to_the_identical_weights(tmp_path: Path, delay: float) -> None:
    Trainer(TINY, tmp_path / "whole").run()
    tests = str(Path(__file__).parent)
    child = [sys.executable, "-c", CHILD, str(tmp_path / "killed"), tests]
    with subprocess.Popen(child, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
    resumed = Trainer(TINY, tmp_path / "killed", resume=True)
    resumed.run()
    whole = load(tmp_path / "whole" / "final")
    assert same(dict(load(tmp_path / "killed" / "final").state_dict()), dict(whole.state_dict()))

    def lines(run: str) -> list[dict[str, object]]:
        found = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        return [{**line, "seconds": 0} for line in found]

    assert lines("killed") == lines("whole")


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"there is no recipe 'maxi'; the recipes are mini/multi_hop/r_dyn"):
        train("maxi", None, False)


def test_the_recipes_are_of_one_graph_and_size() -> None:
    minis = [recipe for name, recipe in RECIPES.items() if name.startswith("mini/multi_hop/")]
    assert len({(r.n_entities, r.n_relations, r.graph_seed, r.n_layers, r.d_model, r.n_heads) for r in minis}) == 1
    assert {recipe.name.rpartition("/")[2] for recipe in minis} == {"r_dyn", "r2", "r4", "r6"}
    assert all(sum(p.numel() for p in fresh_model(recipe).parameters()) < 1_000_000 for recipe in minis)
