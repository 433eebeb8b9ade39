"""HRM-Text: its golden outputs, a forward pass written out by hand, its two states, and its prefix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.load import load
from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from interp.dynamics import dynamics
from interp.gradients import gradients
from interp.lens import logit_lens
from models.hrm_text import HrmText, HrmTextConfig
from models.registry import build
from models.tokens import Batch
from toy import assert_close, is_close, put, randomize_

BATCH, POS, LOOPS, LOW_LOOPS = 3, 7, 2, 3
LENGTHS = torch.tensor([7, 4, 5])
TYPES = torch.tensor([[1, 1, 1, 0, 0, 2, 0], [0, 1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
CONFIG = HrmTextConfig(
    n_layers=2, n_loops=LOOPS, n_low_loops=LOW_LOOPS, d_model=14, n_heads=6, n_key_value_heads=2, head_dim=4, d_mlp=11, d_vocab=29, n_ctx=9,
    embedding_scale=3.5, attention_bias=True, mlp_bias=True,
)  # fmt: skip


@pytest.fixture
def odd() -> HrmText:
    """Every size unequal, grouped heads wider than the stream, biases, and a first low state that is not zero."""
    model = build(CONFIG)
    assert isinstance(model, HrmText)
    return randomize_(model).double().requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 29, (BATCH, POS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> Tensor:
    return (torch.arange(POS) < LENGTHS[:, None]).long()


# Golden outputs


def run_of(h: str, run: str) -> str:
    return f"loops.{h}.high" if run == "H" else f"loops.{h}.low.{run[1:]}"


def low_lens(case: GoldenCase, h: str, low: str) -> Tensor:
    lens = logit_lens(case.model, case.tokens, readout=-1, positions="all", keep_logits=True)
    assert lens.logits is not None
    last = lens.names.index(f"loops.{h}.low.{low}.blocks.{case.model.cfg.n_layers - 1}")
    return lens.logits[last].unflatten(0, tuple(case.tokens.shape))


def first_low_state(case: GoldenCase) -> Tensor:
    return case.model.state_parts(case.model.begin(case.tokens))["low"]


RUN = r"iter\.h(\d+)\.(l\d+|H)\."
BLOCK = RUN + r"block\.(\d+)\."
TABLE: dict[str, Compute] = {
    r"(input_ids|variant\.prefix\.token_type_ids)": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("hook_embed"),
    r"init_state\.z_L": first_low_state,
    RUN + r"z_L_in": lambda case, h, run: case.activation(f"{run_of(h, run)}.hook_state_in"),
    RUN + r"z_H": lambda case, h, run: case.activation(f"{run_of(h, run)}.hook_input"),
    RUN + r"stack_in": lambda case, h, run: case.activation(f"{run_of(h, run)}.hook_injected"),
    RUN + r"z_[LH]_out": lambda case, h, run: case.activation(f"{run_of(h, run)}.hook_state_out"),
    BLOCK + r"(attn|mlp)_out": lambda case, h, run, j, part: case.activation(f"{run_of(h, run)}.blocks.{j}.hook_{part}_out"),
    BLOCK + r"resid_(mid|post)": lambda case, h, run, j, where: case.activation(f"{run_of(h, run)}.blocks.{j}.hook_resid_{where}"),
    BLOCK + r"attn\.pattern": lambda case, h, run, j: case.activation(f"{run_of(h, run)}.blocks.{j}.attn.hook_pattern"),
    BLOCK + r"attn\.(q|k)": lambda case, h, run, j, which: case.heads_first(f"{run_of(h, run)}.blocks.{j}.attn.hook_rot_{which}"),
    BLOCK + r"attn\.v": lambda case, h, run, j: case.heads_first(f"{run_of(h, run)}.blocks.{j}.attn.hook_v"),
    BLOCK + r"attn\.gate_logit": lambda case, h, run, j: case.activation(f"{run_of(h, run)}.blocks.{j}.attn.hook_gate").flatten(-2),
    r"iter\.h(\d+)\.H\.readout_logits": lambda case, h: case.logits(int(h) + 1),
    r"iter\.h(\d+)\.l(\d+)\.z_L_lens_logits": low_lens,
    r"logits": GoldenCase.logits,
    r"variant\.prefix\.logits": lambda case: case.logits(token_types=case.golden["variant.prefix.token_type_ids"]),
    r"variant\.prefix_one_block\.logits": lambda case: case.logits(token_types=torch.ones_like(case.tokens)),
}


def test_golden_outputs(record_error: Callable[[str, str, float], None]) -> None:
    check_case(GoldenCase("hrm_text"), TABLE, record_error)


# The same computation by hand


def by_hand(model: HrmText, tokens: Tensor, mask: Tensor, types: Tensor | None) -> Tensor:
    """Logits, one row and one head at a time."""
    cfg, rows = model.cfg, []
    for row, ids in enumerate(tokens):
        prefix = torch.zeros_like(ids, dtype=torch.bool) if types is None else types[row] == 1
        ahead = prefix[:, None] & prefix[None, :]
        seen = (torch.ones(POS, POS, dtype=torch.bool).tril() | ahead) & mask[row].bool()[None, :]
        high = model.embedding[ids] * cfg.embedding_scale
        low = model.low_init.expand_as(high)
        for _ in range(LOOPS):
            for _ in range(cfg.n_low_loops):
                low = run_stack(model, model.low, low + high, seen)
            high = run_stack(model, model.high, high + low, seen)
        rows.append(high @ model.W_U)
    return torch.stack(rows)


def run_stack(model: HrmText, blocks: Any, x: Tensor, seen: Tensor) -> Tensor:
    for block in blocks:
        x = x + attention_by_hand(model.cfg, block.attn, rms(x, model.cfg.eps), seen)
        normed = rms(x, model.cfg.eps)
        mlp = block.mlp
        hidden = F.silu(normed @ mlp.W_gate + mlp.b_gate) * (normed @ mlp.W_in + mlp.b_in)
        x = x + hidden @ mlp.W_out + mlp.b_out
    return rms(x, model.cfg.eps)


def attention_by_hand(cfg: HrmTextConfig, attn: Any, x: Tensor, seen: Tensor) -> Tensor:
    out = attn.b_O.expand_as(x)
    for head in range(cfg.n_heads):
        shared = head // (cfg.n_heads // cfg.kv_heads)
        q = turn(x @ attn.W_Q[head] + attn.b_Q[head], cfg.rope_theta)
        k = turn(x @ attn.W_K[shared] + attn.b_K[shared], cfg.rope_theta)
        v = x @ attn.W_V[shared] + attn.b_V[shared]
        pattern = (q @ k.T / cfg.d_head**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        gate = x @ attn.W_gate[head] + attn.b_gate[head]
        out = out + (gate.sigmoid() * (pattern @ v)) @ attn.W_O[head]
    return out


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def turn(x: Tensor, theta: float) -> Tensor:
    """Rotation as a product of complex numbers; angles in float32."""
    half = x.shape[-1] // 2
    angles = torch.arange(POS).float()[:, None] * (1.0 / theta ** (torch.arange(half).float() / half))
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.complex(angles.cos().double(), angles.sin().double())
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("types", [None, TYPES])
def test_forward_is_the_one_written_out_by_hand(odd: HrmText, tokens: Tensor, mask: Tensor, types: Tensor | None) -> None:
    logits = odd(tokens, mask=mask, token_types=types)
    expected = by_hand(odd, tokens, mask, types)
    for row, length in enumerate(LENGTHS.tolist()):
        assert_close(logits[row, :length], expected[row, :length])


def test_gated_heads_sum_to_what_attention_adds(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**")
    for visit in odd.schedule():
        gate, z, gated = (cache[f"{visit.name}.attn.hook_{site}"] for site in ("gate", "z", "gated"))
        assert_close(gated, gate.sigmoid() * z)
        attn: Any = visit.block.attn
        assert_close(torch.einsum("bphd,hdm->bpm", gated, attn.W_O) + attn.b_O, cache[f"{visit.name}.hook_attn_out"])


# Models that transformers writes

RELEASES: dict[str, dict[str, Any]] = {
    "biases, under the modules' names": {
        "attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "fused and tied, stretched positions": {
        "tie_word_embeddings": True,
        "embedding_scale": 2.5,
        "rope_parameters": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8, "rope_theta": 10.0,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that transformers wrote, and its model."""
    from transformers import HrmTextConfig as TheirConfig
    from transformers import HrmTextForCausalLM

    torch.manual_seed(0)
    theirs = HrmTextForCausalLM(
        TheirConfig(
            vocab_size=31, hidden_size=15, intermediate_size=22, num_hidden_layers=2, num_attention_heads=5, head_dim=4,
            max_position_embeddings=16, H_cycles=3, L_cycles=2, **RELEASES[request.param],
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(0.0, 0.02 if "embed" in name else 0.4)
    folder = tmp_path_factory.mktemp("release")
    theirs.save_pretrained(folder)
    if theirs.config.attention_bias:
        save_file(theirs.state_dict(), folder / "model.safetensors")
    return folder, theirs


def test_what_transformers_writes_gives_its_logits(release: tuple[Path, Any]) -> None:
    folder, theirs = release
    ours, tokens = load(folder), torch.arange(2 * 9).view(2, 9) % 31
    types = (torch.arange(9) < torch.tensor([[4], [6]])).long()
    assert ours.cfg.fused == theirs.config.tie_word_embeddings
    for given in (None, types):
        with torch.no_grad():
            expected = theirs(input_ids=tokens, token_type_ids=given).logits
            torch.testing.assert_close(ours(tokens, token_types=given), expected, rtol=0.0, atol=5e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("counted", [2, 2 + 2])
def test_every_form_of_a_config_means_the_same(release: tuple[Path, Any], counted: int, tmp_path: Path) -> None:
    folder, _ = release
    values = json.loads((folder / "config.json").read_text())
    assert (values["num_hidden_layers"], values.pop("num_layers_per_stack")) == (2 * 3 * (2 + 1), 2)
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_hidden_layers": counted}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert load(tmp_path).cfg == load(folder).cfg


def test_fused_weights_show_the_same_views(release: tuple[Path, Any]) -> None:
    folder, theirs = release
    for ours, module in ((load(folder).low, theirs.model.L_module), (load(folder).high, theirs.model.H_module)):
        for block, layer in zip(ours, module.layers, strict=True):
            for view, name in (("W_Q", "q"), ("W_K", "k"), ("W_V", "v"), ("W_gate", "gate")):
                stored = getattr(layer.self_attn, f"{name}_proj").weight
                assert torch.equal(getattr(block.attn, view).transpose(1, 2).flatten(0, 1), stored)
            assert torch.equal(block.mlp.W_gate.T, layer.mlp.gate_proj.weight)
            assert torch.equal(block.mlp.W_in.T, layer.mlp.up_proj.weight)


def test_fused_projections_with_biases_are_refused() -> None:
    with pytest.raises(ValueError, match="attention_bias and mlp_bias must be off where the projections are fused"):
        replace(CONFIG, fused=True)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"embedding_scale": None}, "embedding_scale", 1 / 0.02),
        ({"embedding_scale": None, "initializer_range": 0.1}, "embedding_scale", 1 / 0.1),
        ({"rope_parameters": None, "rope_theta": 500, "num_key_value_heads": 3}, "rope_theta", 500.0),
        ({"rope_parameters": None}, "rope_theta", 10000.0),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", {"type": "linear", "factor": 2.0}),
        ({"prefix_lm": None}, "prefix_lm", True),
    ],
)
def test_fields_that_a_config_may_leave_out(
    changes: Mapping[str, Any], field: str, value: object, folder_with: Callable[..., Path]
) -> None:
    assert getattr(load(folder_with("hrm_text", changes)).cfg, field) == value


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        ("num_key_value_heads", 1, "num_key_value_heads must be 3 or None, got 1; every head has keys and values of its own"),
        ("L_cycles", 0, "n_low_loops must be a number of runs, at least 1, got 0"),
        ("L_cycles", "3", "L_cycles must be a whole number, got '3'"),
        ("H_cycles", None, "lacks the field 'H_cycles'"),
        ("num_layers_per_stack", 3, r"lacks 16 key\(s\) .* first 'model.L_module.layers.2"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "rope_scaling must be of the type .* got 'yarn'"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
        ("rope_parameters", {"mscale": 0.5}, "has the field 'mscale' .* which this family's loader does not know"),
        ("attention_bias", True, r"lacks 20 key\(s\) .* first 'model.L_module.layers.0.self_attn"),
        ("q_norm", True, "has the field 'q_norm' .* which this family's loader does not know"),
    ],
)
def test_fields_that_are_not_computed_are_refused(field: str, value: object, message: str, folder_with: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with("hrm_text", {field: value}))


