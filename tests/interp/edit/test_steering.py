"""Steering: each intervention against a run continued by hand, and what is refused and cleaned
up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.interp.edit.injection import attenuate_input, swap_input
from loopscope.interp.edit.steering import set_to, steer, steering_vector
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_HEAD,
    D_MODEL,
    HEADS,
    LAYERS,
    LOOPS,
    POS,
    assert_close,
    cached,
    explode,
    full,
    hook_count,
    is_close,
    padded,
    random_tokens,
    run,
    toy,
    with_words,
)  # fmt: skip


def vector(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(
        dtype
    )


@pytest.fixture(params=["none", "learned", "sinusoidal"])
def injected(request: pytest.FixtureRequest) -> RecurrentDepth:
    return toy(request.param, True)


def steered(
    context: AbstractContextManager, model: RecurrentDepth, batch: Batch, n_loops: int = LOOPS
) -> Tensor:
    with context:
        return run(model, batch, n_loops)


# Adding and replacing


@pytest.mark.parametrize("positions", ["all", [1, 4]])
def test_a_vector_is_added_to_the_state_there(
    positions: list[int] | str, model: RecurrentDepth
) -> None:
    """By hand: stop before the visit, add, go on. The visit opens no iteration, so nothing comes in
    between.
    """
    batch, added = padded(), vector(D_MODEL).to(model.embedding.dtype)
    state = model.advance(model.begin(batch.tokens, batch.mask, n_loops=LOOPS), "loops.2.blocks.1")
    columns = [p in (range(POS) if positions == "all" else positions) for p in range(POS)]
    resid = state.resid + 0.5 * torch.tensor(columns)[:, None] * added
    expected = model.readout(model.advance(replace(state, resid=resid)))
    assert_close(
        steered(
            steer(model, added, loops=[2], layers=[1], positions=positions, scale=0.5), model, batch
        ),
        expected,
    )
    assert not is_close(expected, run(model, batch))


@pytest.mark.parametrize(
    ("loops", "layers"), [("all", "all"), ([0, 3], [1]), ([2], "all"), ("all", [0])]
)
def test_it_is_added_at_the_chosen_visits_only(
    loops: list[int] | str, layers: list[int] | str, plain: RecurrentDepth
) -> None:
    with steer(plain, vector(D_MODEL), site="mlp_out", loops=loops, layers=layers, n_loops=LOOPS):
        found = cached(plain, padded(), ["**.hook_mlp_out", "**.hook_resid_mid"])
    for t in range(LOOPS):
        for layer, block in enumerate(plain.blocks):
            there = t in (range(LOOPS) if loops == "all" else loops) and layer in (
                range(LAYERS) if layers == "all" else layers
            )
            place = f"loops.{t}.blocks.{layer}"
            own = block.mlp(block.ln2(found[f"{place}.hook_resid_mid"], {}), {})
            assert_close(found[f"{place}.hook_mlp_out"], own + there * vector(D_MODEL))


@pytest.mark.parametrize(
    ("site", "layers", "name", "shape"),
    [
        ("z", [1], "loops.1.blocks.1.attn.hook_z", (HEADS, D_HEAD)),
        ("attn.hook_q", [0], "loops.1.blocks.0.attn.hook_q", (HEADS, D_HEAD)),
        ("hook_resid_mid", [1], "loops.1.blocks.1.hook_resid_mid", (D_MODEL,)),
        ("ln2.normalized", [0], "loops.1.blocks.0.ln2.hook_normalized", (D_MODEL,)),
        ("state_in", None, "loops.1.hook_state_in", (D_MODEL,)),
        ("state_out", None, "loops.1.hook_state_out", (D_MODEL,)),
    ],
)
@pytest.mark.parametrize("each", [False, True])
def test_sites_and_one_vector_per_row(
    each: bool,
    site: str,
    layers: list[int] | None,
    name: str,
    shape: tuple[int, ...],
    plain: RecurrentDepth,
) -> None:
    vectors = vector(BATCH, *shape) if each else vector(*shape)
    before = cached(plain, padded(), name)[name]
    aligned = vectors[:, None] if each else vectors
    with steer(plain, vectors, site=site, loops=[1], layers=layers, scale=-2, n_loops=LOOPS):
        assert_close(cached(plain, padded(), name)[name], before - 2 * aligned)
    with set_to(
        plain, vectors, site=site, loops=[1], layers=layers, positions=[3, 0], n_loops=LOOPS
    ):
        found = cached(plain, padded(), name)[name]
    assert torch.equal(found[:, [0, 3]], aligned.expand_as(before)[:, [0, 3]])
    assert torch.equal(found[:, [1, 2, 4, 5, 6]], before[:, [1, 2, 4, 5, 6]])


@pytest.mark.shapes
def test_replacing_a_state_forgets_what_came_before(plain: RecurrentDepth) -> None:
    with set_to(plain, vector(D_MODEL), site="state_in", loops=[2], layers=None, n_loops=LOOPS):
        assert_close(run(plain, full(1)), run(plain, full(2)))


def test_a_vector_of_zeros_changes_nothing(model: RecurrentDepth) -> None:
    nothing = torch.zeros(D_MODEL, dtype=model.embedding.dtype)
    assert_close(
        steered(steer(model, nothing, loops="all", layers="all"), model, padded()),
        run(model, padded()),
    )


def test_a_vector_takes_the_precision_of_the_model(plain: RecurrentDepth) -> None:
    found = steered(steer(plain, vector(D_MODEL).float(), loops=[1], layers=[0]), plain, padded())
    assert_close(
        found,
        steered(
            steer(plain, vector(D_MODEL).float().double(), loops=[1], layers=[0]), plain, padded()
        ),
    )


def test_gradients_reach_the_vectors(plain: RecurrentDepth) -> None:
    leaf = vector(D_MODEL).requires_grad_()

    def total(vectors: Tensor) -> Tensor:
        return steered(
            steer(plain, vectors, loops=[1, 2], layers=[1], positions=[2], scale=3.0), plain, full()
        )[:, -1, 4].sum()

    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    step = 1e-5 * torch.nn.functional.one_hot(torch.tensor(6), D_MODEL)
    with torch.no_grad():
        slope = (total(leaf + step) - total(leaf - step)) / 2e-5
    assert gradient[6].item() == pytest.approx(slope.item(), rel=1e-5)


def test_steering_adds_up(plain: RecurrentDepth) -> None:
    first, second = vector(D_MODEL), vector(2, D_MODEL)[1]
    with steer(plain, first, loops=[1], layers=[0], n_loops=LOOPS):
        both = steered(steer(plain, second, loops=[1], layers=[0]), plain, padded())
    assert_close(
        both, steered(steer(plain, first + second, loops=[1], layers=[0]), plain, padded())
    )


# Steering vectors


def test_a_steering_vector_is_the_difference_of_means_at_the_readout(model: RecurrentDepth) -> None:
    positive, negative, name = padded(1), padded(2, lengths=(3, 6)), "loops.2.blocks.1.attn.hook_z"
    means = []
    for batch in (positive, negative):
        values = cached(model, batch, name)[name]
        means.append(
            torch.stack([values[i, p] for i, p in enumerate(batch.readout.tolist())]).mean(0)
        )
    found = steering_vector(model, positive, negative, "z", 2, 1, LOOPS)
    assert found.shape == (HEADS, D_HEAD)
    assert not found.requires_grad
    assert_close(found, means[0] - means[1])


def test_one_pair_carries_one_run_over_into_the_other(plain: RecurrentDepth) -> None:
    """Added at the readout of the last state, the vector of a single pair makes the answer the
    other's.
    """
    positive, negative = full(1)[:1], full(2)[:1]
    found = steering_vector(plain, positive, negative, "state_out", LOOPS - 1, None, LOOPS)
    added = steered(
        steer(plain, found, site="state_out", loops=[LOOPS - 1], layers=None, positions=[POS - 1]),
        plain,
        negative,
    )
    assert_close(added[:, -1], run(plain, positive)[:, -1])


def test_equal_inputs_give_no_direction(plain: RecurrentDepth) -> None:
    assert not steering_vector(plain, full(1), full(1), "resid_post", 1, 1).any()


def test_vectors_from_texts_tokens_and_pieces(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steering_vector(plain, full(1), full(2), "resid_pre", 3, 0)
    assert_close(
        steering_vector(plain, random_tokens(1), random_tokens(2), "resid_pre", 3, 0, readout=-1),
        expected,
    )
    monkeypatch.setattr("loopscope.interp.edit.steering._CHUNK", 2)
    assert_close(steering_vector(plain, full(1), full(2), "resid_pre", 3, 0), expected)
    model, texts = with_words(plain), ["<t_3><t_9><t_4>", "<t_8>"]
    assert_close(
        steering_vector(model, texts, texts[:1], "resid_pre", 3, 0),
        steering_vector(model, model.encode(texts), model.encode(texts[:1]), "resid_pre", 3, 0),
    )


# What is injected


def with_inputs(model: RecurrentDepth, batch: Batch, inputs: dict[int, Tensor]) -> Tensor:
    """Logits of a run with other injected inputs at some iterations, by hand."""
    state = model.begin(batch.tokens, batch.mask, n_loops=LOOPS)
    own = state.parts["input"]
    for loop, end in enumerate(model.iteration_ends(LOOPS)):
        state = model.advance(replace(state, parts={"input": inputs.get(loop, own)}), end)
    return model.readout(state)


def embedding(model: RecurrentDepth, batch: Batch) -> Tensor:
    return model.begin(batch.tokens, batch.mask, n_loops=LOOPS).parts["input"]


@pytest.mark.parametrize("loops", ["all", [2], [1, 3]])
@pytest.mark.parametrize("factor", [0, 0.5, -3.0])
def test_attenuated_inputs(factor: float, loops: list[int] | str, injected: RecurrentDepth) -> None:
    chosen = [1, 2, 3] if loops == "all" else loops
    inputs = {t: factor * embedding(injected, padded()) for t in chosen}
    found = steered(attenuate_input(injected, factor, loops), injected, padded())
    assert_close(found, with_inputs(injected, padded(), inputs))
    assert not is_close(found, run(injected, padded()))


def test_a_factor_of_one_changes_nothing_and_of_zero_injects_nothing(
    injected: RecurrentDepth,
) -> None:
    assert_close(
        steered(attenuate_input(injected, 1, "all", LOOPS), injected, padded()),
        run(injected, padded()),
    )
    with injected.hooks(
        [("loops.*.hook_input", lambda value, hook: torch.zeros_like(value))], n_loops=LOOPS
    ):
        zeroed = run(injected, padded())
    assert_close(steered(attenuate_input(injected, 0.0, "all", LOOPS), injected, padded()), zeroed)


@pytest.mark.parametrize("loops", ["all", [1], [3, 2]])
def test_swapped_inputs(loops: list[int] | str, injected: RecurrentDepth) -> None:
    other = padded(2, lengths=(5, 7, 3))
    inputs = {t: embedding(injected, other) for t in ([1, 2, 3] if loops == "all" else loops)}
    found = steered(swap_input(injected, other, loops), injected, padded(1))
    assert_close(found, with_inputs(injected, padded(1), inputs))
    assert not is_close(found, run(injected, padded(1)))


def test_swapping_in_the_same_input_changes_nothing(injected: RecurrentDepth) -> None:
    assert_close(
        steered(swap_input(injected, padded()), injected, padded()), run(injected, padded())
    )


def test_swapped_inputs_may_be_tokens(injected: RecurrentDepth) -> None:
    expected = steered(swap_input(injected, full(4), [2]), injected, padded())
    assert_close(steered(swap_input(injected, random_tokens(4), [2]), injected, padded()), expected)


@pytest.mark.parametrize(
    "method", [lambda model: attenuate_input(model, 0.5), lambda model: swap_input(model, full())]
)
def test_models_without_injection_are_refused(
    method: Callable[..., AbstractContextManager], plain: RecurrentDepth
) -> None:
    with (
        pytest.raises(ValueError, match="nothing is injected into this model's iterations"),
        method(plain),
    ):
        pass


@pytest.mark.parametrize(
    ("loops", "message"),
    [
        (
            [0],
            r"nothing is injected at iteration 0; this model injects at the iterations \[1, 2, 3\]",
        ),
        ([4], r"loops must be in 0\.\.3, got 4"),
        ([], r"nothing is injected at loops=\[\]"),
    ],
)
def test_iterations_without_injection_are_refused(
    loops: list[int], message: str, injected: RecurrentDepth
) -> None:
    for context in (attenuate_input(injected, 0.5, loops), swap_input(injected, full(), loops)):
        with pytest.raises(ValueError, match=message), context:
            pass


def test_one_iteration_injects_nothing(injected: RecurrentDepth) -> None:
    message = "nothing is injected into this model's iterations in such a call"
    with pytest.raises(ValueError, match=message), attenuate_input(injected, 0.5, n_loops=1):
        pass


def test_swapped_inputs_must_have_the_shape_of_the_run(injected: RecurrentDepth) -> None:
    with (
        swap_input(injected, full(2)[:2]),
        pytest.raises(
            ValueError, match=r"must have the shape of the run, \[3, 7\] .* got \[2, 7\]"
        ),
    ):
        run(injected, padded())
    assert hook_count(injected) == 0


# The contexts

CONTEXTS = {
    "steer": lambda model: steer(model, vector(D_MODEL), loops=[1], layers=[0], n_loops=LOOPS),
    "set_to": lambda model: set_to(model, vector(D_MODEL), loops=[0], layers=[1], n_loops=LOOPS),
    "attenuate_input": lambda model: attenuate_input(model, 0.5, [1], LOOPS),
    "swap_input": lambda model: swap_input(model, full(3), [1], LOOPS),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_inside_it_holds_for_every_method_and_afterwards_for_none(name: str) -> None:
    model = toy("learned", True)
    before = run(model, padded())
    with CONTEXTS[name](model) as inside:
        assert inside is model
        during = run(model, padded())
        assert_close(
            readout_lens(model, padded(), LOOPS, keep_logits=True).logits[-1],
            during[torch.arange(BATCH), padded().readout],
        )
    assert not is_close(during, before)
    assert torch.equal(run(model, padded()), before)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("n_loops", [2, LOOPS + 2])
def test_a_run_of_another_length_is_refused(n_loops: int, name: str) -> None:
    model = toy("learned", True)
    match = f"attached for n_loops={LOOPS}, but this call runs n_loops={n_loops}"
    with CONTEXTS[name](model), pytest.raises(ValueError, match=match):
        run(model, padded(), n_loops)


@pytest.mark.parametrize("name", CONTEXTS)
def test_nothing_is_left_after_an_error(name: str) -> None:
    model = toy("learned", True)
    with pytest.raises(RuntimeError, match="a hook failed"), CONTEXTS[name](model):
        model.run_with_hooks(
            padded().tokens, n_loops=LOOPS, fwd_hooks=[("loops.3.hook_state_out", explode)]
        )
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loops": [4], "layers": [0]}, ValueError, r"loops must be in 0\.\.3, got 4"),
        ({"loops": [0], "layers": [2]}, ValueError, r"layers must be in 0\.\.1, got 2"),
        (
            {"loops": [], "layers": [0]},
            ValueError,
            r"'resid_pre' does not occur at loops=\[\], layers=\[0\]",
        ),
        (
            {"loops": [0], "layers": [0], "positions": [-2]},
            ValueError,
            "positions must be 'all' or a list of columns counted from 0",
        ),
        ({"loops": [0], "layers": None}, ValueError, "'resid_pre' needs layers="),
        (
            {"loops": [0], "layers": [0], "site": "state_in"},
            ValueError,
            "'state_in' has no layer, so pass layers=None",
        ),
        (
            {"loops": [0], "layers": [0], "site": "embed"},
            ValueError,
            "'embed' lies outside the loop",
        ),
        (
            {"loops": [0], "layers": [0], "site": "pattern"},
            ValueError,
            "'pattern' has a head axis before its positions",
        ),
        (
            {"loops": [0], "layers": [0], "site": "normalized"},
            ValueError,
            "could be ln1.hook_normalized or ln2.hook_normalized",
        ),
        (
            {"loops": [0], "layers": [0], "site": "nowhere"},
            KeyError,
            "no site 'nowhere'; its sites are attn.hook_attn_scores",
        ),
    ],
)
def test_wrong_places_are_refused(
    options: dict, error: type[Exception], message: str, plain: RecurrentDepth
) -> None:
    for method in (steer, set_to):
        with (
            pytest.raises(error, match=message),
            method(plain, vector(D_MODEL), n_loops=LOOPS, **options),
        ):
            pass
    assert hook_count(plain) == 0


@pytest.mark.parametrize(
    "shape", [(D_MODEL + 1,), (BATCH + 1, D_MODEL), (1, D_MODEL), (BATCH, POS, D_MODEL), ()]
)
def test_vectors_of_another_shape_are_refused(
    shape: tuple[int, ...], plain: RecurrentDepth
) -> None:
    message = r"must have the shape \[35\], or \[3, 35\] for one per row, got"
    with (
        steer(plain, vector(*shape), loops=[1], layers=[0]),
        pytest.raises(ValueError, match=message),
    ):
        run(plain, padded())


@pytest.mark.shapes
def test_a_steering_vector_needs_one_place(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match="'resid_pre' needs layers="):
        steering_vector(plain, full(), full(), "resid_pre", 0, None)
    with pytest.raises(ValueError, match=r"loops must be in 0\.\.3, got -1"):
        steering_vector(plain, full(), full(), "resid_pre", -1, 0)


# A trained model


def test_a_trained_model_can_be_steered_to_another_answer() -> None:
    """What two questions' last states differ by, added at the place where the answer is read."""
    model = load("ltg_trained")
    here, there = model.encode("<e_24><r_0><r_7>"), model.encode("<e_3><r_5><r_2>")
    found = steering_vector(model, there, here, "resid_post", 7, 1, 8)
    wanted, plain = run(model, there, 8)[0, -1].argmax(), run(model, here, 8)[0, -1].argmax()
    assert wanted != plain
    with steer(
        model,
        found,
        site="resid_post",
        loops=[7],
        layers=[1],
        positions=here.readout.tolist(),
        n_loops=8,
    ):
        assert run(model, here, 8)[0, -1].argmax() == wanted
