"""The main job: the main analyses of one checkpoint, on one HTML page with tabs that works
offline.
"""

from __future__ import annotations

import html
import platform
import time
from pathlib import Path

import pandas as pd
import plotly.io as pio
import torch
from plotly.offline import get_plotlyjs
from tqdm.auto import tqdm

from loopscope.analyses.common.by_hop import run_by_hop
from loopscope.analyses.common.configs import ReportConfig
from loopscope.analyses.common.figure_configs import (
    HaltingCompareConfig,
    HaltingConfig,
    MarginsConfig,
    OrbitsConfig,
    RecurrenceConfig,
    RecurrenceGridsConfig,
)
from loopscope.analyses.common.inputs_of import Asked
from loopscope.analyses.common.panels import Panel
from loopscope.analyses.common.records import FIGURE_CONFIG, write_text
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.figures.answers import (
    flips,
    halting_compare,
    halting_curves,
    margins,
    overthinking,
    recurrence_grid,
    recurrence_grids,
)
from loopscope.analyses.figures.circuit import lens_heatmap, patching_map, ranks
from loopscope.analyses.figures.dynamics import attention_settling, orbits, steps
from loopscope.analyses.report import sections as sections
from loopscope.analyses.report.sections import Section
from loopscope.interp.exits.halting import HaltingRule

_STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
_TABS = """
const tabs = [...document.querySelectorAll("[role=tab]")];
function show(chosen) {
  for (const tab of tabs) {
    const on = tab === chosen;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
  }
  document.querySelectorAll("[role=tabpanel]:not([hidden]) .js-plotly-plot").forEach((plot) => Plotly.Plots.resize(plot));
}
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    show(next);
    next.focus();
  });
});
show(tabs[0]);
"""
Tabs = dict[str, list[Section]]


def run(config: ReportConfig) -> tuple[Subject, Tabs]:
    """Make all records and figures; the questions are run once for what is about answers."""
    subject = open_subject(config)
    asked = Asked(subject, None)
    with tqdm(total=4 if config.compare else 3, desc="report") as bar:
        made = {"Answers": _answers(subject, config)}
        bar.update()
        made["Circuit"] = [
            sections.lens_section(lens_heatmap.measure(subject, subject.example(config.hops).text)),
            sections.patch_section(
                patching_map.measure(
                    subject, [question.text for question in subject.of_hops(config.hops)]
                )
            ),
            sections.ranks_section(ranks.measure(asked, asked.group(config.hops))),
        ]
        bar.update()
        made["Dynamics"] = [
            sections.orbits_section(
                orbits.measure(
                    asked,
                    OrbitsConfig(checkpoint=config.checkpoint, n_loops=max(config.n_loops, _ORBIT)),
                )
            ),
            sections.steps_section(steps.measure(asked, asked.groups(), config.n_loops)),
            sections.attention_section(
                attention_settling.measure(asked, asked.group(config.hops), config.n_loops)
            ),
        ]
        bar.update()
        if config.compare:
            made["Comparison"] = _comparison(config)
            bar.update()
    return subject, made


_ORBIT = 8  # iterations at least, for an orbit to be looked for


def _answers(subject: Subject, config: ReportConfig) -> list[Section]:
    runs, halting = run_by_hop(subject, config.n_loops), HaltingConfig()
    rule = HaltingRule(RecurrenceConfig().kl, RecurrenceConfig().entropy)
    changes = flips.Flips((Panel.of(subject),), (flips.measure(runs, subject.model.cfg.n_loops),))
    return [
        sections.margin_section(overthinking.measure(subject, runs)),
        sections.grid_section(recurrence_grid.measure(subject, runs, rule)),
        sections.halting_section(halting_curves.measure(runs, halting.kl, halting.entropy)),
        sections.flips_section(changes),
    ]


def _comparison(config: ReportConfig) -> list[Section]:
    """The checkpoint beside others, which are opened as it was."""
    told = {
        name: getattr(config, name)
        for name in ("n_heads", "input_injection", "readout", "per_hop", "device", "n_loops")
    }
    told["checkpoints"] = (config.checkpoint, *config.compare)
    return [
        sections.grids_section(recurrence_grids.run(RecurrenceGridsConfig(**told))),
        sections.margins_section(margins.run(MarginsConfig(**told))),
        sections.halting_compare_section(halting_compare.run(HaltingCompareConfig(**told))),
    ]


def write_report(config: ReportConfig, path: Path) -> Path:
    """Run everything and write the page, whole or not at all."""
    started = time.perf_counter()
    subject, made = run(config)
    return write_text(path, page(subject, made, time.perf_counter() - started))


def page(subject: Subject, made: Tabs, seconds: float) -> str:
    """The whole page; plotly.js is in it once, and nothing is fetched."""
    cfg = subject.model.cfg
    facts = {
        "family": cfg.family.replace("_", "-"),
        "layers, iterations": f"{cfg.n_layers}, {cfg.n_loops or 'not recorded'}",
        "width": f"{cfg.d_model}, {cfg.n_heads} heads",
        "parameters": f"{sum(p.numel() for p in subject.model.parameters()):,}",
        "questions": (
            f"{sum(map(len, subject.questions.values())):,} of {min(subject.questions)} to"
            f" {max(subject.questions)} hops"
        ),
        "hops in training": str(subject.trained_hops or "not recorded"),
        "answer read at": str(subject.model.read_at),
    }
    cards = "".join(
        f"<div class=fact><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>"
        for k, v in facts.items()
    )
    buttons = "".join(
        f'<button role=tab id="tab-{name}" aria-controls="panel-{name}">{name}</button>'
        for name in made
    )
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>loopscope: {html.escape(subject.name)}</title><link rel="icon" href="data:,">
<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>
<body><header><p class=brand>loopscope</p><h1>{html.escape(subject.name)}</h1>
<p class=lead>{html.escape(str(subject.card.get("task", "A looped transformer, iteration by iteration.")))}</p>
<div class=facts>{cards}</div><div role=tablist aria-label="Figures">{buttons}</div></header>
<main>{"".join(_panel(name, inside) for name, inside in made.items())}</main>
<footer>Computed in {seconds:.0f} s with {versions}. Figures follow arXiv 2604.07822.</footer>
<script>{_TABS}</script></body></html>
"""


def _panel(name: str, inside: list[Section]) -> str:
    links = "".join(
        f'<a href="#{section.key}">{html.escape(section.title)}</a>' for section in inside
    )
    return (
        f'<div role=tabpanel id="panel-{name}"'
        f' aria-labelledby="tab-{name}"><nav>{links}</nav>{"".join(map(_section_html, inside))}</div>'
    )


def _section_html(section: Section) -> str:
    figure = pio.to_html(
        section.figure,
        include_plotlyjs=False,
        full_html=False,
        config=FIGURE_CONFIG,
        div_id=f"figure-{section.key}",
    )
    return f"""<section id="{section.key}"><h2>{html.escape(section.title)}</h2>
<p>{html.escape(section.look_for)}</p><p class=found>{html.escape(section.found)}</p>
<div class=figure>{figure}</div>
<details><summary>Numbers</summary><div class=table>{_table(section.record.summary())}</div></details></section>
"""


def _table(frame: pd.DataFrame) -> str:
    return str(
        frame.to_html(index=False, border=0, float_format=lambda value: f"{value:.2f}", na_rep="")
    )
