"""Calls of a compiled model: compiled while no hook is on, eager while one is.

A compiled graph holds no hook points. So whether a hook may be on is asked before the compiled code
is entered, both after `model.compile()` and through `torch.compile(model)`. The compiler guards on
the answer, a plain bool of `HookWatch`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loopscope.models.core.hooks import HookWatch


class EagerWhileHooked(nn.Module):
    """A module whose calls are compiled only while none of its hook points holds a hook.

    Attributes:
        watch: Looks after the module's hook points.
    """

    watch: HookWatch

    def any_hook(self) -> bool:
        """Whether any point holds a hook."""
        return self.watch.may_hold and bool(self.watch)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.watch.may_hold:  # the compiler is not loaded for a model that nobody compiles
            run = _eagerly_in_a_graph if "torch._dynamo" in sys.modules else _eagerly
            return run(self, args, kwargs)
        return super().__call__(*args, **kwargs)


def _eagerly(module: EagerWhileHooked, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a module whose hook points hold hooks, or held some until now."""
    module.watch.may_hold = bool(module.watch)
    if module.watch.may_hold:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]  # PyTorch's
    return nn.Module.__call__(module, *args, **kwargs)


# unlike torch.compiler.disable, this does not load the compiler
_eagerly_in_a_graph = torch._disable_dynamo(_eagerly)  # type: ignore[attr-defined]
