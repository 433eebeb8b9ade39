"""Bad calls of a good checkpoint: each is one sentence that says the rule and what was found."""

from __future__ import annotations

import pytest
import torch

from release_files import D_VOCAB, toy_model


@pytest.mark.parametrize(("token", "found"), [(D_VOCAB, D_VOCAB), (-1, -1)])
def test_tokens_out_of_range_are_refused(token: int, found: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"tokens must be in 0\.\.{D_VOCAB - 1} \(d_vocab={D_VOCAB}\), got {found}",
    ):
        toy_model()(torch.tensor([[1, token, 2]]))


@pytest.mark.parametrize("n_loops", [0, -3])
def test_a_call_with_fewer_than_one_iteration_is_refused(n_loops: int) -> None:
    with pytest.raises(ValueError, match=f"n_loops must be at least 1, got {n_loops}"):
        toy_model()(torch.tensor([[1, 2]]), n_loops=n_loops)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_an_input_longer_than_the_positions_is_refused(positions: str) -> None:
    model = toy_model(positions)
    assert model(torch.ones(1, 7, dtype=torch.int64)).shape == (1, 7, D_VOCAB)
    with pytest.raises(
        ValueError, match="inputs may have at most n_ctx=7 positions in this model, got 8"
    ):
        model(torch.ones(1, 8, dtype=torch.int64))


def test_a_left_padded_mask_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"row 1 starts with padding; left padding is not supported, pad on the right",
    ):
        toy_model()(torch.tensor([[1, 2, 3], [0, 1, 2]]), mask=torch.tensor([[1, 1, 1], [0, 1, 1]]))


def test_a_mask_with_a_hole_is_named() -> None:
    with pytest.raises(
        ValueError,
        match="must be ones then zeros along pos, but row 0 has real tokens after padding",
    ):
        toy_model()(torch.tensor([[1, 0, 2]]), mask=torch.tensor([[1, 0, 1]]))
