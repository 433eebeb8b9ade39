"""Fits of probes at every place, given the states: what `probe` does after its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.interp.common.places import Place
from loopscope.interp.probes.logistic import code_of, fit_logistic
from loopscope.interp.probes.record import Probe
from loopscope.interp.probes.ridge import fit_ridge
from loopscope.interp.probes.states import Side
from loopscope.interp.probes.tasks import Task
from loopscope.interp.shards.work import Results

Kind = Literal["ridge", "logistic"]


@dataclass(frozen=True)
class ProbeFit:
    """All that makes the probes of some states.

    Attributes:
        places: Where the states were read, in the order of the run.
        tasks: The caller's task, the control task if there is one, and the permuted tasks.
        control: Whether there is a control task.
        kind, bits, strength: As for `probe`.
    """

    places: tuple[Place, ...]
    tasks: tuple[Task, ...]
    control: bool
    kind: Kind
    bits: bool
    strength: float

    def about(self) -> dict[str, Any]:
        """The fit without its tensors, as JSON."""
        return {
            "places": [asdict(place) for place in self.places],
            "control": self.control,
            "kind": self.kind,
            "bits": self.bits,
            "strength": self.strength,
        }

    def tensors(self) -> Results:
        """The values and the classes of the tasks."""
        return tensors_of(self.tasks)

    @classmethod
    def kept(cls, about: Mapping[str, Any], common: Results) -> ProbeFit:
        """The fit that `about` and `tensors` describe."""
        places = tuple(Place(**place) for place in about["places"])
        how = {name: about[name] for name in ("control", "kind", "bits", "strength")}
        return cls(places, tasks_of(common), **how)

    def of(self, train: Side, test: Side) -> Probe:
        """Fit the probes on one side, and score them on the other."""
        names, task, code = [place.name for place in self.places], self.tasks[0], None
        if self.kind == "ridge":
            fitted = fit_ridge(names, self.tasks, train, test, self.strength)
        else:
            fitted, kept = fit_logistic(names, self.tasks, train, test, self.strength)
            code = code_of(kept, task, train.reads, self.strength) if self.bits else None
        scores = torch.tensor(
            [
                [t.score(a, test.reads) for t, a in zip(self.tasks, own, strict=True)]
                for own in fitted.answers
            ],
            dtype=torch.float64,
            device="cpu",
        ).view(len(names), len(self.tasks))
        return Probe(
            places=self.places,
            metric=task.metric,
            score=scores[:, 0],
            constant=task.constant(train.reads, test.reads),
            control=scores[:, 1] if self.control else None,
            permuted=scores[:, 1 + self.control :].T,
            code=code,
            maps=fitted.maps,
            classes=task.classes,
            n_train=len(train.reads),
            n_test=len(test.reads),
        )

    def of_shard(self, train: Int[Tensor, " read"], test: Int[Tensor, " held_out"]) -> Probe:
        """The record of a shard, which fits no probe."""
        return replace(self, places=()).of(Side(train, ()), Side(test, ()))


def tensors_of(tasks: tuple[Task, ...]) -> Results:
    """The values and the classes of some tasks."""
    found = {"values": torch.stack([task.values for task in tasks])}
    return found if tasks[0].classes is None else found | {"classes": tasks[0].classes}


def tasks_of(common: Results) -> tuple[Task, ...]:
    """The tasks that `tensors_of` wrote."""
    return tuple(Task(values, common.get("classes")) for values in common["values"])
