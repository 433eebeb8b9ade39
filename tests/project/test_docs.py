"""The documents say what the code does."""

from __future__ import annotations

import re

import pytest

from loopscope.models.core.registry import build
from loopscope.models.families.recurrent_depth import Positions, RecurrentDepthConfig
from paths import ROOT


def _documented() -> dict[str, str]:
    table = (
        (ROOT / "docs" / "hooks.md")
        .read_text(encoding="utf-8")
        .partition("## Names that other families add")[0]
    )
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|", table, flags=re.M))


@pytest.mark.parametrize("positions", ["none", "learned"])
@pytest.mark.parametrize("injection", [False, True])
def test_every_hook_is_documented_with_its_shape(positions: Positions, injection: bool) -> None:
    import torch

    model = build(
        RecurrentDepthConfig(
            n_layers=2, d_model=15, n_heads=5, d_mlp=11, d_vocab=13, positions=positions,
            n_ctx=9 if positions != "none" else None, input_injection=injection,
        )
    )  # fmt: skip
    tokens = torch.randint(1, 13, (4, 7))
    _, cache = model.run_with_cache(tokens, n_loops=3, names_filter="**")
    sizes = {
        "batch": 4,
        "pos": 7,
        "query": 7,
        "key": 7,
        "head": 5,
        "d_head": 3,
        "d_model": 15,
        "d_mlp": 11,
        "1": 1,
    }
    documented = _documented()
    for name in model.hook_names(3):
        general = re.sub(r"blocks\.\d+", "blocks.{l}", re.sub(r"loops\.\d+", "loops.{t}", name))
        assert list(cache[name].shape) == [sizes[axis] for axis in documented[general].split()], (
            name
        )


def test_every_documented_hook_exists() -> None:
    general = set()
    for injection in (False, True):
        model = build(
            RecurrentDepthConfig(
                n_layers=1,
                d_model=6,
                n_heads=2,
                d_mlp=5,
                d_vocab=7,
                positions="learned",
                n_ctx=4,
                input_injection=injection,
            )
        )
        general |= {
            re.sub(r"blocks\.\d+", "blocks.{l}", re.sub(r"loops\.\d+", "loops.{t}", n))
            for n in model.hook_names(2)
        }
    assert set(_documented()) == general


def test_every_runtime_dependency_has_its_reason() -> None:
    import configparser

    parser = configparser.ConfigParser(comment_prefixes=(";",))
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["install_requires"].strip().splitlines()
    assert len(lines) % 2 == 0
    assert all(reason.startswith("# ") for reason in lines[::2])
    assert all(
        re.match(r"[A-Za-z_-]+>=[\d.]+,<[\d.]+$", requirement) for requirement in lines[1::2]
    )


def test_links_in_the_documents_point_at_files() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), (
                f"{page.name}: {target}"
            )
