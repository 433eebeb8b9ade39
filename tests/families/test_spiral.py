"""Spiral: its golden outputs, its pair of states, and the weights behind their spectral norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden_cases import GOLDEN, Compute, GoldenCase, check_case, row
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.checkpoints.tables.spiral import TABLE as RELEASE
from loopscope.interp.common.inputs import begin_batch
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.blocks.spiral_block import SpectralLinear
from loopscope.models.core.registry import build
from loopscope.models.families.spiral import MODULATION, Modulation, Spiral, SpiralConfig
from toy import assert_close, is_close

ODD = SpiralConfig(
    n_layers=3,
    n_loops=2,
    d_model=30,
    n_heads=3,
    d_mlp=17,
    d_vocab=23,
    n_ctx=11,
    d_factor=7,
    d_timestep=6,
    rope_theta=500.0,
    turn_theta=70.0,
    momentum=0.6,
    gate_cap=0.03,
    gate_leak=0.25,
)


def vector(case: GoldenCase, t: str, name: str) -> Tensor:
    """One of an iteration's modulation vectors, which is the same at every row."""
    rows = case.activation(f"loops.{t}.hook_{name}")
    assert torch.equal(rows, rows[:1, :1].expand_as(rows))
    return rows[0, 0]


def initial(case: GoldenCase, part: str) -> Tensor:
    state = case.model.begin(case.tokens)
    return {"h": state.resid, "v": state.parts["v"]}[part]


ITER, BLOCK = r"iter\.(\d+)\.", r"iter\.(\d+)\.block\.(\d+)\."
TABLE: dict[str, Compute] = {
    r"(input_ids)": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("hook_embed_factors"),
    r"injected_input": lambda case: case.activation("hook_embed"),
    r"injected_input_projected": lambda case: case.activation("loops.0.hook_input"),
    r"init_state\.(h|v)": initial,
    ITER + r"state_(in|out)\.(h|v)": lambda case, t, end, part: case.activation(
        f"loops.{t}.hook_state_{end}.{part}"
    ),
    ITER + r"mod\.(\w+)": vector,
    ITER + r"rotated_in": lambda case, t: case.activation(f"loops.{t}.hook_rotated"),
    ITER + r"readout_logits": lambda case, t: case.logits(int(t) + 1),
    ITER + r"halt_logit": lambda case, t: case.activation(f"loops.{t}.hook_halt_logit"),
    BLOCK + r"attn_raw": lambda case, t, j: case.activation(f"loops.{t}.blocks.{j}.attn.hook_out"),
    BLOCK + r"ffn_raw": lambda case, t, j: case.activation(f"loops.{t}.blocks.{j}.mlp.hook_out"),
    BLOCK + r"force": lambda case, t, j: case.activation(f"loops.{t}.blocks.{j}.hook_force"),
    BLOCK + r"attn\.pattern": lambda case, t, j: case.activation(
        f"loops.{t}.blocks.{j}.attn.hook_pattern"
    ),
    BLOCK + r"attn\.(q|k)": lambda case, t, j, which: case.heads_first(
        f"loops.{t}.blocks.{j}.attn.hook_rot_{which}"
    ),
    BLOCK + r"attn\.v": lambda case, t, j: case.heads_first(f"loops.{t}.blocks.{j}.attn.hook_v"),
    r"logits": lambda case: case.logits(),
}


def test_golden_outputs(record_error: Callable[[str, str, float], None]) -> None:
    case = GoldenCase("spiral")
    zeros = {
        key for key, value in case.golden.items() if value.is_floating_point() and not value.any()
    }
    assert zeros == {"init_state.h", "init_state.v", "iter.0.state_in.h", "iter.0.state_in.v"}
    for key in zeros:  # they have no magnitude that an error could be a share of
        assert torch.equal(row(case, TABLE, key), case.golden.pop(key)), key
    check_case(case, TABLE, record_error)


