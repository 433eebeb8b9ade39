"""How a page looks in a browser: what is cut, what collides, and which texts are hard to read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from browser import Tab
from looks.colours import blend, contrast, rgb

_CROWDED = Path(__file__).with_name("layouts.js").read_text(encoding="utf-8")
_TEXTS = """
(() => {
  const grounds = (element) => {
    const found = [];
    for (let each = element; each; each = each.parentElement) {
      const ground = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(ground)) found.push(ground);
      if (/^rgb\\(/.test(ground)) break;
    }
    return found;
  };
  const found = new Map();
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest(".js-plotly-plot, script, style, svg, :disabled")) continue;
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    if (!element.getClientRects().length) continue;
    const inks = getComputedStyle(element).color;
    found.set([inks, ...grounds(element)].join("|"), element.textContent.trim().slice(0, 40));
  }
  return [...found];
})()
"""
_WIDE = """
[...document.querySelectorAll("body, body *")].filter((each) => {
  const style = getComputedStyle(each);
  return !each.closest(".js-plotly-plot, svg, .table, .said") && each.clientWidth > 1
    && style.display !== "inline" && each.scrollWidth > each.clientWidth + 1;
}).map((each) => [each.tagName, each.id, each.className, each.scrollWidth - each.clientWidth])
"""


def dress(tab: Tab, scheme: str, media: str = "") -> None:
    """Show a page to somebody whose system is "light" or "dark", or as it is printed."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    tab.call("Emulation.setEmulatedMedia", media=media, features=features)
    time.sleep(0.3)


def crowded(tab: Tab) -> list[list[str]]:
    """The texts of figures that leave their figure or lie on others: see `layouts.js`."""
    found: list[list[str]] = tab.value(_CROWDED)
    return found


def wide(tab: Tab) -> list[list[str]]:
    """The elements whose content is wider than they are; tables may scroll."""
    found: list[list[str]] = tab.value(_WIDE)
    return found


def faint(tab: Tab) -> dict[str, float]:
    """The texts outside of figures with a contrast below 4.5, and their contrast."""
    found = {}
    pairs = tab.value(_TEXTS)
    assert len(pairs) > 2, "the page has texts"
    for colors, text in pairs:
        ink, *grounds = colors.split("|")
        ground = rgb("#ffffff")
        for each in reversed(grounds):
            ground = blend(rgb(each), ground, _opacity(each))
        ratio = contrast(blend(rgb(ink), ground, _opacity(ink)), ground)
        if ratio < 4.5:
            found[f"{text} {colors}"] = round(ratio, 2)
    return found


def _opacity(color: str) -> float:
    parts = color.partition("(")[2].rstrip(")").split(",")
    return float(parts[3]) if len(parts) == 4 else 1.0


def check_looks(tab: Tab, figures: Sequence[str]) -> None:
    """In a window of 700 pixels nothing is cut, and in light and in dark all can be read.

    Args:
        figures: JavaScript that finds each figure.
    """
    tab.resize(700, 900)
    tab.wait(f"window.innerWidth === 700 && {figures[0]}._fullLayout.width < 700")
    tab.wait("document.documentElement.scrollWidth <= 700")
    assert crowded(tab) == []
    for scheme in ("dark", "light"):
        dress(tab, scheme)
        for figure in figures:
            ground = f"{figure}._fullLayout.paper_bgcolor"
            tab.wait(f"{ground} {'!==' if scheme == 'dark' else '==='} 'white'")
        assert faint(tab) == {}, scheme
        assert wide(tab) == [], scheme
