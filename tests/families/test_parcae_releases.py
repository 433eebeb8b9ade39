"""Parcae's releases: their files and fields, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from golden_cases import GOLDEN, GoldenCase
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.checkpoints.tables.parcae import TABLE as RELEASE
from loopscope.models.core.registry import build
from loopscope.models.families.parcae import ParcaeConfig
from references.parcae import made, tokens_of
from toy import assert_close, is_close


def the_case() -> GoldenCase:
    return GoldenCase("parcae", begin={"state": "init_state"})


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
        build(case.model.cfg).rotation.freqs_cis, case.model.rotation.freqs_cis
    )
    assert not is_close(build(other.cfg).rotation.freqs_cis, case.model.rotation.freqs_cis)


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
