"""The smallest training run, and what tests of several processes share."""

from __future__ import annotations

import socket
from dataclasses import replace

from loopscope.training.recipes import Loops, MultiHopTask, Recipe, Stage

TINY = Recipe(
    name="tiny",
    task=MultiHopTask(n_entities=7, n_relations=3, graph_seed=0, train=None),
    n_layers=1,
    d_model=15,
    n_heads=5,
    loops=Loops(mean=2.0, low=1, high=3),
    eval_loops=3,
    stages=(
        Stage(
            name="2_hops",
            hops=(1, 2),
            max_updates=13,
            gate_on="2",
            gate=1.0,
            lr=1e-2,
            lr_end=1e-2,
            warmup=5,
        ),
        Stage(name="final", hops=(1, 2, 3), max_updates=11, lr=1e-2, lr_end=1e-3),
    ),
    batch_size=12,
    weight_decay=0.1,
    eval_every=4,
    eval_questions=9,
)
SHARED = replace(TINY, zero_init=False)


def free_port() -> str:
    """A port that no process listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
