"""The accuracy of a model on test questions: while training, and for its card."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from loopscope.interp.common.ranking import top_token
from loopscope.interp.exits.halting import HaltingRule, halting
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.training.questions import Questions
from loopscope.training.setup import Answering, TrainingBatch, pack

_TABLE_LOOPS, _TABLE_QUESTIONS = 24, 200
_RULE_COLUMNS = 50  # of the released multi-hop inputs


@torch.no_grad()
def accuracies(model: RecurrentDepth, questions: Questions, groups: list[str]) -> dict[str, float]:
    """The share of right answers in each group, at the iterations at which the recipe judges."""
    count = questions.recipe.eval_questions
    return {
        group: round(float(_right(model, questions, group, count).float().mean()), 4)
        for group in groups
    }


def _right(
    model: RecurrentDepth, questions: Questions, group: str, count: int
) -> Bool[Tensor, " question"]:
    recipe = questions.recipe
    batch = _test_batch(model, questions, group, count, recipe.eval_loops)
    if recipe.halting_gate:
        rule = HaltingRule.while_training(recipe.padded_to or _RULE_COLUMNS)
        return halting(model, batch.inputs, rule, recipe.eval_loops).correct(batch.answers)
    right: Bool[Tensor, " question"] = top_token(Answering(model)(batch)) == batch.answers
    return right


@torch.no_grad()
def accuracy_table(
    model: RecurrentDepth, questions: Questions, groups: list[str]
) -> dict[str, list[float]]:
    """The accuracy of each group after 1 to 24 iterations, from one run of up to 200 questions."""
    table = {}
    for group in groups:
        batch = _test_batch(model, questions, group, _TABLE_QUESTIONS, _TABLE_LOOPS)
        right = readout_lens(model, batch.inputs, _TABLE_LOOPS).correct(batch.answers)
        table[group] = [round(share, 3) for share in right.float().mean(1).tolist()]
    return table


def _test_batch(
    model: RecurrentDepth, questions: Questions, group: str, count: int, n_loops: int
) -> TrainingBatch:
    return pack(questions.recipe, [questions.held_out(group, count)], n_loops).to(
        model.embedding.device
    )
