"""Parcae: its golden outputs, its injections, value embeddings and initial states, and its
releases.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.checkpoints.tables.parcae import TABLE as RELEASE
from loopscope.interp.dynamics.states import dynamics
from loopscope.models.blocks.parcae_block import ParcaeBlock
from loopscope.models.core.registry import build
from loopscope.models.families.parcae import Parcae, ParcaeConfig
from toy import assert_close, is_close

MISMATCHED = ParcaeConfig(
    n_layers=1,
    n_loops=2,
    n_prelude_layers=1,
    n_coda_layers=2,
    d_model=36,
    n_heads=6,
    n_key_value_heads=2,
    d_mlp=19,
    d_mlp_outside=23,
    d_vocab=29,
    n_ctx=9,
    rope_theta=300.0,
    rope_scaling={"rope_type": "linear", "factor": 3},
    value_tables=(1, 3),
    value_gates=(0, 3),
    logit_softcap=2.5,
)


def golden_model(case: GoldenCase) -> Parcae:
    assert isinstance(case.model, Parcae)
    return case.model


@torch.no_grad()
def drive(case: GoldenCase) -> Tensor:
    return golden_model(case).injection.drive(case.activation("prelude_norm.hook_out"))


@torch.no_grad()
def direct_lens(case: GoldenCase, t: str) -> Tensor:
    """Logits of a state without the coda."""
    model = golden_model(case)
    return model.unembed(model.normalize(model.C(case.activation(f"loops.{t}.hook_state_out"))))


def at_own_depth(case: GoldenCase) -> Tensor:
    """Every sequence after its own number of iterations, from one call for each."""
    depths = case.golden["variant.sampled_depth.steps"].tolist()
    return torch.stack([case.logits(depth)[row] for row, depth in enumerate(depths)])


def before_gradients(case: GoldenCase) -> Tensor:
    """The iterations of a sampled depth through which the release's training passes no gradient."""
    through = json.loads((GOLDEN / case.name / "config.json").read_text())["mean_backprop_depth"]
    return (case.golden["variant.sampled_depth.steps"] - through).clamp(min=0)


ITER, BLOCK = r"iter\.(\d+)\.", r"iter\.(\d+)\.block\.(\d+)\."
TABLE: dict[str, Compute] = {
    r"(input_ids|init_state|variant\.sampled_depth\.steps)": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("hook_embed"),
    r"(prelude|coda)\.block\.(\d+)\.resid_post": lambda case, stage, j: case.activation(
        f"{stage}.{j}.hook_resid_post"
    ),
    r"(prelude|coda)\.block\.(\d+)\.attn\.ve_gate_logit": lambda case, stage, j: case.activation(
        f"{stage}.{j}.attn.hook_value_gate_logit"
    ),
    r"injected_input": lambda case: case.activation("loops.1.hook_input"),
    r"inject\.decay": lambda case: golden_model(case).injection.decay.detach(),
    r"inject\.drive": drive,
    ITER + r"state_(in|out)": lambda case, t, end: case.activation(f"loops.{t}.hook_state_{end}"),
    ITER + r"inject_out": lambda case, t: case.activation(f"loops.{t}.hook_injected"),
    BLOCK + r"(attn|mlp)_out": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.hook_{part}_out"
    ),
    BLOCK + r"resid_(mid|post)": lambda case, t, j, where: case.activation(
        f"loops.{t}.blocks.{j}.hook_resid_{where}"
    ),
    BLOCK + r"attn\.ve_gate_logit": lambda case, t, j: case.activation(
        f"loops.{t}.blocks.{j}.attn.hook_value_gate_logit"
    ),
    BLOCK + r"attn\.pattern": lambda case, t, j: case.activation(
        f"loops.{t}.blocks.{j}.attn.hook_pattern"
    ),
    BLOCK + r"attn\.(q|k)": lambda case, t, j, which: case.heads_first(
        f"loops.{t}.blocks.{j}.attn.hook_rot_{which}"
    ),
    BLOCK + r"attn\.v": lambda case, t, j: case.heads_first(f"loops.{t}.blocks.{j}.attn.hook_v"),
    ITER + r"readout_logits": lambda case, t: case.logits(int(t) + 1),
    ITER + r"direct_lens_logits": direct_lens,
    r"after_C": lambda case: case.activation("core_map.hook_out"),
    r"final_norm_out": lambda case: case.activation("ln_final.hook_out"),
    r"logits": lambda case: case.logits(),
    r"variant\.init_zero\.logits": lambda case: case.logits(
        state=torch.zeros_like(case.golden["init_state"])
    ),
    r"variant\.sampled_depth\.no_grad_steps": before_gradients,
    r"variant\.sampled_depth\.logits": at_own_depth,
}


