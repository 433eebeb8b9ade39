"""Training of dictionaries: on states in memory, or on batches of states from anywhere.

Axes: read (a token of an example), loop, d_in, feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.common.inputs import Inputs, ReadoutColumn
from loopscope.interp.common.places import Picked
from loopscope.interp.dictionaries.dictionary import KINDS, Dictionary, Kind
from loopscope.interp.dictionaries.reading import Reading, checked_states, loop_states
from loopscope.interp.dictionaries.stored import Pair, StoredStates, refuse_choice
from loopscope.interp.dictionaries.trainer import DictionaryTraining, Trainer
from loopscope.interp.store.reading import ActivationStore
from loopscope.models.basis.draws import seeded
from loopscope.models.core.base import LoopedModel

Batches = Float[Tensor, "read loop d_in"] | Iterable[Tensor]


def train_dictionary(
    model: LoopedModel,
    inputs: Inputs | ActivationStore,
    n_loops: int | None = None,
    *,
    kind: Kind = "shared",
    hook: str | None = None,
    target: str | None = None,
    positions: Picked | int | None = "all",
    readout: ReadoutColumn = None,
    training: DictionaryTraining | None = None,
) -> Dictionary:
    """Train a sparse dictionary of the states at one hook over the iterations. The model stays
    unchanged.

    Args:
        inputs: A `Batch`, texts, or token ids. Or a store of this model's activations, which may be
            larger than memory and is read in shuffled batches.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number of the store, or else that which
            the checkpoint records.
        kind: "per_iteration", "shared", "crosscoder" or "transcoder"; `Dictionary` describes them.
        hook: The hook that is read, named within an iteration, such as "blocks.1.hook_mlp_out".
            None means the residual stream after the last block.
        target: The hook that is written; for a transcoder only.
        positions: The tokens to train on: "all" except padding, some columns, or None for the
            answer position. For a store it must be "all", which are the tokens that were collected.
        training: The settings; None means the defaults of `DictionaryTraining`.

    Returns:
        The trained dictionary.

    Raises:
        KeyError: An iteration does not have the hook.
        ValueError: `target` is given without a transcoder or missing for one, a state is not
            finite, or the store is of another model, tokenizer or number of iterations.

    Source:
        TopK: Gao et al. 2024 (arXiv 2406.04093). BatchTopK: Bussmann et al. 2024
        (arXiv 2412.06410). JumpReLU: Rajamanoharan et al. 2024 (arXiv 2407.14435). Crosscoders:
        Lindsey et al. 2024 (Anthropic). Transcoders: Dunefsky et al. 2024 (arXiv 2406.11944).
    """
    _check_kind(kind, written=target is not None)
    if isinstance(inputs, ActivationStore):
        refuse_choice(positions, readout)
        n_loops = inputs.n_loops if n_loops is None else n_loops
        reading = Reading.of(model, n_loops, hook, target)
        training = training or DictionaryTraining()
        stored = StoredStates(inputs, model, reading)
        batches = stored.without_end(training.batch_size, training.seed)
        return _fitted(_first_twice(batches), reading, kind, training)
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
    """Train a dictionary on states that were collected before, without running a model.

    Args:
        states: Float[Tensor, "read loop d_in"], from which batches are drawn at random. Or an
            iterable of such batches in random order, which is repeated as often as needed. Errors
            are measured in units of the states' size; for an iterable the first batch alone gives
            these units.
        reading: The hook points of the states; see `Reading`.
        kind: "per_iteration", "shared", "crosscoder" or "transcoder"; `Dictionary` describes them.
        training: The settings; None means the defaults of `DictionaryTraining`.
        targets: The states that a transcoder is to write, for the same reads and in the same form.

    Returns:
        The trained dictionary.

    Raises:
        ValueError: A state is not finite, all states are the same, the states have another number
            of iterations than `reading`, `targets` does not fit the kind or the states, or the
            iterable can be read only once.
    """
    training = training or DictionaryTraining()
    _check_kind(kind, written=targets is not None)
    return _fitted(_pairs(states, targets, training), reading, kind, training)


def _fitted(
    pairs: Iterator[Pair], reading: Reading, kind: Kind, training: DictionaryTraining
) -> Dictionary:
    """Train on what gives the units, which comes first, and on the batches that follow."""
    some = _checked(next(pairs), reading.n_loops)
    even = _evenly(some[1])
    with torch.inference_mode(False), torch.enable_grad():
        parts = zip(_by_coder(some[0], kind), _by_coder(some[1], kind), strict=True)
        trainers = [Trainer(x, y, kind != "transcoder", training) for x, y in parts]
        for _ in tqdm(range(training.steps), desc=kind, leave=False, disable=training.steps < 100):
            x, y = _checked(next(pairs), reading.n_loops)
            vectors = (_by_coder(part, kind) for part in (x, y, even.expand_as(y)))
            for trainer, *own in zip(trainers, *vectors, strict=True):
                trainer.step(*own)
        losses = torch.stack([torch.stack(trainer.losses) for trainer in trainers])
        shares = losses / reading.n_loops if kind == "crosscoder" else losses
        return Dictionary(kind, tuple(trainer.coder() for trainer in trainers), reading, shares)


def _check_kind(kind: Kind, written: bool) -> None:
    """Refuse a kind that is unknown, and one that does not fit what is to be written."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if written != (kind == "transcoder"):
        raise ValueError(
            "what is written (target= or targets=) must be given for a transcoder and only then,"
            f" got kind={kind!r} {'with' if written else 'without'} it"
        )


