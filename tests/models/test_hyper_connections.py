"""The mixing functions of hyper-connections: DeepSeek-V4's golden outputs, and both variants
against loops over single numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from loopscope.models.blocks.hyper_connections import (
    Mixing,
    alternating_sinkhorn,
    collapsed,
    column_first_sinkhorn,
    copies,
    deepseek_mixing,
    deepseek_readout_weights,
    mixed,
    nanbeige_mixing,
)
from toy import assert_close, is_close


class DeepSeekCase(GoldenCase):
    """The streams of a model that is not looped, redone from its embedding with the outputs of its
    sub-layers as they are stored.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.golden = load_file(GOLDEN / name / "golden.safetensors")
        self.weights = load_file(GOLDEN / name / "model.safetensors")
        self.config = json.loads((GOLDEN / name / "config.json").read_text())

    def mixing(self, streams: Tensor, at: str, **changes: Any) -> Mixing:
        layer, part = at.split(".")[1:]
        prefix = f"model.layers.{layer}.{'ffn_hc' if part == 'mlp_hc' else part}."
        fn, scale, base = (self.weights[prefix + key] for key in ("fn", "scale", "base"))
        config = {**self.config, **changes}
        eps = {"eps": config["hc_eps"], "norm_eps": config["rms_norm_eps"]}
        return deepseek_mixing(streams, fn, scale, base, config["hc_sinkhorn_iters"], **eps)

    @cached_property
    def found(self) -> dict[str, Tensor]:
        embed = self.weights["model.embed_tokens.weight"][self.golden["input_ids"]]
        streams = copies(embed, self.config["hc_mult"])
        found = {"embed": embed}
        for at in [f"block.{j}.{part}_hc" for j in range(2) for part in ("attn", "mlp")]:
            mixing = self.mixing(streams, at)
            found |= {
                f"{at}.streams_in": streams,
                f"{at}.pre": mixing.read,
                f"{at}.post": mixing.write,
                f"{at}.comb": mixing.keep.mT,
            }
            found[f"{at}.collapsed"] = collapsed(streams, mixing.read)
            streams = found[f"{at}.streams_out"] = mixed(
                streams, mixing.keep, mixing.write, self.golden[f"{at}.sublayer_out"]
            )
        fn, scale, base = (
            self.weights[f"model.hc_head.hc_{key}"] for key in ("fn", "scale", "base")
        )
        weights = deepseek_readout_weights(
            streams,
            fn,
            scale,
            base,
            eps=self.config["hc_eps"],
            norm_eps=self.config["rms_norm_eps"],
        )
        found |= {"head.streams_in": streams, "head.collapsed": collapsed(streams, weights)}
        found["final_norm_out"] = F.rms_norm(
            found["head.collapsed"],
            (embed.shape[-1],),
            self.weights["model.norm.weight"],
            self.config["rms_norm_eps"],
        )
        found["logits"] = F.linear(found["final_norm_out"], self.weights["lm_head.weight"])
        return found


def with_iterations(case: GoldenCase, iterations: str) -> Tensor:
    assert isinstance(case, DeepSeekCase)
    at = "block.0.attn_hc"
    return case.mixing(
        case.found[f"{at}.streams_in"], at, hc_sinkhorn_iters=int(iterations)
    ).keep.mT


DEEPSEEK: dict[str, Compute] = {
    r"(input_ids|block\.\d+\.(?:attn|mlp)_hc\.sublayer_out)": (
        GoldenCase.stored
    ),  # inputs of the mixing
    r"variant\.sinkhorn_(\d+)\.comb": with_iterations,
    r"(embed|block\..+|head\..+|final_norm_out|logits)": lambda case, key: case.found[key],
}


@pytest.mark.shapes
def test_golden_outputs_of_deepseek(record_error: Callable[[str, str, float], None]) -> None:
    check_case(DeepSeekCase("deepseek_v4_mhc"), DEEPSEEK, record_error)


BATCH, POS, STREAMS, D_MODEL, ITERATIONS = 2, 3, 5, 7, 3
ROWS = 2 * STREAMS + STREAMS**2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def weights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Streams, projection, three factors, shifts."""
    return (
        drawn(BATCH, POS, STREAMS, D_MODEL),
        drawn(ROWS, STREAMS * D_MODEL, seed=1),
        drawn(3, seed=2),
        drawn(ROWS, seed=3),
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def groups_of_one_place(
    streams: Tensor, projection: Tensor, factors: Tensor, shifts: Tensor, divisor: float
) -> list[float]:
    """The scaled and shifted projections of one position's flattened streams, number by number."""
    flat = [streams[s, d].item() for s in range(STREAMS) for d in range(D_MODEL)]
    found = []
    for row in range(ROWS):
        group = 0 if row < STREAMS else 1 if row < 2 * STREAMS else 2
        product = sum(projection[row, i].item() * x for i, x in enumerate(flat))
        found.append(factors[group].item() * product / divisor + shifts[row].item())
    return found


def normalized(
    matrix: list[list[float]], steps: str, least: float, eps: float
) -> list[list[float]]:
    """A matrix after a row or column step for each letter."""
    n = range(len(matrix))
    for step in steps:
        rows = [sum(matrix[i]) for i in n]
        columns = [sum(matrix[i][j] for i in n) for j in n]
        matrix = [
            [matrix[i][j] / (max(rows[i] if step == "r" else columns[j], least) + eps) for j in n]
            for i in n
        ]
    return matrix


def place(streams: Tensor, where: tuple[int, int]) -> tuple[Tensor, float]:
    one = streams[where]
    return one, (one**2).mean().item()