def the_case() -> GoldenCase:
    return GoldenCase("parcae", begin={"state": "init_state"})


def test_golden_outputs(record_error: Callable[[str, str, float], None]) -> None:
    check_case(the_case(), TABLE, record_error)


def test_value_embeddings_act_where_the_reference_says() -> None:
    case = the_case()
    cfg = golden_model(case).cfg
    places = {
        "prelude": 0,
        "core": cfg.n_prelude_layers,
        "coda": cfg.n_prelude_layers + cfg.n_layers,
    }
    for entry in case.meta["value_embedding_map"]:
        place = places[entry["stage"]] + entry["block"]
        assert entry["value_embeds"] == (place in cfg.value_tables), entry
        assert entry["gate"] == (place in cfg.value_gates), entry


def made(cfg: ParcaeConfig, std: float = 0.3) -> Parcae:
    """A model in float64 with weights that make every part matter."""
    torch.manual_seed(4)
    model = build(cfg).double()
    assert isinstance(model, Parcae)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def tokens_of(cfg: ParcaeConfig, seed: int = 3) -> Tensor:
    return torch.randint(0, cfg.d_vocab, (3, 7), generator=torch.Generator().manual_seed(seed))


def normed(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, position: int, cfg: ParcaeConfig) -> Tensor:
    """Each pair of neighbouring channels as one complex number, turned on its own."""
    angles = position * (
        1.0
        / cfg.rope_theta ** (torch.arange(0, cfg.d_head, 2, dtype=torch.float32) / cfg.d_head)
        / 3
    )
    pairs = [torch.complex(x[..., 2 * i], x[..., 2 * i + 1]) for i in range(len(angles))]
    out = [
        pair * torch.complex(angle.cos().double(), angle.sin().double())
        for pair, angle in zip(pairs, angles, strict=True)
    ]
    return torch.stack([part for pair in out for part in (pair.real, pair.imag)], dim=-1)


def slow_block(block: ParcaeBlock, x: Tensor, cfg: ParcaeConfig, embedded: Tensor | None) -> Tensor:
    """A block head by head and query by query; `embedded` is "batch pos width" where value
    embeddings are added.
    """
    attn, seen, added = block.attn, normed(x, block.ln1.w, cfg.eps), torch.zeros_like(x)
    group, eps = cfg.n_heads // attn.n_kv_heads, torch.finfo(x.dtype).eps
    for head in range(cfg.n_heads):
        kv = head // group
        q, k, v = seen @ attn.W_Q[head], seen @ attn.W_K[kv], seen @ attn.W_V[kv]
        if embedded is not None:
            gate = 2 / (1 + torch.exp(-(seen[..., :32] @ attn.value_gate.weight[kv])))
            v = v + gate[..., None] * embedded[..., kv * cfg.d_head : (kv + 1) * cfg.d_head]
        q, k = (
            torch.stack(
                [normed(turned(part[:, i], i, cfg), 1.0, eps) for i in range(x.shape[1])], dim=1
            )
            for part in (q, k)
        )
        for pos in range(x.shape[1]):
            weights = ((k[:, : pos + 1] * q[:, pos : pos + 1]).sum(-1) / cfg.d_head**0.5).softmax(
                -1
            )
            added[:, pos] += (weights[..., None] * v[:, : pos + 1]).sum(1) @ attn.W_O[head]
    x = x + added
    hidden = (normed(x, block.ln2.w, cfg.eps) @ block.mlp.W_in).clamp(min=0)
    return x + 0.5 * hidden**2 @ block.mlp.W_out


@pytest.mark.shapes
@torch.no_grad()
def test_equals_a_slow_computation_with_grouped_heads_and_gates_that_miss_their_tables() -> None:
    model, cfg = made(MISMATCHED), MISMATCHED
    tokens, state = tokens_of(cfg), torch.randn(3, 7, 36, dtype=torch.float64)
    e = slow_block(model.prelude_blocks[0], F.embedding(tokens, model.embedding), cfg, None)
    e, h = normed(e, model.input_norm.w, cfg.eps), state
    step = (1 + model.injection.step_bias.exp()).log()
    for _ in range(2):
        h = torch.exp(-step * model.injection.log_rate.exp()) * h + step * torch.einsum(
            "bpe,de->bpd", e, model.injection.B
        )
        h = slow_block(model.blocks[0], h, cfg, None)
    h = torch.einsum("bpe,de->bpd", h, model.C.weight)
    h = slow_block(model.coda_blocks[0], h, cfg, None)
    h = slow_block(model.coda_blocks[1], h, cfg, model.value_embeds["3"][tokens])
    logits = normed(h, model.final_norm.w, cfg.eps) @ model.head.T
    assert_close(model(tokens, state=state), 2.5 * (logits / 2.5).tanh())


