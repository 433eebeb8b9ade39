"""RESULTS.md in sections, each written by its own command."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_RESULTS = Path(__file__).parent / "RESULTS.md"
_PACKAGES = ("torch", "transformer-lens", "nnsight")


def machine() -> str:
    """The machine and the versions that the numbers are of."""
    versions = ", ".join(filter(None, map(_version, _PACKAGES)))
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} thread"
    return f"{_processor()}, {cores}, Python {platform.python_version()}, {versions}"


def write(title: str, command: str, lines: Sequence[str]) -> None:
    """Write one section of the page; the others stay as they are."""
    page = _RESULTS.read_text(encoding="utf-8") if _RESULTS.exists() else ""
    sections = dict(re.findall(r"^## (.+)\n\n((?:(?!## ).*\n)*)", page, flags=re.MULTILINE))
    sections[title] = "\n".join([f"One run of `{command}` on: {machine()}.", "", *lines, ""])
    kept = [f"## {name}\n\n{text.strip()}\n" for name, text in sections.items()]
    _RESULTS.write_text("\n".join(["# Benchmarks\n", *kept]), encoding="utf-8")


def _version(name: str) -> str:
    """A package with its version; empty where it is not installed."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
