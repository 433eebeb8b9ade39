"""Which files make up a checkpoint, given a name, a file or a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.gguf.reader import SUFFIX
from loopscope.checkpoints.release import ReleaseFacts
from loopscope.models.basis.arguments import Argument

SHIPPED = Path(__file__).parent / "shipped"
INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
_ADAPTER = "adapter_config.json"
_OWN_WEIGHTS = "model.safetensors"
_PICKLES = ("pytorch_model.bin", PICKLE_INDEX, "model.pt")
_COMPANIONS = {
    "card": "card.json",
    "vocab": "vocab.json",
    "graph": "graph.json",
    "questions": "test.json",
}


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint; a file that is absent is None.

    Attributes:
        weights: model.safetensors, or a release's .pt or .gguf file.
        card, vocab, graph, questions: card.json, vocab.json, graph.json and test.json beside the
            weights.
        layout: Facts that the folder names of a release say.
        n_layers: The number of blocks that a folder name r<X>_l<Y> promises.
        readout: The place where answers are read, where the folder names say so.
    """

    weights: Path
    card: Path | None = None
    vocab: Path | None = None
    graph: Path | None = None
    questions: Path | None = None
    layout: ReleaseFacts = field(default_factory=ReleaseFacts)
    n_layers: int | None = None
    readout: str | None = None


def shipped_names() -> list[str]:
    """Names of the checkpoints that travel with the project."""
    found = {
        path.parent
        for pattern in ("**/*.pt", f"**/{_OWN_WEIGHTS}")
        for path in SHIPPED.glob(pattern)
    }
    return sorted(str(folder.relative_to(SHIPPED)) for folder in found)


def locate(source: str | Path) -> CheckpointFiles:
    """Find a checkpoint's files.

    Args:
        source: A shipped name, a checkpoint file, or a folder that holds one.

    Raises:
        FileNotFoundError: Neither a shipped name nor a path that exists.
        CheckpointError: A folder with no checkpoint, or with several.
    """
    path = Path(source)
    if str(source) in shipped_names():
        path = SHIPPED / source
    if not path.exists():
        raise FileNotFoundError(
            f"{str(source)!r} is neither a shipped checkpoint ({', '.join(shipped_names())}) nor a"
            " file or folder; loopscope.available() lists the known ones, and"
            " loopscope.fetch(name) brings a remote one and returns its folder"
        )
    weights = _weights_in(path) if path.is_dir() else path
    beside = {kind: weights.parent / name for kind, name in _COMPANIONS.items()}
    present = {kind: file for kind, file in beside.items() if file.is_file()}
    facts, n_layers, readout = _layout(weights)
    return CheckpointFiles(weights, **present, layout=facts, n_layers=n_layers, readout=readout)


def _weights_in(folder: Path) -> Path:
    for name in (_OWN_WEIGHTS, INDEX, *_PICKLES):
        if (folder / name).is_file():
            return folder / name
    kinds = ("*.pt", f"*{SUFFIX}")
    found = sorted(path for kind in kinds for path in folder.glob(kind) if path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder} holds {len(found)} checkpoints; name one of"
            f" {', '.join(p.name for p in found)}"
        )
    raise _no_checkpoint(folder)


def _no_checkpoint(folder: Path) -> CheckpointError:
    """The error about a folder without weights."""
    if (folder / _ADAPTER).is_file():
        return CheckpointError(
            f"{folder} holds an adapter and not a model; name its base as the checkpoint, and ",
            Argument("adapter", str(folder)),
            " merges the adapter into its weights",
        )
    below = sorted({str(p.parent.relative_to(folder)) for p in folder.glob("**/*.pt")})
    hint = f"; there are some in {', '.join(below[:8])}" if below else ""
    return CheckpointError(
        f"{folder} holds no checkpoint: expected {_OWN_WEIGHTS} with config.json, or a .pt or"
        f" {SUFFIX} file{hint}"
    )


def _layout(weights: Path) -> tuple[ReleaseFacts, int | None, str | None]:
    """The facts in `systematicity/r<X>_l<Y>` and `multi_hop/{final_models,12_hop}/{r<X>,r_dyn}`.

    Released models inject no input. Multi-hop releases read their answer at a padding column;
    without positions, every padding column gives the same answer.
    """
    folder = weights.absolute().parent
    fixed = re.fullmatch(r"r(\d+)_l(\d+)", folder.name)
    if fixed:
        return (
            ReleaseFacts(input_injection=False, n_loops=int(fixed.group(1))),
            int(fixed.group(2)),
            None,
        )
    hop = re.fullmatch(r"r(\d+|_dyn)", folder.name)
    if hop and folder.parent.name in ("final_models", "12_hop"):
        loops = int(hop.group(1)) if hop.group(1).isdigit() else None
        return ReleaseFacts(input_injection=False, n_loops=loops), None, "first_pad"
    return ReleaseFacts(), None, None