@pytest.fixture
def odd() -> Spiral:
    """Three parallel blocks of odd sizes with capped, leaking gates, in float64, with weights that
    make every part matter.
    """
    torch.manual_seed(11)
    model = build(ODD).double()
    assert isinstance(model, Spiral)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def batch_of(model: Spiral) -> Batch:
    tokens = torch.randint(0, model.cfg.d_vocab, (3, 7), generator=torch.Generator().manual_seed(2))
    return Batch(tokens, torch.ones_like(tokens), torch.full((3,), 6))


def turned_pairwise(
    x: Tensor, times: int, theta: float, kind: torch.dtype = torch.float64
) -> Tensor:
    """Each pair of channels as one complex number, turned on its own; cosines and sines in the
    given precision.
    """
    angles = (
        times
        * (1.0 / theta ** (torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / x.shape[-1]))
    ).to(kind)
    pairs = [torch.complex(x[..., 2 * i], x[..., 2 * i + 1]) for i in range(len(angles))]
    turned = [
        pair * torch.complex(angle.cos().double(), angle.sin().double())
        for pair, angle in zip(pairs, angles, strict=True)
    ]
    return torch.stack([part for pair in turned for part in (pair.real, pair.imag)], dim=-1)


def slow_force(
    model: Spiral, block: torch.nn.Module, x: Tensor, vectors: dict[str, Tensor]
) -> Tensor:
    """A block's force, head by head and query by query."""
    cfg, attn = model.cfg, block.attn
    seen = F.layer_norm(x, (cfg.d_model,)) * (1 + vectors["scale1"]) + vectors["shift1"]
    added = torch.zeros_like(x)
    for head in range(cfg.n_heads):
        q, k, v = (seen @ weight[head] for weight in (attn.W_Q, attn.W_K, attn.W_V))
        q, k = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        for pos in range(x.shape[1]):
            mine = turned_pairwise(q[:, pos], pos, 500.0, torch.float32)
            keys = torch.stack(
                [turned_pairwise(k[:, key], key, 500.0, torch.float32) for key in range(pos + 1)],
                dim=1,
            )
            weights = ((keys @ mine[:, :, None])[..., 0] / cfg.d_head**0.5).softmax(-1)
            added[:, pos] += (weights[..., None] * v[:, : pos + 1]).sum(1) @ attn.W_O[head]
    force = vectors["gate1"] * added
    seen = F.layer_norm(x + force, (cfg.d_model,)) * (1 + vectors["scale2"]) + vectors["shift2"]
    hidden = F.gelu(seen @ block.mlp.W_in + block.mlp.b_in)
    return force + vectors["gate2"] * (hidden @ block.mlp.W_out + block.mlp.b_out)


@pytest.mark.shapes
def test_equals_a_slow_computation_of_parallel_blocks_with_capped_gates(odd: Spiral) -> None:
    batch, cfg = batch_of(odd), odd.cfg
    e = odd.inject(F.embedding(batch.tokens, odd.embedding) @ odd.embed_in.weight.T)
    h, v = torch.zeros_like(e), torch.zeros_like(e)
    for t in range(2):
        angles = t * torch.exp(-math.log(10000.0) * torch.arange(3, dtype=torch.float32) / 3)
        hidden = F.silu(odd.modulation.into(torch.cat([angles.sin(), angles.cos()]).double()))
        vectors = dict(zip(MODULATION, odd.modulation.out(hidden).split(cfg.d_model), strict=True))
        for name in ("gate1", "gate2"):
            capped = 0.03 * (vectors[name] / 0.03).tanh()
            vectors[name] = 0.75 * capped + 0.25 * vectors[name]
        x = turned_pairwise(h + e, t, 70.0)
        v = 0.6 * v + 0.4 * torch.stack(
            [slow_force(odd, block, x, vectors) for block in odd.blocks]
        ).sum(0)
        h = turned_pairwise(x + v, -t, 70.0)
    normed = F.layer_norm(h, (cfg.d_model,), odd.final_norm.w, odd.final_norm.b)
    with torch.no_grad():
        assert_close(odd(batch.tokens), normed @ odd.W_U)


