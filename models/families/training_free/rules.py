"""How training-free looping moves the state of a window of layers (arXiv 2605.23872)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.state import Visit

Rule = Literal["blend", "euler", "naive"]
Mode = Literal["block", "layer"]
_OTHERS = ("heun", "midpoint", "rk4", "heavy_ball", "anderson", "aitken")
BETA = 0.5  # of the blend; seen in two reimplementations, not in the paper's own text


@dataclass(frozen=True, kw_only=True)
class WindowConfig(LoopedConfig):
    """An ordinary model, and which of its layers are looped in which way. `n_layers` counts all
    layers of the ordinary model.

    Attributes:
        window: The first and the last layer that are looped, both included, from 0.
        rule: How the state moves in each of the n_loops passes; see `moved`.
        beta: The share of the first pass in the blend; None for the other rules.
        mode: "block" loops the window as a whole, "layer" loops each of its layers before the next.
        stash: Where the window's entries of a generation cache come from: the state after its
            passes ("last") or before ("first").
        decode: Whether generated tokens are "looped" as the prompt is, or run as by the ordinary
            model ("bypass").
    """

    TINY: ClassVar[Mapping[str, Any]] = {"n_layers": 4, "window": (1, 2)}
    window: tuple[int, int]
    rule: Rule = "blend"
    beta: float | int | None = BETA
    mode: Mode = "block"
    stash: str = "last"
    decode: str = "looped"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_source(self.stash)
        if self.decode not in ("looped", "bypass"):
            raise ValueError(f"decode must be 'looped' or 'bypass', got {self.decode!r}")
        object.__setattr__(self, "window", checked_window(self.window, self.n_layers))
        check_rule(self.rule, self.beta, self.mode)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoopedConfig:
        if isinstance(values.get("window"), list):
            values = {**values, "window": tuple(values["window"])}
        return super().from_dict(values)


def checked_window(window: object, n_layers: int) -> tuple[int, int]:
    """The window as a pair, or a sentence about what is wrong with it."""
    ends = list(window) if isinstance(window, tuple | list) else []
    whole = [end for end in ends if isinstance(end, int) and not isinstance(end, bool)]
    if len(ends) != 2 or len(whole) != 2 or not 0 <= whole[0] <= whole[1] < n_layers:
        raise ValueError(
            "window must be the first and the last layer to loop, both included and counted from"
            f" 0, in 0..{n_layers - 1}, got {window!r}"
        )
    return whole[0], whole[1]


def check_source(source: object) -> None:
    """Raise ValueError unless it names a state that a cache's entries can come from."""
    if source not in ("first", "last"):
        raise ValueError(
            "a cache is made of the state before the passes ('first') or after them ('last'), got"
            f" {source!r}"
        )


def check_rule(rule: object, beta: object, mode: object) -> None:
    """Raise ValueError unless the three fit together."""
    if rule not in ("blend", "euler", "naive"):
        what = "; that solver is not computed here" if rule in _OTHERS else ""
        raise ValueError(f"rule must be 'blend', 'euler' or 'naive', got {rule!r}{what}")
    if mode not in ("block", "layer"):
        raise ValueError(f"mode must be 'block' or 'layer', got {mode!r}")
    if rule != "blend" and beta is not None:
        raise ValueError(
            f"beta belongs to rule='blend', but rule={rule!r} came with beta={beta!r}; leave it out"
        )
    if rule == "blend" and (
        isinstance(beta, bool) or not isinstance(beta, int | float) or not 0.0 <= beta <= 1.0
    ):
        raise ValueError(f"beta must be a share from 0 to 1, got {beta!r}")


def entered(
    cfg: WindowConfig, x: Float[Tensor, "batch pos d_model"], parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parts of the state during a pass that starts at x."""
    return {**parts} if cfg.rule == "naive" else {**parts, "x_k": x}


def moved(
    cfg: WindowConfig,
    visit: Visit,
    g: Float[Tensor, "batch pos d_model"],
    parts: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The state after a pass, and the parts that the next one needs.

    With g(x) for what the looped layers make of x, and K passes: "naive" moves to g(x). "euler"
    moves from x to (1 - 1/K) x + g(x)/K. "blend" does the same K times, and leaves with beta g(x_0)
    + (1 - beta) x_K. One pass is the ordinary model under each rule.

    Args:
        visit: The last one of the pass.
        g: What the pass made of its state.

    Source:
        arXiv 2605.23872: damped Euler, and its "K-stage RK", which is this blend of two results.
        g(x_0) is its first stage and not run again, so it costs K passes.
    """
    if cfg.rule == "naive":
        return g, {**parts}
    kept = {name: part for name, part in parts.items() if name != "x_k"}
    x = torch.lerp(parts["x_k"], g, 1.0 / visit.n_loops)
    if cfg.rule == "blend":
        assert cfg.beta is not None, "the config has checked it"
        first = g if visit.loop == 0 else kept.pop("g_0")
        if visit.loop == visit.n_loops - 1:
            return torch.lerp(x, first, cfg.beta), kept
        kept["g_0"] = first
    return x, kept
