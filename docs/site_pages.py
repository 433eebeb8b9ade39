"""What the build adds to Sphinx: docstrings whose signs are taken as they are, a door at the site's
root, and `llms.txt`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes

_DOOR = """<!doctype html>
<meta charset="utf-8">
<title>loopscope</title>
<meta http-equiv="refresh" content="0; url=docs/index.html">
<a href="docs/index.html">loopscope</a>
"""


def _first_paragraph(page: nodes.document) -> str:
    for paragraph in page.findall(nodes.paragraph):
        if not isinstance(paragraph.parent, nodes.Body):
            return " ".join(paragraph.astext().split())
    return ""


def llms_txt(app: Any) -> str:
    """A list of all pages for language models: title, address, first sentence (llmstxt.org).

    Args:
        app: The Sphinx application, after its pages were read.

    Returns:
        The text of the file.
    """
    env = app.builder.env
    about = _first_paragraph(env.get_doctree(app.config.root_doc))
    lines = [f"# {app.config.project}", "", f"> {about}", "", "## Pages", ""]
    for name in sorted(env.found_docs - {app.config.root_doc}):
        about = _first_paragraph(env.get_doctree(name)).partition(". ")[0].rstrip(".:")
        lines.append(f"- [{env.titles[name].astext()}]({name}.html): {about}")
    return "\n".join(lines) + "\n"


def as_written(line: str) -> str:
    """A line of a docstring in which `|`, `*` and a closing `_` outside backticks are no markup."""
    parts = re.split(r"(`[^`]*`)", line)
    plain = (re.sub(r"\||\*(?! )|(?<=\w)_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2])
    quoted = [*parts[1::2], ""]
    return "".join(text + code for text, code in zip(plain, quoted, strict=True))


def _docstring(
    _app: Any, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]
) -> None:
    lines[:] = map(as_written, lines)


def _finish(app: Any, failure: Exception | None) -> None:
    if failure is None and app.builder.format == "html":
        out = Path(app.outdir)
        (out / "index.html").write_text(_DOOR, encoding="utf-8")
        (out / "llms.txt").write_text(llms_txt(app), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Join the build."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon's
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