ALIGNED = replace(
    MISMATCHED,
    n_key_value_heads=None,
    n_layers=2,
    value_tables=None,
    value_gates=None,
    logit_softcap=None,
    rope_scaling=None,
)


def test_default_places_are_every_second_block_from_the_last() -> None:
    assert ALIGNED.value_tables == ALIGNED.value_gates == ALIGNED.mixing() == (0, 2, 4)
    assert [ALIGNED.stage_of(place) for place in range(ALIGNED.n_places)] == [
        "prelude",
        "loops",
        "loops",
        "coda",
        "coda",
    ]


@torch.no_grad()
def test_value_embeddings_enter_at_every_iteration() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    logits = model(tokens)
    for t in range(2):
        off = [(f"loops.{t}.blocks.1.attn.hook_value_embed", lambda value, hook: value * 0)]
        assert not is_close(model.run_with_hooks(tokens, fwd_hooks=off), logits)
    none = [("**.attn.hook_value_embed", lambda value, hook: value * 0)]
    without = made(replace(ALIGNED, value_tables=()))
    without.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "value_embeds" not in name}
    )
    assert_close(model.run_with_hooks(tokens, fwd_hooks=none), without(tokens))


@torch.no_grad()
@pytest.mark.shapes
def test_injections_are_special_cases_of_the_linear_one() -> None:
    diagonal, tokens = made(ALIGNED), tokens_of(ALIGNED)
    linear = made(replace(ALIGNED, injection="linear"))
    shared = {
        name: value for name, value in diagonal.state_dict().items() if "injection" not in name
    }
    step = F.softplus(diagonal.injection.step_bias)
    matrix = torch.cat(
        [diagonal.injection.decay.diag(), step[:, None] * diagonal.injection.B], dim=1
    )
    linear.load_state_dict({**shared, "injection.weight": matrix})
    assert_close(linear(tokens), diagonal(tokens))
    added = made(replace(ALIGNED, injection="add"))
    added.load_state_dict(shared)
    one = torch.eye(36, dtype=torch.float64)
    linear.load_state_dict({**shared, "injection.weight": torch.cat([one, one], dim=1)})
    assert_close(linear(tokens), added(tokens))
    assert not is_close(added(tokens), diagonal(tokens))


@torch.no_grad()
def test_a_state_that_no_block_renews_decays_to_the_fixed_point_of_the_injection() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    silent = [
        (f"loops.*.blocks.*.hook_{part}_out", lambda value, hook: value * 0)
        for part in ("attn", "mlp")
    ]
    with model.hooks(silent, n_loops=4):
        cache = model.run_with_cache(tokens, n_loops=4, names_filter="loops.*.hook_*")[1]
    decay, force = model.injection.decay, model.injection.drive(cache["loops.0.hook_input"])
    assert ((decay > 0) & (decay < 1)).all()
    rest = force / (1 - decay)
    for t in range(4):
        assert_close(cache["state_out", t] - rest, decay ** (t + 1) * (cache["state_in", 0] - rest))


@torch.no_grad()
def test_without_a_prelude_norm_its_output_is_injected_as_it_is() -> None:
    model, tokens = made(replace(ALIGNED, prelude_norm=False)), tokens_of(ALIGNED)
    cache = model.run_with_cache(tokens, names_filter="**")[1]
    assert torch.equal(cache["loops.1.hook_input"], cache["prelude.0.hook_resid_post"])
    assert not [name for name in model.hook_names() if name.startswith("prelude_norm")]
    state = model.advance(model.begin(tokens), "loops.1")
    assert_close(model.readout(model.advance(state.rows(slice(1, None)))), model(tokens)[1:])


