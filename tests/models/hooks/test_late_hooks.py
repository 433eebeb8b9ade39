"""A hook at an iteration that a call lacks, or chosen for calls of another length, is refused and
never silently idle.
"""

from __future__ import annotations

import pytest

from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import LATE, explode, hook_count, nothing, random_tokens, toy


def test_forward_with_a_hook_beyond_its_iterations_raises(plain: RecurrentDepth) -> None:
    plain.add_hook(LATE, nothing)
    with pytest.raises(
        ValueError,
        match=r"hook is attached at 'loops\.3\.blocks\.1\.hook_resid_post'.*n_loops=2.*0 to 1",
    ):
        plain(random_tokens(), n_loops=2)
    assert plain(random_tokens(), n_loops=4).isfinite().all()
    plain.reset_hooks()
    assert plain(random_tokens(), n_loops=2).isfinite().all()


@pytest.mark.parametrize(
    "attach", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_pytorchs_own_hook_beyond_a_calls_iterations_raises_too(
    attach: str, plain: RecurrentDepth
) -> None:
    handle = getattr(plain.hook_dict[LATE], attach)(lambda *arguments: None)
    with pytest.raises(ValueError, match="hook is attached at"):
        plain(random_tokens(), n_loops=2)
    handle.remove()
    assert plain(random_tokens(), n_loops=2).isfinite().all()


def test_exact_name_in_a_context_for_unknown_iterations_raises_in_the_shorter_call(
    plain: RecurrentDepth,
) -> None:
    with plain.hooks([(LATE, explode)]), pytest.raises(ValueError, match="hook is attached at"):
        plain(random_tokens(), n_loops=3)
    assert hook_count(plain) == 0


def test_resumed_run_with_a_hook_beyond_its_iterations_raises(plain: RecurrentDepth) -> None:
    state = plain.begin(random_tokens(), n_loops=2)
    plain.add_hook(LATE, nothing)
    with pytest.raises(ValueError, match="hook is attached at"):
        plain.advance(state)
    with pytest.raises(ValueError, match="hook is attached at"):
        plain.begin(random_tokens(), n_loops=2)


def test_run_with_hooks_at_an_iteration_that_the_call_lacks_is_a_key_error(
    plain: RecurrentDepth,
) -> None:
    plain.grow(4)
    with pytest.raises(KeyError, match=r"n_loops=2 the iterations are loops\.0 to loops\.1"):
        plain.run_with_hooks(random_tokens(), n_loops=2, fwd_hooks=[(LATE, nothing)])


@pytest.mark.parametrize("n_loops", [2, 4])
@pytest.mark.parametrize(
    "names",
    ["loops.*.hook_state_in", lambda name: name.endswith("hook_z"), ["hook_embed", "**.hook_z"]],
)
def test_hooks_by_pattern_refuse_a_call_of_another_length(
    names: object, n_loops: int, plain: RecurrentDepth
) -> None:
    plain.add_hook(names, nothing, n_loops=3)
    with pytest.raises(
        ValueError,
        match=r"hook is attached at|given by a pattern were attached for n_loops=3.*n_loops=4",
    ):
        plain(random_tokens(), n_loops=n_loops)
    assert plain(random_tokens(), n_loops=3).isfinite().all()
    plain.reset_hooks()
    assert plain(random_tokens(), n_loops=n_loops).isfinite().all()


def test_context_by_pattern_refuses_a_call_of_another_length(plain: RecurrentDepth) -> None:
    with (
        plain.hooks([("**.hook_z", nothing)], n_loops=2),
        pytest.raises(ValueError, match=r"attached for n_loops=2.*n_loops=3"),
    ):
        plain(random_tokens(), n_loops=3)
    assert plain(random_tokens(), n_loops=3).isfinite().all()


def test_caching_hooks_by_default_filter_refuse_a_call_of_another_length(
    plain: RecurrentDepth,
) -> None:
    plain.add_caching_hooks(n_loops=2)
    with pytest.raises(ValueError, match=r"attached for n_loops=2.*n_loops=3"):
        plain(random_tokens(), n_loops=3)


def test_pattern_without_a_known_number_of_iterations_is_refused() -> None:
    model = toy(n_loops=None)
    with pytest.raises(ValueError, match="records no number of iterations"):
        model.add_hook("**.hook_z", nothing)
    model.add_hook("loops.2.blocks.0.attn.hook_z", nothing)
    assert hook_count(model) > 0
