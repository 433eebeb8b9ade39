"""The script that draws the figures of a page in dark colours where the reader's system is dark."""

from __future__ import annotations

import json
from pathlib import Path

from loopscope.interp.drawing.look import DARK

_SCRIPT = Path(__file__).with_name("figures.js")


def figures_script() -> str:
    """The script, which runs after plotly's or before it, but before the first figure is drawn."""
    return f"const DARK = {json.dumps(DARK)};\n{_SCRIPT.read_text(encoding='utf-8')}"
