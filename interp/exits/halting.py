"""Adaptive halting: stopping a run by its own answers (figures 9 and 10 of arXiv 2604.07822)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.ranking import rank_of
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.lens.record import Lens, Targets
from loopscope.models.basis.numbers import checked_count, checked_number
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import by_rows
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class HaltingRule:
    """A rule for adaptive halting: an example stops once all conditions hold, after two iterations
    at the earliest.

    Attributes:
        kl: KL(p_t || p_{t-1}) of successive answers must be below this number, in nats; None leaves
            the condition out.
        entropy: The entropy of the answer must be below this number, in nats; None leaves the
            condition out.
        min_loops: The number of iterations before which no example stops.
        inject_input: False runs an input-injected model without its injection, as the reference's
            evaluation during training does.

    If `kl` and `entropy` are None, every example runs all iterations. The rule of arXiv 2604.07822
    is HaltingRule(0.01, 3.0); the default of its inference script has kl=0.001.
    """

    kl: float | None = 0.01
    entropy: float | None = 3.0
    min_loops: int = 1
    inject_input: bool = True

    def __post_init__(self) -> None:
        for name, threshold in (("kl", self.kl), ("entropy", self.entropy)):
            if threshold is not None:
                checked_number(threshold, name, infinite=True)
        checked_count(self.min_loops, "min_loops")

    @classmethod
    def while_training(cls, padded_length: int) -> HaltingRule:
        """The rule of the reference's evaluations during training of dynamic models.

        KL must be below 0.5 nats, and the entropy below 3 + 12 / padded_length nats.

        Args:
            padded_length: The width of the padded inputs, in columns.
        """
        width = checked_count(padded_length, "padded_length")
        return cls(kl=0.5, entropy=3.0 + 12.0 / width, inject_input=False)

    def __str__(self) -> str:
        conditions = [f"KL<{self.kl:g}"] if self.kl is not None else []
        conditions += [f"H<{self.entropy:.3g}"] if self.entropy is not None else []
        return " and ".join(conditions) or "fixed"


@dataclass(frozen=True, kw_only=True)
class Stops(OneScreen):
    """The iteration after which each example of a run stops.

    Attributes:
        lens: The run's answers after every iteration.
        iterations: Int[Tensor, " batch"], how many iterations each example runs; all of them if it
            never stops by itself.
        halted: Bool[Tensor, " batch"], whether the example stopped by itself.
        logits: Float[Tensor, "batch d_vocab"], after the iteration at which the example stopped.
    """

    lens: Lens
    iterations: Int[Tensor, " batch"]
    halted: Bool[Tensor, " batch"]
    logits: Float[Tensor, "batch d_vocab"]

    def correct(self, answers: Targets) -> Bool[Tensor, " batch"]:
        """Whether the top token of each example at its stop is the answer. Ties are broken as in
        `Lens.rank`.

        Args:
            answers: The token id of each example's right answer.

        Raises:
            ValueError: A logit is not finite.
        """
        tokens = self.lens.targets(answers)
        return rank_of(self.logits, tokens, lambda index: f"example {index[0]}") == 0

    def frame(self, answers: Targets | None = None) -> pd.DataFrame:
        """One row per example. The columns are example, iterations (run) and halted, and correct if
        the answers are given.
        """
        frame = pd.DataFrame({"iterations": self.iterations.cpu(), "halted": self.halted.cpu()})
        frame.insert(0, "example", range(len(frame)))
        if answers is not None:
            frame["correct"] = self.correct(answers).cpu().numpy()
        return frame

    def plot(self, title: str = "") -> go.Figure:
        """A picture: entropy and KL over iterations, with a star where an example stops."""
        from loopscope.interp.drawing.lenses import stops

        return stops(self, title)


@dataclass(frozen=True, kw_only=True)
class Halting(Stops):
    """The iteration after which a halting rule stops each example, and the answer there.

    Attributes:
        rule: The rule.
    """

    rule: HaltingRule


@evaluated
def halting(
    model: LoopedModel,
    inputs: Inputs,
    rule: HaltingRule | None = None,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
) -> Halting:
    """Run all iterations once, and find after which one a halting rule stops each example.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        rule: The rule; None means that of arXiv 2604.07822, HaltingRule(0.01, 3.0).
        n_loops: The number of iterations that are run, after which an example that never stops is
            read; 16 in the paper. None means the number that the checkpoint records.

    Returns:
        The stops of all examples.

    Source:
        Figures 9 and 10 of arXiv 2604.07822.
    """
    rule = rule or HaltingRule()
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    injected = [
        f"{visit.scope}.hook_input"
        for visit in model.schedule(n_loops)
        if "hook_input" in visit.opening
    ]
    if rule.inject_input or not injected:
        return apply_rule(readout_lens(model, batch, n_loops), rule)
    with model.hooks([(injected, _nothing)], n_loops=n_loops):
        return apply_rule(readout_lens(model, batch, n_loops), rule)


def apply_rule(lens: Lens, rule: HaltingRule) -> Halting:
    """Find after which iteration a rule stops each read of a `readout_lens`; one lens serves any
    number of rules.

    Raises:
        ValueError: The lens has visits instead of iterations, as a `logit_lens` has.
    """
    check_iterations(lens)
    holds = torch.ones(lens.heads_input.shape[:2], dtype=torch.bool, device=lens.heads_input.device)
    if rule.kl is not None:
        holds &= lens.kl() < rule.kl
    if rule.entropy is not None:
        holds &= lens.entropy() < rule.entropy
    holds[: max(1, rule.min_loops - 1)] = False
    if rule.kl is None and rule.entropy is None:
        holds[:] = False
    stop, halted = first_stop(holds)
    return Halting(
        rule=rule, lens=lens, iterations=stop + 1, halted=halted, logits=lens.logits_at(stop)
    )


def check_iterations(lens: Lens) -> None:
    """Refuse a lens whose entries are visits where iterations are counted."""
    if any(layer is not None for layer in lens.layers):
        raise ValueError(
            "a rule or criterion counts iterations, so it needs the answers after each, but got"
            f" a lens of visits ({lens.names[0]}, ...); use readout_lens(model, inputs, n_loops)"
        )


def first_stop(
    holds: Bool[Tensor, "loop read"],
) -> tuple[Int[Tensor, " read"], Bool[Tensor, " read"]]:
    """The first loop, from 0, after which each read may stop, the last loop if there is none; and
    whether there is one.
    """
    halted = holds.any(0)
    return torch.where(halted, holds.int().argmax(0), len(holds) - 1), halted


@by_rows
def _nothing(value: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(value)
