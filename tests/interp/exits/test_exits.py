"""Early exit: each criterion against a loop over one example at a time, and the distribution of an
exit gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.interp.dynamics.states import Dynamics, dynamics
from loopscope.interp.exits.exit_gate import exit_distribution, gate_logits
from loopscope.interp.exits.exits import (
    AccelerationBelow,
    CosineAbove,
    Criterion,
    EntropyBelow,
    Exits,
    KLBelow,
    StepBelow,
    TopStable,
    apply_criterion,
    exits,
)
from loopscope.interp.exits.halting import HaltingRule, halting
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.lens.record import Lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.state import Slot, Visit
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_MODEL,
    LOOPS,
    ShortEnding,
    assert_close,
    cached,
    hook_count,
    odd_one,
    padded,
    settling,
    toy,
)

CAP = 9
MANY = 12
Condition = Callable[[list[Tensor], list[Tensor], int], float | None]


@pytest.fixture(scope="module")
def quiet() -> RecurrentDepth:
    return settling()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return padded(lengths=tuple(range(1, MANY + 1)), width=MANY)


@pytest.fixture(scope="module")
def lens(quiet: RecurrentDepth, batch: Batch) -> Lens:
    return readout_lens(quiet, batch, CAP, keep_logits=True)


@pytest.fixture(scope="module")
def states(quiet: RecurrentDepth, batch: Batch) -> Dynamics:
    return dynamics(quiet, batch, CAP, positions="readout")


# What is compared with the threshold, of one example: `p` are its log-probabilities after
# iterations 1, 2, ... and `h` its states before the first iteration and after iterations 1, 2, ...;
# None where there is nothing to compare with.


def kl(p: list[Tensor], h: list[Tensor], t: int) -> float | None:
    return None if t == 1 else (p[t - 1].exp() * (p[t - 1] - p[t - 2])).sum().item()


def entropy(p: list[Tensor], h: list[Tensor], t: int) -> float | None:
    return -(p[t - 1].exp() * p[t - 1]).sum().item()


def changed(p: list[Tensor], h: list[Tensor], t: int) -> float | None:
    return None if t == 1 else float(p[t - 1].argmax() != p[t - 2].argmax())


def minus_cosine(p: list[Tensor], h: list[Tensor], t: int) -> float | None:
    return -(h[t] @ h[t - 1] / (h[t].norm() * h[t - 1].norm())).item()


def relative_step(p: list[Tensor], h: list[Tensor], t: int) -> float | None:
    return ((h[t] - h[t - 1]).norm() / h[t - 1].norm()).item()


def acceleration(p: list[Tensor], h: list[Tensor], t: int) -> float | None:
    return None if t == 1 else (h[t] - 2 * h[t - 1] + h[t - 2]).norm().item()


CONDITIONS: dict[type[Criterion], Condition] = {
    KLBelow: kl,
    EntropyBelow: entropy,
    TopStable: changed,
    CosineAbove: minus_cosine,
    StepBelow: relative_step,
    AccelerationBelow: acceleration,
}


def one_by_one(
    condition: Condition, threshold: float, lens: Lens, states: Dynamics, hits: int, min_loops: int
) -> list[int | None]:
    """Iterations used by each example, from 1; None where the criterion never held."""
    used: list[int | None] = []
    for example in range(MANY):
        p, h = list(lens.logits[:, example].log_softmax(-1)), list(states.states[:, example, 0])
        in_a_row, stop = 0, None
        for t in range(1, CAP + 1):
            value = condition(p, h, t)
            in_a_row = in_a_row + 1 if value is not None and value < threshold else 0
            if stop is None and in_a_row >= hits and t >= min_loops:
                stop = t
        used.append(stop)
    return used


def middle(condition: Condition, lens: Lens, states: Dynamics) -> float:
    """A threshold in the middle of what this run shows, so that some examples exit earlier than
    others.
    """
    every = []
    for example in range(MANY):
        p, h = list(lens.logits[:, example].log_softmax(-1)), list(states.states[:, example, 0])
        every += [condition(p, h, t) for t in range(1, CAP + 1)]
    return torch.tensor([value for value in every if value is not None]).quantile(0.4).item()


def criterion_at(kind: type[Criterion], threshold: float, hits: int, min_loops: int) -> Criterion:
    if kind is TopStable:
        return TopStable(hits=hits, min_loops=min_loops)
    return kind(-threshold if kind is CosineAbove else threshold, hits=hits, min_loops=min_loops)


@pytest.mark.parametrize(("hits", "min_loops"), [(1, 1), (1, 3), (2, 1), (3, 2)])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_criterion_exits_where_a_loop_over_examples_does(
    kind: type[Criterion],
    hits: int,
    min_loops: int,
    quiet: RecurrentDepth,
    batch: Batch,
    lens: Lens,
    states: Dynamics,
) -> None:
    condition = CONDITIONS[kind]
    threshold = 0.5 if kind is TopStable else middle(condition, lens, states)
    expected = one_by_one(condition, threshold, lens, states, hits, min_loops)
    found = exits(quiet, batch, criterion_at(kind, threshold, hits, min_loops), CAP)
    assert found.halted.tolist() == [stop is not None for stop in expected]
    assert found.iterations.tolist() == [stop or CAP for stop in expected]
    assert_close(found.logits, lens.logits[found.iterations - 1, torch.arange(MANY)])
    assert len(set(expected)) > 1  # the case tells examples apart


def test_one_run_serves_any_number_of_criteria(
    quiet: RecurrentDepth, batch: Batch, lens: Lens, states: Dynamics
) -> None:
    for criterion in (
        KLBelow(0.05),
        EntropyBelow(3.2),
        TopStable(hits=2),
        CosineAbove(0.9),
        StepBelow(0.5),
        AccelerationBelow(2.0),
    ):
        alone, shared = (
            exits(quiet, batch, criterion, CAP),
            apply_criterion(lens, criterion, states),
        )
        assert torch.equal(alone.iterations, shared.iterations)
        assert torch.equal(alone.halted, shared.halted)


@pytest.mark.shapes
def test_kl_from_the_second_iteration_is_the_halting_rule_with_kl_only(
    quiet: RecurrentDepth, batch: Batch
) -> None:
    rule, criterion = HaltingRule(kl=0.05, entropy=None, min_loops=3), KLBelow(0.05, min_loops=3)
    expected, found = halting(quiet, batch, rule, CAP), exits(quiet, batch, criterion, CAP)
    assert torch.equal(found.iterations, expected.iterations)
    assert torch.equal(found.halted, expected.halted)
    assert_close(found.logits, expected.logits)


def test_a_condition_that_is_met_at_once_by_its_own_kind_of_evidence(
    quiet: RecurrentDepth, batch: Batch
) -> None:
    """What compares with an earlier iteration cannot exit before there is one."""
    generous = {
        KLBelow(1e9): 2,
        EntropyBelow(1e9): 1,
        CosineAbove(-2.0): 1,
        StepBelow(1e9): 1,
        AccelerationBelow(1e9): 3,
    }
    for criterion, first in generous.items():
        assert exits(quiet, batch, criterion, CAP).iterations.tolist() == [first] * MANY
    assert (
        exits(quiet, batch, AccelerationBelow(1e9, hits=1), CAP).iterations.tolist() == [2] * MANY
    )


def test_never_exiting_uses_the_last_iteration(quiet: RecurrentDepth, batch: Batch) -> None:
    for criterion in (
        EntropyBelow(0.0),
        CosineAbove(1.0),
        TopStable(hits=CAP),
        EntropyBelow(1e9, hits=CAP + 1),
    ):
        found = exits(quiet, batch, criterion, CAP)
        assert found.iterations.tolist() == [CAP] * MANY
        assert not found.halted.any()


@pytest.mark.shapes
def test_answers_at_the_exit(quiet: RecurrentDepth, batch: Batch) -> None:
    found = exits(quiet, batch, EntropyBelow(0.0), CAP)
    assert isinstance(found, Exits)
    right = found.logits.argmax(-1)
    answers = torch.where(torch.arange(MANY) % 2 == 0, right, (right + 1) % 29)
    frame = found.frame(answers)
    assert list(frame.columns) == ["example", "iterations", "halted", "correct"]
    assert frame["example"].tolist() == list(range(MANY))
    assert frame["iterations"].tolist() == [CAP] * MANY
    assert frame["correct"].tolist() == [True, False] * (MANY // 2)
    assert list(found.frame().columns) == ["example", "iterations", "halted"]


def test_number_of_iterations_defaults_to_what_is_recorded(plain: RecurrentDepth) -> None:
    assert len(exits(plain, padded(), StepBelow()).lens.loops) == LOOPS
    with pytest.raises(ValueError, match="records no number of iterations"):
        exits(toy(n_loops=None), padded(), StepBelow())


def test_families_that_need_the_whole_run_exit_with_its_readout() -> None:
    model, inputs = odd_one(ShortEnding), padded()
    found = exits(model, inputs, CosineAbove(-2.0, min_loops=2), 3)
    assert found.iterations.tolist() == [2] * BATCH
    state = model.advance(model.begin(inputs.tokens, inputs.mask, n_loops=3), "loops.2")
    assert_close(found.logits, model.readout(state, inputs.readout))


@pytest.mark.shapes
def test_criteria_of_states_need_the_states_of_the_same_reads(
    quiet: RecurrentDepth, batch: Batch, lens: Lens
) -> None:
    for criterion in (CosineAbove(), StepBelow(), AccelerationBelow(1.0)):
        with pytest.raises(ValueError, match="this criterion reads states: give it dynamics"):
            apply_criterion(lens, criterion)
    for wrong in (
        dynamics(quiet, batch, CAP),
        dynamics(quiet, batch, CAP - 1, positions="readout"),
    ):
        with pytest.raises(ValueError, match=r"\[point, batch, pos\] = \[10, 12, 1\], got"):
            apply_criterion(lens, StepBelow(), wrong)


@pytest.mark.parametrize("options", [{"hits": 0}, {"min_loops": 0}])
def test_criteria_refuse_less_than_one_iteration(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"(hits|min_loops) must be at least 1, got 0"):
        KLBelow(**options)


def test_trained_model_knows_when_it_is_done() -> None:
    found = exits(
        load("ltg_trained"), ["<e_24><r_0><r_7>", "<e_11><r_2><r_9><r_5><r_0><r_1>"], KLBelow(), 16
    )
    assert found.halted.all()
    assert found.iterations[0] < found.iterations[1] < 16  # more hops, more iterations


# Exit gates


def test_distribution_by_hand() -> None:
    """lambda = 1/2, 1/4, 3/4: p = 1/2, 1/2 * 1/4, and what is left."""
    lambdas = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    found = exit_distribution(lambdas.logit()[:, None])
    assert found.pdf[:, 0].tolist() == pytest.approx([0.5, 0.125, 0.375], rel=1e-12)
    assert found.cdf[:, 0].tolist() == pytest.approx([0.5, 0.625, 1.0], rel=1e-12)


def test_distribution_is_what_a_loop_over_iterations_makes() -> None:
    logits = 3.0 * torch.randn(
        5, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    found = exit_distribution(logits)
    left = torch.ones(3, 7, dtype=torch.float64)
    for t in range(5):
        p = left if t == 4 else logits[t].sigmoid() * left
        assert_close(found.pdf[t], p)
        left = left - p
        assert_close(found.cdf[t], 1 - left)
    assert_close(found.pdf.sum(0), torch.ones(3, 7, dtype=torch.float64))
    assert_close(found.cdf, found.pdf.cumsum(0))
    assert torch.equal(exit_distribution(torch.cat([logits[:4], -logits[4:]])).pdf, found.pdf)


def test_distribution_of_saturated_gates() -> None:
    found = exit_distribution(torch.tensor([[200.0, -200.0], [5.0, -200.0], [0.0, 0.0]]))
    assert found.pdf.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    assert found.cdf.tolist() == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    assert exit_distribution(torch.zeros(1, 2)).pdf.tolist() == [[1.0, 1.0]]
    tiny = exit_distribution(torch.tensor([[-60.0], [0.0]])).cdf[0].item()
    assert tiny == pytest.approx(
        torch.tensor(-60.0, dtype=torch.float64).sigmoid().item(), rel=1e-5
    )


class Gated(RecurrentDepth):
    """A family with an exit gate that reads the state after every iteration."""

    gate = torch.linspace(-1.0, 2.0, D_MODEL, dtype=torch.float64)

    def plan(self, n_loops: int) -> list[Slot]:
        slots = super().plan(n_loops)
        return [
            replace(slot, closing=(*slot.closing, "hook_exit_logit")) if slot.closing else slot
            for slot in slots
        ]

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        tap(taps, "hook_exit_logit", resid @ self.gate)
        return super().leave(visit, resid, parts, taps)


@pytest.mark.parametrize("batch_size", [2, 512])
def test_gate_logits_are_read_after_every_iteration_at_the_readout(batch_size: int) -> None:
    model, batch = odd_one(Gated), padded()
    found = gate_logits(model, batch, 3, batch_size=batch_size)
    cache = cached(model, batch, "loops.*.hook_state_out", 3)
    expected = [
        cache[f"loops.{t}.hook_state_out"][torch.arange(BATCH), batch.readout] @ Gated.gate
        for t in range(3)
    ]
    assert_close(found, torch.stack(expected))
    assert exit_distribution(found).pdf.shape == (3, BATCH)
    assert hook_count(model) == 0


def test_family_without_a_gate_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(
        ValueError,
        match=(
            r"this RecurrentDepth has no exit gate to read: its calls have no hook point"
            r" 'loops.0.hook_exit_logit'"
        ),
    ):
        gate_logits(plain, padded(), 2)
