"""Training-free looping: its golden outputs, and the identities of its rules."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from family_toys import random_tokens
from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from loopscope.checkpoints.load import load
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.models.core.attention import Rows
from loopscope.models.core.cache import LoopCache
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.registry import build
from loopscope.models.families.training_free.cache import decode_bypass, prefill
from loopscope.models.families.training_free.gpt2 import TrainingFreeGPT2Config
from loopscope.models.families.training_free.model import (
    TrainingFree,
    TrainingFreeConfig,
    WindowLoops,
)
from loopscope.models.families.training_free.rules import checked_window
from toy import assert_close, is_close, randomize_

CASES = ("training_free_llama", "training_free_qwen3")
SIZES: dict[str, Any] = {
    "n_layers": 7,
    "d_model": 15,
    "n_heads": 6,
    "head_dim": 4,
    "n_key_value_heads": 2,
    "d_mlp": 22,
    "d_vocab": 19,
}
GPT2_SIZES: dict[str, Any] = {
    "n_layers": 7,
    "d_model": 15,
    "n_heads": 5,
    "d_mlp": 22,
    "d_vocab": 19,
    "n_ctx": 13,
}
ONE_PASS = 1
STATES = ["**.hook_state_in", "**.hook_window_out", "**.hook_state_out"]


class Looped(GoldenCase):
    """A case whose model is loaded once for each rule."""

    def __init__(self, name: str) -> None:
        self.runs: dict[tuple[str, str | None, str, int], tuple[Tensor, LoopCache]] = {}
        super().__init__(name, n_loops=ONE_PASS, window=(0, 0))
        self.window = tuple(self.golden["window"].tolist())
        self.model = self.under("euler")

    def under(self, rule: str, beta: str | None = None, mode: str = "block") -> WindowLoops:
        shares = {} if beta is None else {"beta": float(beta)}
        model = load(GOLDEN / self.name, window=self.window, rule=rule, mode=mode, **shares)
        assert isinstance(model, WindowLoops)
        return model

    @torch.no_grad()
    def run(
        self, rule: str, k: str, beta: str | None = None, mode: str = "block"
    ) -> tuple[Tensor, LoopCache]:
        key = (rule, beta, mode, int(k))
        if key not in self.runs:
            self.runs[key] = self.under(rule, beta, mode).run_with_cache(
                self.tokens, n_loops=int(k), names_filter=STATES
            )
        return self.runs[key]

    @cached_property
    def lens(self) -> Tensor:
        lens = logit_lens(
            self.model, self.tokens, ONE_PASS, positions="all", readout=-1, keep_logits=True
        )
        assert lens.logits is not None
        return lens.logits.unflatten(1, self.tokens.shape)

    def site(self, layer: str, site: str) -> str:
        """The name of a layer's hook point in the ordinary model's run."""
        first, last = self.window
        stage = (
            "prelude" if int(layer) < first else "coda" if int(layer) > last else "loops.0.blocks"
        )
        return f"{stage}.{layer}.{site}"


def window_out(
    case: Looped, rule: str, k: str, beta: str | None = None, mode: str = "block"
) -> Tensor:
    where = f"loops.{int(k) - 1}." + (f"blocks.{case.window[1]}." if mode == "layer" else "")
    return case.run(rule, k, beta, mode)[1][f"{where}hook_state_out"]


def readout_after(case: Looped, k: str, step: str) -> Tensor:
    """The ordinary model's end applied to x_step of a run of k passes."""
    model, done = case.under("euler"), int(step) - 1
    state = model.advance(
        model.begin(case.tokens, n_loops=int(k)), model.iteration_ends(int(k))[done]
    )
    return model.readout(model.finish(state))


@torch.no_grad()
def decoded(case: Looped, source: str) -> Tensor:
    model = case.under("euler")
    _, cache = prefill(model, case.tokens, n_loops=2, source=source)
    return model.readout(decode_bypass(model, case.golden["decode.next_ids"], cache)[0])


