"""The trainer: what a run sees, that it resumes bit for bit, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loopscope.checkpoints.load import load, read_card
from loopscope.interp.exits.halting import HaltingRule, halting
from loopscope.tasks.graphs import read_graph
from loopscope.tasks.questions import by_hops, read_questions
from loopscope.training.catalog import RECIPES
from loopscope.training.examination import accuracies
from loopscope.training.runs import train
from loopscope.training.setup import fresh_model, fresh_optimizer, pack
from loopscope.training.trainer import Trainer
from paths import HELPERS
from tiny_run import TINY


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def without_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages end without a checkpoint, whose table of accuracies takes most of the time."""
    monkeypatch.setattr(Trainer, "export", lambda trainer, name: None)


def test_a_fresh_loop_is_the_identity() -> None:
    model = fresh_model(TINY)
    state = model.begin(torch.tensor([[1, 8, 9]]), n_loops=3)
    assert torch.equal(model.advance(state).resid, state.resid)
    other = fresh_model(replace(TINY, zero_init=False))
    assert not torch.equal(
        other.advance(other.begin(torch.tensor([[1, 8, 9]]), n_loops=3)).resid, state.resid
    )


@pytest.mark.slow
def test_a_run_improves_exports_and_logs(tmp_path: Path) -> None:
    recipe = replace(
        TINY, stages=(replace(TINY.stages[0], max_updates=200, gate=0.99), TINY.stages[1])
    )
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
    assert read_card(tmp_path / "run" / "2_hops")["trained_hops"] == 2
    asked = by_hops(read_questions(tmp_path / "run" / "final" / "test.json"))
    graph = read_graph(tmp_path / "run" / "final" / "graph.json")
    assert {hops: len(group) for hops, group in asked.items()} == dict.fromkeys(range(1, 10), 50)
    assert all(
        graph.walk(question.text)[-1] == question.answer
        for group in asked.values()
        for question in group
    )


@pytest.mark.usefixtures("without_export")
def test_a_gate_ends_its_stage_early(tmp_path: Path) -> None:
    recipe = replace(
        TINY, stages=(replace(TINY.stages[0], max_updates=100, gate=-1.0), TINY.stages[1])
    )
    trainer = Trainer(recipe, tmp_path)
    trainer.run()
    assert trainer.progress.update == TINY.eval_every + TINY.stages[1].max_updates


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path).save()
    with pytest.raises(ValueError, match="holds a run already; pass --resume"):
        Trainer(TINY, tmp_path)
    with pytest.raises(ValueError, match="was written by a run of another recipe"):
        Trainer(replace(TINY, batch_size=13), tmp_path, resume=True)


@pytest.mark.shapes
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tmp_path)
    trainer.save()
    before = (tmp_path / "state.pt").read_bytes()
    with torch.no_grad():
        trainer.model.embedding.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss became nan at update 0"):
        trainer.run()
    assert (tmp_path / "state.pt").read_bytes() == before