@torch.no_grad()
@pytest.mark.shapes
def test_seed_and_state_set_the_initial_latent() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    drawn = model.begin(tokens, seed=0).parts["state"]
    assert_close(model(tokens, seed=0), model(tokens))
    assert_close(model(tokens, state=drawn), model(tokens))
    assert not is_close(model(tokens, seed=1), model(tokens))
    assert drawn.abs().max() <= 3 * (2 / 180) ** 0.5
    assert_close(model(tokens, state=drawn * 0), made(replace(ALIGNED, state_std=0.0))(tokens))
    with pytest.raises(ValueError, match=r"must have the shape \[3, 7, 36\]"):
        model(tokens, state=torch.zeros(3, 6, 36))


@torch.no_grad()
def test_a_state_at_the_end_of_an_iteration_is_read_through_the_coda() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    state = model.begin(tokens)
    for t, end in enumerate(model.iteration_ends(2)):
        state = model.advance(state, end)
        assert_close(model.readout(state), model(tokens, n_loops=t + 1))


@torch.no_grad()
def test_dynamics_begin_at_the_latent() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    record = dynamics(model, tokens, 2, readout=-1, positions="all")
    assert_close(record.states[0], model.begin(tokens).parts["state"])
    cache = model.run_with_cache(tokens, names_filter="loops.*.hook_state_out")[1]
    assert_close(record.states[1:], cache.stack("state_out"))


def test_one_call_has_one_depth() -> None:
    model, tokens = made(ALIGNED), tokens_of(ALIGNED)
    with pytest.raises(
        TypeError,
        match=(
            r"every row of a call runs the same number of iterations, got tensor\(\[1, 4, 2\]\);"
            r" call once for each depth"
        ),
    ):
        model.begin(tokens, n_loops=torch.tensor([1, 4, 2]))


def test_fresh_model_begins_with_the_release_s_decay_and_identities() -> None:
    model = build(ALIGNED)
    assert isinstance(model, Parcae)
    torch.testing.assert_close(model.injection.decay, torch.full((36,), 0.2**0.5))
    assert torch.equal(model.injection.B, torch.eye(36))
    assert torch.equal(model.C.weight, torch.eye(36))
    assert model(tokens_of(ALIGNED)).isfinite().all()