TABLE: dict[str, Compute] = {
    r"(input_ids|decode\.next_ids)": GoldenCase.stored,
    r"window": lambda case: torch.tensor(case.window),
    r"position_ids": lambda case: case.model.begin(case.tokens, n_loops=ONE_PASS).positions[0],
    r"embed": lambda case: case.activation("hook_embed"),
    r"block\.(\d+)\.resid_(mid|post)": lambda case, j, where: case.activation(
        case.site(j, f"hook_resid_{where}")
    ),
    r"block\.(\d+)\.lens_logits": lambda case, j: case.lens[int(j)],
    r"block\.(\d+)\.attn\.pattern": lambda case, j: case.activation(
        case.site(j, "attn.hook_pattern")
    ),
    r"block\.(\d+)\.attn\.(q|k)": lambda case, j, which: case.heads_first(
        case.site(j, f"attn.hook_rot_{which}")
    ),
    r"block\.(\d+)\.attn\.v": lambda case, j: case.heads_first(case.site(j, "attn.hook_v")),
    r"final_norm_out": lambda case: case.activation("ln_final.hook_out"),
    r"logits": lambda case: case.logits(),
    r"window_in": lambda case: case.activation("loops.0.hook_state_in"),
    r"loop\.(euler|naive)_k(\d+)\.window_out": window_out,
    r"loop\.(euler|naive)_k(\d+)\.logits": lambda case, rule, k: case.run(rule, k)[0],
    r"loop\.euler_k(\d+)\.x\.(\d+)": lambda case, k, i: case.run("euler", k)[1][
        f"loops.{i}.hook_state_in"
    ],
    r"loop\.euler_k(\d+)\.g\.(\d+)": lambda case, k, i: case.run("euler", k)[1][
        f"loops.{i}.hook_window_out"
    ],
    r"loop\.euler_k(\d+)\.readout_logits\.(\d+)": readout_after,
    r"loop\.rk_k(\d+)_beta([\d.]+)\.window_out": lambda case, k, beta: window_out(
        case, "blend", k, beta
    ),
    r"loop\.rk_k(\d+)_beta([\d.]+)\.logits": lambda case, k, beta: case.run("blend", k, beta)[0],
    r"loop\.layer_(euler|naive)_k(\d+)\.window_out": lambda case, rule, k: window_out(
        case, rule, k, mode="layer"
    ),
    r"loop\.layer_(euler|naive)_k(\d+)\.logits": lambda case, rule, k: case.run(
        rule, k, mode="layer"
    )[0],
    r"decode\.stash_(first|last)\.logits": decoded,
    r"decode\.base\.logits": lambda case: case.model(
        torch.cat([case.tokens, case.golden["decode.next_ids"]], 1), n_loops=ONE_PASS
    )[:, -1:],
}


@pytest.mark.parametrize("name", CASES)
def test_golden_outputs(name: str, record_error: Callable[[str, str, float], None]) -> None:
    with torch.no_grad():
        check_case(Looped(name), TABLE, record_error)


# The rules


def windowed(n_loops: int | None = None, gpt2: bool = False, **changes: Any) -> WindowLoops:
    """A model in float64 of odd sizes, whose head width is not d_model / n_heads; GPT-2 has one."""
    options: dict[str, Any] = {"n_loops": n_loops, "window": (2, 4), "rule": "euler", **changes}
    if options["rule"] != "blend":
        options["beta"] = None
    cfg = (
        TrainingFreeGPT2Config(**GPT2_SIZES, **options)
        if gpt2
        else TrainingFreeConfig(**SIZES, **options)
    )
    model = randomize_(build(cfg)).double().requires_grad_(False)
    assert isinstance(model, WindowLoops)
    return model


