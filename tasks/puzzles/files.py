"""The files of the public puzzle data sets: CSV files of boards, and folders of arrays."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from loopscope.tasks.files import new_folder, whole_file
from loopscope.tasks.puzzles.boards import Puzzle

COLUMNS = ("source", "question", "answer", "rating")
ToTokens = Callable[[Sequence[str]], Int64[np.ndarray, "board cell"]]


def read_csv(path: str | Path, least_rating: int = 0) -> list[Puzzle]:
    """The puzzles of a CSV file with the columns source, question, answer and rating.

    Args:
        least_rating: Leave out puzzles of a lower rating.

    Raises:
        ValueError: Other columns, a rating that is no whole number, or a question and an answer of
            unequal length.
    """
    found = []
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} must have the columns {', '.join(COLUMNS)}, got {rows.fieldnames}"
            )
        for row in rows:
            try:
                puzzle = Puzzle(row["question"], row["answer"], int(row["rating"]), row["source"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
            if puzzle.rating >= least_rating:
                found.append(puzzle)
    return found


def write_csv(puzzles: Sequence[Puzzle], path: str | Path) -> None:
    """Write puzzles as `read_csv` reads them, whole or not at all."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for puzzle in puzzles:
            writer.writerow([puzzle.source, puzzle.question, puzzle.answer, puzzle.rating])


def write_arrays(puzzles: Sequence[Puzzle], folder: str | Path, tokens: ToTokens) -> None:
    """Write one split of a data set as the solvers' reference code reads it, into a new folder:
    every puzzle in a group of its own, all with identifier 0.

    Args:
        tokens: `sudoku_tokens` or `maze_tokens`.

    Raises:
        ValueError: No puzzle, or a folder that holds something.
    """
    if not puzzles:
        raise ValueError("a data set has at least one puzzle, got none")
    inputs, labels = (
        tokens(boards).astype(np.uint8)
        for boards in ([p.question for p in puzzles], [p.answer for p in puzzles])
    )
    count = len(puzzles)
    arrays: dict[str, np.ndarray] = {
        "inputs": inputs,
        "labels": labels,
        "puzzle_identifiers": np.zeros(count, dtype=np.int32),
        "puzzle_indices": np.arange(count + 1, dtype=np.int32),
        "group_indices": np.arange(count + 1, dtype=np.int32),
    }
    about = {
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "vocab_size": _vocabulary(tokens),
        "seq_len": inputs.shape[1],
        "num_puzzle_identifiers": 1,
        "total_groups": count,
        "mean_puzzle_examples": 1,
        "total_puzzles": count,
        "sets": ["all"],
    }
    with new_folder(folder) as draft:
        for name, array in arrays.items():
            np.save(draft / f"all__{name}.npy", array)
        (draft / "dataset.json").write_text(json.dumps(about), encoding="utf-8")


def read_arrays(
    folder: str | Path,
) -> tuple[Int64[np.ndarray, "example cell"], Int64[np.ndarray, "example cell"]]:
    """The inputs and the labels of one split, as token ids.

    Raises:
        FileNotFoundError: No such array.
        ValueError: Two arrays of unequal shape, or no whole numbers.
    """
    found = []
    for name in ("inputs", "labels"):
        array = np.load(Path(folder) / f"all__{name}.npy", allow_pickle=False)
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise ValueError(
                f"{folder}: {name} must be whole numbers [example, cell], got {array.dtype}"
                f" {list(array.shape)}"
            )
        found.append(array.astype(np.int64))
    inputs, labels = found
    if inputs.shape != labels.shape:
        raise ValueError(
            f"{folder}: inputs and labels must have one shape, got {list(inputs.shape)} and"
            f" {list(labels.shape)}"
        )
    return inputs, labels


def _vocabulary(tokens: ToTokens) -> int:
    """Token ids of a kind of board: those of its largest cell, and all below it."""
    for largest in "9o":
        try:
            return int(tokens([largest]).max()) + 1
        except ValueError:
            continue
    raise ValueError("tokens must be sudoku_tokens or maze_tokens")