def test_order_of_the_parallel_blocks_does_not_matter(odd: Spiral) -> None:
    batch = batch_of(odd)
    with torch.no_grad():
        logits = odd(batch.tokens)
        odd.blocks = torch.nn.ModuleList([odd.blocks[2], odd.blocks[0], odd.blocks[1]])
        odd._schedules.made.clear()
        assert_close(odd(batch.tokens), logits)
        odd.blocks = odd.blocks[:2]
        odd._schedules.made.clear()
        assert not is_close(odd(batch.tokens), logits)


@torch.no_grad()
def test_an_iteration_can_be_undone(odd: Spiral) -> None:
    batch = batch_of(odd)
    cache = odd.run_with_cache(batch.tokens, names_filter="**")[1]
    h, v = cache["loops.1.hook_state_out.h"], cache["loops.1.hook_state_out.v"]
    x = odd.turned(h, 1) - v
    assert_close(x, cache["loops.1.hook_rotated"])
    force = cache.stack("hook_force")[1].sum(0)
    assert_close((v - 0.4 * force) / 0.6, cache["loops.1.hook_state_in.v"])
    assert_close(odd.turned(x, -1) - cache["loops.1.hook_input"], cache["loops.1.hook_state_in.h"])


@torch.no_grad()
def test_resuming_between_parallel_blocks_equals_the_full_run(odd: Spiral) -> None:
    batch = batch_of(odd)
    logits, state = odd(batch.tokens), begin_batch(odd, batch, None)
    for visit in odd.schedule():
        state = odd.advance(state, visit.index)
        back = [state.rows(slice(i, i + 1)) for i in range(3)]
        assert_close(torch.cat([odd.readout(odd.advance(row)) for row in back]), logits)


@torch.no_grad()
def test_lens_of_every_iteration_is_the_shorter_run() -> None:
    case = GoldenCase("spiral")
    lens = readout_lens(case.model, case.tokens, readout=-1, keep_logits=True)
    assert lens.logits is not None
    for t in range(case.n_loops):
        torch.testing.assert_close(lens.logits[t], case.logits(t + 1)[:, -1])


def test_gates_are_capped_only_where_the_cap_is_above_zero() -> None:
    gate = torch.tensor([-0.5, -0.01, 0.0, 0.02, 3.0], dtype=torch.float64)
    assert torch.equal(Modulation(ODD_WITHOUT_CAP).capped(gate), gate)
    capped = Modulation(ODD).capped(gate)
    assert_close(capped, 0.75 * 0.03 * (gate / 0.03).tanh() + 0.25 * gate)
    assert (capped.abs() <= gate.abs()).all()


ODD_WITHOUT_CAP = SpiralConfig(
    n_layers=1,
    d_model=30,
    n_heads=3,
    d_mlp=17,
    d_vocab=23,
    d_factor=7,
    d_timestep=6,
    gate_cap=0,
    gate_leak=0.25,
)


def test_fresh_matrices_have_spectral_norm_one() -> None:
    torch.manual_seed(0)
    linears = [module for module in build(ODD).modules() if isinstance(module, SpectralLinear)]
    assert len(linears) == 1 + 4 * ODD.n_layers
    for linear in linears:
        norm = torch.linalg.matrix_norm(linear.weight, ord=2)
        assert 0.999 < norm < 1.2
        assert torch.linalg.matrix_norm(linear.original, ord=2) < 0.5


def test_stored_vectors_are_used_as_they_are_and_kept() -> None:
    model = load(GOLDEN / "spiral")
    assert isinstance(model, Spiral)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        logits = model(tokens)
        assert torch.equal(model.train()(tokens), logits)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        model.inject.u.mul_(2.0)
        assert not torch.allclose(model(tokens), logits)


