"""The writing of tokens and places in figures and tables: the one place where labels are made.

A place on an axis is its coordinate as in the hook names ("2.0" under the title "loop.block"), in a
sentence "loop 2 · block 0"; coordinates count from 0. The full hook name goes into the hover text.
"""

from __future__ import annotations

from loopscope.models.core.cache import coordinate

AXIS = "loop.block"
EMBED = "hook_embed"
Name = str | float | int


def label(text: str) -> str:
    """A token or any other text as a figure shows it letter by letter.

    Figures read "<b>", "</a>" and "&lt;" as HTML, so that a token of this form would vanish or
    change.
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def on_axis(name: Name) -> Name:
    """A name on an axis letter by letter; a number as it is."""
    return label(name) if isinstance(name, str) else name


def visible(token: str) -> str:
    """A token whose spaces and line ends at its edges, and those alone, can be seen."""
    inner = token.strip()
    start = token.index(inner) if inner else len(token)
    edges = token[:start], token[start + len(inner) :]
    before, after = (edge.replace(" ", "␣").replace("\n", "⏎") for edge in edges)
    return f"{before}{inner}{after}"


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; an ellipsis stands for its middle."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def tick(name: str) -> str:
    """A visit or a hook point on an axis: "2.0", "prelude.1", "1.low.0.1", or "embed"."""
    return ".".join(map(str, _coordinate(name))) or "embed"


def spoken(name: str) -> str:
    """A visit or a hook point in a sentence: "loop 2 · block 0", "prelude 1", or "embedding"."""
    place, parts = list(_coordinate(name)), []
    if place and isinstance(place[0], int):
        parts.append(f"loop {place.pop(0)}")
    while place and isinstance(place[0], str):
        word = str(place.pop(0))
        numbered = len(place) > 1 or not parts
        parts.append(f"{word} {place.pop(0)}" if numbered else word)
    parts += [f"block {number}" for number in place]
    return " · ".join(parts) or "embedding"


def loop_and_layer(name: str) -> tuple[int | None, int | None]:
    """The loop and the layer of a visit or a hook point, from 0; None where it has none."""
    place = _coordinate(name)
    loop = place[0] if place and isinstance(place[0], int) else None
    layer = place[-1] if len(place) > 1 and isinstance(place[-1], int) else None
    return loop, layer


def _coordinate(name: str) -> tuple[str | int, ...]:
    return coordinate(_pointed(name))


def _pointed(name: str) -> str:
    """The name of a hook point: a visit's own name stands for what leaves it."""
    return name if "hook_" in name else f"{name}.hook_resid_post"
