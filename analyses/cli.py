"""The command line: one subcommand for each analysis, made from its config."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from loopscope.analyses.commands import (
    Atlas,
    Data,
    Dictionaries,
    Explore,
    Families,
    Findings,
    Flat,
    Gallery,
    List,
    Methods,
    Replication,
    Report,
    Train,
)
from loopscope.analyses.common.config_files import defaults_from_file
from loopscope.analyses.common.configs import (
    OutputConfig,
    as_flags,
)
from loopscope.analyses.common.figures import FIGURES, FigureFile
from loopscope.analyses.fetching import Fetch
from loopscope.analyses.fetching import run as _fetch
from loopscope.analyses.sharing import Collect, Merge, command_in, run_collect, run_merge, sharing

FROM = "--from-file"


def _command(figure: FigureFile) -> type:
    """The command of a figure: its config, and what to write."""
    config = figure.config()
    fields = [("config", Annotated[config, Flat]), ("output", Annotated[OutputConfig, Flat])]
    return make_dataclass(figure.stem, fields, frozen=True, namespace={"__doc__": figure.about()})


def _listed(figure: FigureFile) -> type:
    """The command of a figure as `--help` lists it, without importing the figure's code."""
    return make_dataclass(figure.stem, [], frozen=True, namespace={"__doc__": figure.about()})


_PAGES = {
    Replication: "pages.replication",
    Atlas: "atlas.page",
    Findings: "pages.findings",
    Families: "pages.families",
    Methods: "pages.methods",
    Gallery: "pages.gallery",
}
_DESCRIPTION = f"""Mechanistic interpretability of looped transformers. A figure takes its settings
from flags, and with {FROM} SETTINGS.json from a file as well, where flags win."""


_CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell says it of other tools


def main(args: Sequence[str] | None = None) -> None:
    """Parse a command and run it; a user's mistake is one sentence on stderr and exit status 2, and
    a reader that closes the pipe (`| head`) ends the command without a word.
    """
    try:
        try:
            _main(list(sys.argv[1:] if args is None else args))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        raise SystemExit(_CLOSED_PIPE) from None


def _main(args: list[str]) -> None:
    try:
        if args and args[0] in FIGURES:
            _draw(FIGURES[args[0]], args[1:])
        else:
            _run(
                tyro.extras.subcommand_cli_from_dict(
                    _commands(), prog="loopscope", description=_DESCRIPTION, args=args
                )
            )
    except BrokenPipeError:
        raise
    except (ValueError, OSError, KeyError, ImportError) as error:
        print(f"loopscope: {as_flags(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _commands() -> dict[str, Callable[..., Any]]:
    return {
        "list": List,
        "fetch": Fetch,
        "report": Report,
        "explore": Explore,
        **{name: _listed(figure) for name, figure in FIGURES.items()},
        "replication": Replication,
        "atlas": Atlas,
        "findings": Findings,
        "families": Families,
        "methods": Methods,
        "gallery": Gallery,
        "collect": Collect,
        "merge": Merge,
        "dictionaries": Dictionaries,
        "data": Data,
        "train": Train,
    }


def _run(command: Any) -> None:
    for kind, run in _RUNS.items():
        if isinstance(command, kind):
            run(command)


def _list(command: List) -> None:
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


def _data(command: Data) -> None:
    _ready([command.config.out / "vocab.json"], overwrite=True, threads=1)
    for line in import_module("loopscope.analyses.data").make(command.config):
        print(line)


def _page(command: Any) -> None:
    _ready([command.out], command.overwrite, threads=1)
    page = import_module(f"loopscope.analyses.{_PAGES[type(command)]}")
    chosen = (command.papers,) if isinstance(command, Atlas) else ()
    print(f"wrote {page.write(command.out, *chosen)}")


def _dictionaries(command: Dictionaries) -> None:
    _ready([command.out], command.overwrite, threads=1)
    page = import_module("loopscope.analyses.pages.dictionaries")
    print(f"wrote {page.write(command.out, command.checkpoint)}")


def _train(command: Train) -> None:
    config = command.config
    import_module("torch").set_num_threads(config.threads)
    folder = import_module("loopscope.training.runs").train(
        config.recipe, config.out, resume=config.resume, release=config.release, wandb=config.wandb
    )
    print(f"Finished {folder}")


def _explore(command: Explore) -> None:
    import_module("torch").set_num_threads(command.config.threads)
    import_module("loopscope.analyses.explorer.app").explore(command.config)


def _report(command: Report) -> None:
    _ready([command.out], command.overwrite, command.config.threads)
    report = import_module("loopscope.analyses.report.page")
    print(f"Open {report.write_report(command.config, command.out).resolve()}")


def _merge(command: Merge) -> None:
    drawn = command_in(command.folder)
    if drawn is None:
        run_merge(command)
    else:
        _draw(FIGURES[drawn[0]], drawn[1:], merging=command.folder)


_RUNS: dict[type, Callable[[Any], None]] = {
    List: _list,
    Fetch: _fetch,
    Data: _data,
    Dictionaries: _dictionaries,
    Train: _train,
    Explore: _explore,
    Report: _report,
    Collect: run_collect,
    Merge: _merge,
    **dict.fromkeys(_PAGES, _page),
}


def _ready(files: Sequence[Path], overwrite: bool, threads: int) -> None:
    """Refuse, before anything is computed, what cannot be written; and set the threads."""
    import_module("loopscope.analyses.common.records").refuse_unwritable(files, overwrite)
    import_module("torch").set_num_threads(threads)


def _draw(figure: FigureFile, args: list[str], merging: Path | None = None) -> None:
    """Parse a figure's flags, run it, print its numbers and write its files.

    Args:
        merging: The folder of the shards that are merged: compute nothing that shards compute;
            what is missing is an error. None draws a figure as its flags say.
    """
    kind, default, given = _command(figure), cast(Any, None), args
    if FROM in args[:-1]:
        place = args.index(FROM)
        default = defaults_from_file(kind, figure.config(), Path(args[place + 1]))
        args = args[:place] + args[place + 2 :]
    command = tyro.cli(kind, prog=f"loopscope {figure.name}", args=args, default=default)
    records = import_module("loopscope.analyses.common.records")
    standalone = import_module("loopscope.analyses.standalone")
    files = records.files_of(figure.name, command.output)
    output = command.output
    if merging is not None:
        output = replace(output, overwrite=True, work=merging)
    divided = output.shard is not None and merging is None
    _ready([] if divided else files, output.overwrite, command.config.threads)
    written = import_module("loopscope.interp.shards.run").ShardWritten
    try:
        with sharing(output, figure.name, given, merging is not None):
            made = standalone.make(figure, command.config)
    except written as part:
        print(part)
        return
    if divided:
        print(f"all work items are there; loopscope merge {output.work} draws the figure")
        return
    print(made.record.summary().to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    for path in records.write(
        figure.name, made.record, made.figure, output, command.config, made.made_with
    ):
        print(f"wrote {path}")
