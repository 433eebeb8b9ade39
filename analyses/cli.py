"""The command line: one subcommand for each analysis, made from its config."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from analyses.configs import (
    HaltingConfig,
    LensConfig,
    MultiHopDataConfig,
    OutputConfig,
    OverthinkingConfig,
    PatchConfig,
    RecurrenceConfig,
    ReportConfig,
    TrainConfig,
    TwoHopDataConfig,
)

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class List:
    """Show the checkpoints that are shipped, and the known public releases."""


@dataclass(frozen=True)
class Report:
    """Write all analyses of one checkpoint into one HTML page that works offline."""

    config: Annotated[ReportConfig, Flat]
    out: Path = Path("out/report.html")
    """The page to write."""


@dataclass(frozen=True)
class Overthinking:
    """Mean logit margin after each iteration, per hop count."""

    config: Annotated[OverthinkingConfig, Flat]
    output: Annotated[OutputConfig, Flat]


@dataclass(frozen=True)
class Recurrence:
    """Accuracy for each hop count and number of iterations."""

    config: Annotated[RecurrenceConfig, Flat]
    output: Annotated[OutputConfig, Flat]


@dataclass(frozen=True)
class Halting:
    """Iterations used and accuracy of adaptive halting rules."""

    config: Annotated[HaltingConfig, Flat]
    output: Annotated[OutputConfig, Flat]


@dataclass(frozen=True)
class Lens:
    """Logit lens of one question: every position after every block."""

    config: Annotated[LensConfig, Flat]
    output: Annotated[OutputConfig, Flat]


@dataclass(frozen=True)
class Patch:
    """Effect of restoring one clean activation in a corrupted run."""

    config: Annotated[PatchConfig, Flat]
    output: Annotated[OutputConfig, Flat]


MultiHopTask = Annotated[MultiHopDataConfig, tyro.conf.subcommand("multi-hop", prefix_name=False)]
TwoHopTask = Annotated[TwoHopDataConfig, tyro.conf.subcommand("two-hop", prefix_name=False)]


@dataclass(frozen=True)
class Data:
    """Make the data of a task, as files in the released format."""

    config: Annotated[MultiHopTask | TwoHopTask, Flat]


@dataclass(frozen=True)
class Replication:
    """Measure what the shipped miniatures show of the paper's claims, and write it as a page of Markdown."""

    out: Path = Path("out/replication.md")
    """The page to write."""


@dataclass(frozen=True)
class Findings:
    """Measure the circuit that carries the answer through the default miniature, and write it as a page of Markdown."""

    out: Path = Path("out/findings.md")
    """The page to write."""


@dataclass(frozen=True)
class Train:
    """Train a model by a named recipe."""

    config: Annotated[TrainConfig, Flat]


_MODULES = {
    Overthinking: "overthinking",
    Recurrence: "recurrence_grid",
    Halting: "halting_curves",
    Lens: "lens_heatmap",
    Patch: "patching_map",
}
_PAGES = {Replication: "replication", Findings: "findings"}
_COMMANDS: dict[str, Callable[..., Any]] = {
    "list": List,
    "report": Report,
    "lens": Lens,
    "overthinking": Overthinking,
    "recurrence": Recurrence,
    "halting": Halting,
    "patch": Patch,
    "replication": Replication,
    "findings": Findings,
    "data": Data,
    "train": Train,
}


def main(args: list[str] | None = None) -> None:
    """Parse a command and run it; a user's mistake is one sentence on stderr and exit status 2."""
    command = tyro.extras.subcommand_cli_from_dict(
        _COMMANDS, prog="loopscope", description="Mechanistic interpretability of looped transformers.", args=args
    )
    try:
        _run(command)
    except (ValueError, FileNotFoundError, KeyError, ImportError) as error:
        print(f"loopscope: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        raise SystemExit(2) from None


def _run(command: Any) -> None:
    if isinstance(command, List):
        print(import_module("checkpoints.catalog").available().to_string(index=False))
        return
    if isinstance(command, Data):
        for line in import_module("analyses.data").make(command.config):
            print(line)
        return
    if type(command) in _PAGES:
        import_module("torch").set_num_threads(1)
        print(f"wrote {import_module(f'analyses.{_PAGES[type(command)]}').write(command.out)}")
        return
    import_module("torch").set_num_threads(command.config.threads)
    if isinstance(command, Train):
        config = command.config
        run = import_module("training.trainer").train
        print(f"Finished {run(config.recipe, config.out, resume=config.resume, release=config.release, wandb=config.wandb)}")
    elif isinstance(command, Report):
        page = import_module("analyses.report").write_report(command.config, command.out)
        print(f"Open {page.resolve()}")
    else:
        name = _MODULES[type(command)]
        analysis, records = import_module(f"analyses.{name}"), import_module("analyses.records")
        record = analysis.run(command.config)
        print(record.summary().to_string(index=False, float_format=lambda value: f"{value:.2f}"))
        for path in records.write(name, record, analysis.figure(record), command.output):
            print(f"wrote {path}")
