"""The part of the explorer's page about the features of a sparse dictionary of the user's."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dash import dcc, html, no_update
from dash.development.base_component import Component

from loopscope.analyses.common.inputs_of import Asked, Group, asked_of
from loopscope.analyses.common.subject import Subject
from loopscope.analyses.explorer.controls import control, graph, section
from loopscope.analyses.explorer.wiring import Wire
from loopscope.analyses.figures.circuit.feature import everything, figure, measure
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.sae_files import load_dictionary
from loopscope.interp.drawing.labels import visible

_EACH = 4  # questions of each hop count in which features are looked for
SECTION = "feature-section"
WIRES = (
    Wire("show_feature", "feature-page.figure feature-said.children feature.value"
         " feature-took.children", "feature.value feature-loop.value", busy="feature"),
)  # fmt: skip


@dataclass(frozen=True)
class FeaturePart:
    """The features of a dictionary of one checkpoint.

    Attributes:
        subject: The checkpoint.
        dictionary: Of this checkpoint.
        asked: The inputs in which features are looked for.
        lock: The page's, held around every computation.
    """

    subject: Subject
    dictionary: Dictionary
    asked: Asked
    lock: threading.Lock

    @classmethod
    def of(cls, subject: Subject, folder: Path, text: str, lock: threading.Lock) -> FeaturePart:
        """The part for a dictionary's folder.

        Args:
            text: The input of a checkpoint without questions.

        Raises:
            ValueError: A folder that holds no dictionary, or one of another model.
        """
        dictionary = load_dictionary(folder).to(subject.model.device)
        dictionary.check(subject.model)
        if not subject.questions:
            return cls(subject, dictionary, asked_of(subject, [text]), lock)
        few = {hops: group[:_EACH] for hops, group in subject.questions.items()}
        return cls(subject, dictionary, Asked(replace(subject, questions=few), None), lock)

    @cached_property
    def inputs(self) -> Group:
        """The inputs as one group."""
        return everything(self.asked)

    def section(self) -> Component:
        """The part before anything is computed."""
        own = self.dictionary
        number = dcc.Input(
            id="feature", type="number", value=None, min=0, max=own.n_features - 1, step=1,
            debounce=True,
        )  # fmt: skip
        loop = dcc.Dropdown(
            list(range(own.n_loops)), own.n_loops - 1, id="feature-loop", clearable=False
        )
        pickers = [
            control("feature", f"Feature (0 to {own.n_features - 1})", number),
            html.Div(control("feature-loop", "Loop", loop), hidden=own.same_features),
        ]
        text = (
            f"A {own.kind} dictionary at {own.reading.target}: the inputs in which a feature is"
            f" strongest among {len(self.inputs.batch)}, when it is written, and what taking it out"
            " does to the answers."
        )
        parts = [
            html.P(text),
            html.Div(pickers, className="controls"),
            html.P(id="feature-said", className="found", role="status"),
            graph("feature-page", 600),
        ]
        return section(SECTION, "A feature of the dictionary", parts)

    def show_feature(self, feature: int | None, loop: int | None) -> tuple[Any, str, Any, str]:
        """The page of a feature, a sentence about it, its number, and how long it took; for a
        feature that cannot be shown the sentence that says why.
        """
        start = time.perf_counter()
        at = None if self.dictionary.same_features else loop
        with self.lock:
            try:
                record = measure(self.asked, self.inputs, self.dictionary, feature, at)
            except ValueError as error:
                return no_update, f"{error}.", no_update, ""
        said = (
            f"Feature {record.feature} is on in {record.on} of {record.inputs} inputs; by itself it"
            f" raises the logit of {visible(record.raised[0])} most."
        )
        took = f"feature {1000 * (time.perf_counter() - start):.0f} ms"
        number = record.feature if feature is None else no_update
        return figure(record).to_plotly_json(), said, number, took
