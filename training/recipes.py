"""What a training run is: frozen configs, and the named recipes.

A run is a list of stages. The curriculum of arXiv 2604.07822 has one stage per hop count, each ended by its gate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Loops:
    """How many iterations a batch is trained with: clip(Poisson(mean), low, high), one draw per batch; low == high is fixed."""

    mean: float
    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"iterations must satisfy 1 <= low <= high, got low={self.low}, high={self.high}")

    @classmethod
    def fixed(cls, loops: int) -> Loops:
        """Always the same number."""
        return cls(mean=float(loops), low=loops, high=loops)

    def draw(self, rng: np.random.Generator) -> int:
        """The number for one batch."""
        if self.low == self.high:
            return self.low
        return int(np.clip(rng.poisson(self.mean), self.low, self.high))

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"clip(Poisson({self.mean:g}), {self.low}, {self.high})"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with one set of hop counts.

    Attributes:
        hops: Hop counts in the batches, each batch being of one of them, drawn uniformly.
        max_updates: The stage ends after so many updates.
        gate_hops, gate: It also ends once held-out accuracy on gate_hops exceeds the gate; None means no gate.
        lr, lr_end: The learning rate falls linearly from lr to lr_end over max_updates.
        warmup: Updates over which the rate rises from zero at the beginning.
        restart: Forget the optimiser's moments at the beginning.
    """

    hops: tuple[int, ...]
    max_updates: int
    gate_hops: int | None = None
    gate: float = 0.95
    lr: float
    lr_end: float
    warmup: int = 0
    restart: bool = False

    def rate(self, update: int) -> float:
        """The learning rate of an update, counted from 0 within the stage."""
        share = min(1.0, update / self.max_updates)
        rising = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        return rising * (self.lr + share * (self.lr_end - self.lr))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run, besides the machine.

    Attributes:
        name: Its name on the command line and in the card.
        n_entities, n_relations, graph_seed: The permutation graph.
        n_layers, d_model, n_heads: The model; its MLP is four times as wide.
        loops: Iterations per batch.
        eval_loops: Iterations at which gates are judged.
        stages: In order.
        batch_size: Questions per update.
        weight_decay, betas, clip: AdamW and gradient clipping (norm); decay acts on every parameter.
        eval_every: Updates between evaluations.
        eval_questions: Held-out questions per hop count in an evaluation.
        seed: Of weights and batches.
    """

    name: str
    n_entities: int
    n_relations: int
    graph_seed: int = 0
    n_layers: int
    d_model: int
    n_heads: int
    loops: Loops
    eval_loops: int
    stages: tuple[Stage, ...]
    batch_size: int
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    eval_every: int = 250
    eval_questions: int = 200
    seed: int = 0

    @property
    def trained_hops(self) -> int:
        """The deepest hop count of any stage."""
        return max(max(stage.hops) for stage in self.stages)


def curriculum(first: int, last: int, *, max_updates: int, gate: float, lr: float, warmup: int = 0) -> tuple[Stage, ...]:
    """One stage per hop count from `first` to `last`, each with all hop counts up to its own (joint replay)."""
    stages = [
        Stage(hops=tuple(range(1, k + 1)), max_updates=max_updates, gate_hops=k, gate=gate, lr=lr, lr_end=lr)
        for k in range(first, last + 1)
    ]
    return (replace(stages[0], warmup=warmup), *stages[1:])


def _mini(name: str, loops: Loops, eval_loops: int, hops: int, polish: int) -> Recipe:
    """A multi-hop miniature: a gated curriculum at a constant rate, then all hop counts with a falling one."""
    rising = curriculum(2, hops - 2, max_updates=12_000, gate=0.93, lr=2e-3, warmup=200)
    final = Stage(hops=tuple(range(1, hops + 1)), max_updates=polish, lr=1.5e-3, lr_end=1e-5)
    return Recipe(
        name=name,
        n_entities=40,
        n_relations=10,
        n_layers=2,
        d_model=64,
        n_heads=4,
        loops=loops,
        eval_loops=eval_loops,
        stages=(*rising, final),
        batch_size=192,
        weight_decay=0.1,
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _mini("mini/multi_hop/r_dyn", Loops(mean=4.0, low=2, high=8), 8, hops=10, polish=10_000),
        _mini("mini/multi_hop/r6", Loops.fixed(6), 6, hops=10, polish=10_000),
        _mini("mini/multi_hop/r4", Loops.fixed(4), 4, hops=8, polish=8_000),
        _mini("mini/multi_hop/r2", Loops.fixed(2), 2, hops=6, polish=6_000),
    )
}
