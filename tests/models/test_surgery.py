"""Blocks and configs that are replaced after a call: the next run is by the new ones."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from family_toys import TOYS
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.views import unrolled, untied
from toy import LOOPS, random_tokens, randomize_, toy


def test_a_block_that_is_replaced_after_a_call_runs(plain: RecurrentDepth) -> None:
    tokens = random_tokens()
    before = plain(tokens)
    other = randomize_(copy.deepcopy(plain), seed=1)
    plain.blocks[0] = other.blocks[0]
    fresh = toy()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(plain(tokens), fresh(tokens))
    assert not torch.allclose(plain(tokens), before)


def test_a_list_of_blocks_that_is_replaced_or_grows_runs(plain: RecurrentDepth) -> None:
    tokens = random_tokens()
    plain(tokens)
    plain.blocks.append(copy.deepcopy(plain.blocks[0]))
    assert len(plain.schedule(LOOPS)) == 3 * LOOPS
    assert "loops.1.blocks.2.hook_resid_post" in plain.hook_names(2)
    plain.blocks = nn.ModuleList([plain.blocks[2]])
    assert [visit.block for visit in plain.schedule(2)] == [plain.blocks[0]] * 2
    assert "loops.1.blocks.2.hook_resid_post" not in plain.hook_names(2)
    assert plain(tokens).isfinite().all()


def test_a_block_in_a_nested_list_is_noticed() -> None:
    model = TOYS["albert_groups"].make()
    model.schedule(2)
    model.groups[0][1] = copy.deepcopy(model.groups[1][0])
    assert model.schedule(2)[1].block is model.groups[0][1]


def test_a_config_that_is_replaced_is_noticed() -> None:
    model = TOYS["training_free"].make()
    model.schedule(2)
    model.cfg = replace(model.cfg, window=(0, 1))
    assert [v.layer for v in model.schedule(1) if v.loop == 0] == [0, 1]


def test_an_untied_copys_block_that_is_replaced_is_noticed(plain: RecurrentDepth) -> None:
    twin = untied(plain, 2)
    twin(random_tokens())
    twin.visit_blocks[3] = copy.deepcopy(twin.visit_blocks[0])
    assert twin.schedule(2)[3].block is twin.visit_blocks[3]


def test_a_view_of_blocks_that_are_gone_is_refused(plain: RecurrentDepth) -> None:
    view = unrolled(plain, 2)
    plain.blocks[1] = copy.deepcopy(plain.blocks[0])
    with pytest.raises(ValueError, match=r"blocks .* were replaced after unrolled"):
        view(random_tokens())


def test_a_schedule_is_kept_while_nothing_changes(plain: RecurrentDepth) -> None:
    schedule = plain.schedule(LOOPS)
    plain.run_with_cache(random_tokens(), n_loops=7)
    assert plain.schedule(LOOPS) is schedule
