"""Molecule strings as rows of tokens: <bos>, the tokens of a string, <eos>, then <pad>."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from loopscope.models.basis.files import atomic_path
from loopscope.tasks.molecules import make_molecules, random_writings
from loopscope.tasks.smiles import BOS, EOS, SmilesVocabulary
from loopscope.training.language.recipes import LanguageRecipe

PAD_ID = 0
_POOL = 32  # batches among which strings are sorted by length, so that little of a batch is padding


@dataclass(frozen=True, eq=False)
class Corpus:
    """Strings as rows of token ids, each as wide as the context.

    Attributes:
        train: UInt8[np.ndarray, "string pos"].
        held_out: UInt8[np.ndarray, "held_out pos"], of molecules that no training string writes.
    """

    train: UInt8[np.ndarray, "string pos"]
    held_out: UInt8[np.ndarray, "held_out pos"]


def make_corpus(recipe: LanguageRecipe, progress: bool = False) -> Corpus:
    """The strings of a recipe. The held-out ones depend on the task's seed and molecule sizes
    alone.

    Args:
        progress: Show progress bars.
    """
    task = recipe.task
    molecules = make_molecules(
        task.held_out + task.molecules, task.seed, atoms=task.atoms, progress=progress
    )
    held_out = random_writings(molecules[: task.held_out], 1, task.seed)
    train = random_writings(
        molecules[task.held_out :], task.writings, task.seed + 1, progress=progress
    )
    return Corpus(to_rows(train, recipe.context), to_rows(held_out, recipe.context))


def to_rows(texts: Sequence[str], context: int) -> UInt8[np.ndarray, "string pos"]:
    """Strings between <bos> and <eos> as rows, without those of more than `context` tokens."""
    vocabulary = SmilesVocabulary()
    ids = [vocabulary.ids(f"{BOS}{text}{EOS}") for text in texts]
    kept = [row for row in ids if len(row) <= context]
    rows = np.zeros((len(kept), context), dtype=np.uint8)
    for i, row in enumerate(kept):
        rows[i, : len(row)] = row
    return rows


def as_tokens(rows: UInt8[np.ndarray, "string pos"]) -> Int[Tensor, "string width"]:
    """Rows without the columns that are padding in all of them."""
    return torch.from_numpy(rows[:, : int(np.count_nonzero(rows, axis=1).max())].astype(np.int64))


def corpus_in(folder: Path, recipe: LanguageRecipe) -> Corpus:
    """The strings of a run, from its data.npz; the file is made where it is absent.

    Raises:
        ValueError: The file is of another task or context, or there are fewer training strings than
            a batch, or no held-out one.
    """
    path, task = folder / "data.npz", json.dumps({**asdict(recipe.task), "context": recipe.context})
    if path.exists():
        try:
            with np.load(path) as content:
                found, corpus = str(content["task"]), Corpus(content["train"], content["held_out"])
        except Exception as error:  # numpy raises many types on damaged files
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}); remove it, and the strings are made"
                " again"
            ) from None
        if found != task:
            raise ValueError(
                f"{path} holds the strings of another task, {found}, and not of {task}; choose"
                " another folder"
            )
    else:
        corpus = make_corpus(recipe, progress=True)
    if len(corpus.train) < recipe.batch_size or not len(corpus.held_out):
        raise ValueError(
            f"a run needs at least {recipe.batch_size} training strings, its batch, and one"
            f" held-out string of at most {recipe.context} tokens, got {len(corpus.train)} and"
            f" {len(corpus.held_out)}; ask for more molecules, or for a longer context"
        )
    if not path.exists():
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file, train=corpus.train, held_out=corpus.held_out, task=np.array(task)
            )
    return corpus


class Batches:
    """Training strings in shuffled epochs of batches of similar length. The batch of an update
    depends on the seed and the update alone.
    """

    def __init__(self, rows: UInt8[np.ndarray, "string pos"], size: int, seed: int) -> None:
        self.rows, self.size, self.seed = rows, size, seed
        self.per_epoch = len(rows) // size
        self._lengths = np.count_nonzero(rows, axis=1)
        self._epoch: tuple[int, np.ndarray] | None = None

    def __call__(self, update: int) -> Int[Tensor, "string width"]:
        """The tokens of an update, counted from 0."""
        epoch, index = divmod(update, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        return as_tokens(self.rows[self._epoch[1][index]])

    def _order(self, epoch: int) -> Int[np.ndarray, "batch string"]:
        rng = np.random.default_rng((self.seed, epoch))
        strings = rng.permutation(len(self.rows))[: self.per_epoch * self.size]
        pools = np.arange(len(strings)) // (_POOL * self.size)
        batches: Int[np.ndarray, "batch string"] = strings[
            np.lexsort((self._lengths[strings], pools))
        ].reshape(-1, self.size)
        return rng.permutation(batches)
