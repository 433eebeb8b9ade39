"""Mechanistic interpretability of looped transformers, with the iteration as an axis.

from loopscope import load, logit_lens
model = load("ltg_trained")
lens = logit_lens(model, ["<e_24><r_0><r_7>"], n_loops=8)
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from loopscope._in_parts import import_in_parts

__version__ = "0.2.0"

_HERE = Path(__file__).parent
if not (_HERE / "models").is_dir():
    # In a checkout the links here point to the folders beside this one; where links cannot be made
    # (Windows without the right to make them), the same folders are found through the package's
    # search path.
    __path__.append(str(_HERE.parent))

# The models need the hook points of TransformerLens, and not the data sets, tokenizers and bridges
# that its packages import along with them.
import_in_parts(
    "transformer_lens",
    "transformer_lens.utilities",
    "transformer_lens.conversion_utils",
    "transformer_lens.conversion_utils.conversion_steps",
)


def _public_calls() -> dict[str, str]:
    """The module of each public call, read from the stub that lists them."""
    stub = ast.parse((_HERE / "__init__.pyi").read_text(encoding="utf-8"))
    froms = [node for node in stub.body if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.name: f"{__name__}.{node.module}" for node in froms for alias in node.names}


_HOME = _public_calls()
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """Import a public call when it is first used, so that `loopscope --help` does not wait for
    torch.
    """
    if name == "plots":
        return importlib.import_module(f"{__name__}.plots")
    if name not in _HOME:
        raise AttributeError(
            f"module 'loopscope' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "plots", "__version__"]
