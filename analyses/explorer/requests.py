"""The limits of the explorer's server: small requests, and one line in the terminal for each bad
one.
"""

from __future__ import annotations

import sys

import flask
from werkzeug.exceptions import HTTPException
from werkzeug.serving import WSGIRequestHandler

LOOPBACK = "127.0.0.1"
LARGEST_BODY = 1_000_000
"""Bytes of a request's body; the page's own requests have some thousands."""


class QuietHandler(WSGIRequestHandler):
    """Logs errors and no requests; drops a client that sends nothing for `timeout` seconds."""

    timeout = 30

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


def guard(server: flask.Flask) -> None:
    """Refuse other hosts and large bodies, and log what is wrong with a request in one line."""
    server.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
    server.before_request(_refuse)
    server.register_error_handler(Exception, _log)


def _refuse() -> None:
    """A page elsewhere whose name was pointed at this machine gets nothing."""
    request = flask.request
    if request.host.partition(":")[0] not in (LOOPBACK, "localhost"):
        flask.abort(403, f"this page is only at {LOOPBACK}")
    if (request.content_length or 0) > LARGEST_BODY:
        flask.abort(413, f"a request may have {LARGEST_BODY:,} bytes")


def _log(error: Exception) -> flask.typing.ResponseReturnValue:
    """Answer a bad request, and write one line about it.

    Errors inside the page's own callbacks do not come here.
    """
    code = (error.code or 500) if isinstance(error, HTTPException) else 400
    why = error.description if isinstance(error, HTTPException) else repr(error)
    line = " ".join(f"{flask.request.method} {flask.request.path}: {code}, {why}".split())
    print(f"refused {line[:300]}", file=sys.stderr, flush=True)
    return f"{why}\n", code, {"Content-Type": "text/plain; charset=utf-8"}
