"""Loading and saving models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.fill import build_from, check_formats, of_one_format
from loopscope.checkpoints.formats.base import Format, Given, Located
from loopscope.checkpoints.formats.gguf import GGUF
from loopscope.checkpoints.formats.own import OWN
from loopscope.checkpoints.formats.paper import PAPER
from loopscope.checkpoints.formats.released_folder import RELEASED_FOLDER
from loopscope.checkpoints.formats.whole_pickle import WHOLE_PICKLE
from loopscope.checkpoints.hub.fetched import find
from loopscope.checkpoints.jsons import read_json, write_json
from loopscope.checkpoints.locate import CheckpointFiles
from loopscope.checkpoints.release import ReleaseFacts
from loopscope.checkpoints.tokenizer import HubTokenizer, UnusableTokenizer, find_tokenizer
from loopscope.checkpoints.weight_files import plain_weights
from loopscope.checkpoints.weights.placing import checked_device, checked_format, place_
from loopscope.models.basis.files import usual_mode
from loopscope.models.basis.tokens import Readout, Vocabulary, Words
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig
from loopscope.tasks.files import new_folder
from loopscope.tasks.questions import Question
from loopscope.tasks.smiles import BOS, SmilesVocabulary

_WEIGHTS = "model.safetensors"
FORMATS: tuple[Format, ...] = (GGUF, OWN, RELEASED_FOLDER, WHOLE_PICKLE, PAPER)


def load(
    source: str | Path,
    *,
    n_heads: int | None = None,
    input_injection: bool | None = None,
    n_loops: int | None = None,
    readout: str | None = None,
    vocab: str | Path | Literal[False] | None = None,
    ignore: Sequence[str] = (),
    adapter: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> LoopedModel:
    """Load a model in eval mode, with exactly the weights of the file unless an argument below
    changes them.

    Args:
        source: A shipped name ("ltg_trained"), the name of a public release that has been fetched
            ("Ouro-1.4B"), a file (checkpoint_epoch_<N>.pt), or a folder. A folder is in this
            project's own format or is a release of a supported family: config.json with safetensors
            or pickles, in one file or in shards. An ordinary model to be looped may also be a GGUF
            file, whose numbers become float32.
        n_heads: The number of heads, which some released pickles lack. If the config records it,
            the argument must agree with it.
        input_injection: Whether the input is injected, for pickles that lack this fact too.
        n_loops: The number of iterations to record in the model; None keeps the number that the
            checkpoint records.
        readout: Where answers are read: "last_real", "first_pad" or "column:K" (see `Readout`).
            None keeps what the checkpoint records.
        vocab: The path of vocab.json. None means the tokenizer or the vocab.json beside the
            weights, and False means no vocabulary. A tokenizer that cannot be used gives a warning
            with the reason.
        ignore: Fields of a release's config.json that are not to be read. A field that could change
            a result, but that this family does not implement, is refused by its name unless it is
            listed here.
        adapter: The folder of a LoRA adapter in peft's layout (adapter_config.json and
            adapter_model.safetensors). The adapter is merged into the weights, as peft merges it.
        dtype: The number format of all weights, such as torch.float32 or "bfloat16"; only tables of
            rotary angles keep theirs. None means the format of the file, or float32 with a warning
            if the file mixes formats of 16 and 32 bits.
        device: The device of the weights, which are read straight onto it; None means the CPU.
        options: Facts that the release of a family lacks, such as which layers of an ordinary model
            are looped; docs/families.md lists them.

    Returns:
        The model, of its family's class.

    Raises:
        FileNotFoundError: The checkpoint or the adapter does not exist.
        ValueError: The number format or the device does not exist.
        CheckpointError: The file cannot be used; the message says why and what to do.
    """
    kind, place = checked_format(dtype), checked_device(device)
    located = Located(find(source))
    files, card = located.files, located.card
    given = Given(
        ReleaseFacts(n_heads, input_injection, n_loops),
        options,
        readout,
        vocab,
        _names_of(ignore),
        None if adapter is None else Path(adapter),
    )
    recorded = _recorded_readout(card, files)
    model, default = _format_of(located).open(located, given)
    place_(model, kind, place, files.weights)
    where = readout or (default if recorded is None else None)
    model.read_at = Readout.parse(where) if where else recorded
    model.vocab = _find_vocabulary(files, vocab, model.cfg)
    return model


def save(
    model: LoopedModel,
    folder: str | Path,
    card: Mapping[str, Any] | None = None,
    graph: Mapping[str, Any] | None = None,
    questions: Sequence[Question] = (),
) -> None:
    """Write a model with its config, card and vocabulary into a new folder that `load` reads.

    The folder is written whole, or not at all after an error.

    Args:
        folder: A folder that does not exist yet, or is empty.
        card: Facts about the checkpoint for card.json, such as recipe, seed and accuracy. The place
            where answers are read is added to them.
        graph: The knowledge graph that the model was trained on, for graph.json.
        questions: The questions of test.json, which the analyses ask.

    Raises:
        CheckpointError: The folder is not empty, or the weights do not fit the config, as in a copy
            made by `untied`.
        ValueError: The card or the graph holds a number that is not finite.
    """
    folder = Path(folder)
    _refuse_used(folder)
    plain = unwrapped(model)
    tensors = plain_weights(
        {name: tensor.detach().cpu().contiguous() for name, tensor in plain.state_dict().items()},
        folder,
    )
    check_formats(list(of_one_format(plain, tensors).values()), folder, mixed=False)
    build_from(plain.cfg, tensors, None, folder)
    readout = {"readout": str(plain.read_at)} if plain.read_at else {}
    files: dict[str, Any] = {"config.json": plain.cfg.to_dict()}
    files["card.json"] = {**(card or {}), **readout}
    if graph is not None:
        files["graph.json"] = graph
    if questions:
        files["test.json"] = [question.to_item() for question in questions]
    if plain.vocab and not isinstance(plain.vocab, HubTokenizer):
        files["vocab.json"] = list(plain.vocab.words)
    with new_folder(folder) as draft:
        save_file(tensors, draft / _WEIGHTS)
        usual_mode(draft / _WEIGHTS)
        if isinstance(plain.vocab, HubTokenizer):
            plain.vocab.save(draft)
        for name, content in files.items():
            write_json(draft / name, content)


def _names_of(ignore: Sequence[str]) -> tuple[str, ...]:
    """The fields to ignore; a bare text would be taken letter by letter."""
    if isinstance(ignore, str) or not all(isinstance(name, str) for name in ignore):
        raise TypeError(f"ignore= must be a list of names of fields, got {ignore!r}")
    return tuple(ignore)


def _refuse_used(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder} exists and is not empty; saving never overwrites, so choose another folder"
            " or remove it"
        )


def unwrapped(model: nn.Module) -> LoopedModel:
    """The looped model inside wrappers such as torch.compile or data-parallel training.

    Raises:
        TypeError: There is no looped model inside.
    """
    inner: Any = model
    while not isinstance(inner, LoopedModel) and isinstance(inner, nn.Module):
        inner = getattr(inner, "_orig_mod", getattr(inner, "module", None))
    if not isinstance(inner, LoopedModel):
        raise TypeError(f"a looped model can be saved, got {type(model).__name__}")
    return inner


def read_card(source: str | Path) -> dict[str, Any]:
    """The content of a checkpoint's card.json; empty where there is none."""
    return Located(find(source)).card


