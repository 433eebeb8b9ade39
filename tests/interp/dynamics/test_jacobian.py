"""Eigenvalues of one iteration's map, against the exact Jacobian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loopscope.interp.dynamics import jacobian as jacobian_module
from loopscope.interp.dynamics.jacobian import jacobian_spectrum
from loopscope.interp.dynamics.lyapunov import lyapunov_spectrum
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import Taps
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_MODEL,
    LOOPS,
    BatchCentred,
    assert_close,
    full,
    hook_count,
    odd_one,
    padded,
    toy,
)


def exact(model: RecurrentDepth, batch: Batch, row: int, loop: int, columns: list[int]) -> Tensor:
    """Eigenvalues of one example's Jacobian of one iteration with respect to some columns, by
    falling magnitude.
    """
    state = model.begin(batch.tokens[row : row + 1], batch.mask[row : row + 1], n_loops=LOOPS)
    state = model.advance(state, f"loops.{loop}").map(Tensor.detach)

    def step(chosen: Tensor) -> Tensor:
        resid = state.resid.clone()
        resid[0, columns] = chosen
        return model.advance(replace(state, resid=resid), model.iteration_ends(LOOPS)[loop]).resid[
            0, columns
        ]

    jacobian = torch.autograd.functional.jacobian(step, state.resid[0, columns])
    values = torch.linalg.eigvals(jacobian.reshape(len(columns) * D_MODEL, -1))
    return values[values.abs().argsort(descending=True)]


@pytest.mark.parametrize(
    ("positions", "injection", "loop"),
    [("none", False, 0), ("learned", True, 2), ("sinusoidal", False, 3)],
)
def test_spectral_radius_is_that_of_the_exact_jacobian(
    positions: str, injection: bool, loop: int
) -> None:
    model, batch = toy(positions, injection), padded(lengths=(2, 3, 1), width=4)
    found = jacobian_spectrum(
        model, batch, loop, LOOPS, krylov=120
    )  # more than 3 columns have dimensions
    kinds = []
    for row, length in enumerate((2, 3, 1)):
        expected = exact(model, batch, row, loop, list(range(length)))
        assert found.radius[row].item() == pytest.approx(expected[0].abs().item(), rel=1e-7)
        assert found.eigenvalues[row, 0].real.item() == pytest.approx(
            expected[0].real.item(), rel=1e-7
        )
        kinds.append(expected[0].imag.abs().item() > 1e-6)
    assert found.loop == loop
    if loop == 2:
        assert any(
            kinds
        )  # a complex pair, at which the norms of a power iteration would not settle


def test_krylov_space_much_smaller_than_the_state_settles(plain: RecurrentDepth) -> None:
    lengths = (3, 4, 2)
    batch = padded(lengths=lengths, width=5)
    found = jacobian_spectrum(plain, batch, 1, LOOPS, krylov=45, batch_size=2)
    for row, length in enumerate(lengths):
        expected = exact(plain, batch, row, 1, list(range(length)))[0].abs().item()
        assert found.radius[row].item() == pytest.approx(expected, rel=1e-4)
    assert found.residual.max() < 0.05
    assert found.change.max() < 1e-3
    hasty = jacobian_spectrum(plain, batch, 1, LOOPS, krylov=3)
    assert (hasty.residual > found.residual).all()


def test_the_default_space_grows_until_the_leading_eigenvalue_has_settled(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jacobian_module, "_GROWTH", 4)
    lengths = (3, 4, 2)
    batch = padded(lengths=lengths, width=5)
    found = jacobian_spectrum(plain, batch, 1, LOOPS)
    small = jacobian_spectrum(plain, batch, 1, LOOPS, krylov=4)
    assert 4 < found.eigenvalues.shape[1] < 5 * D_MODEL
    assert found.residual.max() <= 1e-5 < small.residual.max()
    expected = [
        exact(plain, batch, row, 1, list(range(length)))[0].abs().item()
        for row, length in enumerate(lengths)
    ]
    assert found.radius.tolist() == pytest.approx(expected, rel=1e-4)
    pieces = jacobian_spectrum(plain, batch, 1, LOOPS, batch_size=1)
    assert pieces.radius.tolist() == pytest.approx(expected, rel=1e-4)
    assert pieces.frame()["radius"].notna().all()


def test_jacobian_of_some_columns_holds_the_others_fixed(plain: RecurrentDepth) -> None:
    batch = padded()
    found = jacobian_spectrum(plain, batch, 1, LOOPS, positions="readout", krylov=D_MODEL)
    for row in range(BATCH):
        expected = exact(plain, batch, row, 1, [int(batch.readout[row])])[0].abs().item()
        assert found.radius[row].item() == pytest.approx(expected, rel=1e-7)
    chosen = jacobian_spectrum(plain, batch, 1, LOOPS, positions=[1, 3], krylov=2 * D_MODEL)
    assert chosen.radius[0].item() == pytest.approx(
        exact(plain, batch, 0, 1, [1, 3])[0].abs().item(), rel=1e-7
    )


class Linear(RecurrentDepth):
    """One that multiplies two parts of its state, jointly, by a matrix of 2 x 2 in every
    iteration.
    """

    matrix = torch.tensor([[0.0, -2.0], [3.0, 0.0]], dtype=torch.float64)

    def embed(
        self, tokens: Tensor, positions: Tensor, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid, _ = super().embed(tokens, positions, taps)
        return resid, {"momentum": resid.flip(-1), "tags": positions}

    def enter(
        self, visit: object, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        (a, b), (c, d) = self.matrix
        return a * resid + b * parts["momentum"], {
            **parts,
            "momentum": c * resid + d * parts["momentum"],
        }


def linear() -> LoopedModel:
    """`Linear` with blocks that do nothing."""
    model = odd_one(Linear)
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.attn.W_O_flat, block.attn.b_O, block.mlp.W_out, block.mlp.b_out):
                part.zero_()
    return model


def test_parts_that_vary_jointly_have_the_eigenvalues_of_both() -> None:
    """Each alone is mapped to zero; together they turn, with the eigenvalues +-i sqrt(6)."""
    model = linear()
    both = jacobian_spectrum(model, padded(), 0, 2, parts=["resid", "momentum"], krylov=8)
    assert_close(both.radius, torch.full((BATCH,), math.sqrt(6), dtype=torch.float64))
    frame = both.frame()
    assert list(frame.columns) == [
        "loop",
        "example",
        "radius",
        "real",
        "imag",
        "residual",
        "change",
    ]
    assert frame["loop"].tolist() == [0] * BATCH
    assert frame["imag"].to_numpy() == pytest.approx(math.sqrt(6))
    assert frame["real"].to_numpy() == pytest.approx(0.0, abs=1e-9)
    assert (jacobian_spectrum(model, padded(), 0, 2, parts="momentum", krylov=8).radius == 0).all()


def test_part_of_whole_numbers_has_no_jacobian() -> None:
    with pytest.raises(
        ValueError,
        match="'tags' cannot vary in the state of this Linear; its parts are resid, momentum",
    ):
        jacobian_spectrum(linear(), full(), 0, 2, parts=["resid", "tags"])


class Widening(Linear):
    """A part that every iteration returns twice as wide."""

    def leave(
        self, visit: object, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return resid, {**parts, "momentum": torch.cat([parts["momentum"]] * 2, dim=-1)}


def test_jacobian_refuses_what_has_none(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match=r"loop must be in 0\.\.1, got 2"):
        jacobian_spectrum(plain, padded(), 2, 2)
    with pytest.raises(ValueError, match=r"examples of a BatchCentred depend on one another"):
        jacobian_spectrum(odd_one(BatchCentred), padded(), 0, 2)
    with pytest.raises(
        ValueError,
        match=r"'momentum' enters it as \[3, 7, 35\] and leaves it as \[3, 7, 70\]",
    ):
        jacobian_spectrum(odd_one(Widening), padded(), 0, 1, parts="momentum")


def test_changes_are_measured_in_two_spaces(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match="space must be 'state' or 'direction', got 'sphere'"):
        lyapunov_spectrum(plain, padded(), 1, 2, space="sphere")  # type: ignore[arg-type]


def test_nothing_is_left_behind(plain: RecurrentDepth) -> None:
    jacobian_spectrum(plain, padded(), 1, 2, krylov=3)
    assert hook_count(plain) == 0
    assert all(parameter.grad is None for parameter in plain.parameters())
