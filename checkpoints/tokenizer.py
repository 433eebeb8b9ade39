"""Tokenizers of released language models, read by transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.jsons import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model")
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


def find_tokenizer(folder: Path, d_vocab: int) -> HubTokenizer | None:
    """The tokenizer whose files lie in a folder; None where there are none. Nothing is downloaded,
    and no code in the folder is run.

    Raises:
        CheckpointError: Files that transformers cannot read, or more tokens than the model has.
    """
    if not any((folder / name).is_file() for name in _FILES):
        return None
    _refuse_custom_code(folder)
    try:
        tokenizer = _read(folder)
        most = max(tokenizer.get_vocab().values(), default=-1)
    except BaseException as error:  # transformers raises many types, and tokenizers' panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {said})"
        ) from None
    if most >= d_vocab >= len(tokenizer):
        raise CheckpointError(
            f"the tokenizer in {folder} has the id {most}, but the model has d_vocab={d_vocab}"
        )
    if len(tokenizer) > d_vocab:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the model has"
            f" d_vocab={d_vocab}"
        )
    return HubTokenizer(tokenizer, d_vocab)


def _refuse_custom_code(folder: Path) -> None:
    """Refuse a tokenizer that is a class of its own, unless its tokenizer.json can be read without
    that class.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return
    if "auto_map" in read_object(path):
        raise CheckpointError(
            f"{path} names code of its own (auto_map), which is never run; put the tokenizer.json"
            " of the tokenizer beside it, or take the file away to load without a tokenizer"
        )


def _read(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, read from a folder without config.json, which transformers may not know."""
    # Imported late: it takes seconds, and most checkpoints have no tokenizer.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    with tempfile.TemporaryDirectory() as alone:
        for name in (*_FILES, *_COMPANIONS):
            if (folder / name).is_file():
                (Path(alone) / name).symlink_to((folder / name).resolve())
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
            alone, local_files_only=True, trust_remote_code=False
        )
    return tokenizer
