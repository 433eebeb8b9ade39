"""The main figures of one checkpoint, on one HTML page with tabs that works offline."""

from __future__ import annotations

import html
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import torch
from plotly.offline import get_plotlyjs
from tqdm.auto import tqdm

from loopscope.analyses.common.configs import ReportConfig, as_flags
from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.records import FIGURE_CONFIG, Record, write_text
from loopscope.analyses.common.sections import Opened, Section
from loopscope.analyses.common.subject import Subject, open_subject, without_questions
from loopscope.analyses.report.dark import figures_script
from loopscope.checkpoints.tokenizer import HubTokenizer
from loopscope.models.core.state import checked_loops

TABS = {
    "Answers": ("readouts", "exit-gate", "overthinking", "recurrence", "halting", "flips"),
    "Circuit": ("lens", "patch", "ranks", "circuit", "feature"),
    "Dynamics": (
        "orbits",
        "steps",
        "attention-settling",
        "layers",
        "lyapunov",
        "attractors",
        "schedule-edit",
    ),
    "Comparison": ("recurrence-grids", "margins", "halting-compare"),
}
"""The figures of each tab; what the page says about a figure, and of which inputs the figure is,
stands in the figure's file.
"""

COMPARISON = "Comparison"
"""The tab that is there only with other checkpoints."""

DEFAULT_TEXT = "The cat sat on the mat, and the dog sat on the"
"""The text of a language model's report where the user gives none."""

_DEFAULTED = f" No text was given, so the text is the default one: {DEFAULT_TEXT!r}."

