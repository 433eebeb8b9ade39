"""Loading and saving models."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.fill import build_from
from loopscope.checkpoints.hub import (
    Release,
    load_hub,
    open_release,
    read_foreign,
    read_tensors,
    recognized_family,
    unpack,
)
from loopscope.checkpoints.jsons import read_json, read_object, write_json
from loopscope.checkpoints.locate import CheckpointFiles, locate
from loopscope.checkpoints.release import ReleaseFacts, infer_config, key_names, state_dict_of
from loopscope.checkpoints.tables import TABLES
from loopscope.checkpoints.tokenizer import HubTokenizer, find_tokenizer
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.files import usual_mode
from loopscope.models.core.registry import config_from_dict
from loopscope.models.core.tokens import Readout, Vocabulary, Words
from loopscope.tasks.questions import Question
from loopscope.tasks.smiles import BOS, SmilesVocabulary


def load(
    source: str | Path,
    *,
    n_heads: int | None = None,
    input_injection: bool | None = None,
    n_loops: int | None = None,
    readout: str | None = None,
    vocab: str | Path | None = None,
    **options: Any,
) -> LoopedModel:
    """Load a model, in eval mode, with exactly the weights that the file holds.

    Args:
        source: A shipped name ("ltg_trained"), a file (checkpoint_epoch_<N>.pt), or a folder: our
            own format, or that of a supported family's release (config.json with safetensors, whole
            or sharded, or a pickle).
        n_heads, input_injection, n_loops: What a released pickle does not say; for our own format
            they must agree with it (n_loops replaces the recorded number of iterations).
        readout: Where answers are read: "last_real", "first_pad" or "column:K".
        vocab: vocab.json, where it does not lie beside the weights. A tokenizer beside the weights
            is read by transformers.
        options: What a family's release does not say and its loader takes, as docs/families.md
            lists them (which layers of an ordinary model to loop, for one).

    Raises:
        FileNotFoundError: No such checkpoint.
        CheckpointError: A file that cannot be used; the message says why and what to do.
    """
    files = locate(source)
    card = read_card(source)
    facts: dict[str, Any] = {
        "n_heads": n_heads,
        "input_injection": input_injection,
        "n_loops": n_loops,
    }
    default = None
    content = read_foreign(files.weights, TABLES) if files.is_release else None
    release = _open_hub(files, content)
    if release is not None:
        given = {
            name: value for name, value in facts.items() if value is not None and name != "n_loops"
        }
        model, table = load_hub(release, files.weights, TABLES, {**given, **options})
        model.cfg = _with_loops(model.cfg, n_loops)
        default = table.readout
    elif options:
        raise CheckpointError(
            f"{files.weights}: no {next(iter(options))}= is taken for a checkpoint of this format"
        )
    else:
        model = (
            _load_own(files.weights, facts)
            if content is None
            else _load_release(files, content, card, ReleaseFacts(**facts))
        )
    where = readout or card.get("readout") or files.readout or default
    model.read_at = Readout.parse(where) if where else None
    model.vocab = _find_vocabulary(files, Path(vocab) if vocab else None, model.cfg)
    return model


def save(
    model: LoopedModel,
    folder: str | Path,
    card: Mapping[str, Any] | None = None,
    graph: Mapping[str, Any] | None = None,
    questions: Sequence[Question] = (),
) -> None:
    """Write a model as model.safetensors, config.json, card.json and vocab.json (graph.json,
    test.json), whole or not at all.

    Args:
        folder: Must not exist yet, or be empty.
        card: What is known of the checkpoint: recipe, seed, accuracy, ...; where answers are read
            is added.
        graph: The knowledge graph that it was trained on.
        questions: What the analyses should ask it.

    Raises:
        CheckpointError: The folder holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder} exists and is not empty; saving never overwrites, so choose another folder"
            " or remove it"
        )
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        usual_mode(draft)
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
        }
        save_file(tensors, draft / "model.safetensors")
        usual_mode(draft / "model.safetensors")
        write_json(draft / "config.json", model.cfg.to_dict())
        readout = {"readout": str(model.read_at)} if model.read_at else {}
        write_json(draft / "card.json", {**(card or {}), **readout})
        if isinstance(model.vocab, HubTokenizer):
            model.vocab.save(draft)
        elif model.vocab:
            write_json(draft / "vocab.json", list(model.vocab.words))
        if graph is not None:
            write_json(draft / "graph.json", graph)
        if questions:
            write_json(draft / "test.json", [question.to_item() for question in questions])
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if not folder.exists():
            for parent in made:
                parent.rmdir()


