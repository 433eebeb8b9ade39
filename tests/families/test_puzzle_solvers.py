"""TRM and HRM: their golden outputs, in evaluation and in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from golden_cases import FLOAT32, Compute, GoldenCase, check_case
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.checkpoints.tables import TABLES
from loopscope.models.core.cache import LoopCache
from loopscope.models.core.registry import build
from loopscope.models.families.puzzle_solvers.config import PuzzleConfig
from loopscope.models.families.puzzle_solvers.hrm import HrmConfig
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver
from loopscope.models.families.puzzle_solvers.trm import TrmConfig
from loopscope.training.puzzles.supervision import (
    Carry,
    Draws,
    Examples,
    Supervised,
    supervise,
    with_prefix,
)
from toy import assert_close, randomize_

STEPS = 3


class PuzzleCase(GoldenCase):
    """A case whose runs are of supervision steps on cells behind a prefix."""

    model: PuzzleSolver

    def __init__(self, name: str) -> None:
        super().__init__(
            name, n_loops=STEPS, tokens="inputs", begin={"puzzle": "puzzle_identifiers"}
        )
        self.tokens = with_prefix(self.model, self.tokens)
        self.prefix = self.model.cfg.n_prefix

    @torch.no_grad()
    def run(
        self,
        n_loops: int = STEPS,
        model: PuzzleSolver | None = None,
        hooks: Any = (),
        **changes: Any,
    ) -> tuple[Tensor, LoopCache]:
        """Logits and every hook's value of a run of another length, model or input."""
        model = model or self.model
        given = {"tokens": self.tokens, **self.begin, **changes}
        tokens = given.pop("tokens")
        with model.hooks(hooks, n_loops=n_loops):
            return model.run_with_cache(tokens, n_loops=n_loops, names_filter="**", **given)

    def outputs(self, s: str, what: str, run: tuple[Tensor, LoopCache] | None = None) -> Tensor:
        """One output of a step: "logits" of the cells, a halting logit, or a state."""
        values = self.cache if run is None else run[1]
        end = f"loops.{s}.cycles.{self.model.cfg.n_cycles - 1}"
        if what == "logits":
            high = values[f"loops.{s}.cycles.{cycles_of(values, s) - 1}.high.hook_state_out"]
            return self.model.unembed(high)[:, self.prefix :].detach()
        if what.startswith("q_"):
            return values[
                f"loops.{s}.hook_{what.removeprefix('q_').removesuffix('_logits')}_logit"
            ][:, 0]
        if what == "z_H_out":
            return values[f"{end}.high.hook_state_out"]
        return values[f"{end}.low.{self.model.cfg.n_low_loops - 1}.hook_state_out"]

    def variant(self, **changes: Any) -> PuzzleSolver:
        """A model of the same weights with another config; weights that it lacks are left out."""
        model = build(replace(self.model.cfg, **changes))
        own = model.state_dict()
        model.load_state_dict({k: v for k, v in self.model.state_dict().items() if k in own})
        assert isinstance(model, PuzzleSolver)
        return model.eval()


def cycles_of(values: LoopCache, s: str) -> int:
    return len(
        [n for n in values if n.startswith(f"loops.{s}.") and n.endswith("high.hook_state_out")]
    )


def halting_after(case: PuzzleCase, s: str, h: str) -> Tensor:
    high = case.activation(f"loops.{s}.cycles.{h}.high.hook_state_out")
    return case.model.halt(high[:, 0]).detach()


def stopped(case: PuzzleCase, s: str, h: str) -> Tensor:
    """The family's own readout of a run that stops after a cycle."""
    with torch.no_grad():
        state = case.model.begin(case.tokens, n_loops=STEPS, **case.begin)
        visits = case.model.schedule(STEPS)
        end = max(v.index for v in visits if v.name.startswith(f"loops.{s}.cycles.{h}."))
        return case.model.readout(case.model.advance(state, end + 1))[:, case.prefix :]


def lens(case: PuzzleCase, run: str) -> Tensor:
    state = case.activation(f"{run}.hook_state_out")
    return case.model.unembed(case.model.normalize(state))[:, case.prefix :].detach()


def zeroed(position: int) -> Callable[..., Tensor]:
    def hook(value: Tensor, hook: object) -> Tensor:
        value[:, position] = 0
        return value

    return hook


