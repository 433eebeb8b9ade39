"""SMolLM: its golden outputs, its stored rotary tables, dropout while training, and its pickle of
foreign objects.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load, save
from loopscope.interp.attribution.direct_logit import direct_logit_attribution
from loopscope.models.core.registry import build
from loopscope.models.families.smollm import SMolLM, SMolLMConfig
from loopscope.models.views import unrolled
from toy import assert_close, randomize_

BLOCK = r"iter\.(\d+)\.block\.(\d+)\."
TABLE: dict[str, Compute] = {
    r"(input_ids)": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("hook_embed"),
    r"iter\.(\d+)\.state_(in|out)": lambda case, t, where: case.activation(
        f"loops.{t}.hook_state_{where}"
    ),
    BLOCK + r"(attn|mlp)_out": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.hook_{part}_out"
    ),
    BLOCK + r"resid_(mid|post)": lambda case, t, j, where: case.activation(
        f"loops.{t}.blocks.{j}.hook_resid_{where}"
    ),
    BLOCK + r"attn\.pattern": lambda case, t, j: case.activation(
        f"loops.{t}.blocks.{j}.attn.hook_pattern"
    ),
    BLOCK + r"attn\.(q|k)": lambda case, t, j, which: case.heads_first(
        f"loops.{t}.blocks.{j}.attn.hook_rot_{which}"
    ),
    BLOCK + r"attn\.v": lambda case, t, j: case.heads_first(f"loops.{t}.blocks.{j}.attn.hook_v"),
    r"iter\.(\d+)\.readout_logits": lambda case, t: case.logits(int(t) + 1),
    r"logits": lambda case: case.logits(),
}


@dataclass
class TransformerConfig:
    """The released config's fields, with values of our own."""

    vocab_size: int = 41
    block_size: int = 16
    n_layer: int = 5
    n_head: int = 3
    n_embd: int = 24
    dropout: float = 0.1
    pad_id: int = 0
    ffn_mult: float = 4.0
    swiglu: bool = True
    rope: bool = True
    weight_sharing: bool = True


class SmilesTokenizer:
    """A stand-in for the release's tokenizer."""

    def __init__(self) -> None:
        self.token2id = {"<PAD>": 0, "C": 1}


class Payload:
    """An object that would run something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise RuntimeError('this ran')",)


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the golden weights as the release's pickle, from classes of modules that are gone when
    it is read.
    """

    def write(module: str = "smollm.model", **more: Any) -> Path:
        weights = load_file(GOLDEN / "smollm" / "model.safetensors")
        content = {
            "model": weights,
            "config": TransformerConfig(),
            "tokenizer": {"id2token": {0: "<PAD>"}},
            "epoch": 100,
            **more,
        }
        foreign = {TransformerConfig: module, SmilesTokenizer: "smollm.tokenizer"}
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "smollm", ModuleType("smollm"))
            for cls, name in foreign.items():
                stand_in = ModuleType(name)
                setattr(stand_in, cls.__name__, cls)
                patch.setitem(sys.modules, name, stand_in)
                patch.setattr(cls, "__module__", name)
            torch.save(content, tmp_path / "ws-e24-x5-s42.pt")
        assert not any(name.startswith("smollm") for name in sys.modules)
        return tmp_path / "ws-e24-x5-s42.pt"

    return write


def toy(**changes: Any) -> SMolLM:
    sizes: dict[str, Any] = {
        "n_loops": 3,
        "d_model": 30,
        "n_heads": 5,
        "d_mlp": 44,
        "d_vocab": 29,
        "n_ctx": 11,
        **changes,
    }
    model = build(SMolLMConfig(**sizes))
    assert isinstance(model, SMolLM)
    return randomize_(model).double()


def tokens_of(model: SMolLM, pos: int = 7) -> Tensor:
    return torch.randint(1, model.cfg.d_vocab, (3, pos), generator=torch.Generator().manual_seed(0))


def test_golden_outputs(record_error: Callable[[str, str, float], None]) -> None:
    check_case(GoldenCase("smollm"), TABLE, record_error)


