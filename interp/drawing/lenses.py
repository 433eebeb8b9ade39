"""The pictures of lenses and of what is read from them: ranks, training, stops, exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch

from loopscope.interp.drawing.cells import CellMap, cell_maps
from loopscope.interp.drawing.curves import Curve, CurvePanel, curves, spread
from loopscope.interp.drawing.labels import AXIS, tick

if TYPE_CHECKING:
    from loopscope.interp.exits.exit_gate import ExitDistribution
    from loopscope.interp.exits.halting import Stops
    from loopscope.interp.lens.alignment import EmbeddingAlignment
    from loopscope.interp.lens.decoding import Decodability, RankTrajectory
    from loopscope.interp.lens.record import Lens, Targets
    from loopscope.interp.lens.tuned_lens import TunedLens
    from loopscope.interp.lens.tuned_training import TunedLensKL


def lens(record: Lens, answers: Targets | None, title: str) -> go.Figure:
    """The top token of each read after each visit; with answers, their margin and rank."""
    rows = [_visit(record, i) for i in range(len(record.names))]
    if answers is not None:
        margin, rank = record.margin(answers).T, record.rank(answers).T
        named = _reads(record)
        shown = (("margin of the answer (logits)", margin), ("rank of the answer (0 = top)", rank))
        panels = [
            CurvePanel(what, spread(rows, values, named), _axis(record)) for what, values in shown
        ]
        return curves(panels, title)
    top = record.top(1)
    words = None if record.model.vocab is None else record.model.vocab.words
    cells = CellMap(
        title="top token",
        columns=_reads(record),
        rows=rows,
        values=top.probs[..., 0].tolist(),
        unit="prob",
        texts=[
            [f"#{i}" if words is None else words[i] for i in row]
            for row in top.tokens[..., 0].tolist()
        ],
        axes=("position" if _one_example(record) else "example.position", _axis(record)),
    )
    return cell_maps([cells], title)


def _visit(record: Lens, visit: int) -> str:
    """A visit on an axis; a lens of whole iterations counts the iterations run."""
    return str(visit + 1) if _of_iterations(record) else tick(record.names[visit])


def _of_iterations(record: Lens) -> bool:
    return all(layer is None for layer in record.layers)


def _axis(record: Lens) -> str:
    return "iterations" if _of_iterations(record) else AXIS


def _one_example(record: Lens) -> bool:
    return len(set(record.example.tolist())) == 1


def _reads(record: Lens) -> list[str]:
    places = zip(record.example.tolist(), record.position.tolist(), strict=True)
    return [f"{at}" if _one_example(record) else f"{row}.{at}" for row, at in places]


def ranks(record: RankTrajectory, title: str) -> go.Figure:
    """Rank and probability of each target over visits, as means over the reads."""
    rows = [_visit(record.lens, i) for i in range(len(record.lens.names))]
    reads, targets = record.tokens.shape
    words = record.lens.model.vocab.words if record.lens.model.vocab else None
    names = [f"target {i}" for i in range(targets)]
    if reads == 1 and words is not None:
        names = [words[token] for token in record.tokens[0].tolist()]
    geometric = record.rank.double().log1p().mean(1).expm1().T.tolist()
    shown = (
        ("rank (0 = top), geometric mean over the reads", geometric),
        ("probability, mean over the reads", record.prob.double().mean(1).T.tolist()),
    )
    return curves([_per_name(what, names, rows, x, _axis(record.lens)) for what, x in shown], title)


def _per_name(
    what: str, names: Sequence[str], x: Sequence[float | str], rows: list[list[float]], axis: str
) -> CurvePanel:
    return CurvePanel(what, [Curve(n, x, row) for n, row in zip(names, rows, strict=True)], axis)


def decodability(record: Decodability, title: str) -> go.Figure:
    """Accuracy and mean reciprocal rank of each target over visits."""
    rows = [tick(name) for name in record.names]
    names = [f"target {i}" for i in range(record.accuracy.shape[1])]
    shown = (
        ("accuracy", record.accuracy.T.tolist()),
        ("mean reciprocal rank", record.mean_reciprocal_rank.T.tolist()),
    )
    return curves([_per_name(what, names, rows, values, AXIS) for what, values in shown], title)


def tuned_lens(record: TunedLens, title: str) -> go.Figure:
    """The loss of each visit over training."""
    steps = list(range(len(record.losses)))
    rows = record.losses.double().T.tolist()
    names = list(map(tick, record.names))
    panel = _per_name("KL from the final answers (nats)", names, steps, rows, "step")
    return curves([panel], title)


def tuned_kl(record: TunedLensKL, title: str) -> go.Figure:
    """The KL over visits, one curve per lens."""
    rows = list(map(tick, record.names))
    values = record.kl.double().tolist()
    panel = _per_name("KL from the final answers (nats)", record.lenses, rows, values, AXIS)
    return curves([panel], title)


def alignment(record: EmbeddingAlignment, title: str) -> go.Figure:
    """Cosine and length of states and embeddings over visits; one curve per position, a mean over
    the examples.
    """
    rows = list(map(tick, record.names))
    at = sorted(set(record.position.tolist()))
    names = [f"position {position}" for position in at]
    shown = (
        ("cosine of state and embedding", record.cosine),
        ("length of the state (1 = the embedding's)", record.length),
    )
    panels = []
    for what, values in shown:
        means = torch.stack([values[:, record.position == i].mean(1) for i in at])
        panels.append(CurvePanel(what, spread(rows, means, names), AXIS))
    return curves(panels, title)


def stops(record: Stops, title: str) -> go.Figure:
    """Entropy and KL of each example over iterations; a star where the example stops."""
    count = len(record.lens.names)
    at = (record.iterations - 1).tolist()
    names = [f"example {i}" for i in range(len(at))]
    iterations = list(range(1, count + 1))
    shown = (("entropy (nats)", record.lens.entropy()), ("KL from before (nats)", record.lens.kl()))
    panels = [CurvePanel(what, spread(iterations, x.T, names, at)) for what, x in shown]
    return curves(panels, title)


def exit_distribution(record: ExitDistribution, title: str) -> go.Figure:
    """The probability of an exit after each iteration, and of one until then, as means."""
    iterations = list(range(1, len(record.pdf) + 1))
    shown = {"exit here": record.pdf, "exit until here": record.cdf}
    rows = [
        Curve(name, iterations, values.reshape(len(values), -1).mean(1).tolist())
        for name, values in shown.items()
    ]
    return curves([CurvePanel("probability of an exit", rows, span=(0.0, 1.05))], title)