class Linear(nn.Module):
    """A layer that is a matrix."""

    sites = ("hook_resid_pre", "hook_resid_post")

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.matrix = (
            torch.randn(
                width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            / width**0.5
        )

    def forward(self, x: Tensor, rows: Rows, taps: Taps) -> Tensor:
        return tap(taps, "hook_resid_post", tap(taps, "hook_resid_pre", x) @ self.matrix)


def linear_window(mode: str, **options: Any) -> tuple[WindowLoops, list[Tensor]]:
    """A model whose three looped layers are matrices, and what is looped: their product, or each of
    them.
    """
    model = windowed(mode=mode, **options)
    layers = [Linear(SIZES["d_model"], layer) for layer in range(2, 5)]
    for layer, linear in enumerate(layers, start=2):
        model.blocks[layer] = linear
    matrices = [layer.matrix for layer in layers]
    return model, [matrices[0] @ matrices[1] @ matrices[2]] if mode == "block" else matrices


def through_window(model: WindowLoops, n_loops: int) -> tuple[Tensor, Tensor]:
    """The state before and after the looped passes."""
    start = model.advance(model.begin(random_tokens(model), n_loops=n_loops), "loops.0.blocks.2")
    return start.resid, model.advance(start, "coda.5").resid


@pytest.mark.parametrize("n_loops", [1, 2, 5])
@pytest.mark.parametrize("mode", ["block", "layer"])
def test_a_linear_window_has_the_closed_form(mode: str, n_loops: int) -> None:
    model, looped = linear_window(mode)
    before, after = through_window(model, n_loops)
    for g in looped:
        before = before @ torch.linalg.matrix_power(
            (1 - 1 / n_loops) * torch.eye(len(g), dtype=g.dtype) + g / n_loops, n_loops
        )
    assert_close(after, before)


@pytest.mark.parametrize("mode", ["block", "layer"])
def test_the_blend_is_the_tableau_with_more_weight_on_the_first_stage(mode: str) -> None:
    model, looped = linear_window(mode, rule="blend", beta=0.3)
    state, after = through_window(model, 3)
    for g in looped:
        x, stages = state, []
        for _ in range(3):
            stages.append(x @ g - x)
            x = state + sum(stages) / 3
        state = state + (0.3 + 0.7 / 3) * stages[0] + 0.7 / 3 * (stages[1] + stages[2])
    assert_close(after, state)


@pytest.mark.parametrize("mode", ["block", "layer"])
def test_the_naive_rule_is_the_matrix_power(mode: str) -> None:
    model, looped = linear_window(mode, rule="naive")
    before, after = through_window(model, 3)
    for g in looped:
        before = before @ torch.linalg.matrix_power(g, 3)
    assert_close(after, before)


def ordinary(model: WindowLoops, tokens: Tensor) -> Tensor:
    """The unlooped model, layer after layer."""
    state = model.begin(tokens, n_loops=1)
    resid, rows = state.resid, Rows.make(state, type(model).visible)
    for block in model.blocks:
        resid = block(resid, rows, {})
    return model.unembed(model.normalize(resid))


@pytest.mark.parametrize("gpt2", [False, True])
@pytest.mark.parametrize("window", [(2, 4), (0, 2), (0, 6)])
@pytest.mark.parametrize("mode", ["block", "layer"])
def test_one_pass_and_a_whole_share_are_the_ordinary_model(
    mode: str, window: tuple[int, int], gpt2: bool
) -> None:
    base = windowed(gpt2=gpt2, window=window)
    tokens = random_tokens(base)
    expected = ordinary(base, tokens)
    for rule in ("euler", "blend", "naive"):
        shares = {"beta": 0.3} if rule == "blend" else {}
        assert torch.equal(
            windowed(gpt2=gpt2, window=window, mode=mode, rule=rule, **shares)(tokens, n_loops=1),
            expected,
        ), rule
    whole = windowed(gpt2=gpt2, window=window, mode=mode, rule="blend", beta=1.0)
    assert torch.equal(whole(tokens, n_loops=3), expected)
    nothing = windowed(gpt2=gpt2, window=window, mode=mode, rule="blend", beta=0)
    euler = windowed(gpt2=gpt2, window=window, mode=mode)(tokens, n_loops=3)
    assert torch.equal(nothing(tokens, n_loops=3), euler)
    assert not is_close(euler, expected)


def test_a_window_of_one_layer_is_the_same_in_both_modes() -> None:
    block, layer = (
        windowed(window=(3, 3), rule="blend", beta=0.4),
        windowed(window=(3, 3), rule="blend", beta=0.4, mode="layer"),
    )
    tokens = random_tokens(block)
    assert torch.equal(block(tokens, n_loops=4), layer(tokens, n_loops=4))


@pytest.mark.parametrize(
    "more", [{}, {"qk_norm": True, "tied": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_a_fresh_model_runs(more: dict[str, Any]) -> None:
    model = build(TrainingFreeConfig(**SIZES, window=(2, 4), **more))
    logits = model(random_tokens(model), n_loops=2)
    assert logits.isfinite().all()
    assert not is_close(logits[0], logits[1])


# Names, states and what is declared


def test_layers_keep_their_numbers_and_each_pass_has_its_own_sites() -> None:
    before, after, passes = (
        ["prelude.0", "prelude.1"],
        ["coda.4", "coda.5", "coda.6"],
        [(0, 2), (0, 3), (1, 2), (1, 3)],
    )
    model = windowed(window=(2, 3))
    inside = [f"loops.{k}.blocks.{layer}" for k, layer in passes]
    assert [visit.name for visit in model.schedule(2)] == [*before, *inside, *after]
    edges = [
        name for name in model.hook_names(2) if name.startswith("loops") and "blocks" not in name
    ]
    assert edges == [
        f"loops.{k}.{site}"
        for k in range(2)
        for site in ("hook_state_in", "hook_window_out", "hook_state_out")
    ]
    layered = windowed(window=(2, 3), mode="layer")
    inside = [f"loops.{k}.blocks.{layer}" for layer, k in sorted((layer, k) for k, layer in passes)]
    assert [visit.name for visit in layered.schedule(2)] == [*before, *inside, *after]
    assert "loops.1.blocks.3.hook_window_out" in layered.hook_names(2)
    assert "loops.1.hook_window_out" not in layered.hook_names(2)


def test_the_state_carries_what_the_rule_needs_and_nothing_else() -> None:
    for rule, inside, between in (
        ("naive", set(), set()),
        ("euler", {"x_k"}, set()),
        ("blend", {"x_k", "g_0"}, {"g_0"}),
    ):
        model = windowed(rule=rule, **({"beta": 0.5} if rule == "blend" else {}))
        state = model.advance(model.begin(random_tokens(model), n_loops=3), "loops.0.blocks.2")
        assert set(state.parts) == set()
        state = model.advance(state, "loops.1.blocks.2")
        assert set(state.parts) == between
        state = model.advance(state, "loops.1.blocks.3")
        assert set(state.parts) == inside
        assert set(model.advance(state, "coda.5").parts) == set()


def test_the_lens_after_a_pass_goes_on_behind_the_window_of_the_same_call() -> None:
    for mode in ("block", "layer"):
        model = windowed(mode=mode, rule="blend", beta=0.25)
        tokens = random_tokens(model)
        lens = readout_lens(model, tokens, 3, readout=-1, keep_logits=True)
        assert lens.logits is not None
        assert_close(lens.logits[-1], model(tokens, n_loops=3)[:, -1])
        state = model.begin(tokens, n_loops=3)
        for loop, end in enumerate(model.iteration_ends(3)):
            state = model.advance(state, end)
            resid, rows = state.resid, Rows.make(state, type(model).visible)
            for block in model.blocks[5:]:
                resid = block(resid, rows, {})
            assert_close(lens.logits[loop], model.unembed(model.normalize(resid))[:, -1])


def test_declared_facts_follow_the_rule() -> None:
    assert not windowed().additive_residual
    assert windowed(rule="naive").additive_residual
    assert not TrainingFree.prefix_readout
    assert TrainingFree.causal
    assert windowed().positional


# Configurations


@pytest.mark.parametrize(
    "window", [(4, 2), (-1, 2), (2, 7), (2,), (1, 2, 3), (1.0, 2), (True, 2), "12", None]
)
def test_a_window_is_two_layers_in_order(window: object) -> None:
    with pytest.raises(
        ValueError,
        match=(
            r"window must be the first and the last layer to loop, both included .* in 0\.\.6, got"
        ),
    ):
        checked_window(window, 7)