@pytest.mark.shapes
@pytest.mark.parametrize("where", [(0, 0), (1, 2)])
def test_nanbeige_mixing_is_the_sum_over_single_numbers(
    where: tuple[int, int], weights: tuple[Tensor, ...]
) -> None:
    streams, *others = weights
    one, square = place(streams, where)
    logits = groups_of_one_place(one, *others, divisor=math.sqrt(square) + 1e-6)
    raw = [logits[2 * STREAMS + i * STREAMS :][:STREAMS] for i in range(STREAMS)]
    exponentials = [[math.exp(x - max(row)) for x in row] for row in raw]
    found = nanbeige_mixing(streams, *others, ITERATIONS)
    assert_close(
        found.read[where], torch.tensor([sigmoid(x) for x in logits[:STREAMS]], dtype=torch.float64)
    )
    assert_close(
        found.write[where],
        torch.tensor([2 * sigmoid(x) for x in logits[STREAMS : 2 * STREAMS]], dtype=torch.float64),
    )
    expected = torch.tensor(
        normalized(exponentials, "rc" * ITERATIONS, least=1e-6, eps=0.0), dtype=torch.float64
    )
    assert_close(found.keep[where], expected)
    assert not is_close(found.keep[where], expected.T)


@pytest.mark.parametrize("where", [(0, 0), (1, 2)])
def test_deepseek_mixing_is_the_sum_over_single_numbers(
    where: tuple[int, int], weights: tuple[Tensor, ...]
) -> None:
    streams, *others = weights
    one, square = place(streams, where)
    logits = groups_of_one_place(one, *others, divisor=math.sqrt(square + 1e-2))
    raw = [logits[2 * STREAMS + i * STREAMS :][:STREAMS] for i in range(STREAMS)]
    softmax = [[math.exp(x) / sum(math.exp(y) for y in row) + 1e-3 for x in row] for row in raw]
    found = deepseek_mixing(streams, *others, ITERATIONS, eps=1e-3, norm_eps=1e-2)
    assert_close(
        found.read[where],
        torch.tensor([sigmoid(x) + 1e-3 for x in logits[:STREAMS]], dtype=torch.float64),
    )
    assert_close(
        found.write[where],
        torch.tensor([2 * sigmoid(x) for x in logits[STREAMS : 2 * STREAMS]], dtype=torch.float64),
    )
    comb = torch.tensor(
        normalized(softmax, "c" + "rc" * (ITERATIONS - 1), least=0.0, eps=1e-3), dtype=torch.float64
    )
    assert_close(found.keep[where], comb.T)
    assert not is_close(found.keep[where], comb)


def test_streams_are_mixed_from_the_second_index_to_the_first(weights: tuple[Tensor, ...]) -> None:
    streams, keep, write = (
        weights[0],
        drawn(BATCH, POS, STREAMS, STREAMS, seed=4),
        drawn(BATCH, POS, STREAMS, seed=5),
    )
    out, read = drawn(BATCH, POS, D_MODEL, seed=6), drawn(BATCH, POS, STREAMS, seed=7)
    found, summed = mixed(streams, keep, write, out), collapsed(streams, read)
    for b in range(BATCH):
        for p in range(POS):
            for to in range(STREAMS):
                old = sum(keep[b, p, to, of] * streams[b, p, of] for of in range(STREAMS))
                assert_close(found[b, p, to], old + write[b, p, to] * out[b, p])
            assert_close(
                summed[b, p], sum(read[b, p, of] * streams[b, p, of] for of in range(STREAMS))
            )


@pytest.mark.parametrize(
    "sinkhorn",
    [alternating_sinkhorn, lambda logits, steps: column_first_sinkhorn(logits, steps, 0.0)],
)
def test_sinkhorn_ends_on_columns_and_converges_to_a_doubly_stochastic_matrix(
    sinkhorn: Callable[[Tensor, int], Tensor],
) -> None:
    logits, ones = (
        drawn(BATCH, POS, STREAMS, STREAMS),
        torch.ones(BATCH, POS, STREAMS, dtype=torch.float64),
    )
    few, many = sinkhorn(logits, 2), sinkhorn(logits, 200)
    assert_close(few.sum(-2), ones)
    assert not is_close(few.sum(-1), ones)
    assert_close(many.sum(-1), ones)
    assert_close(many.sum(-2), ones)
    shifted = logits + drawn(BATCH, POS, STREAMS, 1, seed=1) + drawn(BATCH, POS, 1, STREAMS, seed=2)
    assert_close(sinkhorn(shifted, 200), many)  # factors of rows and of columns are divided out


def test_sinkhorn_gradients_are_those_of_its_steps() -> None:
    logits = drawn(1, 1, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: alternating_sinkhorn(x, 3), logits)
    assert torch.autograd.gradcheck(lambda x: column_first_sinkhorn(x, 3, 1e-3), logits)


def test_copies_are_equal_and_have_memory_of_their_own() -> None:
    resid = drawn(BATCH, POS, D_MODEL)
    streams = copies(resid, STREAMS)
    assert streams.shape == (BATCH, POS, STREAMS, D_MODEL)
    assert all(torch.equal(streams[:, :, s], resid) for s in range(STREAMS))
    assert streams.is_contiguous()


def test_half_precision_streams_are_weighed_in_float32(weights: tuple[Tensor, ...]) -> None:
    streams, *others = (x.bfloat16() for x in weights)
    found = deepseek_mixing(streams, *others, ITERATIONS)
    assert found.keep.dtype == torch.float32
    assert_close(
        found.keep, deepseek_mixing(streams.float(), *(x.float() for x in others), ITERATIONS).keep
    )
