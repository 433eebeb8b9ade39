"""Transfer between iterations, and probes of pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loopscope.interp.probes.differences import difference_probe
from loopscope.interp.probes.probe import probe
from loopscope.interp.probes.transfer import TransferMatrix, transfer_matrix
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.wrapped.wrap import wrap
from toy import LAYERS, toy

pytestmark = pytest.mark.shapes
CLASSES, ROWS, LOOPS, ROUNDS = 5, 83, 3, 4


class Turning(nn.Module):
    """Each token is a direction of its own, and every iteration turns it into a new plane."""

    def __init__(self, turn: bool) -> None:
        super().__init__()
        size = CLASSES * (ROUNDS + 1)
        self.words = nn.Embedding(CLASSES, size)
        self.layers = nn.ModuleList([nn.Linear(size, size, bias=False)])
        self.head = nn.Linear(size, CLASSES)
        with torch.no_grad():
            self.words.weight.copy_(torch.eye(size)[:CLASSES])
            step = torch.eye(size).roll(CLASSES, 0) if turn else torch.eye(size)
            self.layers[0].weight.copy_(step)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for _ in range(ROUNDS):
            x = self.layers[0](x)
        logits: Tensor = self.head(x)
        return logits


def matrix(turn: bool) -> TransferMatrix:
    tokens = torch.randint(CLASSES, (ROWS, 1), generator=torch.Generator().manual_seed(0))
    model = wrap(Turning(turn).double(), blocks="layers", n_loops=ROUNDS, head="head")
    return transfer_matrix(model, tokens, tokens[:, 0], readout=0, strength=1e-3)


def test_a_code_that_turns_is_read_at_its_own_iteration_alone() -> None:
    found = matrix(turn=True)
    assert found.blocks == ("blocks.0",)
    assert found.score.shape == (1, ROUNDS, ROUNDS)
    assert (found.score[0].diagonal() == 1).all()
    apart = found.score[0][~torch.eye(ROUNDS, dtype=torch.bool)]
    assert (apart <= found.constant).all()
    assert found.kept().item() <= 0


def test_a_code_that_stays_is_read_everywhere() -> None:
    found = matrix(turn=False)
    assert (found.score == 1).all()
    assert found.kept().item() == 1.0


def test_iterations_whose_own_probe_tells_nothing_are_not_divided_by() -> None:
    nan = torch.nan
    score = torch.tensor(
        [
            [[0.8, 0.9, 0.4], [0.6, 0.2, 0.1], [0.5, 0.7, 0.4]],  # above 0.2: iterations 0 and 2
            [[0.1, 0.9, 0.9], [0.9, 0.2, 0.9], [0.9, 0.9, 0.0]],
            [[0.8, nan, 0.3], [nan, nan, nan], [0.5, nan, 0.4]],
        ],
        dtype=torch.float64,
    )
    kept = TransferMatrix(("a", "b", "c"), score, "accuracy", 0.2, 3, 3).kept().tolist()
    assert kept[0] == pytest.approx((0.4 + 0.3 + 0.2 - 0.1) / (2 * 0.6 + 2 * 0.2))
    assert kept[1] != kept[1]
    assert kept[2] == pytest.approx((0.3 + 0.1) / (0.6 + 0.2))


def subject() -> tuple[LoopedModel, Batch, Tensor]:
    tokens = torch.randint(1, 29, (ROWS, 5), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens, torch.ones_like(tokens), torch.full((ROWS,), 4))
    return toy(), batch, tokens[:, -1] % 4


def test_the_diagonal_is_the_probe_of_each_place() -> None:
    model, batch, targets = subject()
    found = transfer_matrix(model, batch, targets, LOOPS, batch_size=31)
    alone = probe(model, batch, targets, n_loops=LOOPS, control=False)
    by_place = alone.score.view(LOOPS, LAYERS).T
    torch.testing.assert_close(found.score.diagonal(dim1=1, dim2=2), by_place)
    assert found.constant == alone.constant
    frame = found.frame()
    assert len(frame) == LAYERS * LOOPS**2
    cell = frame[(frame.block == "blocks.1") & (frame.fitted == 2) & (frame.tested == 0)]
    assert cell["score"].item() == found.score[1, 2, 0].item()
    assert len(found.plot().data) == LAYERS


def test_a_cell_is_a_probe_carried_over() -> None:
    model, batch, targets = subject()
    held_out = torch.arange(ROWS) < 20
    found = transfer_matrix(model, batch, targets, LOOPS, site="mlp_out", held_out=held_out)
    site = "loops.*.blocks.1.hook_mlp_out"
    fits = probe(model, batch, targets, site, LOOPS, held_out=held_out, control=False)
    _, cache = model.run_with_cache(batch.tokens, n_loops=LOOPS, names_filter=site)
    states = cache["loops.0.blocks.1.hook_mlp_out"][:20, 4]
    right = (fits.maps[2](states).argmax(1) == targets[:20]).double().mean()
    assert found.score[1, 2, 0].item() == right.item()


# Pairs


def test_a_relation_that_single_states_do_not_have() -> None:
    """The larger of two tokens: the difference of embeddings tells it, one token only partly."""
    model = toy()
    with torch.no_grad():
        model.W_E[:, 0] = torch.linspace(-9, 9, 29)
    first, second = (
        torch.randint(1, 29, (ROWS, 3), generator=torch.Generator().manual_seed(i)) for i in (2, 3)
    )
    larger = first[:, -1] > second[:, -1]
    batches = [Batch(x, torch.ones_like(x), torch.full((ROWS,), 2)) for x in (first, second)]
    found = difference_probe(model, *batches, larger, "hook_embed", LOOPS, strength=50.0)
    assert found.accuracy().item() > 0.9
    assert found.separate.item() < found.accuracy().item()
    assert found.flips().item() > 0.9
    assert found.antisymmetry().item() == pytest.approx(1.0)  # a linear map
    turned = difference_probe(model, *batches[::-1], ~larger, "hook_embed", LOOPS, strength=50.0)
    torch.testing.assert_close(turned.alone, -found.alone)


def test_a_bias_towards_one_order_is_seen() -> None:
    """Nearly all pairs prefer the first, and the states are noise: the probe answers by order."""
    model, batch, _ = subject()
    preferred = torch.arange(ROWS) % 8 != 0
    other = Batch(batch.tokens.roll(1, 0), batch.mask, batch.readout)
    found = difference_probe(model, batch, other, preferred, n_loops=LOOPS, strength=1e6)
    assert found.accuracy().min().item() > 0.7
    assert found.flips().max().item() == 0.0
    frame = found.frame()
    assert len(frame) == LOOPS * LAYERS
    assert len(found.plot().data) == 5


def test_pairs_that_cannot_be_probed_are_refused() -> None:
    model, batch, _ = subject()
    preferred = torch.arange(ROWS) % 2 == 0
    with pytest.raises(ValueError, match="one bool per pair"):
        difference_probe(model, batch, batch, preferred[:5], n_loops=LOOPS)
    with pytest.raises(ValueError, match="turn some pairs round"):
        difference_probe(model, batch, batch, preferred | True, n_loops=LOOPS)
    with pytest.raises(ValueError, match="needs a second one"):
        difference_probe(model, batch, batch[slice(5)], preferred, n_loops=LOOPS)
