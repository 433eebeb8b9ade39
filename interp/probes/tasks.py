"""Tasks of a probe: classes or numbers for every read, and the control tasks made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from loopscope.interp.probes.states import ReadStates


@dataclass(frozen=True)
class Task:
    """One value for every read.

    Attributes:
        values: Int[Tensor, " read"], the index of each read's class; or Float[Tensor, " read"].
        classes: Int[Tensor, " class"], the classes by their index; None for numbers.
    """

    values: Shaped[Tensor, " read"]
    classes: Int[Tensor, " class"] | None

    @classmethod
    def of(cls, states: ReadStates, targets: Shaped[Tensor, ...]) -> Task:
        """The task of a caller's targets, integers for classes and floats for numbers.

        Args:
            targets: "batch" with one value per row, or "batch k" with one per column that is read.

        Raises:
            ValueError: Targets of another shape, numbers that are not finite, or a single class.
        """
        targets = torch.as_tensor(targets, device="cpu")
        rows, columns = states.columns.shape
        if targets.shape not in ((rows,), (rows, columns)):
            raise ValueError(
                f"one target per row or per column that is read is needed, {[rows]} or"
                f" {[rows, columns]}, got the shape {list(targets.shape)}"
            )
        values = states.filled(targets.view(rows, -1).expand(rows, columns))
        if values.is_floating_point():
            if not bool(values.isfinite().all()):
                raise ValueError("the targets of a probe must be finite, got NaN or infinity")
            return cls(values.double(), None)
        classes, index = values.unique(return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"a probe needs at least two classes, got {len(classes)}")
        return cls(index, classes)

    @property
    def metric(self) -> str:
        """The name of the score."""
        return "R2" if self.classes is None else "accuracy"

    def outputs(self, reads: Int[Tensor, " read"]) -> Float[Tensor, "read output"]:
        """The outputs that a linear map should give: +1 for the class and -1 for the others, or
        the number.
        """
        values = self.values[reads]
        if self.classes is None:
            return values[:, None]
        signs = values.new_full((len(values), len(self.classes)), -1.0, dtype=torch.float64)
        return signs.scatter_(1, values[:, None], 1.0)

    def answer(self, outputs: Float[Tensor, "read output"]) -> Shaped[Tensor, " read"]:
        """The class of the largest output, or the number itself."""
        return outputs[:, 0] if self.classes is None else outputs.argmax(1)

    def score(self, answers: Shaped[Tensor, " read"], reads: Int[Tensor, " read"]) -> float:
        """Accuracy, or the share of the variance explained (R2); NaN where there is no variance."""
        truth = self.values[reads]
        if self.classes is not None:
            return float((answers == truth).double().mean())
        if truth.min() == truth.max():  # whose mean may be rounded, so that they seem to vary
            return float("nan")
        off, spread = (truth - answers).square().sum(), (truth - truth.mean()).square().sum()
        return float(1 - off / spread)

    def constant(self, train: Int[Tensor, " train"], test: Int[Tensor, " test"]) -> float:
        """The score of the best answer that looks at no state: the commonest class, or the mean."""
        seen = self.values[train]
        best = seen.mean() if self.classes is None else seen.mode().values
        return self.score(best.expand(len(test)), test)

    def shuffled(self, states: ReadStates, generator: torch.Generator) -> Task:
        """The task with the rows' values in a random order, which no state can know."""
        by_row = self.values.view(len(states.columns), -1)
        order = torch.randperm(len(by_row), generator=generator, device="cpu")
        return replace(self, values=by_row[order].flatten())

    def control(self, types: Shaped[Tensor, " read"], generator: torch.Generator) -> Task:
        """The control task: every type has one value, drawn at random from all values of the task,
        so that only a probe that learns types by heart can solve it (Hewitt & Liang 2019). Values
        are drawn again until two types differ, for a constant would be solved without any state.

        Raises:
            ValueError: Reads of one type alone.
        """
        kinds, index = types.unique(return_inverse=True)
        if len(kinds) < 2:
            raise ValueError(
                "a control task needs reads of several types, but all of these reads have one; pass"
                " types= (which entity, word or question each row is about), or control=False"
            )
        while True:
            turns = torch.randint(
                len(self.values), (len(kinds),), generator=generator, device="cpu"
            )
            drawn = self.values[turns]
            if bool((drawn != drawn[0]).any()) or bool((self.values == drawn[0]).all()):
                return replace(self, values=drawn[index])


def types_of(states: ReadStates, types: Shaped[Tensor, ...] | None) -> Int[Tensor, " read"]:
    """The type of each read: as given for each row or read, by default the token that is read."""
    if types is None:
        return states.filled(states.batch.tokens.gather(1, states.columns)).cpu()
    given = torch.as_tensor(types, device="cpu")
    rows, columns = states.columns.shape
    if given.shape not in ((rows,), (rows, columns)) or given.is_floating_point():
        raise ValueError(
            f"types must be integers, one per row or per column that is read, {[rows]} or"
            f" {[rows, columns]}, got {given.dtype} of the shape {list(given.shape)}"
        )
    return states.filled(given.view(rows, -1).expand(rows, columns))
