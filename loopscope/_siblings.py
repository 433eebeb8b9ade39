"""The folder names of this project are generic, so make sure that Python found ours and not somebody else's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SIBLINGS = ("models", "checkpoints", "tasks", "training", "interp", "analyses")


def check_siblings() -> None:
    """Raise ImportError if another `models`, `checkpoints`, ... hides this project's own.

    Raises:
        ImportError: One sentence that names the shadowing file and says what to do.
    """
    root = Path(__file__).resolve().parent.parent
    for name in SIBLINGS:
        loaded = sys.modules.get(name)
        spec = None if loaded else importlib.util.find_spec(name)
        found = getattr(loaded, "__file__", None) if loaded else spec.origin if spec else None
        ours = root / name / "__init__.py"
        if found is None or Path(found).resolve() != ours:
            shadow = found or (spec and list(spec.submodule_search_locations or ())) or "nothing"
            raise ImportError(
                f"loopscope needs its own package {name!r} ({ours}), but Python finds {shadow}; "
                "rename that file or folder, or start Python from another directory"
            )
