"""The shipped miniatures: training them all, and copying each into its place."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from loopscope.checkpoints.locate import SHIPPED
from loopscope.training.language.recipes import LANGUAGE_RECIPES
from loopscope.training.language.trainer import train_language
from loopscope.training.runs import train

_LAST = {"final": "."}
PLACES: dict[str, dict[str, str]] = {
    "mini/multi_hop/r_dyn": _LAST | {"2_hops": "2_hops", "6_hops": "6_hops"},
    "mini/multi_hop/r2": _LAST,
    "mini/multi_hop/r4": _LAST,
    "mini/multi_hop/r6": _LAST,
    "mini/shortcut": _LAST,
    "mini/systematicity/r4_l2": {"train": "train", "id": "id", "ood": "ood"},
    "mini/systematicity/r1_l8": {"train": "train", "id": "id"},
    "mini/systematicity/r1_l2": {},
    "mini/systematicity/r2_l2": {"ood": "ood"},
    "mini/systematicity/r8_l2": {"ood": "ood"},
    "mini/smiles": _LAST,
    "mini/sudoku/trm": _LAST | {"first": "first"},
    "mini/sudoku/trm6": _LAST | {"first": "first"},
}


def ship(name: str, run: Path, shipped: Path = SHIPPED) -> None:
    """Copy the log and the shipped checkpoints of a finished run under the recipe's name.

    Raises:
        FileNotFoundError: The run lacks one of these checkpoints.
    """
    missing = [stage for stage in PLACES[name] if not (run / stage / "model.safetensors").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{run} has no finished checkpoint {missing[0]!r}; train the recipe {name} to its end"
            " first"
        )
    home = shipped / name
    home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "log.jsonl", home / "log.jsonl")
    for stage, place in PLACES[name].items():
        (home / place).mkdir(exist_ok=True)
        for file in (run / stage).iterdir():
            shutil.copyfile(file, home / place / file.name)


def main() -> None:
    """Train and ship every miniature, one after another; stopped runs go on."""
    torch.set_num_threads(1)
    for name in PLACES:
        run = Path("runs") / name
        if name in LANGUAGE_RECIPES:
            train_language(LANGUAGE_RECIPES[name], run, resume=True)
        else:
            train(name, run, resume=True)
        ship(name, run)


if __name__ == "__main__":
    main()
