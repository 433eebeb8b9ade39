"""LoRA adapters in peft's layout: the merged model is the base with W + scale B A."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load, save
from paths import GOLDEN
from release_files import files_under, toy_model

TOKENS = torch.tensor([[1, 5, 17, 40, 8]])
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "someone/base",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "r": 3,
    "lora_alpha": 7,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "mlp.down_proj"],
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "inference_mode": True,
    "rank_pattern": {},
    "alpha_pattern": {},
}
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def factors(module: str, weight: Tensor, rank: int) -> dict[str, Tensor]:
    """The two factors of a matrix that is stored output first."""
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": draw(rank, weight.shape[1]),
        f"{prefix}.lora_B.weight": draw(weight.shape[0], rank),
    }


def write(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def base() -> dict[str, Tensor]:
    return load_file(GOLDEN / "ouro" / "model.safetensors")


@pytest.fixture
def both(base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors of the two target modules, of the ranks 3 and 3."""
    return {
        **factors(Q, base[f"{Q}.weight"], 3),
        **factors(DOWN, base[f"{DOWN}.weight"], 3),
    }


@pytest.fixture
def expected(tmp_path: Path, base: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Logits of the base with some tensors changed by hand."""

    def logits(**changes: Tensor) -> Tensor:
        folder = tmp_path / "by_hand"
        folder.mkdir(exist_ok=True)
        shutil.copy(GOLDEN / "ouro" / "config.json", folder)
        save_file({**base, **changes}, folder / "model.safetensors")
        return load(folder)(TOKENS)

    return logits


def product(tensors: dict[str, Tensor], module: str) -> Tensor:
    prefix = f"base_model.model.{module}.lora_"
    return tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, (7 / 3, 7 / 3)),
        ({"use_rslora": True}, (7 / math.sqrt(3), 7 / math.sqrt(3))),
        ({"alpha_pattern": {"down_proj": 2.5}}, (7 / 3, 2.5 / 3)),
        ({"alpha_pattern": {r"layers\.1\..*": 2}, "r": 3}, (2 / 3, 7 / 3)),
        ({"target_modules": r".*\.(q|down)_proj"}, (7 / 3, 7 / 3)),
        ({"target_modules": "all-linear"}, (7 / 3, 7 / 3)),
    ],
)
def test_the_update_is_added_with_the_scale_of_the_config(
    changes: dict[str, Any],
    scales: tuple[float, float],
    base: dict[str, Tensor],
    both: dict[str, Tensor],
    expected: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / "adapter", both, **changes)
    before = files_under(tmp_path)
    with torch.no_grad():
        merged = load(GOLDEN / "ouro", adapter=folder)(TOKENS)
        plain = load(GOLDEN / "ouro")(TOKENS)
    assert files_under(tmp_path) == before
    by_hand = {
        f"{module}.weight": base[f"{module}.weight"] + scale * product(both, module)
        for module, scale in zip((Q, DOWN), scales, strict=True)
    }
    torch.testing.assert_close(merged, expected(**by_hand), rtol=0, atol=1e-5)
    assert float((merged - plain).abs().max()) > 0.1


def test_a_module_may_have_a_rank_of_its_own(
    base: dict[str, Tensor], expected: Callable[..., Tensor], tmp_path: Path
) -> None:
    tensors = {
        **factors(Q, base[f"{Q}.weight"], 2),
        **factors(DOWN, base[f"{DOWN}.weight"], 3),
    }
    folder = write(tmp_path / "adapter", tensors, rank_pattern={"self_attn.q_proj": 2})
    by_hand = {
        f"{module}.weight": base[f"{module}.weight"] + 7 / rank * product(tensors, module)
        for module, rank in ((Q, 2), (DOWN, 3))
    }
    torch.testing.assert_close(
        load(GOLDEN / "ouro", adapter=folder)(TOKENS), expected(**by_hand), rtol=0, atol=1e-5
    )


def test_modules_that_are_stored_whole_take_the_place_of_the_base(
    both: dict[str, Tensor], base: dict[str, Tensor], tmp_path: Path
) -> None:
    head = draw(*base["lm_head.weight"].shape)
    tensors = {**both, "base_model.model.lm_head.weight": head}
    folder = write(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    assert torch.equal(load(GOLDEN / "ouro", adapter=folder).W_U, head.T)


def test_an_update_of_an_embedding_is_turned(base: dict[str, Tensor], tmp_path: Path) -> None:
    table, prefix = base["model.embed_tokens.weight"], "base_model.model.model.embed_tokens"
    tensors = {
        f"{prefix}.lora_embedding_A": draw(3, table.shape[0]),
        f"{prefix}.lora_embedding_B": draw(table.shape[1], 3),
    }
    folder = write(tmp_path / "adapter", tensors, target_modules=["embed_tokens"])
    a, b = tensors.values()
    torch.testing.assert_close(
        load(GOLDEN / "ouro", adapter=folder).W_E, table + (7 / 3) * (b @ a).T
    )


def test_the_sum_is_rounded_once_to_the_format_of_the_base(
    base: dict[str, Tensor], both: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(GOLDEN / "ouro", tmp_path / "narrow"))
    narrow = {key: tensor.bfloat16() for key, tensor in base.items()}
    save_file(narrow, folder / "model.safetensors")
    tensors = {key: tensor.bfloat16() for key, tensor in both.items()}
    model = load(folder, adapter=write(tmp_path / "adapter", tensors))
    wide = {key: tensor.float() for key, tensor in tensors.items()}
    sums = narrow[f"{DOWN}.weight"] + (7 / 3) * product(wide, DOWN)
    assert torch.equal(model.blocks[2].mlp.down.weight, sums.bfloat16())  # type: ignore[index]


def test_matrices_that_are_stored_input_first_are_met(tmp_path: Path) -> None:
    """GPT-2's, whose keys also lack the root that an adapter's paths have."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=29, n_layer=2, n_embd=15, n_head=3, n_positions=11, n_inner=20
    )
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(config).eval()
    plain.transformer.save_pretrained(tmp_path / "gpt2")
    module = "transformer.h.1.attn.c_proj"
    tensors = factors(module, torch.empty(15, 15), 3)
    folder = write(tmp_path / "adapter", tensors, target_modules=["c_proj"])
    model = load(tmp_path / "gpt2", window=(0, 0), n_loops=1, adapter=folder)
    with torch.no_grad():
        plain.transformer.h[1].attn.c_proj.weight += (7 / 3) * product(tensors, module).T
        tokens = TOKENS % 29
        torch.testing.assert_close(model(tokens), plain(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'; only LoRA adapters are"),
        ({"use_dora": True}, "use_dora must be False or None, got True; only plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be .*, got 'pissa'; other starts"),
        ({"layer_replication": [[0, 2]]}, "has the field 'layer_replication' .* could change what"),
        ({"trainable_token_indices": [3]}, "has the field 'trainable_token_indices'"),
        ({"r": 0}, "r and rank_pattern must be at least 1, got 0"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern must hold numbers"),
        ({"target_modules": ["q_proj", 3]}, "target_modules must be a list of names, got"),
        ({"target_modules": ["q_proj"]}, "holds factors of .*down_proj', which is none of the tar"),
        (
            {"target_modules": ["q_proj", "down_proj", "v_proj"]},
            "holds nothing of 'v_proj', which adapter_config.json names",
        ),
        ({"modules_to_save": ["lm_head"]}, "holds nothing of 'lm_head', which"),
        ({"r": 4}, r"factors of .* must have the shapes \[4, in\] and \[out, 4\], got \[3, 24\]"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    changes: dict[str, Any], match: str, both: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(GOLDEN / "ouro", adapter=write(tmp_path / "adapter", both, **changes))
    assert "ignore=" not in str(caught.value)


def test_factors_that_do_not_fit_the_base_are_refused(
    base: dict[str, Tensor], both: dict[str, Tensor], tmp_path: Path
) -> None:
    one = factors("model.layers.9.self_attn.q_proj", base[f"{Q}.weight"], 3)
    with pytest.raises(CheckpointError, match=r"the release holds no 'model\.layers\.9\."):
        load(GOLDEN / "ouro", adapter=write(tmp_path / "a", {**both, **one}))
    wrong = factors(DOWN, torch.empty(24, 39), 3)
    with pytest.raises(CheckpointError, match=r"must fit a tensor of the shape \[24, 40\]"):
        load(GOLDEN / "ouro", adapter=write(tmp_path / "b", {**both, **wrong}))
    half = {key: tensor for key, tensor in both.items() if f"{Q}.lora_A" not in key}
    with pytest.raises(CheckpointError, match=r"must hold both factors of .*q_proj"):
        load(GOLDEN / "ouro", adapter=write(tmp_path / "c", half))


def test_an_adapter_is_a_folder_beside_its_base(both: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", both)
    with pytest.raises(CheckpointError, match=r"holds an adapter and not a model; .* and adapter="):
        load(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        load(GOLDEN / "ouro", adapter=tmp_path)
    save(toy_model(), tmp_path / "own")
    with pytest.raises(CheckpointError, match="no adapter= is taken for a checkpoint of this"):
        load(tmp_path / "own", adapter=folder)
