"""The identities of every family, on its toy model in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from family_toys import BATCH, HEAD, LOOPS, POS, POSITION, TOYS, Toy, full, padded
from loopscope.checkpoints.load import load, save
from loopscope.interp.attribution.gradients import gradients
from loopscope.interp.common.cells import HEAD_AXIS
from loopscope.interp.common.inputs import begin_batch
from loopscope.interp.dynamics.answered import dynamics_and_lens
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.cache import position_axis, site_of
from loopscope.models.core.registry import config_from_dict
from loopscope.models.core.state import cat_states
from loopscope.models.views import untied
from toy import assert_close, hook_count, is_close, noise, put, row_each

# further options of a family whose blocks and schedule another toy has too
AGAIN = {"hrm_text_prefix", "melt_raw", "retrofit_olmo", "albert_groups", "training_free_blend"}
Families = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in AGAIN else ()) for name in TOYS],
)
ROWS = 12


@pytest.fixture
def toy(name: str) -> Toy:
    return TOYS[name]


@pytest.fixture
def model(toy: Toy) -> LoopedModel:
    return toy.make().requires_grad_(False)


def run(model: LoopedModel, batch: Batch, n_loops: int = LOOPS) -> Tensor:
    return model(batch.tokens, n_loops=n_loops, mask=batch.mask, **batch.options)


def run_hooked(
    model: LoopedModel,
    batch: Batch,
    name: str,
    hook: Callable[..., Tensor | None],
    n_loops: int = LOOPS,
) -> Tensor:
    with model.hooks([(name, hook)], n_loops=n_loops):
        return run(model, batch, n_loops)


def cached(model: LoopedModel, batch: Batch, n_loops: int = LOOPS) -> dict[str, Tensor]:
    return dict(
        model.run_with_cache(
            batch.tokens, n_loops=n_loops, mask=batch.mask, names_filter="**", **batch.options
        )[1]
    )


def one_place(name: str) -> tuple[slice | int, ...]:
    """One position that is not the last, and one head where the site has heads."""
    head_axis = HEAD_AXIS.get(site_of(name))
    if head_axis is None:
        return slice(None), POSITION
    return (slice(None), POSITION, HEAD) if head_axis == 2 else (slice(None), HEAD, POSITION)


def every_site(model: LoopedModel) -> list[str]:
    """The first and the last point of each site inside the loop, and outside it."""
    names = model.hook_names(2)
    first = {(name.split(".")[0], site_of(name)): name for name in reversed(names)}
    last = {(name.split(".")[0], site_of(name)): name for name in names}
    return [name for name in names if name in {*first.values(), *last.values()}]


def projection(logits: Tensor) -> Tensor:
    return logits @ torch.randn(
        logits.shape[-1], generator=torch.Generator().manual_seed(5), dtype=logits.dtype
    )


@Families
def test_every_point_is_called_once_in_the_order_of_the_names(toy: Toy, model: LoopedModel) -> None:
    batch = full(toy, model)
    values = cached(model, batch)
    assert list(values) == model.hook_names(LOOPS)
    for name, value in values.items():
        assert value.shape[0] == BATCH, name
        assert value.shape[position_axis(name)] == POS, name


def own_row(name: str, row: int) -> tuple[slice | int, ...]:
    return row, *one_place(name)[1:]


@Families
def test_a_patch_of_one_place_changes_nothing_by_its_own_value_and_something_by_another(
    toy: Toy, model: LoopedModel
) -> None:
    """One run changes one row at each of many sites."""
    assert model.batch_independent
    batch, seen = padded(toy, model, rows=ROWS), dict[str, Tensor]()

    def patched(change: Callable[..., Tensor | None]) -> Tensor:
        hooks = [(name, partial(change, name=name, row=row)) for name, row in rows.items()]
        with model.hooks(hooks, n_loops=2):
            return run(model, batch, 2)

    def keep(value: Tensor, hook: object, name: str, row: int) -> None:
        assert name not in seen
        seen[name] = value.clone()

    def own(value: Tensor, hook: object, name: str, row: int) -> Tensor:
        return put(seen[name], own_row(name, row))(value, hook)

    def other(value: Tensor, hook: object, name: str, row: int) -> Tensor:
        return noise(value, own_row(name, row))

    for rows in row_each(every_site(model), ROWS):
        logits = patched(keep)
        assert torch.equal(patched(own), logits), list(rows)
        disturbed = patched(other)
        for name, row in rows.items():
            if site_of(name) in toy.unread:
                assert is_close(disturbed[row], logits[row]), name
            else:
                assert not torch.equal(disturbed[row], logits[row]), name


@Families
def test_hooks_that_return_none_change_nothing_and_errors_leave_no_hook(
    toy: Toy, model: LoopedModel
) -> None:
    batch = padded(toy, model)
    logits, before = run(model, batch), hook_count(model)
    with model.hooks([("**", lambda value, hook: None)], n_loops=LOOPS):
        assert_close(run(model, batch), logits)

    def explode(value: Tensor, hook: object) -> None:
        raise RuntimeError("a hook failed")

    for name in model.hook_names(2)[::17]:
        with pytest.raises(RuntimeError, match="a hook failed"):
            run_hooked(model, batch, name, explode, 2)
        assert hook_count(model) == before


@Families
def test_untied_copy_has_the_same_activations_patched_logits_and_gradients(
    toy: Toy, model: LoopedModel
) -> None:
    batch, twin = padded(toy, model), untied(model, 2)
    values, grads = gradients(model, batch, projection, "**", 2)
    twin_values, twin_grads = gradients(twin, batch, projection, "**", 2)
    assert list(grads) == list(twin_grads) == model.hook_names(2)
    for name in grads:
        assert_close(twin_values[name], values[name])
        assert_close(twin_grads[name], grads[name])
    batch = padded(toy, model, rows=ROWS)
    source = cached(model, padded(toy, model, seed=1, rows=ROWS), 2)
    for rows in row_each(model.hook_names(2), ROWS):
        hooks = [(name, put(source[name], own_row(name, row))) for name, row in rows.items()]
        with model.hooks(hooks, n_loops=2), twin.hooks(hooks, n_loops=2):
            assert_close(run(twin, batch, 2), run(model, batch, 2))


@Families
def test_untied_weight_gradients_sum_to_the_tied_ones(toy: Toy) -> None:
    model = toy.make()
    twin, batch = untied(model, 2), full(toy, model)
    for one in (model, twin):
        projection(run(one, batch, 2)[:, -1]).sum().backward()
    copies: dict[int, list[Tensor]] = {}
    assert twin.visit_blocks is not None
    for visit, block in zip(model.schedule(2), twin.visit_blocks, strict=True):
        for (_, tied), (_, copy) in zip(
            visit.block.named_parameters(), block.named_parameters(), strict=True
        ):
            if copy.grad is not None:
                copies.setdefault(id(tied), []).append(copy.grad)
    tied_by_id = {id(parameter): parameter for parameter in model.parameters()}
    assert copies
    for key, parts in copies.items():
        assert_close(torch.stack(parts).sum(0), tied_by_id[key].grad)


@Families
def test_stopping_cutting_joining_and_resuming_equals_the_full_run(
    toy: Toy, model: LoopedModel
) -> None:
    batch = padded(toy, model)
    logits = run(model, batch)
    state = begin_batch(model, batch, LOOPS)
    for visit in model.schedule(LOOPS):
        state = model.advance(state, visit.index)
        swapped = cat_states([state.rows(slice(1, None)), state.rows(torch.tensor([0]))])
        assert_close(model.readout(model.advance(swapped)), logits[[1, 2, 0]])
    assert_close(model.readout(model.advance(state)), logits)


@Families
def test_later_rows_with_supplied_keys_equal_the_full_run(toy: Toy, model: LoopedModel) -> None:
    batch, store = full(toy, model), {}
    model.advance(begin_batch(model, batch, LOOPS), store=store)
    logits = run(model, batch)
    for stop in range(0, len(model.schedule(LOOPS)), 3):
        state = model.advance(begin_batch(model, batch, LOOPS), stop).rows(
            pos=slice(POSITION, None)
        )
        assert_close(model.readout(model.advance(state, supplied=store)), logits[:, POSITION:])


@Families
def test_causality_padding_and_batching_are_as_declared(toy: Toy, model: LoopedModel) -> None:
    batch, other = full(toy, model), full(toy, model, seed=8)
    logits = run(model, batch)
    later, rows = batch.tokens.clone(), batch.tokens.clone()
    later[:, POSITION + 1 :] = other.tokens[:, POSITION + 1 :]
    rows[1:] = other.tokens[1:]
    assert model.causal == is_close(
        run(model, Batch(later, batch.mask, batch.readout, batch.options))[:, : POSITION + 1],
        logits[:, : POSITION + 1],
    )
    assert model.batch_independent == is_close(
        run(model, Batch(rows, batch.mask, batch.readout, batch.options))[0], logits[0]
    )
    short = padded(toy, model)
    for i, length in enumerate(short.mask.sum(1).tolist()):
        alone = short[slice(i, i + 1)]
        options = {
            k: v[:, :length] if isinstance(v, Tensor) else v for k, v in alone.options.items()
        }
        alone = Batch(alone.tokens[:, :length], alone.mask[:, :length], alone.readout, options)
        assert_close(run(model, alone)[0], run(model, short)[i, :length])


@Families
def test_stopping_earlier_is_a_shorter_call_where_declared(toy: Toy, model: LoopedModel) -> None:
    batch = padded(toy, model)
    lens = readout_lens(model, batch, LOOPS, keep_logits=True)
    assert_close(dynamics_and_lens(model, batch, LOOPS)[1].heads_input, lens.heads_input)
    assert lens.logits is not None
    same = [
        is_close(lens.logits[t], at_columns(run(model, batch, t + 1), batch.readout))
        for t in range(LOOPS)
    ]
    assert same[-1]
    assert all(same) == model.prefix_readout
    idle = [n for n in model.hook_names(LOOPS) if n.startswith(f"loops.{LOOPS - 1}.")][-1]
    with model.hooks([(idle, lambda value, hook: None)], n_loops=LOOPS):
        assert_close(readout_lens(model, batch, LOOPS, keep_logits=True).logits, lens.logits)


@Families
def test_each_cell_of_a_sweep_is_one_patched_run(toy: Toy, model: LoopedModel) -> None:
    clean, corrupted = padded(toy, model), padded(toy, model, seed=1)
    here = set(map(site_of, model.hook_names(2)))
    sites = [
        site
        for site in ("hook_resid_pre", "attn.hook_z", "attn.hook_v", "hook_attn_out")
        if site in here
    ]
    sweep = activation_patch(model, clean, corrupted, projection, n_loops=2, sites=sites)
    source = cached(model, clean, 2)
    assert len(sweep.cells) > 3
    assert not sweep.frame().duplicated(["site", "loop", "layer", "position", "head"]).any()
    for cell, value in list(zip(sweep.cells, sweep.values, strict=True))[
        :: max(1, len(sweep.cells) // 25)
    ]:
        assert cell.position is not None
        index: tuple[slice | int, ...] = (slice(None), cell.position)
        if cell.head is not None:
            index = (*index, cell.head)
        logits = run_hooked(model, corrupted, cell.name, put(source[cell.name], index), 2)
        assert_close(value, projection(at_columns(logits, corrupted.readout)))


@Families
def test_saving_and_loading_gives_the_same_logits(
    toy: Toy, model: LoopedModel, tmp_path: Path
) -> None:
    batch = full(toy, model)
    assert config_from_dict(model.cfg.to_dict()) == model.cfg
    save(model, tmp_path / "own")
    again = load(tmp_path / "own")
    assert again.cfg == model.cfg
    for name, parameter in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name
    assert_close(run(again, batch), run(model, batch))


@Families
def test_half_precision_runs_close_to_the_whole(toy: Toy, model: LoopedModel) -> None:
    batch = full(toy, model)
    half = toy.make().bfloat16()
    options = {
        k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in batch.options.items()
    }
    logits, rough = (
        run(model, batch, 1),
        run(half, Batch(batch.tokens, batch.mask, batch.readout, options), 1),
    )
    assert rough.isfinite().all()
    assert (rough.double() - logits).norm() < 0.25 * logits.norm()


@Families
def test_blocks_show_their_weights_in_the_usual_shapes(model: LoopedModel) -> None:
    cfg = model.cfg
    assert model.W_E.shape == (cfg.d_vocab, cfg.d_model)
    assert model.W_U.shape == (cfg.d_model, cfg.d_vocab)
    assert model.b_U.shape == (cfg.d_vocab,)
    for visit in model.schedule(1):
        attn = visit.block.attn
        assert attn.W_Q.shape == (cfg.n_heads, cfg.d_model, cfg.d_head)
        assert attn.W_K.shape[1:] == attn.W_V.shape[1:] == (cfg.d_model, cfg.d_head)
        assert attn.W_O.shape == (cfg.n_heads, cfg.d_head, cfg.d_model)
        assert attn.b_O.shape == (cfg.d_model,)
        assert attn.b_Q.shape == (cfg.n_heads, cfg.d_head)
