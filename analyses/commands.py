"""The commands that are no figure, each with its flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from loopscope.analyses.common.configs import (
    DEFAULT_CHECKPOINT,
    ExploreConfig,
    MultiHopDataConfig,
    ReportConfig,
    TrainConfig,
    TwoHopDataConfig,
)

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class List:
    """Show the checkpoints that are shipped, the known public releases, and what each family
    declares.
    """

    methods: bool = False
    """Also run every method on a tiny model of every family, and show which runs on which (takes
    some seconds).
    """


@dataclass(frozen=True)
class Report:
    """Write all analyses of one checkpoint into one HTML page that works offline."""

    config: Annotated[ReportConfig, Flat]
    out: Path = Path("out/report.html")
    """The page to write."""
    overwrite: bool = False
    """Replace a page that is there."""


@dataclass(frozen=True)
class Explore:
    """Explore one checkpoint on a local page: ask, watch the iterations, patch with a click."""

    config: Annotated[ExploreConfig, Flat]


MultiHopTask = Annotated[MultiHopDataConfig, tyro.conf.subcommand("multi-hop", prefix_name=False)]
TwoHopTask = Annotated[TwoHopDataConfig, tyro.conf.subcommand("two-hop", prefix_name=False)]


@dataclass(frozen=True)
class Data:
    """Make the data of a task, as files in the released format."""

    config: Annotated[MultiHopTask | TwoHopTask, Flat]


@dataclass(frozen=True)
class Replication:
    """Measure what the shipped miniatures show of the paper's claims, and write it as a page of
    Markdown.
    """

    out: Path = Path("out/replication.md")
    """The page to write."""
    overwrite: bool = False
    """Replace a page that is there."""


@dataclass(frozen=True)
class Atlas:
    """Ask the shipped miniatures the claims of twelve papers about looped models, each with its
    rule and its control, and write the answers as a page of Markdown.
    """

    papers: tuple[str, ...] = ()
    """Papers by their number on arXiv, such as 2607.00341, or claims by their name, such as
    realignment; by default all.
    """
    out: Path = Path("out/atlas.md")
    """The page to write."""
    overwrite: bool = False
    """Replace a page that is there."""


@dataclass(frozen=True)
class Findings:
    """Measure the circuit that carries the answer through the default miniature, and write it as a
    page of Markdown.
    """

    out: Path = Path("out/findings.md")
    """The page to write."""
    overwrite: bool = False
    """Replace a page that is there."""


@dataclass(frozen=True)
class Families:
    """Run every method on a tiny model of every family, and write what runs and what refuses as a
    page of Markdown.
    """

    out: Path = Path("out/families.md")
    """The page to write."""
    overwrite: bool = False
    """Replace a page that is there."""


@dataclass(frozen=True)
class Methods:
    """List every public method, from the docstrings, as a page of Markdown."""

    out: Path = Path("out/methods.md")
    """The page to write."""
    overwrite: bool = False
    """Replace a page that is there."""


@dataclass(frozen=True)
class Gallery:
    """Draw every figure from the shipped checkpoints, and write a page of Markdown with the
    pictures beside it.
    """

    out: Path = Path("out/gallery.md")
    """The page to write; the pictures go into the folder of its name."""
    overwrite: bool = False
    """Replace a page that is there."""


@dataclass(frozen=True)
class Dictionaries:
    """Train sparse dictionaries of a multi-hop checkpoint's states over the iterations, measure
    them against its graph, and write it as a page of Markdown.
    """

    checkpoint: tyro.conf.Positional[str] = DEFAULT_CHECKPOINT
    """A checkpoint of the multi-hop task, by a name from `loopscope list` or as a folder."""
    out: Path = Path("out/dictionaries.md")
    """The page to write."""
    overwrite: bool = False
    """Replace a page that is there."""


@dataclass(frozen=True)
class Train:
    """Train a model by a named recipe."""

    config: Annotated[TrainConfig, Flat]