def test_a_fresh_model_runs() -> None:
    torch.manual_seed(0)
    model = build(replace(CONFIG, embedding_scale=50.0))
    assert isinstance(model, HrmText)
    assert not model.low_init.requires_grad
    _, cache = model.run_with_cache(torch.arange(9)[None], names_filter="**")
    assert 0.8 < float(cache["hook_embed"].std()) < 1.25
    assert float(cache["loops.0.low.0.hook_state_in"].abs().max()) == 0.0
    assert cache["q", 1, "high", 1].shape == (1, 9, 6, 4)
    assert cache["k", 1, "low", 2, 1].shape == (1, 9, 2, 4)


# Two states


def test_low_state_goes_on_and_its_start_enters_once(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**")
    runs = [f"loops.{h}.low.{run}" for h in range(LOOPS) for run in range(LOW_LOOPS)]
    assert torch.equal(cache[f"{runs[0]}.hook_state_in"], odd.low_init.expand(BATCH, POS, -1))
    for before, after in pairwise(runs):
        assert torch.equal(cache[f"{after}.hook_state_in"], cache[f"{before}.hook_state_out"])


def test_both_states_can_be_read_between_runs(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**")
    state = odd.begin(tokens)
    known = {"low": odd.low_init.expand(BATCH, POS, -1), "high": cache["hook_embed"]}
    for visit in odd.schedule():
        if visit.opening:
            parts = odd.state_parts(state)
            assert_close(parts["low"], known["low"])
            assert_close(parts["high"], known["high"])
        state = odd.advance(state, visit.index + 1)
        if visit.closing:
            known["high" if visit.scope.endswith("high") else "low"] = cache[f"{visit.scope}.hook_state_out"]
    assert torch.equal(odd.state_parts(state)["high"], state.resid)
    assert_close(odd.unembed(known["high"]), odd(tokens))


def test_dynamics_of_each_state(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**")
    last = [f"loops.{h}.low.{LOW_LOOPS - 1}.hook_state_out" for h in range(LOOPS)]
    low = torch.stack([odd.low_init.expand(BATCH, POS, -1), *(cache[name] for name in last)])
    high = torch.stack([cache["hook_embed"], *(cache[f"loops.{h}.high.hook_state_out"] for h in range(LOOPS))])
    for part, states in {"low": low, "high": high, "resid": high}.items():
        found = dynamics(odd, tokens, readout=-1, part=part)
        assert_close(found.states, states)


def test_a_patch_of_the_input_reaches_one_run_and_one_of_the_output_all_later_ones(odd: HrmText, tokens: Tensor) -> None:
    index = (slice(None), 2)
    _, plain = odd.run_with_cache(tokens, names_filter="**")

    def changed(name: str, where: str) -> bool:
        with odd.hooks([(name, put(plain[name] + 1.0, index))]):
            _, cache = odd.run_with_cache(tokens, names_filter="**")
        return not is_close(cache[where][index], plain[where][index])

    assert changed("loops.0.low.0.hook_input", "loops.0.low.0.hook_state_out")
    assert not changed("loops.0.low.0.hook_input", "loops.0.low.1.hook_input")
    assert not changed("loops.0.low.0.hook_state_out", "loops.0.low.1.hook_input")
    assert changed("loops.0.low.2.hook_state_out", "loops.0.high.hook_input")
    assert not changed("loops.0.high.hook_input", "loops.1.low.0.hook_state_in")
    assert changed("loops.0.high.hook_state_out", "loops.1.low.2.hook_input")


def test_gradients_flow_through_every_low_run(odd: HrmText, tokens: Tensor) -> None:
    batch = Batch(tokens, torch.ones_like(tokens), torch.full((BATCH,), POS - 1))
    values, grads = gradients(odd, batch, lambda logits: logits[:, 5], "loops.*.low.*.hook_state_in")
    along = torch.randn(tokens.shape[1], odd.cfg.d_model, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def shifted(name: str, step: float) -> Tensor:
        with torch.no_grad(), odd.hooks([(name, lambda value, hook: value + step * along)]):
            return odd(tokens)[:, -1, 5].sum()

    assert len(grads) == LOOPS * LOW_LOOPS
    for name in values:
        slope = (shifted(name, 1e-5) - shifted(name, -1e-5)) / 2e-5
        torch.testing.assert_close((grads[name] * along).sum(), slope, rtol=1e-5, atol=1e-8)
        assert float(slope.abs()) > 1e-4


def test_cache_coordinates(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**")
    assert cache["resid_post", 1, "high", 0] is cache["loops.1.high.blocks.0.hook_resid_post"]
    assert cache["resid_post", 1, "low", 2, -1] is cache["loops.1.low.2.blocks.1.hook_resid_post"]
    assert cache["state_in", -1, "low", 1] is cache["loops.1.low.1.hook_state_in"]
    assert cache["high.state_out", 0] is cache["loops.0.high.hook_state_out"]
    assert cache["ln_boundary.scale", 0, "low", 1] is cache["loops.0.low.1.ln_boundary.hook_scale"]
    assert odd.hook_dict["loops.1.low.2.blocks.1.attn.hook_z"].loop() == 1
    with pytest.raises(KeyError, match="resid_post"):
        cache["resid_post", 0, 0]


# The prefix


def test_types_other_than_one_are_plain_causal(odd: HrmText, tokens: Tensor) -> None:
    alone = torch.tensor([0, 2, 0, 1, 0, 2, 0]).expand(BATCH, POS)
    assert_close(odd(tokens, token_types=alone), odd(tokens))


def test_prefix_tokens_see_each_other_and_nothing_later(odd: HrmText, tokens: Tensor) -> None:
    prefix = torch.tensor([0, 1, 1, 1, 0, 0, 0]).expand(BATCH, POS)

    def moved_by(column: int) -> list[bool]:
        other = tokens.clone()
        other[:, column] = (other[:, column] + 1) % 29
        before, after = odd(tokens, token_types=prefix), odd(other, token_types=prefix)
        return [not is_close(after[:, i], before[:, i]) for i in range(POS)]

    assert moved_by(3) == [False, True, True, True, True, True, True]
    assert moved_by(4) == [False, False, False, False, True, True, True]


def test_prefix_with_padding_subsets_of_rows_and_resuming(odd: HrmText, tokens: Tensor, mask: Tensor) -> None:
    logits = odd(tokens, mask=mask, token_types=TYPES)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = odd(tokens[row : row + 1, :length], token_types=TYPES[row : row + 1, :length])
        assert_close(logits[row, :length], alone[0])
    store: dict[str, Any] = {}
    odd.advance(odd.begin(tokens, mask, token_types=TYPES), store=store)
    for stop in range(len(odd.schedule())):
        state = odd.advance(odd.begin(tokens, mask, token_types=TYPES), stop)
        assert_close(odd.readout(odd.advance(state)), logits)
        rest = odd.advance(state.rows(pos=slice(2, None)), supplied=store)
        assert_close(odd.readout(rest), logits[:, 2:])


def test_a_batch_carries_token_types_into_a_method(odd: HrmText, tokens: Tensor) -> None:
    batch = Batch(tokens, torch.ones_like(tokens), torch.full((BATCH,), POS - 1), {"token_types": TYPES})
    lens = logit_lens(odd, batch, keep_logits=True)
    assert lens.logits is not None
    assert_close(lens.logits[-1], odd(tokens, token_types=TYPES)[:, -1])
    assert not is_close(lens.logits[-1], odd(tokens)[:, -1])


def test_self_patch_under_a_prefix_changes_nothing(odd: HrmText, tokens: Tensor) -> None:
    _, cache = odd.run_with_cache(tokens, names_filter="**.hook_resid_pre", token_types=TYPES)
    for name, value in list(cache.items())[::3]:
        with odd.hooks([(name, lambda value, hook: None)]):
            logits = odd(tokens, token_types=TYPES)
        with odd.hooks([(name, put(value, (slice(None), 1)))]):
            assert torch.equal(odd(tokens, token_types=TYPES), logits)


@pytest.mark.parametrize(
    ("types", "error", "message"),
    [
        (TYPES[:, :5], ValueError, r"token_types must have the tokens' shape \[3, 7\], got \[3, 5\]"),
        (TYPES.double(), TypeError, r"token_types must be an integer tensor \[batch, pos\], got torch.float64"),
    ],
)
def test_wrong_token_types_are_refused(odd: HrmText, tokens: Tensor, types: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        odd(tokens, token_types=types)


def test_token_types_without_a_prefix_are_refused(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="token types change nothing in this model, because its prefix_lm is off"):
        build(replace(CONFIG, prefix_lm=False))(tokens, token_types=TYPES)


def test_recorded_cycles_can_be_replaced() -> None:
    assert load(GOLDEN / "hrm_text", n_loops=5).cfg == replace(load(GOLDEN / "hrm_text").cfg, n_loops=5)
