"""Training of dictionaries: on states in memory, or on batches of states from anywhere.

Axes: read (a token of an example), loop, d_in, feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import Inputs, ReadoutColumn
from loopscope.interp.common.places import Picked
from loopscope.interp.common.precision import widened
from loopscope.interp.dictionaries.dictionary import KINDS, Dictionary, Kind
from loopscope.interp.dictionaries.reading import Reading, loop_states
from loopscope.interp.dictionaries.trainer import DictionaryTraining, Trainer
from loopscope.models.core.base import LoopedModel

Batches = Float[Tensor, "read loop d_in"] | Iterable[Tensor]


def train_dictionary(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    kind: Kind = "shared",
    hook: str | None = None,
    target: str | None = None,
    positions: Picked | int | None = "all",
    readout: ReadoutColumn = None,
    training: DictionaryTraining | None = None,
) -> Dictionary:
    """Train a sparse dictionary of the states at one hook over the iterations; the model itself
    stays as it is.

    Args:
        inputs: A batch, texts, or tokens with `readout`.
        n_loops: Iterations; None means what the checkpoint records.
        kind: "per_iteration", "shared", "crosscoder" or "transcoder", as `Dictionary` says.
        hook: The hook that is read, within an iteration; None means the residual after the last
            block.
        target: The hook that is written, for a transcoder only.
        positions: "all" tokens that are not padding, columns, or None for the readout.
        training: The settings; None means their defaults.

    Raises:
        KeyError: A hook that an iteration does not have.
        ValueError: A target without a transcoder or the reverse, or states that are not finite.

    Source:
        TopK: Gao et al. 2024 (arXiv 2406.04093). BatchTopK: Bussmann et al. 2024 (arXiv
        2412.06410). JumpReLU: Rajamanoharan et al. 2024 (arXiv 2407.14435). Crosscoders: Lindsey et
        al. 2024 (Anthropic). Transcoders: Dunefsky et al. 2024 (arXiv 2406.11944).
    """
    if (target is None) == (kind == "transcoder"):
        raise ValueError(
            "target= (what is written) must be given for a transcoder and only then, got"
            f" kind={kind!r}, target={target!r}"
        )
    reading = Reading.of(model, n_loops, hook, target)

    def states(hook: str) -> Tensor:
        return loop_states(
            model, inputs, reading.n_loops, hook=hook, positions=positions, readout=readout
        )

    targets = None if target is None else states(target)
    return fit_dictionary(states(reading.hook), reading, kind, training, targets)


def fit_dictionary(
    states: Batches,
    reading: Reading,
    kind: Kind = "shared",
    training: DictionaryTraining | None = None,
    targets: Batches | None = None,
) -> Dictionary:
    """Train a dictionary on states that were collected before.

    Args:
        states: Float[Tensor, "read loop d_in"], from which batches are drawn at random; or an
            iterable of such batches in random order, which is gone through as often as needed.
        reading: Where the states come from.
        targets: What a transcoder writes, for the same reads.

    Raises:
        ValueError: States that are not finite or of another number of iterations, or an iterable
            that cannot be gone through again.
    """
    training = training or DictionaryTraining()
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    trainers: list[Trainer] = []
    batches = _vectors(_batches(states, targets, training), kind, reading.n_loops)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in tqdm(range(training.steps), desc=kind, leave=False, disable=training.steps < 100):
            vectors = next(batches)
            if not trainers:
                trainers = [Trainer(x, y, targets is None, training) for x, y, _ in vectors]
            for trainer, own in zip(trainers, vectors, strict=True):
                trainer.step(*own)
    losses = torch.stack([torch.stack(trainer.losses) for trainer in trainers])
    shares = losses / reading.n_loops if kind == "crosscoder" else losses
    return Dictionary(kind, tuple(trainer.coder() for trainer in trainers), reading, shares)


def _vectors(
    batches: Iterator[tuple[Tensor, Tensor]], kind: Kind, n_loops: int
) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """For each coder what it reads, what it writes, and the weight of each entry of that."""
    even: Tensor | None = None
    for pair in batches:
        x, y = (_checked(part, n_loops) for part in pair)
        even = _evenly(y) if even is None else even
        parts = [_by_coder(part, kind) for part in (x, y, even.expand_as(y))]
        yield list(zip(*parts, strict=True))


def _checked(states: Tensor, n_loops: int) -> Float[Tensor, "read loop d"]:
    """A batch of states in float32 or wider."""
    if states.ndim != 3 or states.shape[1] != n_loops:
        raise ValueError(
            f"batches of states must be [read, {n_loops} iterations, width], got the shape"
            f" {list(states.shape)}"
        )
    refuse_nonfinite("the states to train a dictionary on", states)
    return widened(states)


def _evenly(states: Float[Tensor, "read loop d"]) -> Float[Tensor, "1 loop 1"]:
    """The weight of each iteration, by which all count alike: 1 over the variance of its states."""
    spread = (states - states.mean(0)).square().sum(2).mean(0)
    return 1 / spread.clamp(min=max(1e-6 * float(spread.max()), 1e-30))[None, :, None]


def _by_coder(
    values: Float[Tensor, "read loop d"], kind: Kind
) -> tuple[Float[Tensor, "vector _width"], ...]:
    """The vectors that each coder is trained on."""
    if kind == "per_iteration":
        return values.unbind(1)
    return (values.flatten(1) if kind == "crosscoder" else values.flatten(0, 1),)


def _batches(
    states: Batches, targets: Batches | None, training: DictionaryTraining
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of what is read and of what is written, without end."""
    if isinstance(states, Tensor):
        written = states if targets is None else targets
        if not isinstance(written, Tensor) or len(states) != len(written):
            raise ValueError(
                "targets must be a tensor with one row for each of the"
                f" {len(states)} reads of the states"
            )
        generator = torch.Generator().manual_seed(training.seed)
        while True:
            drawn = torch.randint(len(states), (training.batch_size,), generator=generator)
            yield states[drawn.to(states.device)], written[drawn.to(written.device)]
    while True:
        found = False
        for pair in zip(states, *([] if targets is None else [targets]), strict=True):
            found = True
            yield pair[0], pair[-1]
        if not found:
            raise ValueError(
                "the batches of states came to an end before the steps did; pass an iterable that"
                " can be gone through again (a list or a store), no generator"
            )
