"""Weights with wrong keys, shapes or values: each is refused in one sentence that names the
tensor.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from release_files import FACTS, check_refused, release_tensors, write_release

Tensors = dict[str, Tensor]
FC = "blocks.1.mlp.c_fc.weight"


def changed(**values: Tensor | None) -> Tensors:
    """Toy tensors with some replaced, added, or (None) left out; two underscores stand for a
    dot.
    """
    tensors: dict[str, Tensor | None] = {
        **release_tensors(),
        **{name.replace("__", "."): value for name, value in values.items()},
    }
    return {name: value for name, value in tensors.items() if value is not None}


# Keys, shapes and values


@pytest.mark.parametrize(
    "key", ["ln_f.bias", "blocks.0.attn.c_proj.weight", "blocks.1.mlp.c_proj.bias"]
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{key: None}))
    match = (
        r"a\.pt lacks 1 key\(s\) of a recurrent_depth model with 2 layers, first"
        rf" '{re.escape(key)}'"
    )
    check_refused(path, match, within=tmp_path, **FACTS)


@pytest.mark.parametrize("key", ["token_embedding.weight", "blocks.0.mlp.c_fc.weight"])
def test_a_missing_key_that_the_sizes_are_told_from_is_named(tmp_path: Path, key: str) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{key: None}))
    check_refused(
        path,
        rf"a\.pt lacks the matrix '{re.escape(key)}', so the model's sizes cannot be told",
        within=tmp_path,
        **FACTS,
    )


def test_a_whole_missing_block_is_noticed(tmp_path: Path) -> None:
    tensors = {
        key.replace("blocks.1.", "blocks.2."): value for key, value in release_tensors().items()
    }
    check_refused(
        write_release(tmp_path / "a.pt", tensors),
        r"lacks 12 key\(s\) .*with 3 layers, first 'blocks\.1\.ln_1",
        within=tmp_path,
        **FACTS,
    )


@pytest.mark.parametrize(
    "key",
    [
        "extra",
        "blocks.0.attn.rotary.freqs",
        "blocks.1.attn.bias2",
        "blocks.extra.weight",
        "module.ln_f.weight",
    ],
)
def test_an_unexpected_key_is_named(tmp_path: Path, key: str) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{key: torch.zeros(3)}))
    match = (
        rf"a\.pt has 1 unexpected key\(s\), first '{re.escape(key)}'; a recurrent_depth model has"
        r" none of that name"
    )
    check_refused(path, match, within=tmp_path, **FACTS)


def test_two_position_tables_are_refused(tmp_path: Path) -> None:
    tables = {"pe": torch.zeros(7, 15), "position_embedding.weight": torch.zeros(7, 15)}
    check_refused(
        write_release(tmp_path / "a.pt", changed(**tables)),
        "unexpected key|pe.*position_embedding",
        within=tmp_path,
        **FACTS,
    )


@pytest.mark.parametrize(
    ("key", "found", "expected"),
    [
        (FC, (15, 61), "[15, 60]"),
        (FC, (60, 15), "[15, 60]"),
        (FC, (1, 15, 60), "[15, 60]"),
        ("blocks.0.attn.c_attn.weight", (15, 44), "[15, 45]"),
        ("blocks.1.ln_2.bias", (16,), "[15]"),
        ("ln_f.weight", (), "[15]"),
        ("position_embedding.weight", (7, 14), "[7, 15]"),
    ],
)
def test_a_wrong_shape_is_named_with_the_right_one(
    tmp_path: Path, key: str, found: tuple[int, ...], expected: str
) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{key: torch.zeros(found)}))
    match = re.escape(f"{key!r} must have the shape {expected}, got {list(found)}")
    check_refused(path, match, within=tmp_path, **FACTS)


@pytest.mark.parametrize("key", ["pe", "position_embedding.weight"])
@pytest.mark.parametrize("found", [(), (7,), (7, 15, 1)])
def test_a_position_table_that_is_no_matrix_is_named(
    tmp_path: Path, key: str, found: tuple[int, ...]
) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{key: torch.zeros(found)}))
    check_refused(
        path,
        rf"'{re.escape(key)}' must have the shape \[.*15\], got {re.escape(str(list(found)))}",
        within=tmp_path,
        **FACTS,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [FC, "ln_f.bias", "token_embedding.weight"])
def test_weights_that_are_not_finite_are_counted(tmp_path: Path, key: str, value: float) -> None:
    tensors = release_tensors()
    tensors[key].view(-1)[[0, 4]] = value
    match = re.escape(f"{key!r} holds 2 value(s) that are NaN or infinite")
    check_refused(write_release(tmp_path / "a.pt", tensors), match, within=tmp_path, **FACTS)


def test_the_last_value_of_a_large_matrix_is_looked_at_too(tmp_path: Path) -> None:
    tensors = release_tensors(d_mlp=80_000, n_layers=1)
    tensors["blocks.0.mlp.c_fc.weight"][-1, -1] = float("nan")
    path = write_release(tmp_path / "a.pt", tensors, optimizer_state_dict={})
    check_refused(
        path,
        r"'blocks\.0\.mlp\.c_fc\.weight' holds 1 value\(s\) that are NaN or infinite",
        within=tmp_path,
        **FACTS,
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = write_release(tmp_path / "a.pt", changed(**{FC: torch.ones(15, 60, dtype=dtype)}))
    check_refused(
        path,
        re.escape(f"{FC!r} must hold floating-point numbers, got {dtype}"),
        within=tmp_path,
        **FACTS,
    )


@pytest.mark.parametrize("n_heads", [2, 4, 7, 16])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path, n_heads: int) -> None:
    match = (
        rf"n_heads must divide d_model: {n_heads} heads do not divide d_model=15; pass one of \[1,"
        r" 3, 5, 15\]"
    )
    check_refused(
        write_release(tmp_path / "a.pt"),
        match,
        error=ValueError,
        within=tmp_path,
        n_heads=n_heads,
        input_injection=False,
    )


def test_a_mixture_of_number_formats_is_refused(tmp_path: Path) -> None:
    tensors = release_tensors()
    tensors["ln_f.bias"] = tensors["ln_f.bias"].double()
    path = write_release(tmp_path / "a.pt", tensors)
    check_refused(
        path,
        r"a\.pt mixes the number formats \['torch.float32', 'torch.float64'\]",
        within=tmp_path,
        **FACTS,
    )


def test_a_key_with_and_without_its_prefix_is_refused(tmp_path: Path) -> None:
    tensors = release_tensors()
    path = write_release(
        tmp_path / "a.pt", {**tensors, "_orig_mod.ln_f.bias": tensors["ln_f.bias"]}
    )
    check_refused(
        path, r"a\.pt holds some keys both with and without the prefix", within=tmp_path, **FACTS
    )


# Against our own config.json


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"n_layers": 3},
            r"model\.safetensors lacks 12 key\(s\) .* with 3 layers, first 'blocks\.2\.ln1\.w'",
        ),
        ({"n_layers": 1}, r"has 12 unexpected key\(s\), first 'blocks\.1\."),
        ({"d_mlp": 61}, r"'blocks\.0\.mlp\.W_in' must have the shape \[15, 61\], got \[15, 60\]"),
        ({"d_vocab": 12}, r"'embedding' must have the shape \[12, 15\], got \[11, 15\]"),
        ({"n_ctx": 8}, r"'W_pos' must have the shape \[8, 15\], got \[7, 15\]"),
        ({"positions": "none", "n_ctx": None}, r"has 1 unexpected key\(s\), first 'W_pos'"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(
    own: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    values = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**values, **changes}))
    check_refused(own, match, within=tmp_path)
