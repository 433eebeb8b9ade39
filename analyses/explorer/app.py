"""A local page on which a looped model is explored: ask, watch the iterations, look at attention,
patch one cell with a click; of a Sudoku solver, change a clue and watch the boards.

The page is served to this machine alone. It reads a checkpoint and writes nothing.
"""

from __future__ import annotations

import socket
import sys

from dash import Dash
from werkzeug.serving import BaseWSGIServer, make_server

from loopscope.analyses.common.configs import ExploreConfig
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.explorer.boards.app import make_board_app
from loopscope.analyses.explorer.boards.model import table_of
from loopscope.analyses.explorer.callbacks import Explorer, make_app
from loopscope.analyses.explorer.features import FeaturePart
from loopscope.analyses.explorer.questions import ask, beginning
from loopscope.analyses.explorer.requests import LOOPBACK, QuietHandler
from loopscope.models.basis.arguments import Argument, ArgumentError
from loopscope.models.core.state import checked_loops


def explore(config: ExploreConfig) -> None:
    """Serve the page until Ctrl-C, after one line with its address.

    Raises:
        ValueError: Another host than 127.0.0.1, a port that is taken, or a checkpoint that cannot
            be asked.
    """
    server = make_explorer(config)
    try:
        print(
            f"Explore {config.checkpoint} at http://{LOOPBACK}:{server.port}/ (Ctrl-C ends it)",
            flush=True,
        )
        server.serve_forever()
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        server.server_close()


def make_explorer(config: ExploreConfig) -> BaseWSGIServer:
    """A server of the page that listens and is not yet running; the rest is as for `explore`."""
    if config.host != LOOPBACK:
        raise ValueError(
            f"the explorer serves this machine alone, at {LOOPBACK}, got the host {config.host!r}"
        )
    if not 0 <= config.port <= 65535:
        raise ValueError(f"a port is between 0 (take a free one) and 65535, got {config.port}")
    subject = open_subject(config, needs_questions=False)
    app = _page_of(subject, config)
    try:
        listening = socket.create_server((LOOPBACK, config.port))
    except OSError as error:
        raise ValueError(
            f"port {config.port} cannot be used ({error.strerror}); pass another --port, or --port"
            " 0 for a free one"
        ) from None
    with listening:  # the server takes a duplicate
        return make_server(
            LOOPBACK,
            config.port,
            app.server,
            threaded=True,
            fd=listening.fileno(),
            request_handler=QuietHandler,
        )


def _page_of(subject: Subject, config: ExploreConfig) -> Dash:
    """The page of boards for a Sudoku solver, and the page of texts for other checkpoints."""
    recorded = subject.model.cfg.n_loops
    start = checked_loops(config.n_loops, recorded)
    table = table_of(subject)
    if table is not None:
        if config.dictionary is not None:
            raise ArgumentError(
                "a Sudoku solver's page shows boards and no features of a dictionary; leave out ",
                Argument("dictionary", str(config.dictionary)),
            )
        if config.second is not None:
            raise ArgumentError(
                "a Sudoku solver's page has one board, whose clues are changed there; leave out ",
                Argument("second", config.second),
            )
        return make_board_app(subject, table, recorded or start, start, config.text)
    texts = beginning(subject, config.text, config.second)
    ask(subject, texts[0], recorded or start)  # refused here, before a page that cannot be used
    explorer, features = Explorer(subject, recorded or start, start), None
    if config.dictionary is not None:
        features = FeaturePart.of(subject, config.dictionary, texts[0], explorer.lock)
    return make_app(explorer, texts, features)