_FOLDER = Path(__file__).parent
_STYLE, _SCRIPT = (
    (_FOLDER / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
)


@dataclass(frozen=True)
class Drawn:
    """One section of the page.

    Attributes:
        name: The figure's command, which is the section's anchor too.
        section: What the page says about the figure of any checkpoint.
        record, figure: The figure of this checkpoint; None where it cannot be drawn.
        why: The sentence that says why it cannot; empty where it can.
    """

    name: str
    section: Section[Any]
    record: Record | None
    figure: go.Figure | None
    why: str = ""


Tabs = dict[str, list[Drawn]]


def run(config: ReportConfig) -> tuple[Opened, Tabs]:
    """Make all records and figures; the questions are run once for what is about answers. A figure
    that is not about what the report runs, such as one of many questions for a text, is left out.

    Raises:
        ValueError: Neither questions nor a text, no questions of the hop count; or none of the
            figures can be drawn. One figure that cannot be drawn is a section that says why.
    """
    opened = _opened(config)
    checked_loops(config.n_loops, None)
    tabs = {tab: _serving(names, opened) for tab, names in TABS.items()}
    if not config.compare:
        del tabs[COMPARISON]
    names = [name for inside in tabs.values() for name in inside]
    drawn = {name: _drawn(name, opened) for name in tqdm(names, desc="report")}
    if all(each.figure is None for each in drawn.values()):
        raise ValueError(f"no figure of the report can be drawn: {drawn[names[0]].why}")
    made = {tab: [drawn[name] for name in inside] for tab, inside in tabs.items() if inside}
    return opened, made


def _opened(config: ReportConfig) -> Opened:
    """The checkpoint with what is run; a setting of the report's own is refused before any work."""
    subject = open_subject(config, needs_questions=False)
    opened = Opened(config, subject)
    if config.text is None and config.clean is None:
        if subject.questions:
            subject.of_hops(config.hops)
        elif isinstance(subject.model.vocab, HubTokenizer):
            opened = Opened(replace(config, text=DEFAULT_TEXT), subject, ours=True)
        else:
            raise without_questions(config)
    if config.corrupted is not None:
        opened.pairs  # noqa: B018 - made here, so that a pair that cannot be compared is refused
    return opened


def _serving(names: Sequence[str], opened: Opened) -> list[str]:
    return [name for name in names if FIGURES[name].module().SECTION.serves(opened)]


def _drawn(name: str, opened: Opened) -> Drawn:
    module = FIGURES[name].module()
    section: Section[Any] = module.SECTION
    try:
        record = section.measure(opened)
        return Drawn(name, section, record, module.figure(record))
    except (ValueError, KeyError) as error:
        return Drawn(name, section, None, None, as_flags(error))


def write_report(config: ReportConfig, path: Path) -> Path:
    """Run everything and write the page, whole or not at all."""
    started = time.perf_counter()
    opened, made = run(config)
    return write_text(path, page(opened, made, time.perf_counter() - started))


def page(opened: Opened, made: Tabs, seconds: float) -> str:
    """The whole page; plotly.js is in it once, and nothing is fetched."""
    subject = opened.subject
    task = subject.card.get("task", "A looped transformer, iteration by iteration.")
    cards = "".join(
        f"<div class=fact><b>{html.escape(value)}</b><span>{html.escape(key)}</span></div>"
        for key, value in _facts(subject).items()
    )
    buttons = "".join(
        f'<button role=tab id="tab-{name}" aria-controls="panel-{name}">{name}</button>'
        for name in made
    )
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>loopscope: {html.escape(subject.name)}</title><link rel="icon" href="data:,">
<style>{_STYLE}</style><script>{get_plotlyjs()}</script><script>{figures_script()}</script></head>
<body><header><p class=brand>loopscope</p><h1>{html.escape(subject.name)}</h1>
<p class=lead>{html.escape(str(task) + _DEFAULTED * opened.ours)}</p>
<div class=facts>{cards}</div><div role=tablist aria-label="Figures">{buttons}</div></header>
<main>{"".join(_panel(name, inside) for name, inside in made.items())}</main>
<footer>Computed in {seconds:.0f} s with {versions}. Figures follow arXiv 2604.07822.</footer>
<script>{_SCRIPT}</script></body></html>
"""


def _facts(subject: Subject) -> dict[str, str]:
    cfg = subject.model.cfg
    return {
        "family": cfg.family.replace("_", "-"),
        "layers, iterations": f"{cfg.n_layers}, {cfg.n_loops or 'not recorded'}",
        "width": f"{cfg.d_model}, {cfg.n_heads} heads",
        "parameters": f"{sum(p.numel() for p in subject.model.parameters()):,}",
        **_questions(subject),
        "answer read at": str(subject.model.read_at or "last_real"),
    }


def _questions(subject: Subject) -> dict[str, str]:
    """The facts of a checkpoint's questions; none where it has none."""
    asked = subject.questions
    if not asked:
        return {}
    count = sum(map(len, asked.values()))
    return {
        "questions": f"{count:,} of {min(asked)} to {max(asked)} hops",
        "hops in training": str(subject.trained_hops or "not recorded"),
    }


def _panel(name: str, inside: list[Drawn]) -> str:
    links = "".join(
        f'<a href="#{each.name}">{html.escape(each.section.title)}</a>' for each in inside
    )
    return (
        f'<div role=tabpanel id="panel-{name}" aria-labelledby="tab-{name}"><nav>{links}</nav>'
        f"{''.join(map(_section_html, inside))}</div>"
    )


def _section_html(drawn: Drawn) -> str:
    title, look_for = html.escape(drawn.section.title), html.escape(drawn.section.look_for)
    if drawn.record is None or drawn.figure is None:
        body = f"<p class=refused>This figure cannot be drawn: {html.escape(drawn.why)}.</p>"
    else:
        body = _found_html(drawn.name, drawn.section.found(drawn.record), drawn)
    return f'<section id="{drawn.name}"><h2>{title}</h2>\n<p>{look_for}</p>{body}</section>\n'


def _found_html(name: str, found: str, drawn: Drawn) -> str:
    assert drawn.record is not None, "a drawn section has a record"
    figure = pio.to_html(
        drawn.figure,
        include_plotlyjs=False,
        full_html=False,
        config=FIGURE_CONFIG,
        div_id=f"figure-{name}",
    )
    return f"""<p class=found>{html.escape(found)}</p>
<div class=figure>{figure}</div>
<details><summary>Numbers</summary>
<div class=table>{_table(drawn.record.summary())}</div></details>"""


def _table(frame: pd.DataFrame) -> str:
    return str(
        frame.to_html(index=False, border=0, float_format=lambda value: f"{value:.2f}", na_rep="")
    )
