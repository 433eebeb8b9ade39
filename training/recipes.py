"""Frozen configs of a training run: the questions, the model, and the stages. The named recipes are
in `training.catalog`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from loopscope.models.families.recurrent_depth import Positions


@dataclass(frozen=True, kw_only=True)
class Loops:
    """The number of iterations of a training batch: clip(Poisson(mean), low, high), one draw per
    batch. With low == high the number is fixed.
    """

    mean: float
    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(
                f"iterations must satisfy 1 <= low <= high, got low={self.low}, high={self.high}"
            )

    @classmethod
    def fixed(cls, loops: int) -> Loops:
        """The same number for every batch."""
        return cls(mean=float(loops), low=loops, high=loops)

    def draw(self, rng: np.random.Generator) -> int:
        """The number for one batch."""
        if self.low == self.high:
            return self.low
        return int(np.clip(rng.poisson(self.mean), self.low, self.high))

    def __str__(self) -> str:
        return (
            str(self.low)
            if self.low == self.high
            else f"clip(Poisson({self.mean:g}), {self.low}, {self.high})"
        )


@dataclass(frozen=True, kw_only=True)
class MultiHopTask:
    """The task of many hops; the defaults are the paper's.

    Attributes:
        n_entities, n_relations, graph_seed: Sizes and seed of the graph.
        permutations: Whether each relation is a permutation; if not, tails are random, and a short
            suffix nearly fixes the answer.
        train: Distinct facts of each hop count to train on, in shuffled epochs over all hop counts
            of the stage; None means fresh random facts at every update, of one hop count per batch,
            of which a hash holds out a tenth.
        test: Held-out facts of each hop count.
    """

    n_entities: int = 200
    n_relations: int = 10
    graph_seed: int = 42
    permutations: bool = True
    train: int | None = 15_000
    test: int = 750

    def __str__(self) -> str:
        kind = "permutation" if self.permutations else "random"
        return (
            f"multi-hop questions on a {kind} graph of {self.n_entities} entities and"
            f" {self.n_relations} relations"
        )


@dataclass(frozen=True, kw_only=True)
class TwoHopTask:
    """Atomic facts and their compositions, with atoms that no training composition uses; the
    defaults are the paper's.

    Attributes:
        n_entities, n_relations, out_degree, ood_share, graph_seed: As in `TableGraph.two_hop`.
        phi, iid_share, test: As in `make_two_hop`.
    """

    n_entities: int = 2000
    n_relations: int = 200
    out_degree: int = 20
    ood_share: float = 0.05
    graph_seed: int = 42
    phi: float = 7.2
    iid_share: float = 0.005
    test: int = 3000

    def __str__(self) -> str:
        return (
            f"two-hop questions on a graph of {self.n_entities} entities, {self.out_degree} of"
            f" {self.n_relations} relations each, {self.ood_share:.3g} of the facts out of"
            " distribution"
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with one set of hop counts; at its end a checkpoint of its name is exported.

    Attributes:
        name: The name of the checkpoint's folder.
        hops: Hop counts of the questions.
        max_updates: The stage ends after so many updates.
        gate_on, gate: It also ends once accuracy on this group of test questions exceeds the gate;
            None means no gate. Groups are hop counts ("3"), or those of the two-hop task
            ("test_inferred_iid").
        min_updates: Updates before the gate is first asked.
        lr, lr_end: The learning rate stays at lr and then falls linearly to lr_end at max_updates.
        fall_from: Share of max_updates after which the learning rate falls.
        warmup: Updates over which the learning rate first rises from zero.
        restart: Whether the stage forgets the optimiser's moments at its beginning.
    """

    name: str
    hops: tuple[int, ...]
    max_updates: int
    gate_on: str | None = None
    gate: float = 0.95
    min_updates: int = 0
    lr: float
    lr_end: float
    fall_from: float = 0.0
    warmup: int = 0
    restart: bool = False

    def rate(self, update: int) -> float:
        """The learning rate of an update, counted from 0 within the stage."""
        share = min(
            1.0, max(0.0, update / self.max_updates - self.fall_from) / (1.0 - self.fall_from)
        )
        rising = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        return rising * (self.lr + share * (self.lr_end - self.lr))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run, besides the machine.

    Attributes:
        name: The recipe's name on the command line and in the card.
        task: The task that the model is trained on.
        n_layers, d_model, n_heads, positions: Sizes of the model; its MLP is four times as wide.
        dropout: Dropout rate of the blocks, while training.
        zero_init: Whether both output projections of every block start at zero, so that the loop
            starts as the identity.
        readout: Where answers are read: the last real token, or the last column of the inputs
            padded to `padded_to`.
        padded_to: Columns of the padded inputs; None means the length of the batch's longest input.
        loops: Iterations per batch.
        eval_loops: Iterations at which gates are judged; with `halting_gate` the most that the
            halting rule may use.
        halting_gate: Whether gates are judged after the iteration at which the paper's halting rule
            for training stops.
        stages: The stages in order.
        batch_size: Questions per update.
        weight_decay, betas: Arguments of AdamW.
        decay_matrices_only: Whether biases and norms are left out of the weight decay.
        clip: The largest gradient norm; None means no clipping.
        label_smoothing: Label smoothing of the cross-entropy.
        eval_every: Updates between evaluations.
        eval_questions: Test questions of each group in an evaluation.
        seed: The seed of weights and batches.
    """

    name: str
    task: MultiHopTask | TwoHopTask
    n_layers: int
    d_model: int
    n_heads: int
    positions: Positions = "none"
    dropout: float = 0.0
    zero_init: bool = True
    readout: Literal["last_real", "last_column"] = "last_real"
    padded_to: int | None = None
    loops: Loops
    eval_loops: int
    halting_gate: bool = False
    stages: tuple[Stage, ...]
    batch_size: int
    weight_decay: float
    decay_matrices_only: bool = False
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float | None = 1.0
    label_smoothing: float = 0.0
    eval_every: int = 250
    eval_questions: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages or len({stage.name for stage in self.stages}) != len(self.stages):
            raise ValueError(
                "a recipe has stages, each with a name of its own, got"
                f" {[stage.name for stage in self.stages]}"
            )
        if self.padded_to is None and (self.readout == "last_column" or self.positions != "none"):
            raise ValueError(
                "padded_to must be given where answers are read at the last column, or positions"
                " are not 'none'"
            )

    @property
    def trained_hops(self) -> int:
        """The deepest hop count of any stage."""
        return max(max(stage.hops) for stage in self.stages)


def curriculum(
    first: int,
    last: int,
    *,
    max_updates: int,
    gate: float = 0.95,
    lr: float,
    lr_end: float | None = None,
    lr_decay: float = 1.0,
    lr_floor: float = 0.0,
    warmup: int = 0,
    restart: bool = False,
    forced_first: int = 0,
) -> tuple[Stage, ...]:
    """One stage per hop count from `first` to `last`, each with all hop counts up to its own (joint
    replay).

    Args:
        max_updates, gate: As in `Stage`, for each stage.
        lr: The learning rate of the first stage. Each later stage starts at `lr_decay` times the
            rate of the stage before, but not below `lr_floor`.
        lr_end: The learning rate at the end of a stage; None keeps the rate constant.
        warmup: As in `Stage`, for the first stage and, with `restart`, for each.
        restart: Whether optimiser and schedule restart at each stage.
        forced_first: Updates that the first stage runs, whatever its gate says.
    """
    stages = []
    for k in range(first, last + 1):
        rate = max(lr * lr_decay ** (k - first), lr_floor)
        stages.append(
            Stage(
                name=f"{k}_hops",
                hops=tuple(range(1, k + 1)),
                max_updates=max_updates,
                gate_on=str(k),
                gate=gate,
                lr=rate,
                lr_end=rate if lr_end is None else lr_end,
                warmup=warmup if k == first or restart else 0,
                restart=restart and k > first,
            )
        )
    return (replace(stages[0], min_updates=forced_first), *stages[1:])
