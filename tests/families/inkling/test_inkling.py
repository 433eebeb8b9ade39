"""Inkling-2-Mini: its golden outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import Compute, GoldenCase, check_case
from loopscope.interp.generation import generate
from loopscope.models.core.state import State
from loopscope.models.families.inkling.block import InklingBlock

NAME = "inkling2_loop"
PRELUDE, LAYERS, CODA = 2, 4, 3


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    return GoldenCase(NAME)


def visit_of(stage: str, t: str | None, j: str) -> str:
    return f"{stage}.{j}" if t is None else f"loops.{t}.blocks.{j}"


def block_of(case: GoldenCase, visit: str) -> InklingBlock:
    return next(v.block for v in case.model.schedule(case.n_loops) if v.name == visit)


def after_pass(case: GoldenCase, t: str) -> State:
    """The state after a pass, without hooks."""
    model = case.model
    state = model.begin(case.tokens, n_loops=case.n_loops)
    return model.advance(state, model.iteration_ends(case.n_loops)[int(t)])


@torch.no_grad()
def blocks_out(case: GoldenCase, t: str) -> Tensor:
    return after_pass(case, t).parts["blocks"]


@torch.no_grad()
def blocks_before_loop(case: GoldenCase) -> Tensor:
    state = case.model.begin(case.tokens, n_loops=case.n_loops)
    return case.model.advance(state, "loops.0").parts["blocks"]


@torch.no_grad()
def readout(case: GoldenCase, t: str) -> Tensor:
    return case.model.readout(after_pass(case, t))


@torch.no_grad()
def direct_lens(case: GoldenCase, t: str) -> Tensor:
    mixed = case.activation(f"loops.{t}.blocks.{LAYERS - 1}.hook_mixed_post")
    return case.model.unembed(case.model.normalize(mixed))


def experts(case: GoldenCase, stage: str, t: str | None, j: str, what: str) -> Tensor:
    """Chosen experts by index, or their weights in that order."""
    weights = case.activation(f"{visit_of(stage, t, j)}.mlp.hook_expert_weights")
    chosen = weights.nonzero()[:, -1].view(*weights.shape[:2], -1)
    return chosen if what == "experts" else weights.gather(-1, chosen)


def position_bias(case: GoldenCase, t: str, j: str) -> Tensor:
    """The bias of each score, zero where it is not defined or out of the window."""
    visit = visit_of("loops", t, j)
    places = torch.arange(case.tokens.shape[1])
    distance = (places[:, None] - places)[None].expand(len(case.tokens), -1, -1)
    attn: Any = block_of(case, visit).attn
    found = attn.bias(case.activation(f"{visit}.attn.hook_rel"))(distance)
    return found.masked_fill((distance < 0)[:, None], 0).nan_to_num(neginf=0.0)


def mixed_input(case: GoldenCase, t: str, j: str, which: str) -> Tensor:
    return case.activation(f"loops.{t}.blocks.{j}.{which}_mix.hook_out")


def normed_input(case: GoldenCase, t: str, j: str, which: str) -> Tensor:
    name = f"loops.{t}.blocks.{j}.ln1"
    return case.activation(
        f"{name}_{which}.hook_out"
        if f"{name}_{which}.hook_out" in case.cache
        else f"{name}.hook_out"
    )


@torch.no_grad()
def padded_logits(case: GoldenCase, side: str) -> Tensor:
    """Each row's logits at real positions, from the row alone; the stored ones elsewhere."""
    mask = case.golden[f"variant.{side}_pad.attention_mask"].bool()
    found = case.golden[f"variant.{side}_pad.logits"].clone()
    for row, real in enumerate(mask):
        found[row, real] = case.model(case.tokens[row : row + 1, real])[0]
    return found


@torch.no_grad()
def right_padded_logits(case: GoldenCase) -> Tensor:
    mask = case.golden["variant.right_pad.attention_mask"]
    logits = case.logits(mask=mask)
    return torch.where(mask[..., None] == 1, logits, case.golden["variant.right_pad.logits"])


@torch.no_grad()
def later_positions(case: GoldenCase) -> Tensor:
    state = case.model.begin(case.tokens, n_loops=case.n_loops)
    later = State(0, state.n_loops, state.resid, state.positions + 5, state.mask, state.parts)
    return case.model.readout(case.model.advance(later))


