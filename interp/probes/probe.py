"""Probes at every place of a run, with held-out score, control task and permutation test."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from loopscope.interp.common.fingerprint import described
from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import Picked
from loopscope.interp.probes.fits import Kind, ProbeFit
from loopscope.interp.probes.kept import StatesJob
from loopscope.interp.probes.record import Probe
from loopscope.interp.probes.ridge import check_strength
from loopscope.interp.probes.states import HeldOut, ReadStates, split_rows
from loopscope.interp.probes.tasks import Task, types_of
from loopscope.interp.shards.share import Shard
from loopscope.models.basis.draws import seeded
from loopscope.models.basis.names import NamesFilter
from loopscope.models.basis.numbers import checked_count
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops


@torch.no_grad()
@evaluated
def probe(
    model: LoopedModel,
    inputs: Inputs,
    targets: Shaped[Tensor, ...],
    places: NamesFilter | None = None,
    n_loops: int | None = None,
    *,
    kind: Kind = "ridge",
    positions: Picked | int | None = None,
    types: Shaped[Tensor, ...] | None = None,
    control: bool = True,
    permutations: int = 0,
    bits: bool = False,
    strength: float = 1.0,
    held_out: HeldOut = 0.25,
    readout: ReadoutColumn = None,
    batch_size: int = 512,
    seed: int = 0,
    save_to: str | Path | None = None,
    shard: Shard | None = None,
) -> Probe:
    """Fit a linear probe of a property at every place of a run, and score it on rows that were held
    out.

    Every row is run once. "ridge" needs memory that does not grow with the rows; "logistic" keeps
    the states of all places. With `save_to` the states are kept in a folder piece by piece, and the
    probes are fitted on the CPU from these files.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        targets: The property: one value per row, "batch", or one per column that is read, "batch
            k". Integers are classes, floats are numbers (for "ridge").
        places: The hook points by name, pattern or list; None means the residual stream after every
            visit.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        kind: "ridge" regression (for classes, of +1 and -1), or "logistic" regression.
        positions: The columns to read instead of the answer position; "all" for every token except
            padding.
        types: Integers in the shape of `targets`. The control task gives each type a random label;
            None takes the token id that is read as the type.
        control: Whether to fit the control task too.
        permutations: How often the targets are shuffled and fitted again, for a p value.
        bits: Whether to measure the description length; for "logistic" only.
        strength: The weight of the squared length of the probe: beside the squared error for
            "ridge" (scikit-learn's alpha), beside twice the summed log loss for "logistic" (its 1 /
            C).
        held_out: The share of the rows to hold out at random, or which rows.
        batch_size: How many rows run at a time.
        seed: The seed of the split, the control task and the permutations.
        save_to: A folder that keeps states. If the call was interrupted, the same call goes on from
            there. `merge` fits the probes on the states of all shards.
        shard: (i, n) runs the i-th of n shares of the rows, cut into pieces of `batch_size`; None
            runs all.

    Returns:
        The probes with their scores. For a shard the record has no places, because a probe is
        fitted on all rows.

    Raises:
        KeyError: The run does not have a place.
        ValueError: The shape of targets or types does not fit, there are too few rows or classes, a
            state is not finite, the kind does not support an argument, a shard has no folder, or
            the folder holds another call.

    Source:
        Control tasks: Hewitt & Liang, arXiv 1909.03368; description length: Voita & Titov, arXiv
        2003.12298.
    """
    check_strength(strength)
    permutations = checked_count(permutations, "permutations", least=0)
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    states = ReadStates.of(model, batch, places, positions, n_loops, batch_size)
    task = Task.of(states, targets)
    _check_kind(kind, task, bits)
    generator = seeded(seed)
    train, test = split_rows(len(batch), held_out, seed)
    tasks = [task]
    if control:
        tasks.append(task.control(types_of(states, types), generator))
    tasks += [task.shuffled(states, generator) for _ in range(permutations)]
    fit = ProbeFit(states.places, tuple(tasks), control, kind, bits, float(strength))
    settings = {
        "control": control,
        "permutations": permutations,
        "seed": seed,
        "types": described(types),
    }
    job = StatesJob("probe", states, train, test, save_to, shard)
    return job.record(fit, settings)


def _check_kind(kind: str, task: Task, bits: bool) -> None:
    if kind not in ("ridge", "logistic"):
        raise ValueError(f"kind must be 'ridge' or 'logistic', got {kind!r}")
    if kind == "ridge" and bits:
        raise ValueError(
            "a description length needs the probabilities of classes, which a ridge probe does not"
            " have; pass kind='logistic'"
        )
    if kind == "logistic" and task.classes is None:
        raise ValueError(
            "a logistic probe tells classes apart, but these targets are numbers; pass integers, or"
            " kind='ridge'"
        )
