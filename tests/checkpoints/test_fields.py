"""The rule for config fields: read, known to change nothing, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.fields.harmless import COMMON
from loopscope.checkpoints.load import load, save
from loopscope.checkpoints.tables import TABLES
from loopscope.models.core.base import LoopedModel
from paths import GOLDEN
from release_files import toy_model, write_release

OF_CASE = {"training_free_llama": {"window": (1, 3)}, "training_free_qwen3": {"window": (1, 3)}}
CASES = (
    "albert",
    "hrm_text",
    "huginn",
    "nanbeige",
    "ouro",
    "parcae",
    "retrofit_llama",
    "retrofit_olmo",
    "smollm",
    "spiral",
    *OF_CASE,
)
EVERYWHERE: dict[str, Any] = {
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_autoset": True,
    "_name_or_path": "someone/else",
    "_num_labels": 1,
    "attn_implementation": "sdpa",
    "begin_suppress_tokens": None,
    "do_sample": True,
    "gradient_checkpointing": False,
    "hidden_dropout_prob": 0.1,
    "id2label": {"0": "LABEL_0"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "is_llama_config": True,
    "label2id": {"LABEL_0": 0},
    "layer_types": ["full_attention"] * 6,
    "max_sequence_length": 2048,
    "num_beams": 1,
    "of_a_later_version": None,
    "quantization_config": None,
    "rltt_gamma": 0.9,
    "rope_interleaved": False,
    "sep_token_id": 3,
    "temperature": 0.6,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "transformers.js_config": {"dtype": "q4"},
    "unsloth_fixed": True,
    "unsloth_version": "2026.9.1",
    "use_sliding_window": False,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "huginn": {"rope_theta": 50000.0, "sliding_window": 512},
    "nanbeige": {
        "kv_channels": 128,
        "rope_parameters": {"rope_theta": 70000, "rope_type": "default"},
    },
    "ouro": {
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": 4096,
        "chunk_size": 2,
    },
    "retrofit_llama": {"rope_parameters": {"rope_theta": 10000.0}},
    "training_free_llama": {"sliding_window": 4096},
}


def logits_of(model: LoopedModel) -> torch.Tensor:
    tokens = torch.randint(1, 19, (3, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(tokens, mask=torch.ones_like(tokens), n_loops=3)


@pytest.mark.parametrize("case", CASES)
def test_fields_that_change_nothing_are_passed_over(
    case: str, folder_with: Callable[..., Path], tmp_path: Path
) -> None:
    own = json.loads((GOLDEN / case / "config.json").read_text())
    folder = folder_with(case, {})
    added = {
        name: value
        for name, value in {**EVERYWHERE, **OF_FAMILY.get(case, {})}.items()
        if name not in own
    }
    (folder / "config.json").write_text(json.dumps({**added, **own}))
    options = OF_CASE.get(case, {})
    model, plain = load(folder, **options), load(GOLDEN / case, **options)
    assert model.cfg == plain.cfg
    assert torch.equal(logits_of(model), logits_of(plain))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", 16),
        ("rope_interleaved", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("is_decoder", True),
        ("quantization_config", {"bits": 4}),
        ("use_mrope", 0),
        ("residual_multiplier", 0.5),
        ("attention_multiplier", 1.0),
    ],
)
def test_a_field_that_could_change_a_result_is_refused_with_such_a_value(
    name: str, value: object, folder_with: Callable[..., Path]
) -> None:
    folder = folder_with("training_free_llama", {name: value})
    with pytest.raises(CheckpointError, match=rf"has the field '{name}' .* could change what"):
        load(folder, window=(1, 3))


def test_all_unknown_fields_are_named_and_can_be_ignored(folder_with: Callable[..., Path]) -> None:
    folder = folder_with("ouro", {"warp": 2, "twist": [1], "use_sliding_window": True})
    with pytest.raises(CheckpointError, match="use_sliding_window must be False"):
        load(folder, ignore=["warp", "twist"])
    with pytest.raises(
        CheckpointError,
        match=r"has the field 'twist' .*and so are 'warp'.*ignore=\('twist', 'warp'\)",
    ):
        load(folder, ignore=("use_sliding_window",))
    model = load(folder, ignore=("warp", "twist", "use_sliding_window"))
    assert torch.equal(logits_of(model), logits_of(load(GOLDEN / "ouro")))


def test_what_is_ignored_must_be_there_and_be_a_list(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no field 'warp', so ignore= cannot name it"):
        load(GOLDEN / "ouro", ignore=("warp",))
    with pytest.raises(TypeError, match="ignore= must be a list of names of fields, got 'warp'"):
        load(GOLDEN / "ouro", ignore="warp")
    with pytest.raises(CheckpointError, match="lacks the field 'total_ut_steps'"):
        load(GOLDEN / "ouro", ignore=("total_ut_steps",))
    save(toy_model(), tmp_path / "own")
    for source in (tmp_path / "own", write_release(tmp_path / "a.pt")):
        with pytest.raises(CheckpointError, match="no ignore= is taken for a checkpoint of this"):
            load(source, n_heads=5, input_injection=False, ignore=("warp",))


def test_every_harmless_field_has_one_reason() -> None:
    for table in TABLES:
        names = [name for names in table.harmless.values() for name in names]
        assert len(set(names)) == len(names)
        assert not set(names) & {name for names in COMMON.values() for name in names}
    assert all(reason and names for reason, names in COMMON.items())