def read_card(source: str | Path) -> dict[str, Any]:
    """What card.json says of a checkpoint; empty where there is none."""
    files = locate(source)
    return read_object(files.card) if files.card else {}


def read_family(source: str | Path) -> str:
    """The family of a checkpoint, without loading its weights; released pickles are recurrent-depth
    models.
    """
    files = locate(source)
    release = _open_hub(files, read_foreign(files.weights, TABLES) if files.is_release else None)
    if release is not None:
        return recognized_family(release, files.weights, TABLES)
    return (
        "recurrent_depth"
        if files.is_release
        else str(read_object(files.weights.with_name("config.json"))["family"])
    )


def _open_hub(files: CheckpointFiles, content: Mapping[str, Any] | None) -> Release | None:
    """The config and tensors of another family's release; None for our own format and for
    recurrent-depth pickles.

    Args:
        content: Of the pickle, where that is all there is.
    """
    if content is not None:
        return unpack(content, TABLES)
    config_file = files.weights.with_name("config.json")
    ours = not config_file.is_file() or "family" in read_object(config_file)
    return None if ours else open_release(files.weights, TABLES)


def _with_loops(cfg: LoopedConfig, n_loops: int | None) -> LoopedConfig:
    return cfg if n_loops is None else dataclasses.replace(cfg, n_loops=n_loops)


def _load_release(
    files: CheckpointFiles, content: Mapping[str, Any], card: Mapping[str, Any], given: ReleaseFacts
) -> LoopedModel:
    tensors = state_dict_of(content, files.weights)
    merged = {}
    for name in ("n_heads", "input_injection", "n_loops"):
        known = (getattr(given, name), card.get(name), getattr(files.layout, name))
        merged[name] = next((value for value in known if value is not None), None)
        if not isinstance(merged[name], int | None):
            raise CheckpointError(f"{files.card}: {name} must be a number, got {merged[name]!r}")
    cfg = infer_config(tensors, files.weights, ReleaseFacts(**merged))
    if files.n_layers not in (None, cfg.n_layers):
        raise CheckpointError(
            f"{files.weights}: the folder name promises {files.n_layers} layers, but the file holds"
            f" {cfg.n_layers}"
        )
    return build_from(cfg, tensors, key_names(cfg.n_layers), files.weights)


def _load_own(weights: Path, given: Mapping[str, Any]) -> LoopedModel:
    config_file = weights.with_name("config.json")
    if weights.suffix != ".safetensors" or not config_file.is_file():
        raise CheckpointError(
            f"{weights} is not a checkpoint: expected a .pt file, or a .safetensors file with"
            " config.json beside it"
        )
    try:
        cfg = config_from_dict(read_object(config_file))
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {error}") from None
    for name in ("n_heads", "input_injection"):
        if given[name] not in (None, getattr(cfg, name, None)):
            raise CheckpointError(
                f"{config_file} says {name}={getattr(cfg, name, None)}, but {given[name]} was"
                " passed"
            )
    return build_from(_with_loops(cfg, given["n_loops"]), read_tensors(weights), None, weights)


def _find_vocabulary(files: CheckpointFiles, given: Path | None, cfg: LoopedConfig) -> Words | None:
    """The vocabulary that was named, or a tokenizer beside the weights, or the word list there."""
    if given is None:
        tokenizer = find_tokenizer(files.weights.parent, cfg.d_vocab)
        if tokenizer is not None:
            return tokenizer
    path = given or files.vocab
    return None if path is None else _read_vocabulary(path, cfg)


def _read_vocabulary(path: Path, cfg: LoopedConfig) -> Words:
    words = read_json(path)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{path} must be a JSON list of tokens, got {type(words).__name__}")
    try:
        vocabulary: Words = SmilesVocabulary(words) if BOS in words else Vocabulary(words)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if len(vocabulary) != cfg.d_vocab:
        raise CheckpointError(
            f"{path} has {len(vocabulary)} tokens with <pad>, but the model has"
            f" d_vocab={cfg.d_vocab}"
        )
    return vocabulary
