"""Lyapunov spectra, against linear maps and exact Jacobians."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from family_toys import LOOPS as FAMILY_LOOPS
from family_toys import TOYS
from family_toys import padded as family_batch
from loopscope.interp.dynamics.followed import _orthonormal
from loopscope.interp.dynamics.lyapunov import LyapunovSpectrum, lyapunov_spectrum
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.hooks import Taps
from loopscope.models.core.state import Visit
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BATCH, D_MODEL, LOOPS, hook_count, odd_one, padded, randomize_, toy, toy_config

pytestmark = pytest.mark.shapes
K = 3


class Linear(RecurrentDepth):
    """Multiplies the stream at every column by one matrix in every iteration."""

    matrix: Tensor

    def leave(
        self, visit: Visit, resid: Tensor, parts: dict[str, Tensor], taps: Taps
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return resid @ self.matrix.T, parts


def linear(matrix: Tensor) -> Linear:
    """`Linear` with blocks that do nothing."""
    model = randomize_(Linear(replace(toy_config(), d_model=len(matrix))).eval()).double()
    model.matrix = matrix
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.attn.W_O_flat, block.attn.b_O, block.mlp.W_out, block.mlp.b_out):
                part.zero_()
    return model


def one_column(seed: int = 0) -> Batch:
    return padded(seed, lengths=(1, 1, 1), width=1)


def rotation(size: int, seed: int) -> Tensor:
    numbers = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.qr(numbers)[0]


def test_on_a_linear_map_the_spectrum_is_the_logarithms_of_its_singular_rates() -> None:
    rates = torch.tensor([8.0, 4.0, 2.0, 0.5, 0.1]).double()
    turn = rotation(5, 0)
    found = lyapunov_spectrum(linear(turn @ rates.diag() @ turn.T), one_column(), 4, 33)
    expected = rates[:4].log().expand(BATCH, 4)
    torch.testing.assert_close(found.spectrum(skip=20), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found.spectrum(), expected, atol=1e-3), "directions settle first"


def test_singular_rates_are_those_of_the_whole_product_for_any_matrix() -> None:
    matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()
    found = lyapunov_spectrum(linear(matrix), one_column(), 5, LOOPS)
    sizes = torch.linalg.svdvals(torch.linalg.matrix_power(matrix, LOOPS))
    expected = (sizes.log() / LOOPS).expand(BATCH, 5)
    torch.testing.assert_close(found.singular_rates(), expected, rtol=0, atol=1e-6)
    volume = matrix.det().abs().log()
    assert found.exponents.sum(2).flatten().tolist() == pytest.approx([volume.item()] * 12)


def test_a_rate_that_rounding_hides_is_no_number() -> None:
    rates = torch.tensor([10.0, 1.0, 1e-9, 1e-10, 1e-11]).double()
    found = lyapunov_spectrum(linear(rates.diag()), one_column(), 3, 3)
    hidden = found.singular_rates().isnan()
    assert hidden.tolist() == [[False, False, True]] * BATCH


def exact(model: RecurrentDepth, batch: Batch, row: int, loop: int) -> Tensor:
    """The Jacobian of one iteration of one example, over its real columns."""
    columns = list(range(int(batch.mask[row].sum())))
    state = model.begin(batch.tokens[row : row + 1], batch.mask[row : row + 1], n_loops=LOOPS)
    state = model.advance(state, f"loops.{loop}").map(Tensor.detach)

    def step(chosen: Tensor) -> Tensor:
        resid = state.resid.clone()
        resid[0, columns] = chosen
        after = model.advance(replace(state, resid=resid), model.iteration_ends(LOOPS)[loop])
        return after.resid[0, columns]

    jacobian = torch.autograd.functional.jacobian(step, state.resid[0, columns])
    return jacobian.reshape(len(columns) * D_MODEL, -1)


@pytest.fixture(scope="module")
def found() -> LyapunovSpectrum:
    return lyapunov_spectrum(toy(), short(), K, LOOPS, batch_size=2)


def short() -> Batch:
    return padded(lengths=(2, 3, 1), width=4)


def test_exponents_are_those_of_the_exact_jacobian(found: LyapunovSpectrum) -> None:
    """The first directions are drawn again, and pushed by autograd's matrices."""
    model, batch = toy(), short()
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(K, D_MODEL, generator=generator, dtype=torch.float64) for _ in range(4)]
    drawn = torch.stack(columns, 1)
    for row, length in enumerate((2, 3, 1)):
        directions = torch.linalg.qr(drawn[:, :length].flatten(1).T)[0]
        for loop in range(LOOPS):
            directions, triangle = torch.linalg.qr(exact(model, batch, row, loop) @ directions)
            expected = triangle.diagonal().abs().log()
            torch.testing.assert_close(found.exponents[loop, row], expected, rtol=0, atol=1e-6)


