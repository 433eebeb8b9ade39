"""Dictionaries inside a run: the codes take the place of the states, and features are changed.

Axes: batch pos d_model feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.collecting import recorded
from loopscope.interp.common.columns import at_columns_of, checked_columns
from loopscope.interp.common.inputs import Inputs, reference_batch
from loopscope.interp.common.modes import evaluating
from loopscope.interp.common.places import Picked, in_range
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.models.basis.numbers import checked_factor, factor_like, given_tensor, is_bool
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import by_rows

_EMBED = "hook_embed"
Features = int | Sequence[int] | Int[Tensor, "batch some"]


@dataclass(frozen=True)
class FeatureEdit:
    """A change of some features during a run, to be given to `splice`.

    The new activation of a feature is scale * activation + add.

    Attributes:
        features: One feature, several features, or other ones for each row:
            Int[Tensor, "batch some"].
        loops: The iterations to change, from 0; "all" for every one.
        positions: The columns of the text to change; "all" for every one.
        scale: The factor of the activations; 0 switches the features off. A tensor can hold one
            factor for each feature.
        add: The amount that is added after scaling, in units of the states.
        into: As many features as `features`. Each also receives the activation of its partner in
            `features`; with scale=0 the activation moves from one to the other.
    """

    features: Features
    loops: Picked | int = "all"
    positions: Picked | int = "all"
    scale: float | Tensor = 0.0
    add: float | Tensor = 0.0
    into: Features | None = None

    def __post_init__(self) -> None:
        checked_factor(self.scale, "scale")
        checked_factor(self.add, "add")

    def check(self, dictionary: Dictionary, chosen: Sequence[int]) -> None:
        """Refuse an edit that cannot be applied to a dictionary.

        Args:
            dictionary: The dictionary.
            chosen: The iterations at which the dictionary is in place.

        Raises:
            ValueError: The edit names an iteration at which the dictionary is not in place, a
                feature out of range, features that are not numbers, or an `into` of another size.
        """
        outside = set(in_range("loops", self.loops, dictionary.n_loops)) - set(chosen)
        if outside and not isinstance(self.loops, str):
            raise ValueError(
                f"an edit's loops must be among those of splice, {list(chosen)}, got"
                f" {sorted(outside)}"
            )
        sizes = [given_tensor(self.features)]
        sizes += [] if self.into is None else [given_tensor(self.into)]
        if any(size.ndim > 2 for size in sizes):
            raise ValueError("features must be one number, a list, or a list for each row")
        for size in sizes:
            _check_range(size, dictionary.n_features)
        widths = {size.shape[-1] if size.ndim else 1 for size in sizes}
        if len(widths) > 1:
            raise ValueError(
                "into must name as many features as features does, got"
                f" {' and '.join(map(str, sorted(widths)))}"
            )

    @property
    def of_rows(self) -> bool:
        """Whether the edit names features or scales for each row."""
        into = self.features if self.into is None else self.into
        named = self.features, into, self.scale, self.add
        return any(given_tensor(each).ndim > 1 for each in named)

    def apply(
        self, codes: Float[Tensor, "batch pos feature"], loop: int, n_loops: int
    ) -> Float[Tensor, "batch pos feature"]:
        """The codes of one iteration after the edit.

        Raises:
            ValueError: A column is out of range, or the features are given for another number of
                rows.
        """
        if loop not in in_range("loops", self.loops, n_loops):
            return codes
        index = _index(self.features, codes)
        old = codes.gather(-1, index)
        scaled = factor_like(self.scale, old) * old + factor_like(self.add, old)
        new = codes.scatter(-1, index, scaled)
        if self.into is not None:
            new = new.scatter_add(-1, _index(self.into, codes), old)
        return at_columns_of(codes, new, checked_columns(self.positions))


def _check_range(features: Tensor, count: int) -> None:
    inside = (features >= 0) & (features < count)
    if features.is_floating_point() or is_bool(features) or not bool(inside.all()):
        raise ValueError(
            f"features must be integers in 0..{count - 1}, got {features.flatten().tolist()}"
        )


def _index(features: Features, codes: Tensor) -> Int[Tensor, "batch pos some"]:
    """The features of each row and column."""
    rows, columns, _ = codes.shape
    given = torch.as_tensor(features, device=codes.device)
    given = given if given.ndim == 2 else given.reshape(1, -1)
    if len(given) not in (1, rows):
        raise ValueError(
            f"features must be the same for all rows or given for each of the {rows} rows, got"
            f" {len(given)}"
        )
    return given.long()[:, None].expand(rows, columns, -1)


@contextmanager
def splice(
    model: LoopedModel,
    dictionary: Dictionary,
    edits: FeatureEdit | Sequence[FeatureEdit] = (),
    *,
    loops: Picked | int = "all",
    error: bool = True,
    reference: Inputs | None = None,
) -> Iterator[LoopedModel]:
    """Run a model with a dictionary in place of its states, and change features of the dictionary.

    Inside the `with` block every run is encoded by the dictionary, edited and decoded again at the
    dictionary's hook. After the block, also after an error, the model is as before. The runs must
    have the dictionary's number of iterations. Gradients pass through to the states.

    Args:
        dictionary: A dictionary of this model.
        edits: Changes of features, applied one after another.
        loops: The iterations at which the dictionary is in place, from 0; "all" for every one.
        error: True adds the part of each state that the dictionary does not reconstruct, so that
            runs without edits are exactly those of the model. False leaves only the reconstruction.
        reference: The inputs of the runs inside, for a crosscoder only. A crosscoder needs the
            states of all iterations to encode a token, so these inputs are run once at the start of
            the block. A run of other tokens is refused. Changes by `Batch.options` (such as a seed)
            or by hooks inside are not noticed.

    Raises:
        KeyError: The model does not have a hook of the dictionary.
        ValueError: The dictionary is of another model or width, a feature or place is out of range,
            or `reference` is missing or not needed. Runs inside raise it for another `n_loops` or
            other inputs than the reference.
    """
    dictionary.check(model)
    if (reference is None) == (dictionary.kind == "crosscoder"):
        raise ValueError(
            "reference= (the inputs of the runs inside) must be given for a crosscoder and only"
            f" then, got a {dictionary.kind} dictionary"
        )
    chosen = in_range("loops", loops, dictionary.n_loops)
    changes = _checked_edits(edits, dictionary, chosen)
    fixed = None if reference is None else _Reference.of(model, dictionary, reference)
    held: dict[int, Tensor] = {}
    reading, writing = (
        {names[loop]: loop for loop in chosen}
        for names in (dictionary.reading.names, dictionary.reading.written)
    )

    def read(value: Tensor, hook: HookPoint) -> None:
        held[reading[str(hook.name)]] = _checked_state(value, hook, dictionary)

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        loop = writing[str(hook.name)]
        codes = _taken(held, loop, dictionary) if fixed is None else fixed.codes
        if codes.shape[:2] != value.shape[:2]:
            raise ValueError(
                f"the codes are those of {list(codes.shape[:2])} rows and columns, but the run"
                f" inside has {list(value.shape[:2])}; a reference must be the input of the run"
            )
        new = codes
        for change in changes:
            new = change.apply(new, loop, dictionary.n_loops)
        return _written(value, codes if error else None, new, dictionary, loop)

    write = by_rows(write) if fixed is None and not any(e.of_rows for e in changes) else write
    # predicates, so that another n_loops is refused; what is read is read before it is written
    first = (reading.__contains__, by_rows(read)) if fixed is None else (_EMBED.__eq__, fixed.check)
    hooks: list[Any] = [first, (writing.__contains__, write)]
    with model.hooks(hooks, n_loops=dictionary.n_loops):
        yield model


def _checked_edits(
    edits: FeatureEdit | Sequence[FeatureEdit], dictionary: Dictionary, chosen: Sequence[int]
) -> list[FeatureEdit]:
    changes = [edits] if isinstance(edits, FeatureEdit) else list(edits)
    for change in changes:
        change.check(dictionary, chosen)
    return changes


def _written(
    value: Tensor, codes: Tensor | None, new: Tensor, dictionary: Dictionary, loop: int
) -> Tensor:
    """The value with its new codes in place of its own ones; without own ones, the sum of the new
    ones alone.
    """
    directions = dictionary.directions(loop).to(new.dtype)
    if codes is not None:
        return value + ((new - codes) @ directions).to(value.dtype)
    return (new @ directions + dictionary.bias(loop).to(new.dtype)).to(value.dtype)


def _checked_state(value: Tensor, hook: HookPoint, dictionary: Dictionary) -> Tensor:
    if value.ndim != 3:
        raise ValueError(
            f"a dictionary reads vectors [batch, pos, width], but {hook.name} has the shape"
            f" {list(value.shape)}"
        )
    return value


def _taken(held: dict[int, Tensor], loop: int, dictionary: Dictionary) -> Tensor:
    """The codes of what was read at an iteration of this run, once."""
    if loop not in held:
        raise ValueError(
            "a spliced run must pass where the dictionary reads before it comes to where it writes,"
            " but this one was continued in between; continue from a visit before it, or after it"
        )
    return dictionary.coder(loop).encode(held.pop(loop))


@dataclass(frozen=True)
class _Reference:
    """The inputs of the runs inside, as a crosscoder reads them.

    Attributes:
        codes: Float[Tensor, "batch pos feature"], of all tokens.
        embedded: Float[Tensor, "batch pos d_model"], by which the inputs are known again.
    """

    codes: Float[Tensor, "batch pos feature"]
    embedded: Float[Tensor, "batch pos d_model"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: LoopedModel, dictionary: Dictionary, inputs: Inputs) -> _Reference:
        """One run of the inputs."""
        batch, names = reference_batch(model, inputs), dictionary.reading.names
        with evaluating(model):
            run = recorded(model, batch, [_EMBED, *names], dictionary.n_loops)
        states = torch.stack([run[name] for name in names], dim=2)
        codes = dictionary.encode(states.flatten(0, 1))
        return cls(codes[:, 0].view(*states.shape[:2], -1), run[_EMBED])

    def check(self, value: Tensor, hook: HookPoint) -> None:
        """Refuse a run of other tokens; one of another shape is refused where codes are written.

        Raises:
            ValueError: An embedding is not the reference's.
        """
        if value.shape != self.embedded.shape:
            return
        other = (value.detach() != self.embedded).any(-1)
        if bool(other.any()):
            row, column = other.nonzero()[0].tolist()
            raise ValueError(
                "a reference must be the input of the run inside, but the embeddings differ, first"
                f" in row {row} at position {column}; pass the inputs of the run as reference="
            )
