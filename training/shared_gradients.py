"""Weight gradients of a looped model without one matrix per use.

A shared weight is used once per iteration, and autograd makes a gradient of its size for every use
and adds them up. With few rows and wide weights these sums cost as much as the products themselves.
Here the rows of all uses are joined and multiplied once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Uses:
    """The uses of one weight in a forward pass, with the rows and gradients so far."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: list[Tensor] = []
        self.grads: list[Tensor] = []


class _Product(torch.autograd.Function):
    """bias + rows @ weight. The last backward pass returns the weight's whole gradient, the passes
    before it return none.
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, rows: Tensor, weight: Tensor, uses: _Uses) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.uses = uses
        uses.count += 1
        return torch.addmm(bias, rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        (grad,), (rows, weight), uses = grads, ctx.saved_tensors, ctx.uses
        uses.rows.append(rows)
        uses.grads.append(grad)
        if len(uses.rows) < uses.count:
            return None, grad @ weight.T, None, None
        joined, joined_grads = torch.cat(uses.rows), torch.cat(uses.grads)
        uses.rows.clear()
        uses.grads.clear()
        return joined_grads.sum(0), grad @ weight.T, joined.T @ joined_grads, None


class SharedGradients(TorchFunctionMode):
    """A context in which products with parameters share the computation of their gradient, for one
    forward and its backward pass.

    Every product must be on the way to the loss; `check`, called after the backward pass, makes
    sure.
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[int, _Uses] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if (
            func is torch.addmm
            and not kwargs
            and isinstance(args[2], nn.Parameter)
            and torch.is_grad_enabled()
        ):
            return _Product.apply(*args, self._uses.setdefault(id(args[2]), _Uses()))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        """Raise a RuntimeError where a product had no backward pass and a gradient is missing."""
        if any(uses.rows for uses in self._uses.values()):
            raise RuntimeError(
                "a product inside SharedGradients is not on the way to the loss, so a weight's"
                " gradient is incomplete"
            )