def test_shares_of_sublayers_sum_to_the_exponent(found: LyapunovSpectrum) -> None:
    assert found.sublayers == (
        "boundary", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp",
    )  # fmt: skip
    torch.testing.assert_close(found.shares.sum(1), found.exponents, rtol=0, atol=1e-6)
    assert found.shares[:, 0].abs().max() < 1e-9, "this family does nothing between iterations"
    assert (found.shares[:, 1:].abs().amax((0, 2, 3)) > 1e-3).all()


def test_a_block_that_does_nothing_has_no_share() -> None:
    model = toy()
    with torch.no_grad():
        for part in (model.blocks[1].mlp.W_out, model.blocks[1].mlp.b_out):
            part.zero_()
    shares = lyapunov_spectrum(model, short(), K, 2).shares
    assert shares[:, 4].abs().max() < 1e-9
    assert shares[:, 3].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["hrm_text", "spiral", "hyperloop", "melt"])
def test_a_state_of_several_parts_has_a_share_for_each_block(family: str) -> None:
    model = TOYS[family].make()
    batch = family_batch(TOYS[family], model)
    found = lyapunov_spectrum(model, batch, K, FAMILY_LOOPS)
    blocks = {v.name.split(".", 2)[2] for v in model.schedule(FAMILY_LOOPS) if v.loop == 0}
    assert set(found.sublayers) == blocks
    torch.testing.assert_close(found.shares.sum(1), found.exponents, rtol=0, atol=1e-6)


def test_messages_that_no_iteration_was_handed_yet_begin_later() -> None:
    model = TOYS["inkling2_loop"].make()
    found = lyapunov_spectrum(model, family_batch(TOYS["inkling2_loop"], model), K, FAMILY_LOOPS)
    assert found.start == 1
    assert sorted(set(found.frame()["loop"])) == [1, 2]


def test_changes_of_directions_leave_out_the_growth_of_the_state() -> None:
    """A multiple of the state has the same direction, whatever it does to the state."""
    growing = linear(3.0 * torch.eye(5).double())
    batch = one_column()
    state = lyapunov_spectrum(growing, batch, 2, 4)
    direction = lyapunov_spectrum(growing, batch, 2, 4, space="direction")
    assert state.exponents.flatten().tolist() == pytest.approx([math.log(3.0)] * 24)
    assert direction.exponents.abs().max() < 1e-9
    model = TOYS["spiral"].make()
    zeros = family_batch(TOYS["spiral"], model)
    with pytest.raises(ValueError, match="a state of zeros has no direction"):
        lyapunov_spectrum(model, zeros, 1, FAMILY_LOOPS, space="direction")


def test_the_frame_has_a_row_for_each_exponent(found: LyapunovSpectrum) -> None:
    frame = found.frame()
    assert list(frame)[:4] == ["loop", "example", "rank", "exponent"]
    assert len(frame) == LOOPS * BATCH * K
    row = frame[(frame["loop"] == 2) & (frame["example"] == 1) & (frame["rank"] == 2)].iloc[0]
    assert row["exponent"] == pytest.approx(found.exponents[2, 1, 2].item())
    assert row["blocks.1.attn"] == pytest.approx(found.shares[2, 3, 1, 2].item())
    assert len(found.plot().data) == BATCH + len(found.sublayers)


def test_directions_that_fall_together_are_refused() -> None:
    vectors, flat = torch.eye(3)[None, :2].double(), torch.zeros(1, 2, 3).double()
    flat[0, 0, 0] = 1.0
    with pytest.raises(ValueError, match="maps the k=2 followed directions onto fewer, so their"):
        _orthonormal(vectors, flat)


def test_what_has_no_spectrum_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match=r"k must be in 1\.\.35, the dimensions .* got 36"):
        lyapunov_spectrum(plain, short(), 36, 2)
    with pytest.raises(ValueError, match=r"start must be in 0\.\.1, got 2"):
        lyapunov_spectrum(plain, short(), 1, 2, start=2)
    with pytest.raises(ValueError, match=r"skip must be in 0\.\.1, got 2"):
        lyapunov_spectrum(plain, short(), 1, 2).spectrum(skip=2)


def test_nothing_is_left_behind(plain: RecurrentDepth) -> None:
    before = torch.get_rng_state()
    lyapunov_spectrum(plain, short(), 2, 2)
    assert hook_count(plain) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in plain.parameters())
    assert odd_one(RecurrentDepth).training is False
