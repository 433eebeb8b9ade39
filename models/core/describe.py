"""A model on one screen: its family, its sizes, its schedule and its sites."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby
from textwrap import fill
from typing import TYPE_CHECKING

from loopscope.models.core.cache import site_of

if TYPE_CHECKING:
    from loopscope.models.core.base import LoopedModel

_SHOWN = 6  # names of a list that is longer are its first ones and its last


def facts(model: LoopedModel) -> dict[str, str]:
    """The lines that describe a model, by the word in front of each."""
    cfg, weights = model.cfg, list(model.parameters())
    sizes = (f"{name} {getattr(cfg, name)}" for name in ("d_model", "d_mlp", "d_vocab"))
    recorded = "no number recorded" if cfg.n_loops is None else f"{cfg.n_loops} recorded"
    return {
        "weights": (
            f"{sum(weight.numel() for weight in weights):,} parameters,"
            f" {' and '.join(sorted({str(each.dtype)[6:] for each in weights}))}"
            f" on {model.device}"
        ),
        "sizes": (
            f"{cfg.n_layers} layers, {cfg.n_heads} heads of {cfg.d_head}, {', '.join(sizes)}"
            f"{'' if cfg.n_ctx is None else f', n_ctx {cfg.n_ctx}'}"
        ),
        "iterations": recorded,
        "schedule": _schedule(model),
        "sites": ", ".join(_sites(model)),
        "texts": _texts(model),
    }


def as_text(model: LoopedModel) -> str:
    """The description for a terminal."""
    lines = [f"{type(model).__name__} of the family {model.cfg.family}"]
    for word, value in facts(model).items():
        lines.append(
            fill(value, 98, initial_indent=f"  {word}: ", subsequent_indent="    ",
                 break_on_hyphens=False)
        )  # fmt: skip
    return "\n".join(lines)


def as_html(model: LoopedModel) -> str:
    """The description for a notebook."""
    rows = "".join(
        f"<tr><th style='text-align:left;vertical-align:top'>{word}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for word, value in facts(model).items()
    )
    title = html.escape(f"{type(model).__name__} of the family {model.cfg.family}")
    return f"<b>{title}</b><table>{rows}</table>"


def _schedule(model: LoopedModel) -> str:
    """The visits of one iteration among what stands before and after the loop, in one line."""
    times = "n_loops" if model.cfg.n_loops is None else model.cfg.n_loops
    parts = []
    for inside, slots in groupby(model.plan(1), lambda slot: slot.loop is not None):
        names = [slot.name.removeprefix("loops.0.") for slot in slots]
        parts.append(f"{times} x loops.t.[{_short(names)}]" if inside else _short(names))
    before, after = (
        dict.fromkeys(name.partition(".")[0] for name in names) for names in model.edge_sites()
    )
    return " -> ".join((*before, *parts, *after))


def _short(names: Sequence[str]) -> str:
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, ..., {names[-1]} ({len(names)} visits)"


def _sites(model: LoopedModel) -> list[str]:
    """The sites of all visits, each once, in order of execution."""
    names = (name for slot in model.plan(1) for name in slot.hook_names())
    return list(dict.fromkeys(map(site_of, names)))


def _texts(model: LoopedModel) -> str:
    words = "no vocabulary" if model.vocab is None else f"{len(model.vocab)} tokens"
    return f"{words}, answers read at {model.read_at or 'a column that must be given'}"
