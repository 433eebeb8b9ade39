"""The real config fields of public releases load; with a reference class, to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loopscope.checkpoints.load import load
from loopscope.checkpoints.remote import remote_releases
from loopscope.checkpoints.tables import TABLES
from release_configs import (
    PAGE,
    page,
    reference_class,
    release_configs,
    write_reference,
    write_release_of,
)

CONFIGS = release_configs()
FAMILIES = {table.family for table in TABLES} | {"retrofit", "ordinary_models"}
WITH = [name for name, (_, fields) in CONFIGS.items() if reference_class(fields)]
TOKENS = torch.randint(2, 37, (3, 13), generator=torch.Generator().manual_seed(1))


def options_of(stem: str) -> dict[str, Any]:
    """An ordinary model is the same model when its window is visited once."""
    return {"window": (1, 2), "n_loops": 1} if stem == "ordinary_models" else {}


def test_every_release_that_is_listed_has_its_fields_here() -> None:
    """The puzzle solvers' fields, which stand in a YAML file, are in test_puzzle_solvers.py."""
    listed = {
        each.name
        for each in remote_releases()
        if not each.on_drive and each.family not in ("trm", "hrm")
    }
    assert listed <= set(CONFIGS)


@pytest.mark.parametrize("name", WITH)
def test_logits_are_those_of_the_reference_class(name: str, tmp_path: Path) -> None:
    stem, fields = CONFIGS[name]
    if stem not in FAMILIES:
        pytest.skip(f"the family of {name} is not installed")
    theirs = write_reference(fields, tmp_path)
    ours = load(tmp_path, vocab=False, **options_of(stem))
    with torch.no_grad():
        logits = ours(TOKENS, mask=torch.ones_like(TOKENS))
        expected = theirs(TOKENS).logits
    error = float((logits - expected[..., : logits.shape[-1]]).abs().max() / expected.abs().max())
    assert error <= 5e-5


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in WITH])
def test_fields_without_a_reference_class_load_as_the_model_they_describe(
    name: str, tmp_path: Path
) -> None:
    stem, fields = CONFIGS[name]
    built = write_release_of(name, stem, fields, tmp_path)
    model = load(tmp_path)
    assert model.cfg == built.cfg
    with torch.no_grad():
        logits = model(TOKENS, n_loops=2)
        assert torch.equal(logits, built.eval()(TOKENS, n_loops=2))
    assert bool(logits.isfinite().all())


def test_the_page_says_which_releases_have_a_reference_class() -> None:
    """`python tests/helpers/release_configs.py` writes it."""
    assert PAGE.read_text(encoding="utf-8") == page()
    assert "| Ouro-1.4B | no reference |" in page()
    assert "| gpt2 | yes, to `GPT2LMHeadModel` |" in page()
