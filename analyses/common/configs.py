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
    """CPU threads. One is fastest for small models and on a shared machine; use more for wide
    models.
    """


@dataclass(frozen=True, kw_only=True)
class FilesConfig(RunConfig):
    """How a checkpoint is loaded, and facts that its file does not contain."""

    data: Path | None = None
    """File of inputs: questions as test.json (default: the one beside the weights), or pairs of
    texts as CSV or JSONL.
    """
    columns: tuple[str, str, str, str] = ("clean", "corrupted", "answer", "wrong")
    """Names of the columns in the CSV or JSONL file, in this order: the clean text, the corrupted
    text, the answer, and a wrong answer to compare with. Only the first column must be there.
    """
    vocab: Path | None = None
    """File with the vocabulary (vocab.json); by default the one beside the weights."""
    n_heads: int | None = None
    """Number of attention heads, if a released pickle does not say."""
    input_injection: bool | None = None
    """Whether the embedding is added again before each iteration after the first, if a released
    pickle does not say.
    """
    readout: str | None = None
    """Position at which answers are read: last_real (last token that is not padding), first_pad
    (the position after it), or column:K (position K, from 0).
    """
    window: tuple[int, int] | None = None
    """First and last layer of the part that is looped, from 0, if the checkpoint is an ordinary
    model (Llama, Mistral, Qwen2, Qwen3, Gemma 2 or 3, OLMo-2, Pythia or GPT-2).
    """
    ignore: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD ...")] = ()
    """Fields of the release's config.json to ignore."""
    adapter: Path | None = None
    """Folder of a LoRA adapter in peft's layout, to merge into the weights of a release."""
    dtype: str | None = None
    """Number format of the weights, such as float32 or bfloat16; by default that of the file."""
    device: str = "cpu"
    """Device to compute on: cpu, cuda, ..."""
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
    """One checkpoint, and facts that its file does not contain."""

    checkpoint: Annotated[str, tyro.conf.Positional] = DEFAULT_CHECKPOINT
    """The model: a name from `loopscope list`, a checkpoint file, or a folder."""


@dataclass(frozen=True, kw_only=True)
class LogsConfig(RunConfig):
    """Logs of training runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Training runs: names of shipped runs, folders of runs, or log files; by default all shipped
    runs.
    """


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(FilesConfig):
    """Several checkpoints. Flags about a checkpoint's file apply to each of them."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The models: names from `loopscope list`, checkpoint files, or folders."""

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
    """Use at most this many questions of each group of facts."""
    n_loops: int | None = None
    """Iterations to run; by default the number that each checkpoint records."""


@dataclass(frozen=True, kw_only=True)
class PanelsConfig(ComparisonConfig):
    """Several checkpoints that answer multi-hop questions, one panel each."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(
        f"mini/multi_hop/{run}" for run in ("r2", "r4", "r6", "r_dyn")
    )
    """The models: names from `loopscope list`, checkpoint files, or folders."""


@dataclass(frozen=True, kw_only=True)
class InputsConfig(SourceConfig):
    """The inputs: the checkpoint's own questions, or your texts, or token ids."""

    text: tuple[str, ...] = ()
    """Your texts, instead of the questions from the file beside the weights."""
    tokens: tuple[int, ...] = ()
    """Token ids of one input, if the checkpoint has no vocabulary."""
    hops: int | None = None
    """Run only the questions with this number of hops."""


@dataclass(frozen=True, kw_only=True)
class AnswersConfig(InputsConfig):
    """The answers of some inputs after each of many iterations."""

    n_loops: int = 24
    """Iterations to run; one run gives the answers after each of them."""
    answer: str | None = None
    """The token that counts as the answer of every text. By default the true answer if it is known,
    otherwise the model's own top token after all iterations.
    """


@dataclass(frozen=True, kw_only=True)
class TextConfig(SourceConfig):
    """One input: a question of the checkpoint's own, your text, or token ids."""

    text: str | None = None
    """Your text, instead of a question from the file beside the weights."""
    tokens: tuple[int, ...] = ()
    """Token ids of your input, if the checkpoint has no vocabulary."""
    answer: str | None = None
    """The token that counts as the answer. By default the true answer if it is known, otherwise the
    model's own top token after all iterations.
    """
    hops: int | None = None
    """Number of hops of the question; by default about half of the deepest in training."""


@dataclass(frozen=True, kw_only=True)
class PairConfig(SourceConfig):
    """Pairs of inputs that are compared: a clean and a corrupted one."""

    clean: str | None = None
    """The clean text. By default all questions of one hop count, or all pairs of --data."""
    corrupted: str | None = None
    """The corrupted text, with as many tokens as the clean one. By default the question with
    another head entity.
    """
    answer: str | None = None
    """The token that counts as the answer. By default the true answer if it is known, otherwise the
    model's own top token in the clean run.
    """
    wrong: str | None = None
    """The token with which the answer is compared. By default the other token with the largest
    logit.
    """
    hops: int | None = None
    """Number of hops of the questions to average over; by default about half of the deepest in
    training.
    """