def test_fresh_tables_are_those_of_the_release() -> None:
    model = load(GOLDEN / "smollm")
    assert isinstance(model, SMolLM)
    fresh = build(model.cfg)
    assert isinstance(fresh, SMolLM)
    for name in ("cos", "sin"):
        torch.testing.assert_close(
            getattr(fresh.rotation, name), getattr(model.rotation, name), rtol=0.0, atol=1e-6
        )


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_a_fresh_model_is_the_obvious_computation(kv_heads: int | None) -> None:
    model = toy(n_heads=3, n_layers=2, n_key_value_heads=kv_heads)
    tokens = tokens_of(model)
    angles = exact_angles()
    model.rotation.cos.copy_(angles.cos())
    model.rotation.sin.copy_(angles.sin())
    x = model.embedding[tokens]
    for _ in range(3):
        for block in model.blocks:
            x = x + attended(
                layer_norm(x, block.ln1), block.attn, 3 if kv_heads is None else kv_heads
            )
            y = layer_norm(x, block.ln2)
            gate = y @ block.mlp.gate.weight.T
            x = (
                x
                + (gate * torch.sigmoid(gate) * (y @ block.mlp.up.weight.T))
                @ block.mlp.down.weight.T
            )
    with torch.no_grad():
        assert_close(model(tokens), layer_norm(x, model.final_norm) @ model.embedding.T)


def exact_angles() -> Tensor:
    """The tables of a fresh model come from float32, as those of the releases do."""
    return torch.arange(11)[:, None] * 10000.0 ** -(torch.arange(5, dtype=torch.float64) / 5)


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.w + norm.b


def attended(x: Tensor, attn: Any, kv_heads: int) -> Tensor:
    """Attention head by head and query by query, each pair of channels turned as one complex
    number.
    """
    q, k, v = (x @ attn.qkv.weight.T).split([30, 10 * kv_heads, 10 * kv_heads], dim=-1)
    angles, heads = exact_angles()[: x.shape[1]], []
    for head in range(3):
        shared = head * kv_heads // 3
        q_head, k_head = (
            torch.complex(y[..., i * 10 : i * 10 + 5], y[..., i * 10 + 5 : i * 10 + 10])
            for y, i in ((q, head), (k, shared))
        )
        turned = [y * torch.polar(torch.ones_like(angles), angles) for y in (q_head, k_head)]
        scores = torch.einsum("bqc,bkc->bqk", turned[0], turned[1].conj()).real / 10**0.5
        rows = [
            scores[:, i, : i + 1].softmax(-1)[:, None]
            @ v[:, : i + 1, shared * 10 : shared * 10 + 10]
            for i in range(x.shape[1])
        ]
        heads.append(torch.cat(rows, dim=1))
    return torch.cat(heads, dim=-1) @ attn.o.weight.T


def test_stored_tables_count_and_not_the_frequencies() -> None:
    model = toy()
    tokens = tokens_of(model)
    before = model(tokens)
    with torch.no_grad():
        model.rotation.cos[:, :, 2] = 0.25
    after = model(tokens)
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2:], before[:, 2:])


def test_positions_beyond_the_tables_are_refused() -> None:
    model = toy()
    model(tokens_of(model, 11))
    with pytest.raises(
        ValueError, match="inputs may have at most n_ctx=11 positions in this model, got 12"
    ):
        model(tokens_of(model, 12))


def test_dropout_acts_in_train_mode_only() -> None:
    model, plain = toy(dropout=0.3), toy()
    tokens = tokens_of(model)
    expected = plain(tokens)
    assert_close(model(tokens), expected)
    assert_close(plain.train()(tokens), expected)
    noisy = [model.train()(tokens) for _ in range(2)]
    assert not torch.allclose(noisy[0], expected)
    assert not torch.allclose(noisy[0], noisy[1])
    assert_close(model.eval()(tokens), expected)


def test_a_fresh_model_learns() -> None:
    model = build(
        SMolLMConfig(n_loops=3, d_model=30, n_heads=5, d_mlp=44, d_vocab=29, n_ctx=11, dropout=0.1)
    )
    assert isinstance(model, SMolLM)
    tokens, mask = tokens_of(model), torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=0.01), []
    for _ in range(30):
        logits = model(tokens, mask=mask)[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits[mask[:, 1:] == 1], tokens[:, 1:][mask[:, 1:] == 1]
        )
        optimizer.zero_grad()
        loss.backward()
        assert all(
            parameter.grad is not None and parameter.grad.isfinite().all()
            for parameter in model.parameters()
        )
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_every_place_of_dropout_is_hit() -> None:
    model, tokens = toy(dropout=0.5).train(), tokens_of(toy())
    torch.manual_seed(0)
    cache = model.run_with_cache(tokens, n_loops=1, names_filter="**")[1]
    for name in ("hook_embed", "loops.0.blocks.0.hook_attn_out", "loops.0.blocks.0.hook_mlp_out"):
        assert 0.3 < (cache[name] == 0).double().mean() < 0.7, name
    attn = "loops.0.blocks.0.attn."
    mixed = torch.einsum("bhqk,bkhd->bqhd", cache[attn + "hook_pattern"], cache[attn + "hook_v"])
    assert not torch.allclose(cache[attn + "hook_z"], mixed)


