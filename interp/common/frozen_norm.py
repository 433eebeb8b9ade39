"""Norms whose divisor is held at its value in a run, which makes them affine maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import LoopHookPoint, Taps

Norm = Callable[[Tensor, Taps], Tensor]


def frozen_norm(
    norm: Norm, site: str, x: Float[Tensor, "batch pos d_model"], scale: Tensor
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, " d_model"]]:
    """A norm whose divisor is held is an affine map; its linear part applied to some vectors, and
    its constant part.

    Args:
        norm: Of a residual stream and the hook points that it is to use.
        site: The norm's scale site, e.g. "ln_final.hook_scale".
        scale: The divisor, to be broadcast over "batch pos 1".

    Raises:
        ValueError: The norm does not pass its divisor through that site.
    """
    asked: list[Tensor] = []

    def hold(value: Tensor, hook: HookPoint) -> Tensor:
        asked.append(value)
        return scale.expand_as(value)

    zero = norm(
        torch.zeros_like(x[:1, :1]), watching(site, lambda value, hook: torch.ones_like(value))
    )[0, 0]
    held = norm(x, watching(site, hold))
    if not asked:
        raise ValueError(
            f"the norm must show its divisor at {site!r} to be frozen there, but never asked for it"
        )
    return held - zero, zero


def watching(site: str, hook: Callable[..., Tensor | None]) -> Taps:
    """A hook point of our own, so that a norm can be called without the model's hooks and without
    leaving any.
    """
    point = LoopHookPoint()
    point.name = site
    point.add_hook(hook)
    return {site: point}


def held_divisors(
    model: LoopedModel, n_loops: int
) -> tuple[list[str], Callable[[Tensor, HookPoint], Tensor]]:
    """The points at which norms show their divisor in a call, and a hook that takes the divisor's
    gradient away.
    """

    def detach(value: Tensor, hook: HookPoint) -> Tensor:
        return value.detach()

    return [name for name in model.hook_names(n_loops) if name.endswith("hook_scale")], detach