@torch.no_grad()
def stepwise(case: GoldenCase) -> Tensor:
    """Three positions in one chunk, then one at a time."""
    model, store, found = case.model, {}, []
    for first, last in [(0, 3), *((i, i + 1) for i in range(3, case.tokens.shape[1]))]:
        state = model.begin(case.tokens[:, :last], n_loops=case.n_loops).rows(
            pos=slice(first, None)
        )
        end, new = model.extend(state, store)
        store = {k: store[k].followed_by(v) if k in store else v for k, v in new.items()}
        found.append(model.readout(end))
    return torch.cat(found, dim=1)


def generated(case: GoldenCase, cached: str, what: str) -> Tensor:
    record = generate(case.model, case.tokens, 4, use_cache=cached == "cache")
    return record.tokens if what == "tokens" else record.logits


BLOCK = r"iter\.(\d+)\.block\.(\d+)\."
IN_BLOCK = {
    r"attn_out": "attn.hook_out",
    r"attn_add": "hook_attn_out",
    r"mlp_mix": "mlp_mix.hook_out",
    r"mlp_in": "ln2.hook_out",
    r"mlp_out": "mlp.hook_out",
    r"mlp_add": "hook_mlp_out",
    r"router\.scores": "mlp.hook_router_scores",
}
EDGES = r"(prelude|iter|coda)(?:\.(\d+))?\.block\.(\d+)\."


def at_visit(site: str) -> Compute:
    return lambda case, stage, t, j, *more: case.activation(
        f"{visit_of(stage, t, j)}.{site.format(*more)}"
    )


def in_loop(site: str, heads: bool = False) -> Compute:
    def compute(case: GoldenCase, t: str, j: str, *more: str) -> Tensor:
        name = f"loops.{t}.blocks.{j}.{site.format(*more)}"
        return case.heads_first(name) if heads else case.activation(name)

    return compute


TABLE: dict[str, Compute] = {
    r"(input_ids|variant\.\w+_pad\.(?:attention_mask|position_ids))": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("ln_embed.hook_out"),
    EDGES + r"resid_(mid|post)": at_visit("hook_resid_{}"),
    EDGES + r"router\.(experts|weights)": experts,
    EDGES + r"attn\.pattern": at_visit("attn.hook_pattern"),
    r"prelude_out": lambda case: case.activation(f"prelude.{PRELUDE - 1}.hook_resid_post"),
    r"prelude_block_states": blocks_before_loop,
    r"iter\.(\d+)\.state_(in|out)": lambda case, t, end: case.activation(
        f"loops.{t}.hook_state_{end}"
    ),
    r"iter\.(\d+)\.block_states_out": blocks_out,
    r"iter\.(\d+)\.message_sources": lambda case, t: case.activation(f"loops.{t}.hook_sources"),
    r"iter\.(\d+)\.readout_logits": readout,
    r"iter\.(\d+)\.direct_lens_logits": direct_lens,
    **{BLOCK + key: in_loop(site) for key, site in IN_BLOCK.items()},
    BLOCK + r"attn_mix\.(\w+)": mixed_input,
    BLOCK + r"attn_in\.([qkv])": normed_input,
    BLOCK + r"gated\.(\w+)": in_loop("{}_gate.hook_out"),
    BLOCK + r"message\.(\w+)": in_loop("{}_message.hook_out"),
    BLOCK + r"attn\.([qk])": in_loop("attn.hook_rot_{}", heads=True),
    BLOCK + r"attn\.v": in_loop("attn.hook_v", heads=True),
    BLOCK + r"attn\.position_bias": position_bias,
    BLOCK + r"attn\.sink": in_loop("attn.hook_sink", heads=True),
    r"final_mix": lambda case: case.activation("final_mix.hook_out"),
    r"final_norm_out": lambda case: case.activation("ln_final.hook_out"),
    r"logits": GoldenCase.logits,
    r"variant\.passes_(\d+)\.logits": lambda case, n: case.logits(int(n)),
    r"variant\.right_pad\.logits": right_padded_logits,
    r"variant\.(left)_pad\.logits": padded_logits,
    r"variant\.positions_plus_5\.logits": later_positions,
    r"variant\.labels\.loss": lambda case: F.cross_entropy(
        case.logits()[:, :-1].flatten(0, 1), case.tokens[:, 1:].flatten()
    )[None],
    r"variant\.generate_(cache|no_cache)\.(tokens|logits)": generated,
    r"variant\.stepwise\.logits": stepwise,
}


def test_golden(case: GoldenCase, record_error: Callable[[str, str, float], None]) -> None:
    check_case(case, TABLE, record_error)
