"""A fingerprint of all that a result depends on, so that a file made for another model or call is
refused.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.interp.common.cells import Cell
from loopscope.models.basis.numbers import given_tensor
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, slice, torch.dtype, torch.device)
_PLAIN += (type(None), types.EllipsisType)


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
    return described(facts_of(model, cells, batches, options))


def facts_of(
    model: LoopedModel, cells: Sequence[Cell], batches: Sequence[Batch], options: tuple[object, ...]
) -> tuple[object, ...]:
    """All that decides a result; the arguments are those of `fingerprint`."""
    return repr(tuple(cells)), options, facts_of_inputs(batches), facts_of_model(model)


def facts_of_inputs(batches: Sequence[Batch]) -> list[object]:
    """All that inputs hold."""
    return [(batch.tokens, batch.mask, batch.readout, dict(batch.options)) for batch in batches]


def facts_of_model(model: LoopedModel) -> tuple[object, ...]:
    """All that a model computes with: configuration, hooks, weights and edited schedule."""
    hooks = {
        name: [*point._forward_hooks.values(), *point._forward_pre_hooks.values()]
        for name, point in sorted(model.hooked_points().items())
    }
    schedule = () if model.edited is None else (model.edited.order,)
    return repr(model.cfg), hooks, list(model.state_dict().values()), *schedule


def described(value: object, longest: int | None = None) -> str:
    """A hash of a value and of all that it holds; equal values have equal hashes, also in another
    process.

    Args:
        longest: A tensor with more entries counts with about so many of them, evenly spaced; None
            takes in every entry.

    Raises:
        ValueError: It holds an object that cannot be told from others.
    """
    return _Hashes(longest).of(value).hex()


class _Hashes:
    """The hashes of values of many kinds, each object's worked out once."""

    def __init__(self, longest: int | None) -> None:
        self._longest = longest
        self._known: dict[int, tuple[object, bytes]] = {}

    def of(self, value: object) -> bytes:
        """The hash of a value."""
        if id(value) not in self._known:
            # kept with the object, so that no other takes its id; an object inside itself is not
            # followed again
            self._known[id(value)] = value, b"inside itself"
            whole = hashlib.sha256(f"{type(value).__module__}.{type(value).__qualname__}".encode())
            for part in self._parts(value):
                whole.update(part)
            self._known[id(value)] = value, whole.digest()
        return self._known[id(value)][1]

    def _parts(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, _PLAIN):
            yield repr(value).encode()
        elif isinstance(value, Tensor):
            yield repr((value.dtype, tuple(value.shape))).encode()
            step = max(1, value.numel() // self._longest) if self._longest else 1
            entries = value.detach().reshape(-1)[::step].cpu().contiguous()
            yield entries.view(torch.uint8).numpy().tobytes()
        elif isinstance(value, Mapping):
            yield from (self.of(pair) for pair in value.items())
        elif isinstance(value, Set):
            yield from sorted(map(self.of, value))
        elif isinstance(value, Sequence):
            yield from map(self.of, value)
        else:
            yield from map(self.of, self._held(value))

    def _held(self, value: Any) -> Iterable[object]:
        """The values that an object consists of."""
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, types.CodeType):
            return value.co_name, value.co_code, value.co_names, value.co_consts
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        if isinstance(value, types.MethodType):
            return value.__func__, value.__self__
        if callable(value) and hasattr(value, "__qualname__"):  # a class, or of a library
            own = _members(value) if isinstance(value, type) else []
            return getattr(value, "__module__", ""), value.__qualname__, own
        if isinstance(value, types.ModuleType):
            return (value.__name__,)
        if isinstance(value, nn.Module):
            return type(value), list(value.state_dict().values())
        if hasattr(value, "__array__"):
            return (given_tensor(value),)
        if hasattr(value, "__dict__"):
            return type(value), vars(value)
        raise ValueError(
            "save_to= needs metrics and hooks that can be told from others, but a"
            f" {type(value).__name__} that one of them holds cannot; leave save_to out"
        )

    def _of_function(self, function: types.FunctionType) -> Iterator[object]:
        """A function's code, and the values that the code finds around it."""
        yield function.__code__
        yield function.__defaults__, function.__kwdefaults__
        yield [cell.cell_contents for cell in function.__closure__ or ()]
        for name in sorted(_global_names(function.__code__)):
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType) and _of_library(value.__module__):
                value = value.__code__  # whose own globals are no part of this
            yield value


def _members(kind: type) -> list[object]:
    """The code and the plain values of a class and of those that it is made from, as far as they
    are the user's own; the version of a library counts elsewhere.
    """
    own = [each for each in kind.__mro__ if not _of_library(each.__module__)]
    members = [
        (name, getattr(value, "__func__", value))
        for each in own
        for name, value in vars(each).items()
    ]
    wanted = (types.FunctionType, property, *_PLAIN)
    return [(name, _read(value)) for name, value in members if isinstance(value, wanted)]


def _read(member: object) -> object:
    """The function behind a property, and anything else as it is."""
    return member.fget if isinstance(member, property) else member


def _of_library(module: str) -> bool:
    """Whether a module belongs to an installed package or to Python."""
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names and root != "__main__":
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return root in ("loopscope", "builtins") or "site-packages" in file


def _global_names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_global_names, inner))
