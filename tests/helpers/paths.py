"""Where the tests find what lies beside the code."""

from __future__ import annotations

from pathlib import Path

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parent.parent
DOCS = ROOT / "docs"
GOLDEN = ROOT / "tests" / "golden"
SHIPPED = ROOT / "checkpoints" / "shipped"


def write(root: Path, files: dict[str, str]) -> None:
    """Write files of one line each below a folder."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
