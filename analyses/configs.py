"""What each analysis can be told: frozen, and free of heavy imports, because the command line reads them to print its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

DEFAULT_CHECKPOINT = "mini/multi_hop/r_dyn"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which checkpoint, and what its file does not say."""

    checkpoint: Annotated[str, tyro.conf.Positional] = DEFAULT_CHECKPOINT
    """A name from `loopscope list`, a checkpoint file, or a folder."""
    data: Path | None = None
    """test.json with the questions; by default the one beside the weights."""
    vocab: Path | None = None
    """vocab.json; by default the one beside the weights."""
    n_heads: int | None = None
    """Attention heads, where a released pickle does not say."""
    input_injection: bool | None = None
    """Whether the embedding is added again before each later iteration, where a released pickle does not say."""
    readout: str | None = None
    """Where answers are read: last_real, first_pad or column:K."""
    per_hop: int | None = None
    """Use at most this many questions of each hop count."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, ..."""
    threads: int = 1
    """CPU threads. One is fastest for small models and on a shared machine; take more for wide ones."""


@dataclass(frozen=True, kw_only=True)
class OverthinkingConfig(SourceConfig):
    """Mean logit margin of the answer after each iteration, one curve per hop count (figure 8 of arXiv 2604.07822)."""

    n_loops: int = 24
    """Iterations to run."""


@dataclass(frozen=True, kw_only=True)
class RecurrenceConfig(SourceConfig):
    """Accuracy for each hop count and each number of iterations (figures 5, 7 and 12 to 18)."""

    n_loops: int = 24
    """Iterations to run; one run gives the accuracy after each of them."""
    kl: float = 0.01
    """Row r*: halt when KL(p_t || p_t-1) is below this ..."""
    entropy: float = 3.0
    """... and the entropy is below this, both in nats."""
    trained_hops: int | None = None
    """Deepest hop count seen in training, to mark in the figure; by default what card.json says."""


@dataclass(frozen=True, kw_only=True)
class HaltingConfig(SourceConfig):
    """Iterations used and accuracy per hop count, for several halting rules (figures 9 and 10)."""

    n_loops: int = 16
    """The cap: an example that never halts uses the last iteration."""
    kl: float = 0.01
    """Threshold of KL(p_t || p_t-1), in nats."""
    entropy: float = 3.0
    """Threshold of the entropy, in nats."""


@dataclass(frozen=True, kw_only=True)
class LensConfig(SourceConfig):
    """Logit lens of one question: every token position, after every block of every iteration (figure 4 for one example)."""

    text: str | None = None
    """The question; by default the first one of the data with the most hops that were trained."""
    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    track: tuple[str, ...] = ()
    """Tokens whose rank to show; by default the entities that the question passes, where the graph is known, or its answer."""


@dataclass(frozen=True, kw_only=True)
class PatchConfig(SourceConfig):
    """Effect of restoring one clean activation in a corrupted run, for each iteration and layer and position (figures 11 and 21)."""

    clean: str | None = None
    """The clean question; by default the mean over all questions of one hop count is shown."""
    corrupted: str | None = None
    """The corrupted question, of the same length; by default the clean one with another head entity."""
    hops: int | None = None
    """Hop count of the questions to average over; by default about half of what was trained."""
    site: str = "resid_post"
    """What is patched: resid_pre, resid_mid, resid_post, attn_out, mlp_out, ..."""
    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    direction: Literal["denoise", "noise"] = "denoise"
    """denoise: clean into corrupted; noise: corrupted into clean."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig(SourceConfig):
    """All analyses of one checkpoint in one HTML page that works offline."""

    n_loops: int = 24
    """Iterations of the margin and accuracy figures."""
    hops: int | None = None
    """Hops of the example in the lens and the patching map; by default about half of what was trained."""


@dataclass(frozen=True, kw_only=True)
class MultiHopDataConfig:
    """Distinct random facts of many hops, split into train and test; the defaults are the paper's sizes (arXiv 2604.07822)."""

    out: Path
    """Folder for the files, which must be new or empty."""
    graph: Literal["permutation", "random"] = "permutation"
    """permutation: every relation is a permutation of the entities; random: tails are random, which invites a shortcut."""
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
    """Atomic facts and their compositions, with some atoms that no training composition uses; the defaults are the paper's sizes."""

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
    """Folder of the run: its state, its log and the finished checkpoints; by default runs/RECIPE."""
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
    """What to write."""

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


ANALYSES: dict[str, tuple[type, str]] = {
    "lens": (LensConfig, "lens_heatmap"),
    "overthinking": (OverthinkingConfig, "overthinking"),
    "recurrence": (RecurrenceConfig, "recurrence_grid"),
    "halting": (HaltingConfig, "halting_curves"),
    "patch": (PatchConfig, "patching_map"),
}
"""Each command's settings, and the module with its `run(config)` and `figure(record)`."""
