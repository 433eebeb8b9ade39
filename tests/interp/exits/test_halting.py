"""Adaptive halting: each rule against a loop that looks at one example at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from family_toys import TOYS
from family_toys import padded as family_padded
from loopscope.interp.exits.exits import EntropyBelow, apply_criterion
from loopscope.interp.exits.halting import Halting, HaltingRule, apply_rule, halting
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.lens.record import Lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.registry import build
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_VOCAB,
    LOOPS,
    assert_close,
    hook_count,
    nothing,
    padded,
    random_tokens,
    settling,
    toy,
    toy_config,
)

CAP = 9
MANY = 12


@pytest.fixture(scope="module")
def quiet() -> RecurrentDepth:
    return settling()


@pytest.fixture(scope="module")
def batch() -> Batch:
    lengths = tuple(range(1, MANY + 1))
    return padded(lengths=lengths, width=MANY)


@pytest.fixture(scope="module")
def lens(quiet: RecurrentDepth, batch: Batch) -> Lens:
    return readout_lens(quiet, batch, CAP, keep_logits=True)


def one_by_one(
    logits: Tensor, kl: float | None, entropy: float | None, min_loops: int
) -> tuple[list[int], list[bool]]:
    """Iterations used, from 1, and whether the rule ever held; `logits` is loop, example,
    d_vocab.
    """
    used, halted = [], []
    for example in range(logits.shape[1]):
        stop = None
        for loop in range(1, len(logits)):
            now, before = (
                logits[loop, example].log_softmax(-1),
                logits[loop - 1, example].log_softmax(-1),
            )
            divergence = (now.exp() * (now - before)).sum().item()
            spread = -(now.exp() * now).sum().item()
            calm = (kl is None or divergence < kl) and (entropy is None or spread < entropy)
            if calm and loop + 1 >= min_loops and (kl is not None or entropy is not None):
                stop = loop + 1
                break
        used.append(stop or len(logits))
        halted.append(stop is not None)
    return used, halted


def middle(values: Tensor) -> float:
    return values[1:].median().item()


RULES = ["kl and entropy", "kl only", "entropy only", "fixed"]


def thresholds(kind: str, lens: Lens) -> dict[str, float | None]:
    """Thresholds in the middle of what this run shows, so that some examples stop and some do
    not.
    """
    kl, entropy = middle(lens.kl()), lens.entropy()[1:].quantile(0.7).item()
    return {"kl": kl if "kl" in kind else None, "entropy": entropy if "entropy" in kind else None}


@pytest.mark.parametrize("min_loops", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", RULES)
def test_rule_stops_where_a_loop_over_examples_does(
    kind: str, min_loops: int, quiet: RecurrentDepth, batch: Batch, lens: Lens
) -> None:
    limits = thresholds(kind, lens)
    found = halting(quiet, batch, HaltingRule(**limits, min_loops=min_loops), CAP)
    used, halted = one_by_one(lens.logits, **limits, min_loops=min_loops)
    assert found.iterations.tolist() == used
    assert found.halted.tolist() == halted
    assert_close(found.logits, lens.logits[found.iterations - 1, torch.arange(MANY)])
    if kind == "fixed":
        assert used == [CAP] * MANY
    else:
        assert len(set(used)) > 1
        assert min(used) >= max(2, min_loops)


def test_both_conditions_stop_no_earlier_than_either(lens: Lens) -> None:
    both, kl, entropy = (
        apply_rule(lens, HaltingRule(**thresholds(kind, lens))).iterations for kind in RULES[:3]
    )
    assert (both >= torch.maximum(kl, entropy)).all()
    assert (both > kl).any()


def test_thresholds_are_strict(lens: Lens) -> None:
    exactly = lens.kl()[1:].min().item()
    assert not apply_rule(lens, HaltingRule(kl=exactly, entropy=None)).halted.any()


def test_one_lens_serves_any_number_of_rules(
    quiet: RecurrentDepth, batch: Batch, lens: Lens
) -> None:
    for kind in RULES:
        rule = HaltingRule(**thresholds(kind, lens))
        assert torch.equal(
            apply_rule(lens, rule).iterations, halting(quiet, batch, rule, CAP).iterations
        )


def test_no_example_stops_after_the_first_iteration(quiet: RecurrentDepth, batch: Batch) -> None:
    generous = HaltingRule(kl=1e9, entropy=1e9)
    assert halting(quiet, batch, generous, CAP).iterations.tolist() == [2] * MANY
    alone = halting(quiet, batch, generous, 1)
    assert alone.iterations.tolist() == [1] * MANY
    assert not alone.halted.any()


def test_default_is_the_papers_rule_and_the_recorded_iterations(
    quiet: RecurrentDepth, batch: Batch
) -> None:
    found = halting(quiet, batch)
    assert (found.rule.kl, found.rule.entropy, found.rule.min_loops) == (0.01, 3.0, 1)
    assert len(found.lens.loops) == quiet.cfg.n_loops == LOOPS


@pytest.mark.parametrize(
    "apply",
    [
        lambda lens: apply_rule(lens, HaltingRule()),
        lambda lens: apply_criterion(lens, EntropyBelow(1.0)),
    ],
)
def test_a_lens_of_visits_is_refused(
    apply: Callable[[Lens], object], quiet: RecurrentDepth, batch: Batch
) -> None:
    with pytest.raises(
        ValueError,
        match=r"counts iterations, .* got a lens of visits \(loops\.0\.blocks\.0, \.\.\.\)",
    ):
        apply(logit_lens(quiet, batch, 2))


def test_rules_say_what_they_are() -> None:
    assert str(HaltingRule()) == "KL<0.01 and H<3"
    assert str(HaltingRule(kl=0.001, entropy=None)) == "KL<0.001"
    assert str(HaltingRule(kl=None, entropy=2.5)) == "H<2.5"
    assert str(HaltingRule(None, None)) == "fixed"


def test_answers_at_the_stop(quiet: RecurrentDepth, batch: Batch) -> None:
    found = halting(quiet, batch, HaltingRule(kl=None, entropy=None), CAP)
    right = found.logits.argmax(-1)
    answers = torch.where(torch.arange(MANY) % 2 == 0, right, (right + 1) % D_VOCAB)
    assert found.correct(answers).tolist() == [True, False] * (MANY // 2)
    frame = found.frame(answers)
    assert list(frame.columns) == ["example", "iterations", "halted", "correct"]
    assert frame["example"].tolist() == list(range(MANY))
    assert frame["iterations"].tolist() == [CAP] * MANY
    assert frame["correct"].tolist() == [True, False] * (MANY // 2)
    assert list(found.frame().columns) == ["example", "iterations", "halted"]


# The rule that evaluates models during training ignores input injection


def same_weights_without_injection(model: RecurrentDepth) -> RecurrentDepth:
    plain = build(toy_config(model.cfg.positions, False)).double()
    plain.load_state_dict(model.state_dict())
    return plain


def test_rule_while_training() -> None:
    rule = HaltingRule.while_training(padded_length=50)
    assert (rule.kl, rule.entropy, rule.inject_input, rule.min_loops) == (0.5, 3.24, False, 1)
    assert HaltingRule.while_training(7).entropy == 3.0 + 12 / 7


@pytest.mark.parametrize("positions", ["none", "learned"])
def test_injection_is_ignored_while_training(positions: str) -> None:
    model, batch = toy(positions, True), padded()
    without = same_weights_without_injection(model)
    rule = HaltingRule.while_training(7)
    found, expected = halting(model, batch, rule, 5), halting(without, batch, rule, 5)
    assert_close(found.lens.heads_input, expected.lens.heads_input)
    assert torch.equal(found.iterations, expected.iterations)
    assert_close(found.logits, expected.logits)
    assert hook_count(model) == 0
    injected = halting(model, batch, HaltingRule(rule.kl, rule.entropy), 5)
    assert (injected.lens.heads_input[1:] - found.lens.heads_input[1:]).abs().max() > 0.1


def test_injection_is_ignored_at_every_point_of_nested_cycles() -> None:
    family = TOYS["hrm_text"]
    model = family.make()
    batch = family_padded(family, model)
    found = halting(model, batch, HaltingRule.while_training(7), 3)
    inputs = [each for each in model.hook_names(3) if each.endswith(".hook_input")]
    assert len(inputs) >= 3
    with model.hooks([(inputs, lambda value, hook: torch.zeros_like(value))], n_loops=3):
        assert_close(found.lens.heads_input, readout_lens(model, batch, 3).heads_input)
    assert (found.lens.heads_input - readout_lens(model, batch, 3).heads_input).abs().max() > 1e-3
    assert hook_count(model) == 0


def test_ignoring_injection_changes_nothing_where_there_is_none(plain: RecurrentDepth) -> None:
    rules = HaltingRule(0.5, 3.3), HaltingRule(0.5, 3.3, inject_input=False)
    found, ignored = (halting(plain, padded(), rule, 5) for rule in rules)
    assert torch.equal(found.lens.heads_input, ignored.lens.heads_input)


def test_ignoring_injection_in_a_call_of_one_iteration() -> None:
    model = toy("none", True)
    found = halting(model, padded(), HaltingRule.while_training(7), 1)
    assert found.iterations.tolist() == [1] * BATCH
    assert torch.equal(found.lens.heads_input, readout_lens(model, padded(), 1).heads_input)


def test_users_hooks_survive_a_run_without_injection() -> None:
    model = toy("none", True)
    model.add_hook("loops.2.hook_state_in", nothing)
    before = hook_count(model)
    assert isinstance(
        halting(model, random_tokens(), HaltingRule.while_training(7), 4, readout=-1), Halting
    )
    assert hook_count(model) == before > 0