def _checked(pair: tuple[Tensor, Tensor], n_loops: int) -> Pair:
    """A batch of what is read and of what is written, as `checked_states`."""
    x, y = (checked_states(states, n_loops) for states in pair)
    if len(pair[0]) != len(pair[1]):
        raise ValueError(
            "a batch of targets must have as many reads as its batch of states, got"
            f" {len(pair[1])} and {len(pair[0])}"
        )
    return x, y


def _evenly(states: Float[Tensor, "read loop d"]) -> Float[Tensor, "1 loop 1"]:
    """The weight of each iteration, by which all count alike: 1 over the variance of its states."""
    if len(states) < 2 or not bool((states != states[0]).any()):
        raise ValueError(
            "states to train a dictionary on, and the first batch of several, must hold at least 2"
            f" reads that differ, got {len(states)} {'read' if len(states) == 1 else 'reads'}"
            " without a difference; pass more tokens, or larger batches"
        )
    spread = (states - states.mean(0)).square().sum(2).mean(0)
    return 1 / spread.clamp(min=max(1e-6 * float(spread.max()), 1e-30))[None, :, None]


def _by_coder(
    values: Float[Tensor, "read loop d"], kind: Kind
) -> tuple[Float[Tensor, "vector _width"], ...]:
    """The vectors that each coder is trained on."""
    if kind == "per_iteration":
        return values.unbind(1)
    return (values.flatten(1) if kind == "crosscoder" else values.flatten(0, 1),)


def _pairs(
    states: Batches, targets: Batches | None, training: DictionaryTraining
) -> Iterator[Pair]:
    """Pairs of what is read and what is written: first what gives the units (all states, or the
    first batch), then batches without end.
    """
    if not isinstance(states, Tensor):
        yield from _first_twice(_again(states, targets))
        return
    written = states if targets is None else targets
    if not isinstance(written, Tensor) or len(states) != len(written):
        raise ValueError(
            "targets must be a tensor with one row for each of the"
            f" {len(states)} reads of the states"
        )
    yield states, written
    generator, size = seeded(training.seed), (training.batch_size,)
    while True:
        drawn = torch.randint(len(states), size, generator=generator, device="cpu")
        yield states[drawn.to(states.device)], written[drawn.to(written.device)]


def _first_twice(batches: Iterator[Pair]) -> Iterator[Pair]:
    first = next(batches)
    return chain([first, first], batches)


def _again(states: Iterable[Tensor], targets: Batches | None) -> Iterator[Pair]:
    """The batches of an iterable, again and again."""
    while True:
        found = False
        for pair in zip(states, *([] if targets is None else [targets]), strict=True):
            found = True
            yield pair[0], pair[-1]
        if not found:
            raise ValueError(
                "the batches of states came to an end before the steps did; pass an iterable that"
                " can be gone through again (a list), no generator"
            )
