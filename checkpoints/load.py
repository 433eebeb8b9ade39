"""Loading and saving models."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from checkpoints.errors import CheckpointError
from checkpoints.fill import build_from
from checkpoints.locate import CheckpointFiles, locate
from checkpoints.release import ReleaseFacts, infer_config, key_names, read_state_dict
from models.base import LoopedModel
from models.config import LoopedConfig
from models.files import usual_mode
from models.registry import config_from_dict
from models.tokens import Readout, Vocabulary
from tasks.questions import Question


def load(
    source: str | Path,
    *,
    n_heads: int | None = None,
    input_injection: bool | None = None,
    n_loops: int | None = None,
    readout: str | None = None,
    vocab: str | Path | None = None,
) -> LoopedModel:
    """Load a model, in eval mode, with exactly the weights that the file holds.

    Args:
        source: A shipped name ("ltg_trained"), a file (checkpoint_epoch_<N>.pt), or a folder.
        n_heads, input_injection, n_loops: What a released pickle does not say; for our own format they must agree with it
            (n_loops replaces the recorded number of iterations).
        readout: Where answers are read: "last_real", "first_pad" or "column:K".
        vocab: vocab.json, where it does not lie beside the weights.

    Raises:
        FileNotFoundError: No such checkpoint.
        CheckpointError: A file that cannot be used; the message says why and what to do.
    """
    files = locate(source)
    card = read_card(source)
    if files.is_release:
        model = _load_release(files, card, ReleaseFacts(n_heads, input_injection, n_loops))
    else:
        model = _load_own(files.weights, {"n_heads": n_heads, "input_injection": input_injection, "n_loops": n_loops})
    where = readout or card.get("readout") or files.readout
    model.read_at = Readout.parse(where) if where else None
    vocab_file = Path(vocab) if vocab else files.vocab
    if vocab_file:
        model.vocab = _read_vocabulary(vocab_file, model.cfg)
    return model


def save(
    model: LoopedModel,
    folder: str | Path,
    card: Mapping[str, Any] | None = None,
    graph: Mapping[str, Any] | None = None,
    questions: Sequence[Question] = (),
) -> None:
    """Write a model as model.safetensors, config.json, card.json and vocab.json (graph.json, test.json), whole or not at all.

    Args:
        folder: Must not exist yet, or be empty.
        card: What is known of the checkpoint: recipe, seed, accuracy, ...; where answers are read is added.
        graph: The knowledge graph that it was trained on.
        questions: What the analyses should ask it.

    Raises:
        CheckpointError: The folder holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; saving never overwrites, so choose another folder or remove it")
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        usual_mode(draft)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, draft / "model.safetensors")
        usual_mode(draft / "model.safetensors")
        _write_json(draft / "config.json", model.cfg.to_dict())
        readout = {"readout": str(model.read_at)} if model.read_at else {}
        _write_json(draft / "card.json", {**(card or {}), **readout})
        if model.vocab:
            _write_json(draft / "vocab.json", list(model.vocab.words))
        if graph is not None:
            _write_json(draft / "graph.json", graph)
        if questions:
            _write_json(draft / "test.json", [question.to_item() for question in questions])
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if not folder.exists():
            for parent in made:
                parent.rmdir()


def read_card(source: str | Path) -> dict[str, Any]:
    """What card.json says of a checkpoint; empty where there is none."""
    files = locate(source)
    return _read_object(files.card) if files.card else {}


def read_family(source: str | Path) -> str:
    """The family of a checkpoint, without loading its weights; released pickles are recurrent-depth models."""
    files = locate(source)
    return "recurrent_depth" if files.is_release else str(_read_object(files.weights.with_name("config.json"))["family"])


def _load_release(files: CheckpointFiles, card: Mapping[str, Any], given: ReleaseFacts) -> LoopedModel:
    tensors = read_state_dict(files.weights)
    merged = {}
    for name in ("n_heads", "input_injection", "n_loops"):
        known = (getattr(given, name), card.get(name), getattr(files.layout, name))
        merged[name] = next((value for value in known if value is not None), None)
        if not isinstance(merged[name], int | None):
            raise CheckpointError(f"{files.card}: {name} must be a number, got {merged[name]!r}")
    cfg = infer_config(tensors, files.weights, ReleaseFacts(**merged))
    if files.n_layers not in (None, cfg.n_layers):
        raise CheckpointError(f"{files.weights}: the folder name promises {files.n_layers} layers, but the file holds {cfg.n_layers}")
    return build_from(cfg, tensors, key_names(cfg.n_layers), files.weights)


def _load_own(weights: Path, given: Mapping[str, Any]) -> LoopedModel:
    config_file = weights.with_name("config.json")
    if weights.suffix != ".safetensors" or not config_file.is_file():
        raise CheckpointError(f"{weights} is not a checkpoint: expected a .pt file, or a .safetensors file with config.json beside it")
    values = _read_object(config_file)
    if "family" not in values:
        kind = values.get("model_type", "none")
        raise CheckpointError(f"{config_file} names no family that can be loaded (its model_type is {kind!r})")
    try:
        cfg = config_from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {error}") from None
    for name in ("n_heads", "input_injection"):
        if given[name] not in (None, getattr(cfg, name, None)):
            raise CheckpointError(f"{config_file} says {name}={getattr(cfg, name, None)}, but {given[name]} was passed")
    if given["n_loops"] is not None:
        cfg = dataclasses.replace(cfg, n_loops=given["n_loops"])
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is damaged or cut short: {error}") from None
    return build_from(cfg, tensors, None, weights)


def _read_vocabulary(path: Path, cfg: LoopedConfig) -> Vocabulary:
    words = _read_json(path)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{path} must be a JSON list of tokens, got {type(words).__name__}")
    try:
        vocabulary = Vocabulary(words)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if len(vocabulary) != cfg.d_vocab:
        raise CheckpointError(f"{path} has {len(vocabulary)} tokens with <pad>, but the model has d_vocab={cfg.d_vocab}")
    return vocabulary


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
