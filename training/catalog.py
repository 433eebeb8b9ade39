"""The named recipes: the paper's, and the miniatures that travel with the project."""

from __future__ import annotations

from dataclasses import replace

from loopscope.training.recipes import Loops, MultiHopTask, Recipe, Stage, TwoHopTask, curriculum

_DYNAMIC = Loops(mean=4.0, low=2, high=8)


def extrapolation(
    name: str, loops: Loops, *, max_hops: int = 30, lr_decay: float = 1.0, forced_first: int = 0
) -> Recipe:
    """The paper's multi-hop training: a gated curriculum with joint replay and restarts.

    Args:
        loops: Iterations, fixed or drawn for each batch; where they are drawn, gates are judged by
            the halting rule.
        max_hops: The hop count of the last stage, which a run need not reach.
        lr_decay: The public code's optional decay of the learning rate per stage (0.9, with a floor
            of 2e-5).
        forced_first: The public code's optional minimum of updates for 2 hops (1000 epochs of 133).

    Source:
        arXiv 2604.07822, its section on recursion extrapolation and its appendix on training, and
        its public trainer.
    """
    dynamic = loops.low != loops.high
    stages = curriculum(
        2,
        max_hops,
        max_updates=1_000_000,
        lr=1e-4,
        lr_end=0.0,
        lr_decay=lr_decay,
        lr_floor=2e-5,
        warmup=2000,
        restart=True,
        forced_first=forced_first,
    )
    return Recipe(
        name=name,
        task=MultiHopTask(),
        n_layers=4,
        d_model=768,
        n_heads=12,
        readout="last_column",
        padded_to=50,
        loops=loops,
        eval_loops=loops.high,
        halting_gate=dynamic,
        stages=stages,
        batch_size=128,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        eval_every=1000,
        eval_questions=750,
    )


def systematicity(
    name: str, n_loops: int, n_layers: int, *, batch_size: int = 512, weight_decay: float = 0.01
) -> Recipe:
    """The paper's two-hop training: fixed iterations, learned positions, dropout, label smoothing,
    and a checkpoint when the training facts are known, when the in-distribution facts are known,
    and at the end.

    Args:
        batch_size, weight_decay: The values in the paper; the public code's defaults are 128 and
            0.1.

    Source:
        arXiv 2604.07822, its section on systematic generalisation and its appendix on training, and
        its public trainer.
    """
    last = Stage(name="end", hops=(1, 2), max_updates=2_000_000, lr=1e-4, lr_end=0.0)
    return Recipe(
        name=name,
        task=TwoHopTask(),
        n_layers=n_layers,
        d_model=768,
        n_heads=12,
        positions="learned",
        dropout=0.1,
        zero_init=False,
        padded_to=5,
        loops=Loops.fixed(n_loops),
        eval_loops=n_loops,
        stages=_two_hop_stages(last, looped=n_loops > 1, gate=0.99, warmup=2000),
        batch_size=batch_size,
        weight_decay=weight_decay,
        betas=(0.9, 0.999),
        label_smoothing=0.1,
        eval_every=1000,
        eval_questions=3000,
    )


def _two_hop_stages(last: Stage, *, looped: bool, gate: float, warmup: int) -> tuple[Stage, ...]:
    """The stages "train" (until training facts are known), "id" (looped models: until
    in-distribution facts are known), and the rest.
    """
    constant = replace(last, gate=gate, lr_end=last.lr, fall_from=0.0)
    first = replace(constant, name="train", gate_on="train_inferred", warmup=warmup)
    second = replace(constant, name="id", gate_on="test_inferred_iid")
    return (
        (first, second, replace(last, name="ood")) if looped else (first, replace(last, name="id"))
    )


def _mini_multi_hop(
    name: str, loops: Loops, hops: int, polish: int, *, permutations: bool = True
) -> Recipe:
    """A multi-hop miniature: a gated curriculum, then all hop counts at a falling rate."""
    rising = curriculum(2, hops - 2, max_updates=12_000, gate=0.93, lr=2e-3, warmup=200)
    final = Stage(
        name="final", hops=tuple(range(1, hops + 1)), max_updates=polish, lr=1.5e-3, lr_end=1e-5
    )
    return Recipe(
        name=f"mini/{name}",
        task=MultiHopTask(n_entities=40, graph_seed=0, permutations=permutations, train=None),
        n_layers=2,
        d_model=64,
        n_heads=4,
        loops=loops,
        eval_loops=loops.high,
        stages=(*rising, final),
        batch_size=192,
        weight_decay=0.1,
    )


def _mini_two_hop(n_loops: int, n_layers: int, updates: int) -> Recipe:
    """A two-hop miniature on a smaller, denser graph, with strong weight decay of the matrices."""
    last = Stage(
        name="end", hops=(1, 2), max_updates=updates, lr=1.5e-3, lr_end=1e-5, fall_from=0.5
    )
    return Recipe(
        name=f"mini/systematicity/r{n_loops}_l{n_layers}",
        task=TwoHopTask(
            n_entities=80,
            n_relations=20,
            out_degree=20,
            ood_share=0.07,
            graph_seed=0,
            iid_share=0.02,
        ),
        n_layers=n_layers,
        d_model=96,
        n_heads=4,
        positions="learned",
        padded_to=5,
        loops=Loops.fixed(n_loops),
        eval_loops=n_loops,
        stages=_two_hop_stages(last, looped=n_loops > 1, gate=0.95, warmup=500),
        batch_size=512,
        weight_decay=1.0,
        decay_matrices_only=True,
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _mini_multi_hop("multi_hop/r_dyn", _DYNAMIC, 10, 10_000),
        _mini_multi_hop("multi_hop/r6", Loops.fixed(6), 6, 6_000),
        _mini_multi_hop("multi_hop/r4", Loops.fixed(4), 8, 8_000),
        _mini_multi_hop("multi_hop/r2", Loops.fixed(2), 4, 8_000),
        _mini_multi_hop("shortcut", Loops.fixed(4), 6, 6_000, permutations=False),
        _mini_two_hop(4, 2, 12_000),
        _mini_two_hop(1, 8, 6_000),
        _mini_two_hop(1, 2, 6_000),
        _mini_two_hop(2, 2, 6_000),
        _mini_two_hop(8, 2, 3_000),
        *(extrapolation(f"paper/multi_hop/r{loops}", Loops.fixed(loops)) for loops in range(1, 9)),
        extrapolation("paper/multi_hop/r_dyn", _DYNAMIC),
        *(systematicity(f"paper/systematicity/r{loops}_l4", loops, 4) for loops in (1, 2, 4, 8)),
        *(
            systematicity(
                f"code/systematicity/r{loops}_l4", loops, 4, batch_size=128, weight_decay=0.1
            )
            for loops in (1, 2, 4, 8)
        ),
    )
}
