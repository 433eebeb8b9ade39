"""Hook names: which iteration a name belongs to, and which names of a call a filter means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
COMPARED = 2000  # names that a message's nearest ones are chosen from


def loop_of(name: str) -> int | None:
    """The iteration in a hook name, from 0; None outside the loop."""
    return number_after("loops", name)


def number_after(word: str, name: str | None) -> int | None:
    """The number behind a word in a hook name; None where the word is not there."""
    found = re.search(rf"(?:^|\.){word}\.(\d+)\.", name or "")
    return int(found.group(1)) if found else None


def is_pattern(names: NamesFilter) -> bool:
    """Whether the filter can match different names in calls of different length."""
    if isinstance(names, str):
        return "*" in names
    if isinstance(names, Sequence):
        return any("*" in name for name in names)
    return True


def resolve(names: NamesFilter, available: Mapping[str, object], n_loops: int) -> list[str]:
    """The hook names, in order of execution, that a filter means in a call of `n_loops` iterations.

    Args:
        names: A name, a pattern (`*` stays inside one segment, `**` is any number of segments), a
            list of those, a predicate, or None for all.
        available: The names of the call, in order of execution.
        n_loops: Iterations of the call, for the message.

    Raises:
        KeyError: The filter, or one entry of the list, matches nothing in this call; the message
            gives the nearest names.
    """
    if names is None:
        return list(available)
    if isinstance(names, str) and names in available:
        return [names]
    if callable(names):
        chosen = {name for name in available if names(name)}
    else:
        entries = [names] if isinstance(names, str) else names
        chosen = set().union(*(_matches(entry, available, n_loops) for entry in entries))
    if not chosen:
        what = "predicate matches none" if callable(names) else "list is empty and so matches none"
        raise KeyError(
            f"the {what} of the {len(available)} hook names of a call with n_loops={n_loops}"
        )
    return [name for name in available if name in chosen]


def _matches(entry: str, available: Mapping[str, object], n_loops: int) -> set[str]:
    if entry in available:
        return {entry}
    matcher = _compile(entry)
    found = {name for name in available if matcher.fullmatch(name + ".")} if "*" in entry else set()
    if not found:
        raise KeyError(_nothing_matches(entry, available, n_loops))
    return found


def _compile(pattern: str) -> re.Pattern[str]:
    """A regular expression over a name with a dot put behind it."""
    parts = []
    for segment in pattern.split("."):
        inside = "[^.]*".join(re.escape(piece) for piece in segment.split("*"))
        parts.append(r"(?:[^.]+\.)*" if segment == "**" else inside + r"\.")
    return re.compile("".join(parts))


def _nothing_matches(entry: str, available: Mapping[str, object], n_loops: int) -> str:
    loop = loop_of(entry + ".")
    if loop is not None and loop >= n_loops:
        return (
            f"{entry!r} is not in this call: with n_loops={n_loops} the iterations are loops.0 to"
            f" loops.{n_loops - 1}"
        )
    first = list(islice(available, COMPARED))
    inside = [name for name in first if name.endswith("." + entry)]
    nearest = inside[:3] or difflib.get_close_matches(entry, first, n=3, cutoff=0.3)
    hint = f"nearest: {', '.join(nearest)}" if nearest else "model.hook_names(n_loops) lists them"
    if inside:
        hint += (
            "; for every iteration write"
            f" {re.sub(r'loops[.][0-9]+', 'loops.*', inside[0], count=1)!r}"
        )
    return f"{entry!r} matches no hook point of a call with n_loops={n_loops}; {hint}"
