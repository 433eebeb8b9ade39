"""Tokenizers of released language models, read by transformers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.gguf.reader import SUFFIX
from loopscope.checkpoints.jsons import read_json, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model")
_BYTE_PAIRS, _END = ("vocab.json", "merges.txt"), "<|endoftext|>"
_COMPANIONS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


class HubTokenizer:
    """A released tokenizer with the calls of a `Vocabulary`.

    Args:
        tokenizer: The tokenizer that transformers loads.
        d_vocab: Number of the model's ids; the tokenizer may have fewer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, d_vocab: int) -> None:
        self.tokenizer, self._d_vocab = tokenizer, d_vocab
        self._words: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Each id's token as text; `<unused ID>` where the tokenizer has none."""
        if not self._words:
            found = {
                i: self.tokenizer.convert_tokens_to_string([token])
                for token, i in self.tokenizer.get_vocab().items()
            }
            self._words = tuple(found.get(i, f"<unused {i}>") for i in range(self._d_vocab))
        return self._words

    def __len__(self) -> int:
        return self._d_vocab

    def ids(self, text: str, prepend_bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        Args:
            prepend_bos: None adds the special tokens that `tokenizer(text)` of transformers adds;
                True puts the token that begins a text in front and adds no other; False adds none.

        Raises:
            ValueError: An empty text, or a tokenizer without a token that begins a text.
        """
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not found:
            raise ValueError("a text must hold at least one token, got an empty one")
        if prepend_bos is None:
            return list(self.tokenizer(text)["input_ids"])
        if not prepend_bos:
            return found
        first = self.tokenizer.bos_token_id
        if first is None:
            raise ValueError("no token of this tokenizer begins a text; leave prepend_bos out")
        return [first, *found]

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


class UnusableTokenizer(CheckpointError):
    """A tokenizer beside the weights that cannot be used; the message gives the reason."""


def find_tokenizer(weights: Path, d_vocab: int) -> HubTokenizer | None:
    """The tokenizer in a GGUF file, or whose files lie beside other weights; None where there are
    none. Nothing is downloaded, and no code in the folder is run.

    Raises:
        UnusableTokenizer: Files that transformers cannot read, a class of the release's own, or
            more tokens than the model has.
    """
    folder, alone = weights.parent, weights.suffix == SUFFIX
    where = weights if alone else folder
    if not alone and not _has_tokenizer(folder):
        return None
    if not alone:
        _refuse_custom_code(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = _read_gguf(weights) if alone else _read(folder)
        most = max(tokenizer.get_vocab().values(), default=-1)
    except BaseException as error:  # transformers raises many types, and tokenizers' panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        said = " ".join(str(error).split())[:200]
        raise UnusableTokenizer(
            f"the tokenizer in {where} cannot be read ({type(error).__name__}: {said})"
        ) from None
    if most >= d_vocab >= len(tokenizer):
        raise UnusableTokenizer(
            f"the tokenizer in {where} has the id {most}, but the model has d_vocab={d_vocab}"
        )
    if len(tokenizer) > d_vocab:
        raise UnusableTokenizer(
            f"the tokenizer in {where} has {len(tokenizer)} tokens, but the model has"
            f" d_vocab={d_vocab}"
        )
    return HubTokenizer(tokenizer, d_vocab)


def _has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files. A vocab.json with a number for each token is one
    of them; a list of words is not.
    """
    if any((folder / name).is_file() for name in (*_FILES, "merges.txt", "vocab.txt")):
        return True
    vocab, config = folder / "vocab.json", folder / "config.json"
    return vocab.is_file() and config.is_file() and isinstance(read_json(vocab), dict)


def _refuse_custom_code(folder: Path) -> None:
    """Refuse a tokenizer that is a class of its own, unless its tokenizer.json can be read without
    that class.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return
    try:
        settings = read_object(path)
    except CheckpointError as error:
        raise UnusableTokenizer(str(error)) from None
    if "auto_map" in settings:
        raise UnusableTokenizer(
            f"{path} names code of its own (auto_map), which is never run, and no tokenizer.json"
            " lies beside it"
        )


def _read(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, read from a folder without config.json, which transformers may not know.

    Without tokenizer.json and a named class, the class is that of the model type, where
    transformers has one, and else GPT-2's for its two files.
    """
    # Imported late: it takes seconds, and most checkpoints have no tokenizer.
    from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

    def read(kind: Any, **options: Any) -> PreTrainedTokenizerBase:
        found: PreTrainedTokenizerBase = kind.from_pretrained(
            alone, local_files_only=True, trust_remote_code=False, **options
        )
        return found

    with tempfile.TemporaryDirectory() as alone:
        for name in (*_FILES, *_COMPANIONS):
            if (folder / name).is_file():
                (Path(alone) / name).symlink_to((folder / name).resolve())
        if (folder / "tokenizer.json").is_file():
            return read(PreTrainedTokenizerFast)
        if not all((folder / name).is_file() for name in _BYTE_PAIRS):
            return read(AutoTokenizer, **_known_type(folder))
        plain = _without_defaults(folder)
        try:
            return read(AutoTokenizer, **_known_type(folder), **plain)
        except (ValueError, OSError):
            return read(GPT2Tokenizer, **plain)


def _read_gguf(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / path.name).symlink_to(path.resolve())
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            alone, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        return found


def _known_type(folder: Path) -> dict[str, Any]:
    """The model type's config, as an argument for transformers, where transformers has the type."""
    from transformers import AutoConfig

    path = folder / "config.json"
    kind = read_object(path).get("model_type") if path.is_file() else None
    try:
        return {"config": AutoConfig.for_model(kind)} if isinstance(kind, str) else {}
    except ValueError:
        return {}


def _without_defaults(folder: Path) -> dict[str, None]:
    """The special tokens of byte-pair classes that no file names and the vocabulary does not hold:
    they would be added to it.
    """
    named = any(
        (folder / name).is_file() for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    if named or _END in read_object(folder / "vocab.json"):
        return {}
    return dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"))