@cache
def variant_run(case: PuzzleCase, name: str) -> tuple[Tensor, LoopCache]:
    if name.startswith("cycles_"):
        high, low = (int(part[1:]) for part in name.removeprefix("cycles_").split("_"))
        return case.run(2, case.variant(n_cycles=high, n_low_loops=low))
    hooks = {
        "patch_low_state": ("loops.0.cycles.0.low.1.hook_state_out", zeroed(case.prefix + 1)),
        "patch_high_block": (
            f"loops.0.cycles.{case.model.cfg.n_cycles - 1}.high.blocks.0.hook_resid_post",
            zeroed(0),
        ),
    }
    return case.run(2, hooks=[hooks[name]])


def without_puzzle(case: PuzzleCase, s: str, what: str) -> Tensor:
    model = case.variant(n_prefix=0, d_puzzle=0, n_puzzles=0, n_ctx=None)
    logits, values = case.run(2, model, tokens=case.stored("inputs"))
    if what == "logits":
        return model.unembed(
            values[f"loops.{s}.cycles.{model.cfg.n_cycles - 1}.high.hook_state_out"]
        ).detach()
    return case.outputs(s, what, (logits, values))


@cache
def restarted(case: PuzzleCase) -> tuple[Tensor, LoopCache]:
    """Row 1 begins anew with another puzzle after step 0; the others go on."""
    cells, puzzle = case.stored("inputs").clone(), case.stored("puzzle_identifiers").clone()
    cells[1], puzzle[1] = case.stored("other_inputs")[1], case.stored("other_puzzle_identifiers")[1]
    states = {"high": case.outputs("0", "z_H_out"), "low": case.outputs("0", "z_L_out")}
    for name, state in states.items():
        state = states[name] = state.clone()
        state[1] = getattr(case.model, f"{name}_init")
    return case.run(2, tokens=with_prefix(case.model, cells), puzzle=puzzle, **states)


RUN = r"step\.(\d+)\.cycle\.(\d+)\.(low\.\d+|high)"
BLOCK = RUN + r"\.block\.(\d+)"
NAMES = {
    "state_in": "hook_state_in",
    "injected": "hook_input",
    "state_out": "hook_state_out",
}
SITES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "mixer_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "attn.pattern": "attn.hook_pattern",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.q_rot": "attn.hook_rot_q",
    "attn.k_rot": "attn.hook_rot_k",
}
OUT = r"(logits|q_halt_logits|q_continue_logits|z_H_out|z_L_out)"
VARIANT = r"variant\.(cycles_H\d_L\d|patch_\w+)\.step\.(\d+)\." + OUT


@cache
def double(case: PuzzleCase) -> tuple[Tensor, LoopCache]:
    return case.run(model=case.variant().double())


def double_outputs(case: PuzzleCase, s: str, what: str) -> Tensor:
    high = double(case)[1][f"loops.{s}.cycles.{case.model.cfg.n_cycles - 1}.high.hook_state_out"]
    model = case.variant().double()
    return (
        model.halt(high[:, 0]) if what == "q_logits" else model.unembed(high)[:, case.prefix :]
    ).detach()


