"""One figure on its own: run, drawn, with a title, and with the facts of what made it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch

import loopscope
from loopscope.analyses.common.configs import (
    ComparisonConfig,
    FilesConfig,
    LoadedModel,
    PairConfig,
    SourceConfig,
)
from loopscope.analyses.common.figures import FigureFile
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.subject import called, load_model
from loopscope.interp.common.fingerprint import described
from loopscope.interp.drawing.labels import label, shortened
from loopscope.interp.drawing.look import titled
from loopscope.models.core.base import LoopedModel

_LONGEST = 150  # characters of a line of a title
_UNSAID = {
    *(each.name for kind in (SourceConfig, PairConfig, ComparisonConfig) for each in fields(kind)),
    "text",
    "tokens",
    "n_loops",
} - {"per_hop", "readout", "window", "ignore", "adapter", "dtype"}
"""Settings that a title says in words of its own, or not at all."""


@dataclass(frozen=True)
class Standalone:
    """One figure that was run and drawn.

    Attributes:
        record: Its numbers.
        figure: The drawing with a title.
        made_with: Versions, and of each checkpoint its weights' hash and what it records.
    """

    record: Record
    figure: go.Figure
    made_with: dict[str, Any]


def make(file: FigureFile, config: Any) -> Standalone:
    """Run a figure's settings, each checkpoint loaded once, and draw it with a title."""
    config = with_models(config)
    record = file.module().run(config)
    facts = {name: _facts(held.model) for name, held in _models(config).items()}
    title = _title(file.name, config, record, facts)
    figure = titled(file.module().figure(record), title)
    return Standalone(record, figure, _versions() | ({"checkpoints": facts} if facts else {}))


def with_models(config: Any) -> Any:
    """The settings with every checkpoint that they name loaded."""
    if not isinstance(config, FilesConfig):
        return config
    sources: list[FilesConfig] = [config]
    if isinstance(config, ComparisonConfig):
        sources = [*config.sources()] if config.checkpoints else []
    models = {
        source.checkpoint: source.in_memory(source.checkpoint)
        or LoadedModel(load_model(source), alone=False)
        for source in sources
        if isinstance(source, SourceConfig)
    }
    return replace(config, loaded=models)


def _models(config: Any) -> Mapping[str, LoadedModel]:
    return (config.loaded or {}) if isinstance(config, FilesConfig) else {}


def _facts(model: LoopedModel) -> dict[str, Any]:
    """The facts of a checkpoint that decide a result."""
    return {
        "family": model.cfg.family,
        "n_loops": model.cfg.n_loops,
        "readout": str(model.read_at) if model.read_at else None,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": described(dict(model.state_dict())),
    }


def _versions() -> dict[str, Any]:
    commit = _commit()
    versions = {"loopscope": loopscope.__version__, "torch": str(torch.__version__)}
    return versions | ({"commit": commit} if commit else {})


def _commit() -> str:
    """The commit of the checkout that runs; empty for an installed package."""
    root = Path(loopscope.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _title(name: str, config: Any, record: Record, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Two lines: the figure with its checkpoint, and the input with the settings."""
    of = f": {_few(list(map(called, facts)))}" if facts else ""
    said = [record.heading() or _inputs(config), *_settings(config, list(facts.values()))]
    below = label(" · ".join(shortened(each, _LONGEST) for each in said if each))
    first = f"<b>{label(name.replace('-', ' '))}</b>{label(of)}"
    return f"{first}<br><sup>{below}</sup>" if below else first


def _few(names: Sequence[str]) -> str:
    shown = [shortened(name, 40) for name in names[: 4 if len(names) == 4 else 3]]
    more = len(names) - len(shown)
    return ", ".join(shown) + f" and {more} more" * bool(more)


def _inputs(config: Any) -> str:
    """The inputs that the settings name."""
    texts = getattr(config, "text", None) or ()
    texts = (texts,) if isinstance(texts, str) else texts
    if texts:
        return texts[0] if len(texts) == 1 else f"{texts[0]} and {len(texts) - 1} more texts"
    if getattr(config, "tokens", ()):
        return "tokens " + " ".join(map(str, config.tokens))
    hops = getattr(config, "hops", None)
    return f"questions of {hops} hop{'s' * (hops != 1)}" if hops is not None else ""


def _settings(config: Any, facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The iterations that were run, and the settings that are not the defaults."""
    recorded = {each["n_loops"] for each in facts}
    loops = getattr(config, "n_loops", None) or (recorded.pop() if len(recorded) == 1 else None)
    known = hasattr(config, "n_loops") and loops is not None
    return [f"{loops} iteration{'s' * (loops != 1)}"] * known + [
        f"{each.name.replace('_', ' ')} {_plain(getattr(config, each.name))}"
        for each in fields(config)
        if each.name not in _UNSAID | {"threads", "runs"}
        and getattr(config, each.name) != each.default
    ]


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
