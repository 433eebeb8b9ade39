"""What a run is asked: it depends on the recipe and the progress alone, tests are never trained on,
and padding is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.tasks.facts import FactBatch, is_among, is_held_out
from loopscope.tasks.two_hop import TEST_GROUPS
from loopscope.training.questions import FixedFacts, Questions, TwoHop, questions_of
from loopscope.training.recipes import Loops, MultiHopTask, Recipe, Stage, TwoHopTask
from loopscope.training.setup import Answering, TrainingBatch, fresh_model, pack
from loopscope.training.state import Progress

STAGES = (
    Stage(name="two", hops=(1, 2), max_updates=50, lr=1e-3, lr_end=1e-3),
    Stage(name="three", hops=(1, 2, 3), max_updates=50, lr=1e-3, lr_end=1e-3),
)
FRESH = Recipe(
    name="fresh",
    task=MultiHopTask(n_entities=7, n_relations=3, graph_seed=0, train=None),
    n_layers=2,
    d_model=15,
    n_heads=5,
    loops=Loops.fixed(3),
    eval_loops=3,
    stages=STAGES,
    batch_size=11,
    weight_decay=0.1,
)
FIXED = replace(
    FRESH,
    name="fixed",
    task=MultiHopTask(n_entities=7, n_relations=3, graph_seed=0, train=40, test=9),
)
TWO_HOP = replace(
    FRESH,
    name="two hop",
    task=TwoHopTask(
        n_entities=19, n_relations=5, out_degree=3, ood_share=0.2, phi=1.5, iid_share=0.1, test=20
    ),
    stages=STAGES[:1],
)
LAST_COLUMN = replace(FIXED, readout="last_column", padded_to=50)
RECIPES = pytest.mark.parametrize(
    "recipe", [FRESH, FIXED, TWO_HOP], ids=lambda recipe: str(recipe.name)
)


def facts(questions: Questions, update: int, stage: int = 0) -> list[FactBatch]:
    progress = Progress(stage=stage, stage_update=update, update=update)
    return questions.batch(
        questions.recipe.stages[stage],
        progress,
        np.random.default_rng((questions.recipe.seed, update)),
    )


@RECIPES
def test_batches_depend_on_the_seed_and_the_update_alone(recipe: Recipe) -> None:
    twin, other = questions_of(recipe), questions_of(replace(recipe, seed=1))
    different = []
    for update in reversed(range(20)):
        ours, theirs = (
            pack(recipe, facts(questions_of(recipe), update), 1),
            pack(recipe, facts(twin, update), 1),
        )
        assert torch.equal(ours.inputs.tokens, theirs.inputs.tokens)
        assert torch.equal(ours.answers, theirs.answers)
        different.append(
            pack(recipe, facts(other, update), 1).inputs.tokens.tolist()
            != ours.inputs.tokens.tolist()
        )
    assert all(different)


@RECIPES
def test_every_batch_has_the_recipes_size(recipe: Recipe) -> None:
    questions = questions_of(recipe)
    assert {sum(len(batch) for batch in facts(questions, update)) for update in range(30)} == {11}


def test_fresh_facts_are_never_held_out_ones() -> None:
    questions, first_relation = questions_of(FRESH), 1 + 7
    for update in range(40):
        for batch in facts(questions, update, stage=1):
            assert not is_held_out(
                batch.tokens[:, 0] - 1, batch.tokens[:, 1:] - first_relation
            ).any()
    tokens = questions.held_out("3", 30).tokens
    assert is_held_out(tokens[:, 0] - 1, tokens[:, 1:] - first_relation).all()


@pytest.mark.parametrize("recipe", [FIXED, TWO_HOP], ids=lambda recipe: str(recipe.name))
def test_an_epoch_shows_every_training_fact_once_and_no_test_fact(recipe: Recipe) -> None:
    questions = questions_of(recipe)
    assert isinstance(questions, FixedFacts | TwoHop)
    stage = len(recipe.stages) - 1
    hops = recipe.stages[stage].hops
    updates = questions.updates_per_epoch(hops)
    for epoch in (0, 1):
        seen: dict[int, list[FactBatch]] = {k: [] for k in hops}
        for update in range(epoch * updates, (epoch + 1) * updates):
            for batch in facts(questions, update, stage):
                seen[batch.hops].append(batch)
        rows = {k: np.concatenate([batch.rows for batch in batches]) for k, batches in seen.items()}
        total = sum(len(questions.train[k]) for k in hops)
        assert (
            sum(len(r) for r in rows.values())
            == updates * recipe.batch_size
            > total - recipe.batch_size
        )
        for k in hops:
            assert len(np.unique(rows[k], axis=0)) == len(rows[k])
            assert {tuple(row) for row in rows[k].tolist()} <= {
                tuple(row) for row in questions.train[k].rows.tolist()
            }
    first, second = (
        pack(recipe, facts(questions, update, stage), 1).inputs.tokens for update in (0, updates)
    )
    assert first.tolist() != second.tolist()


@pytest.mark.shapes
def test_test_groups_are_not_trained_on() -> None:
    fixed, two_hop = questions_of(FIXED), questions_of(TWO_HOP)
    assert isinstance(fixed, FixedFacts)
    assert isinstance(two_hop, TwoHop)
    assert fixed.groups(3) == ["1", "2", "3"]
    assert fixed.beyond(3) == [str(k) for k in range(1, 10)]
    assert not any(is_among(fixed.held_out(str(k), 9), fixed.train[k]).any() for k in (2, 3))
    assert two_hop.groups(2) == list(TEST_GROUPS)
    for group in ("test_inferred_iid", "test_inferred_ood"):
        assert len(two_hop.held_out(group, 5)) > 0
        assert not is_among(two_hop.held_out(group, 50), two_hop.train[2]).any()
    assert is_among(two_hop.held_out("train_inferred", 50), two_hop.train[2]).all()


def test_a_random_graph_has_relations_that_are_no_permutations() -> None:
    shortcut = questions_of(
        replace(
            FRESH, task=MultiHopTask(n_entities=7, n_relations=3, permutations=False, train=None)
        )
    )
    tails = np.array(shortcut.graph.rows)
    assert any(len(set(row)) < len(row) for row in tails.tolist())


def answer_gradients(
    answer: Callable[[RecurrentDepth], torch.Tensor], batch: TrainingBatch, recipe: Recipe
) -> list[torch.Tensor]:
    """Loss and gradients, in float64 and with weights far from zero."""
    model = fresh_model(recipe).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.2
                * torch.randn(
                    parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
                )
            )
    loss = F.cross_entropy(answer(model), batch.answers)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("recipe", [FIXED, LAST_COLUMN], ids=["last real token", "last column"])
def test_loss_and_gradients_equal_those_of_padding_to_50(recipe: Recipe) -> None:
    batch = pack(recipe, facts(questions_of(recipe), 3, stage=1), 3)
    longest = int(batch.inputs.mask.sum(1).max())
    assert batch.inputs.tokens.shape[1] == longest + (recipe.readout == "last_column")
    assert len(set(batch.inputs.mask.sum(1).tolist())) > 1

    def padded_to_50(model: RecurrentDepth) -> torch.Tensor:
        tokens, mask = (
            F.pad(x, (0, 50 - x.shape[1])) for x in (batch.inputs.tokens, batch.inputs.mask)
        )
        columns = (
            batch.inputs.readout
            if recipe.readout == "last_real"
            else torch.full((len(tokens),), 49)
        )
        return model.readout(model.advance(model.begin(tokens, mask, n_loops=3)), columns)

    ours = answer_gradients(lambda model: Answering(model)(batch), batch, recipe)
    for a, b in zip(ours, answer_gradients(padded_to_50, batch, recipe), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("recipe", [FIXED, LAST_COLUMN], ids=["last real token", "last column"])
def test_only_real_tokens_and_readouts_are_computed(recipe: Recipe) -> None:
    batch = pack(recipe, facts(questions_of(recipe), 3, stage=1), 3)
    model, rows = fresh_model(recipe), set()
    for block in model.blocks:
        block.register_forward_hook(
            lambda block, arguments, output: rows.add(output.shape[:2].numel())
        )
    Answering(model)(batch)
    assert rows == {
        int(batch.inputs.mask.sum()) + (recipe.readout == "last_column") * len(batch.answers)
    }


@pytest.mark.shapes
def test_learned_positions_keep_the_padded_width_of_the_last_column() -> None:
    recipe = replace(TWO_HOP, readout="last_column", padded_to=5, positions="learned")
    batch = pack(recipe, facts(questions_of(recipe), 0), 3)
    assert batch.inputs.tokens.shape == (11, 5)
    assert set(batch.inputs.readout.tolist()) == {4}
    assert Answering(fresh_model(recipe))(batch).shape == (11, fresh_model(recipe).cfg.d_vocab)


def test_the_answers_are_those_of_the_graph() -> None:
    questions = questions_of(FIXED)
    model = fresh_model(FIXED)
    batch = pack(FIXED, facts(questions, 0, stage=1), 3)
    assert model.vocab is not None
    for tokens, length, answer in zip(
        batch.inputs.tokens, batch.inputs.mask.sum(1).tolist(), batch.answers.tolist(), strict=True
    ):
        text = "".join(model.vocab.words[i] for i in tokens[:length])
        assert questions.graph.walk(text)[-1] == model.vocab.words[answer]
