"""How much each writer's output changes between two runs: scores that know no gradient."""

from __future__ import annotations

from loopscope.interp.circuits.building import graph_with
from loopscope.interp.circuits.gradients import Written
from loopscope.interp.circuits.names import placed
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.common.modes import evaluated
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel


@evaluated
def writer_changes(
    model: LoopedModel, clean: Batch, corrupted: Batch, scores: Circuit
) -> dict[str, float]:
    """The mean norm, over inputs and positions, of what each writer adds in the clean run minus
    what it adds in the corrupted one; over inputs alone for the writers of a circuit by position.

    Args:
        clean, corrupted: Row by row a pair.
        scores: All edges of the model, whose writers are meant.
    """
    graph = graph_with(model, clean, [scores])
    runs = [Written.of(model, batch, graph).outputs for batch in (clean, corrupted)]
    change = (runs[0] - runs[1]).norm(dim=-1).mean(1)
    if graph.positions is None:
        return dict(zip(graph.writers, change.mean(1).tolist(), strict=True))
    return {
        placed(writer, at): size
        for writer, sizes in zip(graph.writers, change.tolist(), strict=True)
        for at, size in enumerate(sizes)
    }
