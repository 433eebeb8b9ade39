"""A looped module of one's own as a family: the page's example, and what wrong declarations say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import loopscope
from family_toys import position_solver
from loopscope.analyses.trials import tiny
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.registry import FAMILIES
from loopscope.models.core.state import Visit
from loopscope.models.families.recurrent_depth import RecurrentDepth
from paths import DOCS
from toy import assert_close, odd_one

BLOCKS = re.findall(
    r"```python\n(.*?)```", (DOCS / "your_model.md").read_text(encoding="utf-8"), flags=re.S
)
SIZES: dict[str, Any] = {"n_layers": 2, "n_loops": 3, "d_model": 15, "n_heads": 3, "d_mlp": 22}


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the page's examples leave behind, run in order."""
    names: dict[str, Any] = {}
    before = dict(FAMILIES)
    for number, block in enumerate(BLOCKS):
        code = compile(block, f"your_model.md, block {number}", "exec", dont_inherit=True)
        exec(code, names)
    yield names
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.fixture
def registry() -> Iterator[None]:
    """Forget the families that a test adds."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def test_the_family_of_the_page_has_under_40_lines() -> None:
    lines = [
        x for x in BLOCKS[0].splitlines() if x.strip() and not x.startswith(("from", "import"))
    ]
    assert len(lines) < 40


def test_a_cell_of_the_page_is_a_run_with_that_patch(page: dict[str, Any]) -> None:
    model, clean, corrupted = page["model"], page["clean"], page["corrupted"]
    _, cache = model.run_with_cache(clean)
    sweep = page["sweep"]
    assert len(sweep.cells) == 3 * 2 * 7
    for index in (8, 29, 41):
        cell = sweep.cells[index]

        def patch(value: Tensor, hook: object, cell: Any = cell) -> Tensor:
            value = value.clone()
            value[:, cell.position] = cache[cell.name][:, cell.position]
            return value

        with torch.no_grad():
            logits = model.run_with_hooks(corrupted, fwd_hooks=[(cell.name, patch)])
        assert_close(sweep.values[index], page["metric"](logits[:, -1]))


def test_a_readout_of_the_page_is_a_shorter_call(page: dict[str, Any]) -> None:
    with torch.no_grad():
        top = [page["model"](page["clean"], n_loops=r)[:, -1].argmax(-1) for r in (1, 2, 3)]
    assert torch.equal(page["lens"].top(1).tokens[..., 0].view(3, -1), torch.stack(top))


def test_the_wrapped_module_of_the_page_is_asked_the_same(page: dict[str, Any]) -> None:
    cache, lens, sweep = page["cache"], page["wrapped_lens"], page["wrapped_sweep"]
    assert page["logits"].shape == (4, 7, 29)
    assert cache["resid_post", 2, 1].shape == (4, 7, 15)
    assert "loops.1.blocks.0.hook_ff" in page["wrapped"].hook_names()
    said = page["logits"][:, -1].argmax(-1)
    assert torch.equal(lens.top(1).tokens[-1, :, 0], said)
    assert [cell.name for cell in sweep.cells] == [cell.name for cell in page["sweep"].cells]
    assert_close(sweep.values[-1], page["metric"](page["logits"][:, -1]))
    assert page["dory"]["blocks"] == "model.layers[4:10]"


def lying(page: dict[str, Any], **declared: Any) -> LoopedModel:
    """The page's model under a class that declares otherwise."""
    kind = type("Lying", (page["Mine"],), declared)
    torch.manual_seed(0)
    model: LoopedModel = kind(page["MineConfig"](**SIZES, d_vocab=29)).eval()
    return model


def test_a_block_with_attention_of_its_own_gets_a_sentence(page: dict[str, Any]) -> None:
    model = lying(page, rowwise=True)
    words = r"'loops\.0\.blocks\.0' does not call rows\.attend.*`rowwise = False`"
    with pytest.raises(ValueError, match=words):
        loopscope.check_family(model)
    with pytest.raises(ValueError, match=words):
        loopscope.activation_patch(
            model, page["clean"], page["corrupted"], page["metric"], readout=-1
        )


