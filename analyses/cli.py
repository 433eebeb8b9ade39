"""The command line: one subcommand for each analysis, made from its config."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from loopscope.analyses.common.config_files import defaults_from_file
from loopscope.analyses.common.configs import (
    ExploreConfig,
    MultiHopDataConfig,
    OutputConfig,
    ReportConfig,
    TrainConfig,
    TwoHopDataConfig,
)
from loopscope.analyses.common.figure_configs import ANALYSES

Flat = tyro.conf.arg(name="")
FROM = "--from-file"


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
class Gallery:
    """Draw every figure from the shipped checkpoints, and write a page of Markdown with the
    pictures beside it.
    """

    out: Path = Path("out/gallery.md")
    """The page to write; the pictures go into the folder of its name."""
    overwrite: bool = False
    """Replace a page that is there."""


@dataclass(frozen=True)
class Train:
    """Train a model by a named recipe."""

    config: Annotated[TrainConfig, Flat]


def _analysis(name: str, config: type) -> type:
    """The command of an analysis: its config, and what to write."""
    fields = [("config", Annotated[config, Flat]), ("output", Annotated[OutputConfig, Flat])]
    return make_dataclass(
        name.replace("-", "_"), fields, frozen=True, namespace={"__doc__": config.__doc__}
    )


_ANALYSES = {name: _analysis(name, config) for name, (config, _) in ANALYSES.items()}
_PAGES = {
    Replication: "replication",
    Findings: "findings",
    Families: "families",
    Gallery: "gallery",
}
_COMMANDS: dict[str, Callable[..., Any]] = {
    "list": List,
    "report": Report,
    "explore": Explore,
    **_ANALYSES,
    "replication": Replication,
    "findings": Findings,
    "families": Families,
    "gallery": Gallery,
    "data": Data,
    "train": Train,
}
_DESCRIPTION = f"""Mechanistic interpretability of looped transformers. An analysis takes its settings from
flags, and with {FROM} SETTINGS.json from a file as well, where flags win."""


def main(args: Sequence[str] | None = None) -> None:
    """Parse a command and run it; a user's mistake is one sentence on stderr and exit status 2."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        _run(_parsed(args))
    except (ValueError, OSError, KeyError, ImportError) as error:
        print(
            f"loopscope: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr
        )
        raise SystemExit(2) from None


def _parsed(args: list[str]) -> Any:
    if FROM in args[:-1] and args[0] in _ANALYSES:
        place = args.index(FROM)
        default = defaults_from_file(
            _ANALYSES[args[0]], ANALYSES[args[0]][0], Path(args[place + 1])
        )
        rest = args[1:place] + args[place + 2 :]
        return tyro.cli(_ANALYSES[args[0]], prog=f"loopscope {args[0]}", args=rest, default=default)
    return tyro.extras.subcommand_cli_from_dict(
        _COMMANDS, prog="loopscope", description=_DESCRIPTION, args=args
    )


def _run(command: Any) -> None:
    if isinstance(command, List):
        print(import_module("loopscope.checkpoints.catalog").available().to_string(index=False))
        families = import_module("loopscope.analyses.pages.families")
        print(
            "\nWhat each family declares; --methods and docs/families.md show which methods run on"
            " which.\n"
        )
        print(families.facts().to_string(index=False))
        if command.methods:
            import_module("torch").set_num_threads(1)
            print(f"\n{families.run().methods.to_string(index=False)}")
    elif isinstance(command, Data):
        for line in import_module("loopscope.analyses.data").make(command.config):
            print(line)
    elif type(command) in _PAGES:
        import_module("loopscope.analyses.common.records").refuse_existing(
            [command.out], command.overwrite
        )
        import_module("torch").set_num_threads(1)
        print(
            f"wrote {import_module(f'loopscope.analyses.pages.{_PAGES[type(command)]}').write(command.out)}"
        )
    elif isinstance(command, Train):
        config = command.config
        import_module("torch").set_num_threads(config.threads)
        run = import_module("loopscope.training.trainer").train
        print(
            "Finished"
            f" {run(config.recipe, config.out, resume=config.resume, release=config.release, wandb=config.wandb)}"
        )
    elif isinstance(command, Explore):
        import_module("torch").set_num_threads(command.config.threads)
        import_module("loopscope.analyses.explorer.app").explore(command.config)
    elif isinstance(command, Report):
        import_module("loopscope.analyses.common.records").refuse_existing(
            [command.out], command.overwrite
        )
        import_module("torch").set_num_threads(command.config.threads)
        page = import_module("loopscope.analyses.report.page").write_report(
            command.config, command.out
        )
        print(f"Open {page.resolve()}")
    else:
        _analyse(type(command).__name__.replace("_", "-"), command)


def _analyse(name: str, command: Any) -> None:
    module = ANALYSES[name][1]
    analysis, records = (
        import_module(f"loopscope.analyses.figures.{module}"),
        import_module("loopscope.analyses.common.records"),
    )
    records.refuse_existing(
        records.files_of(module.rpartition(".")[2], command.output), command.output.overwrite
    )
    import_module("torch").set_num_threads(command.config.threads)
    record = analysis.run(command.config)
    print(record.summary().to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    for path in records.write(
        module, record, analysis.figure(record), command.output, command.config
    ):
        print(f"wrote {path}")
