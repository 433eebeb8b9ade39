"""The settings of commands, as frozen classes.

This file imports nothing heavy, because the command line reads it to print its help.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, cast

import tyro

if TYPE_CHECKING:
    from loopscope.models.basis.arguments import Argument

DEFAULT_CHECKPOINT = "mini/multi_hop/r_dyn"


_Kind = TypeVar("_Kind")


def taken_from(kind: type[_Kind], config: Any, **own: Any) -> _Kind:
    """A config of another kind, with the values of all fields that both kinds have.

    Args:
        own: Values of fields that are not taken over.
    """
    there = {each.name for each in fields(config)}
    shared = [each.name for each in fields(cast(Any, kind)) if each.name in there]
    return kind(**{name: getattr(config, name) for name in shared} | own)


class LoadedModel(NamedTuple):
    """A model that is in memory already.

    Attributes:
        model: The model.
        alone: Whether it comes from the user's own code, so that no files lie beside it.
    """

    model: Any
    alone: bool


def is_setting(name: str) -> bool:
    """Whether a config's field is a setting that a file can hold."""
    return name != "loaded"


def as_flags(error: Exception) -> str:
    """The sentence of an error, with the arguments that it asks for as flags of a command."""
    spelled = getattr(error, "spelled", None)  # an `ArgumentError`; its module would import torch
    if spelled is not None:
        return str(spelled(_flag))
    return str(error.args[0] if isinstance(error, KeyError) else error)


