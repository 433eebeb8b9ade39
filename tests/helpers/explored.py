"""The explorer as tests ask it: a toy with a few questions, and pages that are served."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import plotly.graph_objects as go

from browser import Tab, opened, require_chromium
from looks.marks import hard_to_see
from loopscope.analyses.common.configs import ExploreConfig
from loopscope.analyses.common.subject import Subject
from loopscope.analyses.explorer.app import make_explorer
from loopscope.analyses.explorer.questions import Query, ask, ask_beside
from loopscope.models.basis.tokens import Readout, Vocabulary
from loopscope.models.core.base import LoopedModel
from loopscope.tasks.questions import Question
from toy import D_VOCAB, LOOPS

A_TEXT, B_TEXT = "<w_3><w_8><w_2><w_20><w_11>", "<w_4><w_8><w_5><w_20><w_13>"


def around(model: LoopedModel) -> Subject:
    """A subject without a graph, whose answers are read at a padding column; it knows the answer of
    one question.
    """
    model.vocab, model.read_at = (
        Vocabulary([f"<w_{i}>" for i in range(1, D_VOCAB)]),
        Readout("first_pad"),
    )
    known = Question("<w_1><w_2><w_3>", "<w_9>", 2)
    return Subject(
        "toy", model.eval(), {2: [known, Question("<w_1><w_2><w_4>", "<w_8>", 2)]}, None, {}
    )


def two_questions(subject: Subject) -> tuple[Query, Query]:
    """The questions A and B to a toy."""
    a = ask(subject, A_TEXT, LOOPS)
    return a, ask_beside(subject, B_TEXT, a, LOOPS)


def valid(figure: dict[str, Any]) -> go.Figure:
    """Plotly's own check of a figure that is plain data, and that all of it can be seen."""
    drawn = go.Figure(figure)
    assert hard_to_see(drawn) == []
    return drawn


@contextmanager
def serving(config: ExploreConfig) -> Iterator[str]:
    """The address of the explorer's page."""
    server = make_explorer(config)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def served(config: ExploreConfig, ready: str) -> Iterator[Tab]:
    """The explorer's page in a browser.

    Args:
        ready: JavaScript that is true when the page can be looked at.
    """
    require_chromium()
    with serving(config) as address, opened(address) as page:
        page.resize(1280, 900)
        page.wait(ready)
        settle(page)
        yield page


def settle(page: Tab) -> None:
    """Wait until nothing is being computed, and nothing failed in a way that no check foresaw."""
    page.wait(
        "[...document.querySelectorAll('.status .busy')].every(e => !e.innerText) &&"
        " !document.querySelector('[data-dash-is-loading]')"
    )
    assert not page.value(text_of("problem"))


def text_of(key: str) -> str:
    """JavaScript for the text of an element."""
    return f"document.getElementById('{key}')?.innerText"


def plot(key: str) -> str:
    """JavaScript that finds a figure."""
    return f"document.querySelector('#{key} .js-plotly-plot')"