def angles(case: PuzzleCase, which: str) -> Tensor:
    rotary = case.model.rotary
    assert rotary is not None
    positions = torch.arange(case.tokens.shape[1])[None]
    one = torch.ones(1, len(positions[0]), 1, rotary.d_head)
    half = one.clone()
    half[..., rotary.d_head // 2 :] = 0
    turned = rotary(half, positions)[0, :, 0]
    cos, sin = turned.chunk(2, dim=-1)
    return torch.cat([cos, cos] if which == "cos" else [sin, sin], dim=-1)


# Training


@cache
def trained(case: PuzzleCase) -> list[tuple[Carry, Supervised, dict[str, Tensor]]]:
    """Each step of the training run: the rows after it, its loss, and its gradients."""
    model = case.variant().train()
    assert model.puzzles is not None
    own = torch.arange(len(case.tokens)) * len(model.puzzles)  # a copy of the table for each row
    model.puzzles = torch.nn.Parameter(model.puzzles.detach().repeat(len(own), 1))
    stored = {k: v for k, v in case.golden.items() if k.startswith("variant.train.")}
    carry, found = Carry.empty(model, len(case.tokens), case.stored("inputs").shape[1]), []
    for s in range(4):
        at = f"variant.train.step.{s}."
        cells, labels, puzzle = (
            stored[f"{at}fresh.{x}"] for x in ("inputs", "labels", "puzzle_identifiers")
        )
        fresh = Examples(cells, labels, puzzle + own)
        draws = Draws(stored[f"{at}draw.u"], stored[f"{at}draw.min_steps"])
        model.zero_grad()
        carry, done = supervise(model, carry, fresh, draws, max_steps=4, exploration=0.5)
        done.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((carry, done, grads))
    return found


def training_output(case: PuzzleCase, s: str, what: str) -> Tensor:
    carry, done, _ = trained(case)[int(s)]
    values = {
        "logits": done.logits.detach(),
        "q_halt_logits": done.halting[:, 0].detach(),
        "q_continue_logits": done.halting[:, 1].detach(),
        "target_q_continue": done.target,
        "loss": done.loss.detach()[None],
        "halted": carry.halted.long(),
        "steps": carry.steps,
        "used.inputs": carry.cells,
        "used.labels": carry.labels,
        "used.puzzle_identifiers": carry.puzzle % case.model.cfg.n_puzzles,
    }
    value = values[what]
    assert value is not None
    return value


def metric(case: PuzzleCase, s: str, name: str) -> Tensor:
    """The sums that the reference reports, most of them over halted rows with labels."""
    carry, done, _ = trained(case)[int(s)]
    asked = carry.labels != -100
    counted = carry.halted & asked.any(1)
    cells = ((done.logits.argmax(-1) == carry.labels) & asked).sum(1) / asked.sum(1).clamp(min=1)
    values = {
        "count": counted.sum(),
        "accuracy": cells[counted].sum(),
        "exact_accuracy": done.right[counted].sum(),
        "q_halt_accuracy": ((done.halting[:, 0] >= 0) == done.right)[counted].sum(),
        "steps": carry.steps[counted].sum(),
        "lm_loss": done.cell,
        "q_halt_loss": done.halt,
        "q_continue_loss": done.go_on,
    }
    return values[name].detach().double()[None]


def gradient(case: PuzzleCase, s: str, key: str) -> Tensor:
    carry, _, grads = trained(case)[int(s)]
    if key == "puzzle_emb.local_weights":  # one row of the table for each row of the batch
        return grads["puzzles"][carry.puzzle]
    own = "blocks" if case.name == "trm" else "low"
    names = {
        "inner.L_level.layers.0.self_attn.o_proj.weight": f"{own}.0.attn.o.weight",
        "inner.H_level.layers.0.self_attn.o_proj.weight": "high.0.attn.o.weight",
        "inner.embed_tokens.embedding_weight": "embedding",
        "inner.lm_head.weight": "head",
        "inner.q_head.weight": "halt.weight",
        "inner.q_head.bias": "halt.bias",
    }
    return grads[names[key]]


TABLE: Mapping[str, Compute] = {
    r"((other_)?(inputs|puzzle_identifiers)|variant\.train\.step\.\d\.(draw|fresh)\..+)": (
        lambda case, key, *_: case.stored(key)
    ),
    r"embed": lambda case: case.activation("hook_embed"),
    r"rope\.(cos|sin)": angles,
    r"f64\.step\.(\d)\.(logits|q_logits)": double_outputs,
    r"step\.(\d)\.carry\.halted": lambda case, s: torch.full((3,), int(int(s) + 1 >= 4)),
    r"step\.(\d)\.carry\.steps": lambda case, s: torch.full((3,), int(s) + 1),
    RUN + r"\.(state_in|injected|state_out)": lambda case, s, h, run, what: case.activation(
        f"loops.{s}.cycles.{h}.{run}.{NAMES[what]}"
    ),
    RUN + r"\.readout_q": lambda case, s, h, run: halting_after(case, s, h),
    RUN + r"\.readout_logits": lambda case, s, h, run: stopped(case, s, h),
    RUN + r"\.lens_logits": lambda case, s, h, run: lens(case, f"loops.{s}.cycles.{h}.{run}"),
    BLOCK + rf"\.({'|'.join(map(str, SITES))})": lambda case, s, h, run, i, what: case.activation(
        f"loops.{s}.cycles.{h}.{run}.blocks.{i}.{SITES[what]}"
    ),
    r"step\.(\d)\." + OUT: lambda case, s, what: case.outputs(s, what),
    VARIANT: lambda case, name, s, what: case.outputs(s, what, variant_run(case, name)),
    r"variant\.no_puzzle_embedding\.step\.(\d)\." + OUT: without_puzzle,
    r"variant\.restart_row_1\.step\.(\d)\." + OUT: lambda case, s, what: case.outputs(
        str(int(s) - 1), what, restarted(case)
    ),
    r"variant\.restart_row_1\.step\.(\d)\.carry\.steps": lambda case, s: torch.tensor(
        [int(s) + 1, int(s), int(s) + 1]
    ),
    r"variant\.restart_row_1\.step\.1\.used\.(inputs|puzzle_identifiers)": (
        lambda case, what: torch.stack(
            [case.stored(f"{'other_' if i == 1 else ''}{what}")[i] for i in range(3)]
        )
    ),
    r"variant\.train\.step\.(\d)\.metric\.(\w+)": metric,
    r"variant\.train\.step\.(\d)\.grad\.(.+)": gradient,
    r"variant\.train\.step\.(\d)\.([\w.]+)": training_output,
}


def gradient_bounds(case: PuzzleCase) -> dict[str, float]:
    """Ten times the distance of the reference's own float32 from its float64, where that is more
    than the usual bound.
    """
    own = case.meta["float64_vs_float32_training"]["gradients_relative_norm"]
    return {f"variant.train.step.1.grad.{key}": max(FLOAT32, 10 * x) for key, x in own.items()}


@pytest.mark.parametrize("name", ["trm", "hrm"])
def test_golden_outputs(name: str, record_error: Callable[[str, str, float], None]) -> None:
    case = PuzzleCase(name)
    check_case(case, TABLE, record_error, gradient_bounds(case))


# Releases


def released(model: PuzzleSolver, folder: Path, **arch: Any) -> Path:
    """A run's folder as the public trainers write it: step_<N> beside all_config.yaml."""
    names = {name: key for key, name in names_of(model).items() if key.startswith("model.inner.")}
    tensors = {f"_orig_mod.{names[name]}": t for name, t in model.state_dict().items()}
    folder.mkdir()
    torch.save(tensors, folder / "step_26040")
    cfg = model.cfg
    known = {
        "name": "recursive_reasoning.trm@Model",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "H_cycles": cfg.n_cycles,
        "L_cycles": cfg.n_low_loops,
        "L_layers": cfg.n_layers,
        "H_layers": getattr(cfg, "n_high_layers", 0),
        "hidden_size": cfg.d_model,
        "num_heads": cfg.n_heads,
        "expansion": 4,
        "halt_max_steps": cfg.n_loops,
        "halt_exploration_prob": 0.1,
        "forward_dtype": "bfloat16",
        "puzzle_emb_ndim": cfg.d_puzzle,
        "pos_encodings": cfg.positions,
    }
    (folder / "all_config.yaml").write_text(yaml.safe_dump({"arch": {**known, **arch}, "lr": 1e-4}))
    return folder


def names_of(model: PuzzleSolver) -> Mapping[str, str]:
    table = next(table for table in TABLES if table.family == model.cfg.family)
    return table.names(model.cfg)


SIZES: dict[str, Any] = {
    "n_layers": 2,
    "n_loops": 3,
    "n_cycles": 2,
    "n_low_loops": 3,
    "d_model": 14,
    "n_heads": 3,
    "d_mlp": 256,
    "d_vocab": 11,
    "n_prefix": 2,
    "d_puzzle": 14,
    "n_puzzles": 4,
}
RELEASED: dict[str, tuple[PuzzleConfig, dict[str, Any]]] = {
    "hrm, learned positions": (
        HrmConfig(**SIZES | {"n_prefix": 1}, n_high_layers=1, positions="learned", n_ctx=8),
        {},
    ),
    "trm, an MLP along the positions": (
        TrmConfig(**SIZES, positions="none", d_pos_mlp=256, n_ctx=9),
        {"mlp_t": True, "puzzle_emb_len": 2, "no_ACT_continue": True},
    ),
    "trm, heads that do not divide the width": (
        TrmConfig(**SIZES | {"n_ctx": 9}),
        {"puzzle_emb_len": 2, "seq_len": 7, "vocab_size": 11, "num_puzzle_identifiers": 4},
    ),
}


@pytest.fixture(params=RELEASED)
def solver(request: pytest.FixtureRequest) -> tuple[PuzzleSolver, dict[str, Any]]:
    cfg, arch = RELEASED[request.param]
    model = randomize_(build(cfg))
    assert isinstance(model, PuzzleSolver)
    return model, arch


@pytest.mark.shapes
def test_a_public_run_loads_by_its_folder_and_by_its_file(
    solver: tuple[PuzzleSolver, dict[str, Any]], tmp_path: Path
) -> None:
    model, arch = solver
    folder = released(model, tmp_path / "run", **arch)
    tokens = torch.randint(0, 11, (3, model.cfg.n_ctx), generator=torch.Generator().manual_seed(3))
    puzzle = torch.tensor([3, 0, 2])
    for source in (folder, folder / "step_26040"):
        again = load(source)
        assert again.cfg == model.cfg
        assert_close(again(tokens, puzzle=puzzle), model(tokens, puzzle=puzzle))
    (folder / "step_26040").rename(folder / "checkpoint")
    assert load(folder).cfg == model.cfg


def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path: Path) -> None:
    cfg, arch = RELEASED["trm, an MLP along the positions"]
    model = randomize_(build(cfg))
    assert isinstance(model, PuzzleSolver)
    wrong = {
        r"seq_len promises 6 positions with the prefix, but the weights have 9": {"seq_len": 4},
        r"vocab_size is 12, but the weights have 11": {"vocab_size": 12},
        r"pos_encodings must be .*got 'alibi'": {"pos_encodings": "alibi"},
        r"has the field 'width' \(= 3\)": {"width": 3},
    }
    for i, (words, change) in enumerate(wrong.items()):
        with pytest.raises(CheckpointError, match=words):
            load(released(model, tmp_path / str(i), **arch, **change))
    folder = released(model, tmp_path / "bad", **arch)
    (folder / "all_config.yaml").write_text("arch: [1, 2]")
    with pytest.raises(CheckpointError, match="must have a section 'arch' of fields by name"):
        load(folder)
    (folder / "all_config.yaml").write_text("arch: !!python/object:os.system {}")
    with pytest.raises(CheckpointError, match="cannot be read as plain YAML"):
        load(folder)