@pytest.mark.shapes
def test_weight_views_are_the_matrices_that_are_applied(odd: Spiral) -> None:
    attn, x = odd.blocks[1].attn, torch.randn(2, 3, 30, dtype=torch.float64)
    q, _, v = attn.projected(x)
    assert_close(torch.einsum("bpd,hde->bphe", x, attn.W_Q), q)
    assert_close(torch.einsum("bpd,hde->bphe", x, attn.W_V), v)
    assert_close(torch.einsum("bphe,hed->bpd", v, attn.W_O), attn.o(v.flatten(-2)))
    assert_close(odd.unembed(x), x @ odd.W_U)
    assert_close(odd.embed_in(odd.embedding), odd.W_E)


def test_several_blocks_and_a_gate_cap_are_read(folder_with: Callable[..., Path]) -> None:
    folder = folder_with(
        "spiral",
        {
            "n_shared_blocks": 3,
            "gate_cap": 0.5,
            "gate_leak": 0.125,
            "qk_norm": False,
            "timestep_dim": 6,
        },
    )
    case = load(GOLDEN / "spiral")
    assert isinstance(case, Spiral)
    cfg = replace(case.cfg, n_layers=3, gate_cap=0.5, gate_leak=0.125, qk_norm=False, d_timestep=6)
    model = build(cfg)
    state, tokens = model.state_dict(), torch.tensor([[5, 1, 40]])
    save_file(
        {key: state[name] for key, name in RELEASE.names(cfg).items()}, folder / "model.safetensors"
    )
    again = load(folder)
    assert again.cfg == cfg
    assert_close(again.double()(tokens), model.double()(tokens))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("work_mem", True, "work_mem must be False, got True"),
        ("latent_points", 4, "latent_points must be 0, got 4"),
        ("pk_mem", True, "pk_mem must be False, got True"),
        ("twin", True, "twin must be False, got True"),
        ("vision_dim", 16, "vision_dim must be 0, got 16"),
        ("attn_sink", True, "attn_sink must be False, got True"),
        ("reversible", "none", "reversible must be 'momentum', got 'none'"),
        ("stability", "none", "stability must be 'spectral', got 'none'"),
        ("rope_scaling", 2.0, r"rope_scaling must be 1\.0, got 2\.0"),
        ("noise_init_std", 0.1, r"noise_init_std must be 0\.0, got 0\.1"),
        ("implementation_version", 3, "implementation_version must be 2, got 3"),
        ("momentum_zeta", 1.5, r"momentum must be at most 1, got 1\.5"),
        ("d_model", 21, "d_model must be even"),
        ("mean_iters", "4", "mean_iters must be a whole number, got '4'"),
        ("activation", "tanh", "activation must be 'gelu' or 'silu' or 'relu', got 'tanh'"),
        ("swirl", 2.0, "has the field 'swirl' .* which this family's loader does not know"),
        ("n_shared_blocks", 2, r"lacks 14 key\(s\) .* first 'blocks\.1\.attn\.qkv"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    field: str, value: object, message: str, folder_with: Callable[..., object]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with("spiral", {field: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_timestep": 5}, "d_timestep must be even"),
        ({"d_factor": 0}, "d_factor must be at least 1, got 0"),
        ({"n_heads": 2}, "d_head must be even, .* got 15"),
        ({"gate_cap": -1.0}, r"gate_cap must be at least 0, got -1\.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpiralConfig.from_dict({**ODD.to_dict(), **changes})


@pytest.mark.parametrize("act", ["silu", "relu"])
def test_the_other_activations_are_those_of_the_reference(
    act: str, folder_with: Callable[..., Path]
) -> None:
    case = GoldenCase("spiral")
    model = load(folder_with("spiral", {"activation": act}))
    expected = load_file(GOLDEN / "spiral" / "activations.safetensors")[act]
    with torch.no_grad():
        ours = model(case.tokens, n_loops=4)
    assert model.cfg.act_fn == act
    assert float((ours - expected).abs().max()) <= 5e-5 * float(expected.abs().max())
    assert float((case.logits(4) - expected).abs().max()) > 0.1