@dataclass(frozen=True)
class Finished:
    """A finished run of the smallest recipe: its folder, and the calls that wandb was given."""

    folder: Path
    reported: list[tuple[dict[str, float], int]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = Finished(tmp_path_factory.mktemp("finished"), [])
    run = SimpleNamespace(
        log=lambda numbers, step: done.reported.append((numbers, step)),
        finish=lambda: done.reported.append(({}, -1)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
        Trainer(TINY, done.folder, release=True, wandb=True).run()
    return done


@pytest.mark.slow
def test_the_same_numbers_go_to_tensorboard(finished: Finished) -> None:
    (events,) = (finished.folder / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"loss", b"lr", b"accuracy/2", b"accuracy/3"))


def test_without_wandb_asking_for_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="needs the package wandb; install it"):
        Trainer(TINY, tmp_path, wandb=True)


def test_wandb_is_given_the_same_numbers(finished: Finished) -> None:
    lines = [json.loads(line) for line in (finished.folder / "log.jsonl").read_text().splitlines()]
    assert [step for _, step in finished.reported] == [*(line["update"] for line in lines), -1]
    assert finished.reported[0][0]["accuracy/2"] == lines[0]["accuracy"]["2"]


def test_checkpoints_in_the_released_layout_give_the_same_logits(finished: Finished) -> None:
    folder = finished.folder
    for stage, epoch in (("2_hops", 3), ("final", 6)):
        ours, released = load(folder / stage), load(folder / "released" / stage)
        assert (folder / "released" / stage / f"checkpoint_epoch_{epoch}.pt").is_file()
        assert str(released.read_at) == "last_real"
        tokens = torch.tensor([[1, 8, 9], [2, 9, 10]])
        assert torch.equal(ours(tokens, n_loops=3), released(tokens, n_loops=3))


def test_dropout_is_on_while_training_only_and_the_same_after_a_resume(tmp_path: Path) -> None:
    recipe = replace(TINY, dropout=0.3, zero_init=False)
    whole, first = Trainer(recipe, tmp_path / "whole"), Trainer(recipe, tmp_path / "parts")
    stage = recipe.stages[0]
    losses = [whole.step(stage) for _ in range(6)]
    assert [first.step(stage) for _ in range(3)] == losses[:3]
    first.save()
    second = Trainer(recipe, tmp_path / "parts", resume=True)
    assert [second.step(stage) for _ in range(3)] == losses[3:]
    tokens = torch.tensor([[1, 8, 9]])
    assert not torch.equal(whole.model(tokens, n_loops=2), whole.model(tokens, n_loops=2))
    whole.model.eval()
    assert torch.equal(whole.model(tokens, n_loops=2), whole.model(tokens, n_loops=2))
    assert Trainer(replace(recipe, dropout=0.0), tmp_path / "without").step(stage) != losses[0]


def test_only_matrices_decay_when_asked() -> None:
    model = fresh_model(TINY)
    decayed, rest = fresh_optimizer(replace(TINY, decay_matrices_only=True), model).param_groups
    assert decayed["weight_decay"] == TINY.weight_decay > rest["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(p) for p in model.parameters() if p.ndim == 2}
    (every,) = fresh_optimizer(TINY, model).param_groups
    assert len(every["params"]) == len(list(model.parameters()))


@pytest.mark.shapes
@pytest.mark.usefixtures("without_export")
def test_a_restart_forgets_the_moments(tmp_path: Path) -> None:
    recipe = replace(
        TINY, stages=(TINY.stages[0], replace(TINY.stages[1], restart=True, max_updates=1))
    )
    trainer = Trainer(recipe, tmp_path)
    trainer.run()
    assert {int(values["step"]) for values in trainer.optimizer.state_dict()["state"].values()} == {
        1
    }


@pytest.mark.usefixtures("without_export")
def test_a_gate_is_not_asked_before_its_forced_updates(tmp_path: Path) -> None:
    recipe = replace(
        TINY,
        stages=(replace(TINY.stages[0], max_updates=100, gate=-1.0, min_updates=9), TINY.stages[1]),
    )
    trainer = Trainer(recipe, tmp_path)
    trainer.run()
    assert trainer.progress.update == 12 + TINY.stages[1].max_updates


@pytest.mark.usefixtures("without_export")
def test_a_halting_gate_judges_where_the_rule_stops(tmp_path: Path) -> None:
    recipe = replace(TINY, halting_gate=True)
    trainer = Trainer(recipe, tmp_path)
    trainer.run()
    trainer.model.eval()
    batch = pack(recipe, [trainer.questions.held_out("2", recipe.eval_questions)], 3)
    stopped = halting(trainer.model, batch.inputs, HaltingRule.while_training(50), 3).correct(
        batch.answers
    )
    expected = round(float(stopped.float().mean()), 4)
    assert accuracies(trainer.model, trainer.questions, ["2"]) == {"2": expected}


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from tiny_run import TINY
from loopscope.training.trainer import Trainer
trainer = Trainer(TINY, Path(sys.argv[1]), resume=True)
trainer.save()
print("ready", flush=True)
trainer.run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.02, 0.07, 0.13])
def test_a_killed_run_resumes_to_the_identical_weights(tmp_path: Path, delay: float) -> None:
    Trainer(TINY, tmp_path / "whole").run()
    tests = str(HELPERS)
    child = [sys.executable, "-c", CHILD, str(tmp_path / "killed"), tests]
    with subprocess.Popen(
        child, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
    resumed = Trainer(TINY, tmp_path / "killed", resume=True)
    resumed.run()
    whole = load(tmp_path / "whole" / "final")
    assert same(dict(load(tmp_path / "killed" / "final").state_dict()), dict(whole.state_dict()))

    def lines(run: str) -> list[dict[str, object]]:
        found = [
            json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()
        ]
        return [{**line, "seconds": 0} for line in found]

    assert lines("killed") == lines("whole")


def test_training_leaves_the_callers_random_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    before = torch.get_rng_state()
    train("tiny", tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"there is no recipe 'maxi'; the recipes are mini/multi_hop/r_dyn"
    ):
        train("maxi")