def _flag(argument: Argument) -> str:
    value = argument.value
    words = value if isinstance(value, tuple | list) else () if value in (None, True) else (value,)
    return " ".join(
        ["--" + argument.name.replace("_", "-"), *(shlex.quote(str(word)) for word in words)]
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of every figure."""

    threads: int = 1
    """CPU threads. One is fastest for small models and on a shared machine; take more for wide
    ones.
    """


@dataclass(frozen=True, kw_only=True)
class FilesConfig(RunConfig):
    """How a checkpoint is loaded, and what its file lacks."""

    data: Path | None = None
    """Questions to ask: a test.json, by default the one beside the weights; or pairs as CSV or
    JSONL.
    """
    columns: tuple[str, str, str, str] = ("clean", "corrupted", "answer", "wrong")
    """How the columns of a CSV or JSONL are called: the clean text, the corrupted text, the answer,
    and the wrong answer to compare the answer with; only the first one must be there.
    """
    vocab: Path | None = None
    """vocab.json; by default the one beside the weights."""
    n_heads: int | None = None
    """Attention heads, where a released pickle does not say."""
    input_injection: bool | None = None
    """Whether the embedding is added again before each later iteration, where a released pickle
    does not say.
    """
    readout: str | None = None
    """Where answers are read: last_real, first_pad or column:K."""
    window: tuple[int, int] | None = None
    """First and last layer to loop, from 0, where the checkpoint is an ordinary model (Llama,
    Mistral, Qwen2, Qwen3, Gemma 2 or 3, OLMo-2, Pythia or GPT-2).
    """
    ignore: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD ...")] = ()
    """Fields of a release's config.json to read as if they were not there."""
    adapter: Path | None = None
    """Folder of a LoRA adapter in peft's layout, to merge into the weights of a release."""
    dtype: str | None = None
    """Number format to convert the weights to: float32, bfloat16, ...; by default the file's."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, ..."""
    per_hop: int | None = None
    """Use at most this many questions of each hop count."""
    loaded: tyro.conf.Suppress[Any] = field(default=None, repr=False, compare=False)
    """A `LoadedModel` for each checkpoint that is in memory, by name; it is not loaded again."""

    def in_memory(self, checkpoint: str) -> LoadedModel | None:
        """The model of a checkpoint, where it is loaded already."""
        models: Mapping[str, LoadedModel] = self.loaded or {}
        return models.get(checkpoint)

    def told(self) -> dict[str, Any]:
        """The arguments of `load` besides the checkpoint."""
        known = {name: getattr(self, name) for name in _OF_LOAD}
        return known if self.window is None else {**known, "window": self.window}


_OF_LOAD = (
    "n_heads",
    "input_injection",
    "readout",
    "vocab",
    "ignore",
    "adapter",
    "dtype",
    "device",
)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(FilesConfig):
    """Which checkpoint, and what its file does not say."""

    checkpoint: Annotated[str, tyro.conf.Positional] = DEFAULT_CHECKPOINT
    """A name from `loopscope list`, a checkpoint file, or a folder."""


@dataclass(frozen=True, kw_only=True)
class LogsConfig(RunConfig):
    """Logs of training runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of shipped runs, folders of runs, or log files; by default all that are shipped."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(FilesConfig):
    """Several checkpoints; what is said of their files holds for each."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names from `loopscope list`, checkpoint files, or folders."""

    def sources(self) -> list[SourceConfig]:
        """The config of each checkpoint on its own.

        Raises:
            ValueError: No checkpoint is named.
        """
        if not self.checkpoints:
            raise ValueError(
                "a comparison needs at least one checkpoint, got none; name them, such as"
                " mini/multi_hop/r4"
            )
        return [self.source(checkpoint) for checkpoint in self.checkpoints]

    def source(self, checkpoint: str) -> SourceConfig:
        """The config of one checkpoint on its own."""
        return taken_from(SourceConfig, self, checkpoint=checkpoint)


@dataclass(frozen=True, kw_only=True)
class TwoHopConfig(ComparisonConfig):
    """Checkpoints that answer two-hop questions."""

    per_hop: tyro.conf.Suppress[int | None] = None
    per_group: int | None = None
    """Use at most this many questions of each group."""
    n_loops: int | None = None
    """Iterations; by default what each checkpoint records."""


@dataclass(frozen=True, kw_only=True)
class PanelsConfig(ComparisonConfig):
    """Several checkpoints that answer multi-hop questions, one panel each."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(
        f"mini/multi_hop/{run}" for run in ("r2", "r4", "r6", "r_dyn")
    )
    """Names from `loopscope list`, checkpoint files, or folders."""


@dataclass(frozen=True, kw_only=True)
class InputsConfig(SourceConfig):
    """The inputs of a checkpoint: its own questions, or texts, or token ids."""

    text: tuple[str, ...] = ()
    """Texts to run instead of the questions beside the weights."""
    tokens: tuple[int, ...] = ()
    """Token ids of one input, for a checkpoint without a vocabulary."""
    hops: int | None = None
    """Hop count of the questions to run."""


@dataclass(frozen=True, kw_only=True)
class AnswersConfig(InputsConfig):
    """The answers of some inputs after each of many iterations."""

    n_loops: int = 24
    """Iterations to run; one run gives the answers after each of them."""
    answer: str | None = None
    """The token that counts as the answer of every text; by default the true one where it is known,
    else the model's own top token after all iterations.
    """


@dataclass(frozen=True, kw_only=True)
class TextConfig(SourceConfig):
    """One input of a checkpoint: a question of its own, a text, or token ids."""

    text: str | None = None
    """The text to run instead of a question beside the weights."""
    tokens: tuple[int, ...] = ()
    """Token ids to run, for a checkpoint without a vocabulary."""
    answer: str | None = None
    """The token that counts as the answer; by default the true one where it is known, else the
    model's own top token after all iterations.
    """
    hops: int | None = None
    """Hop count of the question to run; by default about half of what was trained."""


@dataclass(frozen=True, kw_only=True)
class PairConfig(SourceConfig):
    """Two inputs of a checkpoint that are compared: a clean and a corrupted one."""

    clean: str | None = None
    """The clean text; by default all questions of one hop count, or all pairs of --data."""
    corrupted: str | None = None
    """The corrupted text, with as many tokens; by default a question with another head entity."""
    answer: str | None = None
    """The token that counts as the answer; by default the true one where it is known, else the
    model's own top token in the clean run.
    """
    wrong: str | None = None
    """The token with which the answer is compared; by default the strongest other one."""
    hops: int | None = None
    """Hop count of the questions to average over; by default about half of what was trained."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig(PairConfig):
    """All analyses of one checkpoint in one HTML page that works offline."""

    text: str | None = None
    """The text that the figures of one input show; by default the clean one, or a question, or of a
    language model a sentence of this project's own, which the page names.
    """

    n_loops: int = 24
    """Iterations of the margin and accuracy figures."""
    compare: tuple[str, ...] = ()
    """Other checkpoints to put beside it, in a tab of their own."""
    dictionary: Path | None = None
    """Folder of a sparse dictionary of the checkpoint, of which one feature is shown."""
    feature: int | None = None
    """The feature to show, from 0; by default the one with the strongest activation."""


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(SourceConfig):
    """A local page to explore a checkpoint: lens, margins, attention and patching of any question,
    while you change it; of a Sudoku solver the boards, while you change clues.
    """

    n_loops: int | None = None
    """Iterations to start with; by default what the checkpoint records."""
    text: str | None = None
    """Text A to start with; by default a question beside the weights. Of a Sudoku solver a board,
    row by row, with "." for a blank cell.
    """
    second: str | None = None
    """Text B to start with, with as many tokens; by default another question, or text A."""
    dictionary: Path | None = None
    """Folder of a sparse dictionary of the checkpoint, whose features the page shows."""
    port: int = 8050
    """The port of the page; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Only 127.0.0.1: the page is for this machine."""


@dataclass(frozen=True, kw_only=True)
class MultiHopDataConfig:
    """Distinct random facts of many hops, split into train and test; the defaults are the paper's
    sizes (arXiv 2604.07822).
    """

    out: Path
    """Folder for the files, which must be new or empty."""
    graph: Literal["permutation", "random"] = "permutation"
    """permutation: every relation is a permutation of the entities; random: tails are random, which
    invites a shortcut.
    """
    n_entities: int = 200
    """Entities of the graph."""
    n_relations: int = 10
    """Relations of the graph; every entity has all of them."""
    max_hops: int = 40
    """Facts have 1 to this many hops."""
    train: int = 15_000
    """Facts of each hop count to train on, from 2 hops; those of 1 hop are all trained on."""
    test: int = 750
    """Facts of each hop count to test on."""
    seed: int = 42
    """Seed of the graph and of the facts."""


@dataclass(frozen=True, kw_only=True)
class TwoHopDataConfig:
    """Atomic facts and their compositions, with some atoms that no training composition uses; the
    defaults are the paper's sizes.
    """

    out: Path
    """Folder for the files, which must be new or empty."""
    n_entities: int = 2000
    """Entities of the graph."""
    n_relations: int = 200
    """Relations of the graph."""
    out_degree: int = 20
    """Relations that each entity has."""
    ood_share: float = 0.05
    """Share of atomic facts that no training fact of two hops uses."""
    phi: float = 7.2
    """Training facts of two hops for each atomic fact that they may use."""
    iid_share: float = 0.005
    """Probability with which a fact of two hops that could be trained on is kept for the test."""
    test: int = 3000
    """At most this many facts of each group in test.json."""
    seed: int = 42
    """Seed of the graph and of the split."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model by a named recipe, or go on with a run that was stopped."""

    recipe: Annotated[str, tyro.conf.Positional]
    """A recipe's name, such as mini/multi_hop/r_dyn."""
    out: Path | None = None
    """Folder of the run: its state, its log and the finished checkpoints; by default
    runs/RECIPE.
    """
    resume: bool = False
    """Go on from the state in the folder."""
    release: bool = False
    """Write each checkpoint in the released layout too."""
    wandb: bool = False
    """Report to Weights & Biases, besides log.jsonl and TensorBoard's files."""
    threads: int = 1
    """CPU threads; a run resumes bit for bit at the same number of them."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """The files to write."""

    out: Path = field(default_factory=lambda: Path("out"))
    """Folder for the files."""
    csv: bool = True
    """Write the numbers as CSV."""
    json: bool = True
    """Write the record as JSON."""
    html: bool = True
    """Write the figure as an HTML page that works offline."""
    png: bool = False
    """Write the figure as a picture (needs kaleido and a Chromium or Chrome)."""
    svg: bool = False
    """Write the figure as vector graphics (needs the same)."""
    pdf: bool = False
    """Write the figure for print (needs the same)."""
    overwrite: bool = False
    """Replace files that are there."""
    work: Path | None = None
    """Folder for partial results: a command that was interrupted goes on from there, and `loopscope
    merge FOLDER` draws the figure once all shards are there.
    """
    shard: str | None = None
    """i/n: do the i-th of n shares of the sweeps, estimates, lenses and probes into --work (0/8 to
    7/8).
    """