# Calls


def test_an_mlp_along_the_positions_needs_them_all() -> None:
    model = build(RELEASED["trm, an MLP along the positions"][0])
    with pytest.raises(ValueError, match=r"all its 9 positions in order.*got 8 positions"):
        model(torch.ones(1, 8, dtype=torch.int64))
    mask = torch.ones(2, 9)
    mask[1, 7:] = 0
    with pytest.raises(ValueError, match="got 9 positions, 7 of them real"):
        model(torch.ones(2, 9, dtype=torch.int64), mask=mask)
    state = model.begin(torch.ones(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 6 positions"):
        model.advance(state.rows(pos=slice(3, None)))


def test_what_a_call_cannot_take_is_refused() -> None:
    model = build(RELEASED["hrm, learned positions"][0])
    tokens = torch.ones(2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"puzzle must be in 0..3, got 1..4"):
        model(tokens, puzzle=torch.tensor([4, 1]))
    with pytest.raises(
        ValueError, match=r"high must have the shape .* = \[2, 8, 14\], got \[2, 8\]"
    ):
        model(tokens, high=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="n_prefix \\* d_model must hold d_puzzle"):
        replace(model.cfg, d_puzzle=15)
    with pytest.raises(ValueError, match="n_ctx must be given where positions are learned"):
        replace(model.cfg, n_ctx=None)


def test_padding_is_a_cell_and_the_prefix_is_not_read() -> None:
    model = randomize_(build(RELEASED["hrm, learned positions"][0])).double()
    tokens = torch.tensor([[5, 3, 2, 7, 1, 4, 0, 0]])
    other = tokens.clone()
    other[0, 0] = 9
    assert_close(model(other), model(tokens))
    other = tokens.clone()
    other[0, -1] = 2
    assert not torch.allclose(model(other)[0, 1], model(tokens)[0, 1])


@pytest.mark.shapes
def test_the_states_of_a_call_begin_the_next_one() -> None:
    model = randomize_(build(RELEASED["trm, heads that do not divide the width"][0])).double()
    tokens = torch.arange(9)[None] % 11
    first = model.advance(model.begin(tokens, n_loops=1, puzzle=2))
    again = model(tokens, n_loops=2, puzzle=2, high=first.resid, low=first.parts["low"])
    assert_close(again, model(tokens, n_loops=3, puzzle=2))
    assert model.state_parts(first)["high"] is first.resid
