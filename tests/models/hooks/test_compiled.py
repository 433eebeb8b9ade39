"""A compiled model runs eagerly while a hook is on, and its compiled code again without hooks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loopscope.interp.edit.schedule import schedule_edit
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.views import unrolled
from toy import Calls, random_tokens

SITE = "loops.1.blocks.0.hook_mlp_out"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        hasattr(LoopedModel.forward, "__wrapped__"),
        reason="the run-time checker of shapes cannot be compiled",
    ),
]


def in_place(model: Any, backend: Callable[..., Any]) -> Any:
    model.compile(backend=backend)
    return model


def wrapped(model: Any, backend: Callable[..., Any]) -> Any:
    return torch.compile(model, backend=backend)


@pytest.fixture
def graphs() -> list[int]:
    torch._dynamo.reset()
    return []


@pytest.fixture
def backend(graphs: list[int]) -> Callable[..., Any]:
    """Runs a graph as it is and counts its runs."""

    def compiler(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            graphs.append(1)
            return graph(*arguments)

        return run

    return compiler


@pytest.mark.slow
@pytest.mark.parametrize("compile_", [in_place, wrapped])
def test_hooks_of_a_compiled_model_fire(
    compile_: Any, backend: Any, graphs: list[int], plain: RecurrentDepth
) -> None:
    tokens, calls = random_tokens(), Calls()
    expected, kept = plain.run_with_cache(tokens, n_loops=2, names_filter=SITE)
    model = compile_(plain, backend)
    for _ in range(2):  # the first call after a hook was on may be eager
        torch.testing.assert_close(model(tokens, n_loops=2), expected)
    assert graphs
    _, cache = model.run_with_cache(tokens, n_loops=2, names_filter=SITE)
    assert torch.equal(cache[SITE], kept[SITE])
    graphs.clear()
    plain.hook_dict[SITE].add_hook(calls)
    with plain.hooks([(SITE, lambda value, hook: value * 0)]):
        hooked = model(tokens, n_loops=2)
    assert calls.names == [SITE]
    assert not torch.allclose(hooked, expected)
    assert not graphs, "hooks are not compiled"
    plain.reset_hooks()
    for _ in range(3):
        torch.testing.assert_close(model(tokens, n_loops=2), expected)
    assert graphs, "without hooks the compiled code runs again"


def test_an_edited_schedule_is_not_compiled(
    backend: Any, graphs: list[int], plain: RecurrentDepth
) -> None:
    tokens = random_tokens()
    expected = plain(tokens, n_loops=1)
    model = in_place(plain, backend)
    model(tokens, n_loops=2)
    graphs.clear()
    with schedule_edit(plain, ["loops.1"], 2):
        torch.testing.assert_close(model(tokens, n_loops=1), expected)
    assert not graphs
    for _ in range(2):
        model(tokens, n_loops=2)
    assert graphs


@pytest.mark.slow
def test_hooks_of_a_compiled_view_fire(backend: Any, plain: RecurrentDepth) -> None:
    view = unrolled(plain, 2)
    calls, compiled = Calls(), torch.compile(view, backend=backend)
    compiled(random_tokens())
    with view.hooks([("blocks.1.hook_mlp_out", calls)]):
        compiled(random_tokens())
    assert calls.names == ["blocks.1.hook_mlp_out"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of PyTorch needs g++")
def test_hooks_fire_beside_code_that_was_compiled_for_the_machine(plain: RecurrentDepth) -> None:
    tokens, calls = random_tokens(), Calls()
    expected, kept = plain.run_with_cache(tokens, n_loops=2, names_filter=SITE)
    model = torch.compile(plain)
    torch.testing.assert_close(model(tokens, n_loops=2), expected)
    with plain.hooks([(SITE, calls), (SITE, lambda value, hook: value * 0)]):
        assert not torch.allclose(model(tokens, n_loops=2), expected)
    assert calls.names == [SITE]
    _, cache = plain.run_with_cache(tokens, n_loops=2, names_filter=SITE)
    assert torch.equal(cache[SITE], kept[SITE])
    torch.testing.assert_close(model(tokens, n_loops=2), expected)