def mixed(self: Any, tokens: Tensor, positions: Tensor, taps: Any) -> Any:
    embedded, parts = type(self).__mro__[1].embed(self, tokens, positions, taps)
    return embedded + embedded.mean(0), parts


def foreseen(self: Any, tokens: Tensor, positions: Tensor, taps: Any) -> Any:
    embedded, parts = type(self).__mro__[1].embed(self, tokens, positions, taps)
    return embedded + embedded.mean(1, keepdim=True), parts


def ahead(self: Any, n_loops: int) -> list[Any]:
    return type(self).__mro__[1].plan(self, n_loops)[: 2 * n_loops - 1][::-1]


def unvisited(self: Any) -> Any:
    return ("hook_embed", "hook_pos_embed"), ()


def doubled(self: Any, n_loops: int) -> list[Any]:
    return 2 * type(self).__mro__[1].plan(self, n_loops)


def shorter(self: Any, n_loops: int) -> list[Any]:
    return type(self).__mro__[1].plan(self, n_loops - 1)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"embed": mixed}, "batch_independent is declared"),
        ({"embed": foreseen}, "causal is declared"),
        ({"plan": ahead}, "prefix_readout is declared"),
        ({"edge_sites": unvisited}, "nothing passes through the declared site 'hook_pos_embed'"),
        ({"lens_site": "hook_out"}, "lens_site names 'loops.0.blocks.0.hook_out'"),
        ({"plan": doubled}, "'loops.0.blocks.0.hook_resid_pre' stands for two places"),
        ({"plan": shorter}, "no block in iteration 2 of 3"),
    ],
)
def test_a_declaration_that_does_not_hold_is_one_sentence(
    page: dict[str, Any], declared: dict[str, Any], words: str
) -> None:
    model = lying(page, **declared)
    with pytest.raises(ValueError, match=words):
        loopscope.check_family(model)
    assert not model.training
    assert not model.any_hook()


class Neighbours(RecurrentDepth):
    """Reads earlier positions outside attention."""

    rowwise = False  # type: ignore[assignment]  # a fact for a property

    def enter(self, visit: Visit, resid: Tensor, parts: Any, taps: Any) -> tuple[Tensor, Any]:
        return super().enter(visit, resid + resid.cumsum(1), parts, taps)


def test_a_family_that_must_say_how_it_generates_is_told() -> None:
    with pytest.raises(ValueError, match="`extend` is inherited, but a token that is run"):
        loopscope.check_family(odd_one(Neighbours))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_of_the_project_is_what_it_declares(name: str) -> None:
    loopscope.check_family(tiny(name))


def test_a_solver_with_an_mlp_along_positions_is_what_it_declares() -> None:
    model = position_solver(n_ctx=7)
    assert (tiny("trm").rowwise, model.rowwise) == (True, False)
    loopscope.check_family(model)


@pytest.mark.usefixtures("registry")
def test_what_no_family_can_be_is_refused_where_it_is_registered(page: dict[str, Any]) -> None:
    class Nameless(LoopedConfig):
        pass

    class Taken(LoopedConfig):
        family: ClassVar[str] = "ouro"

    class Bare(LoopedModel):
        pass

    with pytest.raises(ValueError, match="Nameless must name its family"):
        loopscope.register(Nameless)(page["Mine"])
    with pytest.raises(ValueError, match="'ouro' is Ouro"):
        loopscope.register(Taken)(page["Mine"])
    with pytest.raises(TypeError, match="must define plan, edge_sites, embed"):
        loopscope.register(page["MineConfig"])(type("Mine", (Bare,), {"__qualname__": "Mine"}))
    wrong = type("Mine", (page["Mine"],), {"rowwise": "no", "__qualname__": "Mine"})
    with pytest.raises(TypeError, match="rowwise must be True or False, got 'no'"):
        loopscope.register(page["MineConfig"])(wrong)
    with pytest.raises(TypeError, match=r"extends LoopedModel|parameter 'model'"):
        loopscope.register(page["MineConfig"])(torch.nn.Linear)