@dataclass(frozen=True, kw_only=True)
class ReportConfig(PairConfig):
    """All analyses of one checkpoint in one HTML page that works offline."""

    text: str | None = None
    """The text for the figures that show one input. By default the clean text or a question; for a
    language model a sentence that comes with loopscope (the page shows it).
    """

    n_loops: int = 24
    """Iterations to run in the margin and accuracy figures."""
    compare: tuple[str, ...] = ()
    """Other checkpoints to compare with, shown in a tab of their own."""
    dictionary: Path | None = None
    """Folder of a sparse dictionary of the checkpoint; the page shows one of its features."""
    feature: int | None = None
    """Number of the feature to show, from 0; by default the feature with the strongest activation.
    """


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(SourceConfig):
    """A local web page to explore a checkpoint. Type a question and see lens, margins, attention
    and patching change with it; for a Sudoku solver, change clues and see the boards.
    """

    n_loops: int | None = None
    """Iterations when the page opens; by default the number that the checkpoint records."""
    text: str | None = None
    """Text A when the page opens; by default a question from the file beside the weights. For a
    Sudoku solver a board, row by row, with "." for a blank cell.
    """
    second: str | None = None
    """Text B when the page opens, with as many tokens as text A; by default another question, or
    text A.
    """
    dictionary: Path | None = None
    """Folder of a sparse dictionary of the checkpoint, whose features the page shows."""
    port: int = 8050
    """The port of the page; 0 chooses a free one."""
    host: str = "127.0.0.1"
    """The address of the page. Only 127.0.0.1 is allowed: the page is for this machine alone."""


@dataclass(frozen=True, kw_only=True)
class MultiHopDataConfig:
    """Makes a data set of random facts of many hops, split into train and test. The defaults are
    the sizes of arXiv 2604.07822.
    """

    out: Path
    """Folder for the files; it must be new or empty."""
    graph: Literal["permutation", "random"] = "permutation"
    """permutation: every relation is a permutation of the entities. random: the target of each
    relation is random, so that a shortcut can give the answer.
    """
    n_entities: int = 200
    """Number of entities in the graph."""
    n_relations: int = 10
    """Number of relations in the graph; every entity has all of them."""
    max_hops: int = 40
    """Largest number of hops of a fact."""
    train: int = 15_000
    """Number of training facts of each hop count from 2 on. All facts of 1 hop are training facts.
    """
    test: int = 750
    """Number of test facts of each hop count."""
    seed: int = 42
    """Random seed of the graph and of the facts."""


@dataclass(frozen=True, kw_only=True)
class TwoHopDataConfig:
    """Makes a data set of atomic facts (one hop) and their compositions (two hops). Some atomic
    facts are in no training composition (OOD). The defaults are the sizes of arXiv 2604.07822.
    """

    out: Path
    """Folder for the files; it must be new or empty."""
    n_entities: int = 2000
    """Number of entities in the graph."""
    n_relations: int = 200
    """Number of relations in the graph."""
    out_degree: int = 20
    """Number of relations that each entity has."""
    ood_share: float = 0.05
    """Share of atomic facts that are in no training fact of two hops."""
    phi: float = 7.2
    """Number of training facts of two hops, divided by the number of atomic facts that they may
    use.
    """
    iid_share: float = 0.005
    """Probability that a possible training fact of two hops is kept for the test."""
    test: int = 3000
    """At most this many facts of each group in test.json."""
    seed: int = 42
    """Random seed of the graph and of the split."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model by a named recipe, or continue a run that was stopped."""

    recipe: Annotated[str, tyro.conf.Positional]
    """Name of the recipe, such as mini/multi_hop/r_dyn; an unknown name prints all recipes."""
    out: Path | None = None
    """Folder of the run: its state, its log and the finished checkpoints; by default
    runs/RECIPE.
    """
    resume: bool = False
    """Continue from the saved state in the folder."""
    release: bool = False
    """Also write each checkpoint in the layout of the paper's released files."""
    wandb: bool = False
    """Also report to Weights & Biases, in addition to log.jsonl and TensorBoard's files."""
    threads: int = 1
    """CPU threads; with the same number, a resumed run gives the same weights bit for bit."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """The files to write."""

    out: Path = field(default_factory=lambda: Path("out"))
    """Folder for the files."""
    csv: bool = True
    """Write the numbers as CSV."""
    json: bool = True
    """Write the full result as JSON."""
    html: bool = True
    """Write the figure as an HTML page that works offline."""
    png: bool = False
    """Write the figure as PNG (needs kaleido and a Chromium or Chrome)."""
    svg: bool = False
    """Write the figure as SVG (needs kaleido and a Chromium or Chrome)."""
    pdf: bool = False
    """Write the figure as PDF (needs kaleido and a Chromium or Chrome)."""
    overwrite: bool = False
    """Replace files that exist already."""
    work: Path | None = None
    """Folder for partial results. If the command is interrupted, run it again to continue from
    there. With --shard, `loopscope merge FOLDER` draws the figure when all shards are done.
    """
    shard: str | None = None
    """i/n: compute only share i of n (from 0/8 to 7/8) of the sweeps, estimates, lenses and probes,
    into the folder --work.
    """
