"""The modes that methods run in: evaluation for all of them, gradients for some; and the turns that
they take, since the hooks of one would act in the runs of another. The methods of the model itself
(`forward`, `run_with_cache`, ...) take no turn.

A method's own decorator stands closest to it: `@evaluated` above `def`, other decorators above.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import existing_modules, module_hooked

_TURNS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_MAKING = threading.Lock()  # of a model's turn
PATIENCE = 60.0  # seconds of waiting for a turn, after which a warning says so
_P = ParamSpec("_P")
_R = TypeVar("_R")


def evaluated(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method of a model (its first argument, `model`) that runs in evaluation mode and puts every
    module's mode back, so that no dropout makes its result random.
    """

    @functools.wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with evaluating(_model_of(*args, **kwargs)):
            return method(*args, **kwargs)

    return run


def differentiated(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """An `evaluated` method that needs gradients, also where the caller has switched them off with
    `torch.no_grad()` or `torch.inference_mode()`.

    Raises:
        ValueError: The model's weights were made inside `torch.inference_mode()`.
    """
    quiet = evaluated(method)

    @functools.wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if any(weight.is_inference() for weight in _model_of(*args, **kwargs).parameters()):
            raise ValueError(
                f"{method.__name__} needs gradients, but this model was made inside"
                " torch.inference_mode(), whose tensors have none; make or load it outside"
            )
        with torch.inference_mode(False):
            return quiet(*args, **kwargs)

    return run


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block a model is in evaluation mode; afterwards, also after an error, every
    module has the mode that it had. Other threads that come to such a block of the same model wait,
    without end where this block itself waits for them.

    Warns:
        UserWarning: A thread has waited for a minute.
    """
    with _turn(model), _evaluating(model):
        yield


@contextmanager
def _turn(model: nn.Module) -> Iterator[None]:
    with _MAKING:
        turn = _TURNS.setdefault(model, threading.RLock())
    if not turn.acquire(timeout=PATIENCE):
        warnings.warn(
            f"a method has waited {PATIENCE:g} s for its turn, as another thread runs a method of"
            " the same model; it waits without end where that method's metric or hook waits for"
            " this thread, so call the model there from the method's own thread, or give each"
            " thread a copy of the model",
            stacklevel=2,
        )
        turn.acquire()
    try:
        yield
    finally:
        turn.release()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    whole = model.training
    training = [module for module in existing_modules(model) if module.training]
    if not training:
        yield
        return
    known = set(existing_modules(model))
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module in existing_modules(model):
            if module not in known:  # a hook point that was made meanwhile
                module.training = whole


def ungraphed(model: LoopedModel) -> AbstractContextManager[None]:
    """A context for runs of which no tensor escapes: inference mode; or, where hooks of a caller
    see the tensors and may keep them, no gradients.
    """
    watched = model.any_hook() or module_hooked(model)
    return torch.no_grad() if watched else torch.inference_mode()


def _model_of(*args: object, **kwargs: object) -> LoopedModel:
    model = args[0] if args else kwargs.get("model")
    if not isinstance(model, LoopedModel):
        raise TypeError(
            "the first argument must be a looped model, got"
            f" {type(model).__name__}; load(name) makes one of a checkpoint, wrap(module, ...) of a"
            " module of your own"
        )
    return model
