"""A fingerprint of all that a result depends on, so that a file made for another model or call is
refused.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.interp.common.cells import Cell
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.tokens import Batch


def fingerprint(
    model: LoopedModel, cells: Sequence[Cell], batches: Sequence[Batch], options: tuple[object, ...]
) -> str:
    """A hash of what decides a sweep's values: weights, configuration, hooks, cells, inputs and
    options.

    Args:
        options: All else; a function counts with its code, and with the tensors, numbers and
            functions that it was made with.

    Raises:
        ValueError: An option or a hook holds an object that cannot be told from others.
    """
    found = _Hash()
    found.add((repr(model.cfg), repr(tuple(cells)), options))
    for batch in batches:
        found.add((batch.tokens, batch.mask, batch.readout, dict(batch.options)))
    for name, point in model.hook_dict.items():
        hooks = [*point._forward_hooks.values(), *point._forward_pre_hooks.values()]
        if hooks:
            found.add((name, hooks))
    found.add(list(model.state_dict().values()))
    return found.digest.hexdigest()


class _Hash:
    """A hash that takes in values of many kinds, each object once."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: dict[int, object] = {}

    def add(self, value: object) -> None:
        """Take in a value and all that it holds."""
        if isinstance(value, (type(None), bool, int, float, complex, str, bytes)):
            self._text(type(value).__name__, repr(value))
            return
        if id(value) in self._seen:
            self._text("again", str(list(self._seen).index(id(value))))
            return
        self._seen[id(value)] = value  # kept, so that no other object takes its id
        self._text("type", f"{type(value).__module__}.{type(value).__qualname__}")
        self._object(value)

    def _text(self, *words: str) -> None:
        self.digest.update(repr(words).encode())

    def _object(self, value: Any) -> None:
        if isinstance(value, Tensor):
            whole = value.detach().cpu().contiguous()
            self._text(str(whole.dtype), str(list(whole.shape)))
            self.digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, nn.Module):
            self.add(list(value.state_dict().values()))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, Mapping):
            self.add([(key, item) for key, item in value.items()])
        elif isinstance(value, Set):
            self._text(*sorted(map(repr, value)))
        elif isinstance(value, Sequence):
            for item in value:
                self.add(item)
        else:
            self._other(value)

    def _other(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self.add((value.__func__, value.__self__))
        elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            self._text(str(getattr(value, "__qualname__", value.__name__)))
        elif isinstance(value, (torch.dtype, torch.device)):
            self._text(str(value))
        elif hasattr(value, "__dict__"):
            self.add(vars(value))
        elif hasattr(value, "__array__"):
            self.add(torch.as_tensor(value))
        else:
            raise ValueError(
                "save_to= needs metrics and hooks that can be told from others, but a"
                f" {type(value).__name__} that one of them holds cannot; leave save_to out"
            )

    def _function(self, function: types.FunctionType) -> None:
        """A function by its code, and by the values that the code finds around it."""
        self._code(function.__code__)
        self.add((function.__defaults__, function.__kwdefaults__))
        self.add([cell.cell_contents for cell in function.__closure__ or ()])
        for name in sorted(_global_names(function.__code__)):
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType) and value.__module__ != function.__module__:
                self._code(value.__code__)  # a library's: its own globals are no part of this
            elif not isinstance(value, types.ModuleType):
                self.add(value)

    def _code(self, code: types.CodeType) -> None:
        self._text(code.co_name, repr(code.co_code), *code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self._text(repr(constant))


def _global_names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_global_names, inner))
