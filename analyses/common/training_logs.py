"""The logs of training runs: found by name or path, and read with what their recipe says of
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.analyses.common.look import model_label
from loopscope.checkpoints.locate import SHIPPED
from loopscope.training.catalog import RECIPES

LOG = "log.jsonl"
_ROOTS = (SHIPPED, SHIPPED / "logs")


@dataclass(frozen=True)
class TrainingLog:
    """One run, evaluation by evaluation.

    Attributes:
        name: The recipe's name.
        loops: Fewest and most iterations of a training batch.
        n_layers: Blocks of the model.
        stages: Names of all stages of the recipe.
        gates: For each group of test questions on which a stage is gated, the accuracy that it asks
            for.
        stage: Int[Tensor, " evaluation"], from 0.
        updates: Int[Tensor, " evaluation"], since the run began.
        minutes: Float[Tensor, " evaluation"], of computing since the run began.
        accuracy: For each group of test questions a Float[Tensor, " evaluation"], NaN before the
            group was first asked.
    """

    name: str
    loops: tuple[int, int]
    n_layers: int
    stages: tuple[str, ...]
    gates: dict[str, float]
    stage: Int[Tensor, " evaluation"]
    updates: Int[Tensor, " evaluation"]
    minutes: Float[Tensor, " evaluation"]
    accuracy: dict[str, Float[Tensor, " evaluation"]]

    @property
    def label(self) -> str:
        """Iterations and layers, e.g. "R = 4, L = 2"."""
        return model_label(self.loops, self.n_layers)


def read_logs(runs: Sequence[str], kind: str, groups: Sequence[str]) -> tuple[TrainingLog, ...]:
    """Read the logs of some runs, or of all shipped ones of a kind.

    Args:
        runs: Names of shipped runs, folders of runs, or log files; none means all that are shipped.
        kind: The folder of the shipped ones, e.g. "mini/multi_hop".
        groups: Groups of test questions that each log must have.

    Raises:
        ValueError: There are none, one is no log of a known recipe, or one lacks a group.
        FileNotFoundError: Neither a shipped run nor a path with a log.
    """
    files = [_file_of(run) for run in runs] or shipped_logs(kind)
    if not files:
        raise ValueError(
            f"no log of a run of {kind} is shipped; name folders of runs, each with its {LOG}"
        )
    logs = tuple(map(read_log, files))
    for log, file in zip(logs, files, strict=True):
        missing = [group for group in groups if group not in log.accuracy]
        if missing:
            raise ValueError(
                f"{file} has no accuracy of {missing[0]!r}; its groups are"
                f" {', '.join(log.accuracy)}"
            )
    return logs


def shipped_logs(kind: str) -> list[Path]:
    """The shipped logs of a kind of run, beside checkpoints and alone, in order of their names."""
    found = [path for root in _ROOTS for path in (root / kind).glob(f"**/{LOG}")]
    return sorted(found, key=lambda path: path.parent.name)


def _file_of(run: str) -> Path:
    for place in (*(root / run for root in _ROOTS), Path(run)):
        if place.is_file():
            return place
        if (place / LOG).is_file():
            return place / LOG
    raise FileNotFoundError(
        f"{run!r} is neither a shipped run with a log, nor a folder with a {LOG}, nor such a file"
    )


def read_log(path: Path) -> TrainingLog:
    """Read one log.

    Raises:
        ValueError: Not lines of JSON as training writes them, no line at all, or of no recipe that
            is known.
    """
    recipe = _recipe_of(path)
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        accuracy = _accuracies(lines)
        columns = {key: [line[key] for line in lines] for key in ("stage", "update", "seconds")}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a log of a training run, one JSON object per evaluation: {error!r}"
        ) from None
    if not lines:
        raise ValueError(f"{path} is empty: the run was not evaluated yet")
    return TrainingLog(
        name=recipe["name"],
        loops=(recipe["loops"]["low"], recipe["loops"]["high"]),
        n_layers=recipe["n_layers"],
        stages=tuple(stage["name"] for stage in recipe["stages"]),
        gates=_gates(recipe),
        stage=torch.tensor(columns["stage"]),
        updates=torch.tensor(columns["update"]),
        minutes=_tensor(columns["seconds"]) / 60,
        accuracy=accuracy,
    )


def _accuracies(lines: Sequence[dict[str, Any]]) -> dict[str, Float[Tensor, " evaluation"]]:
    """The accuracy of each group of questions; NaN before the group was first asked."""
    groups = dict.fromkeys(group for line in lines for group in line["accuracy"])
    return {
        group: _tensor([line["accuracy"].get(group, math.nan) for line in lines])
        for group in groups
    }


def _gates(recipe: dict[str, Any]) -> dict[str, float]:
    """The accuracy that ends a stage, by the group of questions that is asked for it."""
    gated = [stage for stage in recipe["stages"] if stage["gate_on"] is not None]
    return {stage["gate_on"]: stage["gate"] for stage in gated}


def _tensor(values: Sequence[float]) -> Float[Tensor, " evaluation"]:
    return torch.tensor(values, dtype=torch.float64)


def _recipe_of(log: Path) -> dict[str, Any]:
    """From a card beside or below the log, else the named recipe in whose folder the log is."""
    for card in sorted(log.parent.glob("**/card.json")):
        recipe = json.loads(card.read_text()).get("recipe")
        if isinstance(recipe, dict):
            return recipe
    parts = log.resolve().parent.parts
    names = ("/".join(parts[i:]) for i in range(len(parts)))
    found = next((name for name in names if name in RECIPES), None)
    if found is None:
        raise ValueError(
            f"{log} is of no known recipe: no card.json lies beside or below it, and its folder is"
            " not named as a recipe is"
        )
    return asdict(RECIPES[found])