def read_family(source: str | Path) -> str:
    """The family of a checkpoint, without loading its weights."""
    located = Located(find(source))
    return _format_of(located).family(located)


def _format_of(located: Located) -> Format:
    for one in FORMATS:
        if one.is_own(located):
            return one
    raise CheckpointError(
        f"{located.files.weights} is not a checkpoint: expected a .pt file, a .gguf file, or a"
        " .safetensors file with config.json beside it"
    )


def _recorded_readout(card: Mapping[str, Any], files: CheckpointFiles) -> Readout | None:
    """Where the card says that answers are read; None where it does not say."""
    where = card.get("readout")
    if where is None:
        return None
    try:
        return Readout.parse(where if isinstance(where, str) else shown(where))
    except ValueError as error:
        raise CheckpointError(f"{files.card}: {error}") from None


def _find_vocabulary(
    files: CheckpointFiles, given: str | Path | bool | None, cfg: LoopedConfig
) -> Words | None:
    """The vocabulary at a given path, or else the tokenizer or the word list beside the weights."""
    if given is False:
        return None
    if given is None:
        try:
            tokenizer = find_tokenizer(files.weights, cfg.d_vocab)
        except UnusableTokenizer as reason:
            warnings.warn(
                f"{reason}; the weights are loaded without a vocabulary, which vocab=False asks for"
                " without this warning",
                stacklevel=3,
            )
            return None
        if tokenizer is not None:
            return tokenizer
    path = Path(given) if isinstance(given, str | Path) else files.vocab
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
