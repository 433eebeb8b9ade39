"""The options of `load` that say how an ordinary model is looped."""

from __future__ import annotations

from typing import Any

from loopscope.models.basis.arguments import Argument, ArgumentError
from loopscope.models.families.training_free.rules import BETA, check_rule, checked_window

OPTIONS = {
    "window": "first and last layer to loop, both included, from 0 (needed)",
    "rule": "'blend' (default), 'euler' or 'naive'",
    "beta": f"share of the first pass in the blend ({BETA} by default)",
    "mode": "'block' (default) or 'layer'",
    "stash": "state that a cache's entries are made of: 'last' (default) or 'first'",
    "decode": "generated tokens are 'looped' (default) or run unlooped ('bypass')",
}


def looping(options: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """Window, rule, beta, mode and the rule of the cache, from the caller's options."""
    if options.get("window") is None:
        raise ArgumentError(
            f"this is an ordinary model of {n_layers} layers, so say which of them to loop: ",
            Argument("window"),
            " takes the first and the last, both included and counted from 0; arXiv 2605.23872"
            " takes four in the middle, (12, 15) of 28 or (15, 18) of 36",
        )
    rule, mode = options.pop("rule", "blend"), options.pop("mode", "block")
    beta = options.pop("beta", BETA if rule == "blend" else None)
    check_rule(rule, beta, mode)
    cache: dict[str, Any] = {
        name: options.pop(name) for name in ("stash", "decode") if name in options
    }
    return {
        "window": checked_window(options.pop("window"), n_layers),
        "rule": rule,
        "beta": beta,
        "mode": mode,
        **cache,
    }