def test_stored_angles_count_and_not_the_config_s(folder_with: Callable[..., Path]) -> None:
    case = the_case()
    other = load(
        folder_with(
            "parcae",
            {"rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 7}},
        )
    )
    assert_close(other(case.tokens, **case.begin), case.logits())
    torch.testing.assert_close(
        build(golden_model(case).cfg).rotation.freqs_cis, golden_model(case).rotation.freqs_cis
    )
    assert not is_close(build(other.cfg).rotation.freqs_cis, golden_model(case).rotation.freqs_cis)


def test_the_pickled_release_is_the_same_model(tmp_path: Path) -> None:
    case = the_case()
    values = json.loads((GOLDEN / "parcae" / "config.json").read_text())
    del values[
        "_class_name"
    ]  # one of the two ways in which a release's config is written leaves it out
    (tmp_path / "config.json").write_text(json.dumps(values))
    torch.save(load_file(GOLDEN / "parcae" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert_close(load(tmp_path)(case.tokens, **case.begin), case.logits())


@torch.no_grad()
def test_half_precision_weights_keep_a_table_of_angles_in_single(
    folder_with: Callable[..., Path],
) -> None:
    case, folder = the_case(), folder_with("parcae", {})
    tensors = load_file(GOLDEN / "parcae" / "model.safetensors")
    save_file(
        {key: value if key == "freqs_cis" else value.bfloat16() for key, value in tensors.items()},
        folder / "model.safetensors",
    )
    half = load(folder)
    assert half.state_dict()["rotation.freqs_cis"].dtype == torch.float32
    logits = half(case.tokens, **case.begin)
    assert logits.dtype == torch.float32
    assert (logits - case.logits()).norm() < 0.05 * case.logits().norm()


@pytest.mark.parametrize(
    ("sizes", "tables", "gates"),
    [
        (
            {"n_layers_in_prelude": 2, "n_layers_in_coda": 2, "mean_recurrence": 4},
            (0, 2, 4, 6),
            (1, 3, 6),
        ),
        (
            {
                "n_layers_in_prelude": 1,
                "mean_recurrence": 2,
                "n_layers_in_recurrent_block": 1,
                "num_key_value_heads": 2,
            },
            (0, 2),
            (1, 2),
        ),
        (
            {
                "mean_backprop_depth": 3,
                "tie_embeddings": False,
                "prelude_norm": False,
                "injection_type": "linear",
            },
            (1, 3, 5),
            (0, 2, 4),
        ),
    ],
)
def test_releases_of_other_sizes_are_read(
    sizes: dict[str, object],
    tables: tuple[int, ...],
    gates: tuple[int, ...],
    folder_with: Callable[..., Path],
) -> None:
    folder = folder_with("parcae", sizes)
    with pytest.raises(CheckpointError, match=r"(has|lacks) \d+ (unexpected )?key"):
        load(folder)
    given = {**json.loads((GOLDEN / "parcae" / "config.json").read_text()), **sizes}
    cfg = ParcaeConfig(
        n_layers=given["n_layers_in_recurrent_block"],
        n_loops=given["mean_recurrence"],
        n_prelude_layers=given["n_layers_in_prelude"],
        n_coda_layers=given["n_layers_in_coda"],
        n_key_value_heads=given["num_key_value_heads"],
        **{
            "d_model": 32,
            "n_heads": 4,
            "d_mlp": 20,
            "d_mlp_outside": 24,
            "d_vocab": 37,
            "n_ctx": 16,
            "rope_theta": 50000.0,
        },
        injection=given["injection_type"],
        prelude_norm=given["prelude_norm"],
        tied=given["tie_embeddings"],
        value_tables=tables,
        value_gates=gates,
    )
    model = made(cfg).float()
    state = model.state_dict()
    save_file(
        {key: state[name] for key, name in RELEASE.names(cfg).items() if name in state},
        folder / "model.safetensors",
    )
    again = load(folder)
    assert again.cfg == cfg
    assert_close(again.double()(tokens_of(cfg)), model.double()(tokens_of(cfg)))


def test_value_embeddings_of_grouped_heads_do_not_fit_the_core() -> None:
    with pytest.raises(
        ValueError,
        match="which value embeddings of n_key_value_heads=2 do not fit, but the block at place 1",
    ):
        replace(MISMATCHED, value_gates=(0, 1, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_coda_layers": 0}, "n_coda_layers must be at least 1, got 0"),
        (
            {"injection": "gated"},
            "injection must be one of 'diagonal', 'linear', 'add', got 'gated'",
        ),
        ({"d_model": 30}, "d_model must be at least 32, .* got 30"),
        ({"value_tables": [5]}, "value_tables must hold places of blocks, 0 to 3, got 5"),
        ({"n_ctx": None}, "n_ctx must be given"),
        ({"head_dim": 8}, "head_dim must be d_model / n_heads = 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParcaeConfig.from_dict({**MISMATCHED.to_dict(), **changes})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("nonlin_name", "GELU", "nonlin_name must be 'ReLU2', got 'GELU'"),
        ("norm_class_name", None, "lacks the field 'norm_class_name'"),
        ("mlp_class_name", "GatedMLP", "mlp_class_name must be 'BaseMLP', got 'GatedMLP'"),
        ("clip_qkv", 8.0, r"clip_qkv must be None, got 8\.0"),
        ("qk_bias", True, "qk_bias must be False, got True"),
        (
            "init_strategy",
            "takase",
            "init_strategy must be 'scaled' or .* got 'takase'; others scale embeddings",
        ),
        ("state_init", "unit", "state_init must be 'like-init' or 'zero', got 'unit'"),
        ("recurrent_embedding_dimension", 64, "recurrent_embedding_dimension must be 32, got 64"),
        (
            "recurrent_num_attention_heads",
            2,
            "recurrent_num_attention_heads must be None or 4, got 2",
        ),
        ("rope_settings", {"use_rope": False}, "use_rope must be True, got False"),
        (
            "rope_settings",
            {"rope_twist": 1},
            "has the field 'rope_twist' .* which this family's loader does not know",
        ),
        (
            "use_fused_head",
            "hhe",
            "use_fused_head must be 'pytorch' or 'cce' or 'full-triton', got 'hhe'",
        ),
        ("mean_recurrence", 2.5, r"mean_recurrence must be a whole number, got 2\.5"),
        ("loop_gain", 2.0, "has the field 'loop_gain' .* which this family's loader does not know"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    field: str, value: object, message: str, folder_with: Callable[..., object]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with("parcae", {field: value}))


def test_an_untied_head_is_not_read_from_a_transposed_file(
    folder_with: Callable[..., object],
) -> None:
    with pytest.raises(
        CheckpointError,
        match="use_fused_head must be 'pytorch' or 'cce', got 'full-triton'; an untied fused head",
    ):
        load(folder_with("parcae", {"tie_embeddings": False, "use_fused_head": "full-triton"}))
