"""Commands whose work several processes share: `merge`, `collect`, and figures with `--shard`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from loopscope.analyses.common.configs import OutputConfig, SourceConfig

_COMMAND = "command.json"


@dataclass(frozen=True)
class Merge:
    """Make one result of all shards in a folder, and say what is missing where some are."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The folder that the shards wrote: --work of a figure, save_to= or to= of a call."""
    checkpoint: str | None = None
    """The checkpoint, which the record of a logit, readout or coda lens needs."""
    out: Path | None = None
    """The CSV file to write for a call; by default merged.csv in the folder."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig(SourceConfig):
    """Write the activations of texts into a folder, from which dictionaries and probes read."""

    to: Path
    """The folder."""
    texts: Path | None = None
    """One text a line (JSON where the name ends with .jsonl); by default the questions of the
    data.
    """
    column: str | None = None
    """The field of a line of JSON that holds the text."""
    sites: tuple[str, ...] = ("resid_post",)
    """Site names: resid_post, mlp_out, state_out, ..."""
    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    stored: str | None = None
    """Number format on disk: float32, bfloat16, ...; by default that of the weights."""
    max_bytes: int = 1 << 28
    """Activations held in memory at a time, in bytes."""
    per_file: int = 256
    """Examples whose activations share a file; shards share out whole files."""
    context: int | None = None
    """Cut texts after so many tokens."""
    readout_only: bool = False
    """Keep the column where the answer is read instead of every token."""
    shard: str | None = None
    """i/n: write the i-th of n shares (0/8 to 7/8)."""


@dataclass(frozen=True)
class Collect:
    """Write the activations of texts into a folder, from which dictionaries and probes read."""

    config: Annotated[CollectConfig, tyro.conf.arg(name="")]


def run_collect(command: Collect) -> None:
    """Collect, and say what the folder holds."""
    config = command.config
    torch = import_module("torch")
    torch.set_num_threads(config.threads)
    subject = import_module("loopscope.analyses.common.subject").open_subject(config)
    inputs: Any = config.texts
    if inputs is None:
        inputs, _ = subject.encode(subject.of_hops())
    store = import_module("loopscope.interp.store.collect").collect(
        subject.model,
        inputs,
        list(config.sites),
        config.n_loops,
        to=config.to,
        dtype=None if config.stored is None else getattr(torch, config.stored),
        max_bytes=config.max_bytes,
        per_file=config.per_file,
        column=config.column,
        context=config.context,
        positions=None if config.readout_only else "all",
        shard=shard_of(config.shard),
    )
    print(store)


def run_merge(command: Merge) -> None:
    """Merge the shards of a call, print a part of the record and write it as CSV; a tuned lens is
    written as `TunedLens.load` reads it too.
    """
    model = None
    if command.checkpoint is not None:
        model = import_module("loopscope.checkpoints.load").load(command.checkpoint)
    record = import_module("loopscope.interp.merging").merge(command.folder, model)
    print(record)
    out = command.folder / "merged.csv" if command.out is None else command.out
    with import_module("loopscope.models.basis.files").atomic_path(out) as temporary:
        record.frame().to_csv(temporary, index=False)
    print(f"wrote {out}")
    if isinstance(record, import_module("loopscope.interp.lens.tuned_lens").TunedLens):
        lens = out.with_suffix(".safetensors")
        record.save(lens)
        print(f"wrote {lens}")


def shard_of(text: str | None) -> tuple[int, int] | None:
    """The shard that a flag names."""
    if text is None:
        return None
    found: tuple[int, int] = import_module("loopscope.interp.shards.share").parse_shard(text)
    return found


@contextmanager
def sharing(output: OutputConfig, name: str, args: Sequence[str], merging: bool) -> Iterator[None]:
    """Inside the `with` block a figure does its share of the work into the folder of `--work`.

    Raises:
        ValueError: `--shard` without `--work`, or a folder of another command.
    """
    if output.work is None:
        if output.shard is not None:
            raise ValueError(
                "--shard is the share of the work to do into --work FOLDER; add --work"
            )
        yield
        return
    if not merging:
        _remember(output.work, [name, *_undivided(args)])
    run = import_module("loopscope.interp.shards.run")
    shard = None if merging else shard_of(output.shard) or (0, 1)
    with run.into(output.work, shard):
        yield


def command_in(folder: Path) -> list[str] | None:
    """The figure and its flags whose shards a folder holds; None where it holds those of a call."""
    path = folder / _COMMAND
    return json.loads(path.read_text())["command"] if path.is_file() else None


def _remember(folder: Path, command: list[str]) -> None:
    """Keep a command beside its results, or check that it is the same."""
    known = command_in(folder)
    if known is not None and known != command:
        raise ValueError(
            f"{folder} holds the work of another command, loopscope {' '.join(known)}; name another"
            " folder with --work"
        )
    if known is None:
        path = folder / _COMMAND
        with import_module("loopscope.models.basis.files").atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"command": command}) + "\n")


def _undivided(args: Sequence[str]) -> list[str]:
    """The flags of a command without those that say which shard it is."""
    kept, skip = [], False
    for word in args:
        if not skip and word != "--shard" and not word.startswith("--shard="):
            kept.append(word)
        skip = word == "--shard"
    return kept