@pytest.mark.parametrize("module", ["smollm.model", "smollm.config", "smollm.configs"])
def test_the_released_pickle_is_the_same_model(module: str, released: Callable[..., Path]) -> None:
    model, golden = load(released(module)), GoldenCase("smollm")
    assert model.cfg == golden.model.cfg
    assert str(model.read_at) == "last_real"
    assert_close(model(golden.tokens), golden.logits())


def test_a_tokenizer_object_is_read_past(released: Callable[..., Path]) -> None:
    assert load(released(tokenizer=SmilesTokenizer())).cfg.d_vocab == 41


def test_a_pickle_with_code_is_refused(released: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"holds code.*, not only tensors; it is refused"):
        load(released(tokenizer=Payload()))


def test_a_config_of_another_class_is_refused(released: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"holds code \(elsewhere.TransformerConfig\)"):
        load(released("elsewhere"))


def test_a_baseline_in_the_same_pickle_is_refused_by_name(released: Callable[..., Path]) -> None:
    with pytest.raises(
        CheckpointError,
        match="weight_sharing must be True, got False; only the looped model is computed here",
    ):
        load(released(config=TransformerConfig(weight_sharing=False)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rope", False, "rope must be True, got False"),
        ("swiglu", False, "swiglu must be True, got False"),
        ("weight_sharing", False, "weight_sharing must be True, got False"),
        ("swiglu", None, "lacks the field 'swiglu'"),
        ("n_layer", "5", "n_layer must be a whole number, got '5'"),
        ("n_head", 5, "5 heads do not divide d_model=24"),
        (
            "ffn_mult",
            3.0,
            r"'shared_block.mlp.w_gate.weight' must have the shape \[48, 24\], got \[64, 24\]",
        ),
        ("block_size", 17, r"'rope_cos' must have the shape \[1, 1, 17, 4\], got \[1, 1, 16, 4\]"),
        ("dropout", 1.0, "dropout must be a share from 0 to below 1, got 1.0"),
        ("n_loop", 2, "has the field 'n_loop' .* which this family's loader does not know"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    field: str, value: object, message: str, folder_with: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with("smollm", {field: value}))


def test_a_model_without_a_length_is_refused() -> None:
    with pytest.raises(
        ValueError, match="n_ctx must be given, because the rotary tables are stored up to it"
    ):
        toy(n_ctx=None)


def test_saving_a_fresh_model_keeps_its_tables_and_dropout(tmp_path: Path) -> None:
    model = toy(n_key_value_heads=1, dropout=0.2)
    save(model, tmp_path / "own")
    again = load(tmp_path / "own")
    assert again.cfg == model.cfg == replace(again.cfg, dropout=0.2)
    assert_close(again(tokens_of(model)), model(tokens_of(model)))


@pytest.mark.parametrize("fold_ln", [False, True])
def test_unrolled_is_the_same_computation(fold_ln: bool) -> None:
    model, tokens = toy(n_layers=2), tokens_of(toy())
    view = unrolled(model, 3, fold_ln=fold_ln)
    mask = (torch.arange(7) < torch.tensor([7, 4, 5])[:, None]).long()
    assert_close(view(tokens, mask=mask), model(tokens, mask=mask))
    _, theirs = view.run_with_cache(tokens)
    _, ours = model.run_with_cache(tokens, names_filter="**")
    for i in range(6):
        for site in (
            "hook_resid_pre",
            "attn.hook_rot_k",
            "attn.hook_pattern",
            "mlp.hook_post",
            "hook_mlp_out",
        ):
            assert_close(
                theirs[f"blocks.{i}.{site}"], ours[f"loops.{i // 2}.blocks.{i % 2}.{site}"]
            )
    assert (view.cfg.original_architecture, view.cfg.positional_embedding_type) == (
        "smollm",
        "rotary",
    )


def test_folded_attributions_of_the_unrolled_view_sum_to_the_logit() -> None:
    model, tokens = toy(n_layers=2), tokens_of(toy())
    logits, cache = unrolled(model, 3, fold_ln=True).run_with_cache(tokens)
    parts = cache.decompose_resid()
    assert len(parts) == 2 * 6 + 1
    attributions = cache.logit_attrs(parts, tokens=3)
    bias = model.final_norm.b @ model.W_U[:, 3]
    assert_close(attributions.sum(0) + bias, logits[..., 3])


def test_direct_logits_sum_to_the_logit() -> None:
    model, tokens = toy(n_layers=2), tokens_of(toy())
    answers = torch.tensor([3, 7, 28])
    direct = direct_logit_attribution(model, tokens, answers, readout=5)
    assert_close(direct.values.sum(0) + direct.constant, model(tokens)[torch.arange(3), 5, answers])
