"""Circuits against dense matrices, and composition against every pair of visits of the unrolled
model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.utilities.matrix import composition_scores as scores_of_transformer_lens

from family_toys import TOYS
from loopscope.checkpoints.load import load
from loopscope.interp.weights.circuits import (
    Composition,
    composition_scores,
    full_ov,
    full_qk,
    ov_circuit,
    qk_circuit,
)
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build
from loopscope.models.core.state import Slot
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.views import unrolled, untied
from toy import (
    D_HEAD,
    D_MODEL,
    D_VOCAB,
    HEADS,
    LAYERS,
    LOOPS,
    assert_close,
    cached,
    full,
    odd_one,
    toy,
)

Circuit = Callable[..., FactoredMatrix]
DEEP = 3  # layers, so that earlier, same and later all occur
CENTRE = torch.eye(D_MODEL, dtype=torch.float64) - torch.full(
    (D_MODEL, D_MODEL), 1 / D_MODEL, dtype=torch.float64
)


def dense(model: RecurrentDepth, layer: int, head: int, fold_ln: bool) -> dict[str, Tensor]:
    """Both circuits of a head, multiplied out."""
    block = model.blocks[layer]
    reads = CENTRE @ block.ln1.w.diag() if fold_ln else torch.eye(D_MODEL, dtype=torch.float64)
    q, k, v = (reads @ weight[head] for weight in (block.attn.W_Q, block.attn.W_K, block.attn.W_V))
    written = block.attn.W_O[head]
    return {"qk": q @ k.T, "ov": v @ (written @ CENTRE if fold_ln else written)}


# Circuits


@pytest.mark.parametrize("fold_ln", [True, False])
@pytest.mark.parametrize(("circuit", "name"), [(qk_circuit, "qk"), (ov_circuit, "ov")])
def test_circuits_are_the_products_of_the_weights(
    circuit: Circuit, name: str, fold_ln: bool, plain: RecurrentDepth
) -> None:
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        found = circuit(plain, layer, head, fold_ln=fold_ln)
        assert (found.ldim, found.mdim, found.rdim) == (D_MODEL, D_HEAD, D_MODEL)
        assert_close(found.AB, dense(plain, layer, head, fold_ln)[name])
        assert_close(circuit(plain, layer, fold_ln=fold_ln)[head].AB, found.AB)
        assert not found.A.requires_grad


def test_scores_are_the_query_key_circuit_between_centred_streams() -> None:
    """Without the biases' terms, a score is the circuit between the two streams divided by their
    scales and sqrt(d_head).
    """
    model, layer, head = toy(), 1, 2
    with torch.no_grad():
        model.blocks[layer].attn.b_QKV.zero_()
        model.blocks[layer].ln1.b.zero_()
    values = cached(
        model,
        full(),
        [
            f"loops.2.blocks.{layer}.{site}"
            for site in ("hook_resid_pre", "ln1.hook_scale", "attn.hook_attn_scores")
        ],
    )
    stream, scale, scores = values.values()
    scaled = stream / scale
    found = (scaled @ qk_circuit(model, layer, head).AB @ scaled.transpose(1, 2)) / D_HEAD**0.5
    seen = torch.ones(found.shape[-2:], dtype=torch.bool).tril()
    assert_close(found[:, seen], scores[:, head][:, seen])


@pytest.mark.parametrize("fold_ln", [True, False])
def test_full_circuits_are_between_tokens(fold_ln: bool, model: RecurrentDepth) -> None:
    if model.W_E.dtype == torch.float32:
        model = model.double()
    final = (
        CENTRE @ model.final_norm.w.diag() if fold_ln else torch.eye(D_MODEL, dtype=torch.float64)
    )
    qk, ov = full_qk(model, 1, 3, fold_ln=fold_ln), full_ov(model, 1, 3, fold_ln=fold_ln)
    parts = dense(model, 1, 3, fold_ln)
    assert qk.shape == ov.shape == (D_VOCAB, D_VOCAB)
    assert_close(qk.AB, model.W_E @ parts["qk"] @ model.W_E.T)
    assert_close(ov.AB, model.W_E @ parts["ov"] @ final @ model.W_U)
    assert full_ov(model, 1, fold_ln=fold_ln).shape == (HEADS, D_VOCAB, D_VOCAB)


def test_a_norm_without_centring_is_folded_without_it(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(plain.cfg), "normalization_type", "RMS")

    class ByWeight(nn.Module):
        def forward(self, x: Tensor, taps: dict) -> Tensor:
            return x / taps["ln1.hook_scale"](x.norm(dim=-1, keepdim=True)) * weight

    weight = plain.blocks[0].ln1.w.detach()
    plain.blocks[0].ln1 = ByWeight()
    attn = plain.blocks[0].attn
    assert_close(ov_circuit(plain, 0, 1).AB, weight.diag() @ attn.W_V[1] @ attn.W_O[1])


class Grouped(nn.Module):
    """Attention weights in which several query heads share a key and value head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = {"W_Q": (4, 6, 3), "W_K": (2, 6, 3), "W_V": (2, 6, 3), "W_O": (4, 3, 6)}
        for name, shape in shapes.items():
            setattr(self, name, torch.randn(shape, generator=generator, dtype=torch.float64))


def test_grouped_heads_use_the_keys_and_values_of_their_group(plain: RecurrentDepth) -> None:
    attn = plain.blocks[1].attn = Grouped()
    for head, group in enumerate([0, 0, 1, 1]):
        assert_close(
            qk_circuit(plain, 1, head, fold_ln=False).AB, attn.W_Q[head] @ attn.W_K[group].T
        )
        assert_close(ov_circuit(plain, 1, head, fold_ln=False).AB, attn.W_V[group] @ attn.W_O[head])


# Composition


def by_hand(model: RecurrentDepth, kind: str, fold_ln: bool) -> Tensor:
    pairs = list(itertools.product(range(DEEP), range(HEADS)))
    scores = torch.zeros(DEEP, HEADS, DEEP, HEADS, dtype=torch.float64)
    circuits = {pair: dense(model, *pair, fold_ln) for pair in pairs}
    for src, dst in itertools.product(pairs, pairs):
        written, read = circuits[src]["ov"], circuits[dst]["ov" if kind == "V" else "qk"]
        read = read.T if kind == "K" else read
        scores[src + dst] = (written @ read).norm() / written.norm() / read.norm()
    return scores


@pytest.mark.parametrize("fold_ln", [True, False])
@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_of_every_pair_of_heads(kind: str, fold_ln: bool) -> None:
    model = toy(n_layers=DEEP)
    found = composition_scores(model, kind, fold_ln=fold_ln)
    assert_close(found.values, by_hand(model, kind, fold_ln))
    assert (found.kind, found.fold_ln) == (kind, fold_ln)
    assert 0 < found.values.min() < found.values.max() <= 1
    assert not found.values.requires_grad


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_of_transformer_lens_between_all_visits(kind: str) -> None:
    """Its scores of the unrolled model's visits, two of the same layer among them, are those of
    their layers.
    """
    model, n_loops = toy(n_layers=DEEP), 2
    blocks = unrolled(model, n_loops).blocks
    q, k, v, o = (
        torch.stack([getattr(block.attn, name) for block in blocks])
        for name in ("W_Q", "W_K", "W_V", "W_O")
    )
    written, compared = FactoredMatrix(v, o), FactoredMatrix(q, k.transpose(-2, -1))
    theirs = scores_of_transformer_lens(
        written, {"Q": compared, "K": compared.T, "V": written}[kind]
    )
    ours = composition_scores(model, kind, fold_ln=False)
    pairs = 0
    for src, dst in itertools.combinations(range(n_loops * DEEP), 2):
        (src_loop, src_layer), (dst_loop, dst_layer) = divmod(src, DEEP), divmod(dst, DEEP)
        assert ours.possible(dst_loop - src_loop)[src_layer, :, dst_layer].all()
        assert_close(ours.values[src_layer, :, dst_layer], theirs[src, :, dst])
        pairs += 1
    possible = n_loops * ours.possible(0)[:, 0, :, 0].sum() + ours.possible(1)[:, 0, :, 0].sum()
    assert possible == pairs


def test_a_head_that_reads_what_another_writes_composes_with_it() -> None:
    """Head 1 of layer 0 writes along two directions; only the values of head 4 of layer 0 read
    nothing but these.
    """
    model = toy()
    attn = model.blocks[0].attn
    with torch.no_grad():
        plane = torch.linalg.qr(
            torch.randn(D_MODEL, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        )[0]
        model.blocks[0].ln1.w.fill_(1.0)
        attn.W_O[1] = attn.W_O[1] @ plane @ plane.T
        attn.W_V[4] = plane @ (plane.T @ attn.W_V[4])
    scores = composition_scores(model, "V", fold_ln=False).values
    assert scores[0, 1, 0].argmax() == 4
    assert scores[:, :, 0, 4].argmax() == 1


def test_possible_pairs() -> None:
    found = composition_scores(toy(n_layers=DEEP), "Q")
    for src, dst in itertools.product(range(DEEP), range(DEEP)):
        assert bool(found.possible(0)[src, 0, dst, 3]) == (src < dst)
    for distance in (1, 5):
        assert found.possible(distance).all()
    assert found.possible(0).shape == found.values.shape
    with pytest.raises(ValueError, match="distance must be at least 0, got -1"):
        found.possible(-1)


@pytest.mark.shapes
def test_frame_of_compositions() -> None:
    values = torch.arange(2.0 * 3 * 2 * 3).view(2, 3, 2, 3)
    frame = Composition("K", values, True).frame()
    assert list(frame.columns) == [
        "kind",
        "src_layer",
        "src_head",
        "dst_layer",
        "dst_head",
        "least_distance",
        "value",
    ]
    for row in frame.itertuples():
        assert row.value == values[row.src_layer, row.src_head, row.dst_layer, row.dst_head]
        assert row.least_distance == (0 if row.src_layer < row.dst_layer else 1)
    assert len(frame) == values.numel()


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_trained_heads_compose_more_than_random_ones(kind: str) -> None:
    trained = load("ltg_trained")
    untrained = build(trained.cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in untrained.parameters() if p.ndim == 2):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    ours, theirs = (composition_scores(model, kind).values for model in (trained, untrained))
    assert ours.max() > 1.5 * theirs.max()


# Refusals


def test_an_untied_copy_is_refused(plain: RecurrentDepth) -> None:
    for call in (lambda model: qk_circuit(model, 0), lambda model: composition_scores(model, "Q")):
        with pytest.raises(
            ValueError,
            match=(
                "an untied copy has other weights at each visit; ask the model that it was made"
                " from"
            ),
        ):
            call(untied(plain, LOOPS))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((LAYERS, 0), r"layer must be in 0\.\.1, got 2"),
        ((-1, 0), "got -1"),
        ((0, HEADS), r"head must be in 0\.\.4, got 5"),
    ],
)
@pytest.mark.parametrize("circuit", [qk_circuit, ov_circuit, full_qk, full_ov])
def test_places_out_of_range_are_refused(
    circuit: Circuit, place: tuple[int, int], message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=message):
        circuit(plain, *place)


def test_another_kind_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(
        (ValueError, TypeError), match="kind"
    ):  # TypeError where the test run checks types
        composition_scores(plain, "q")


class NormAfter(RecurrentDepth):
    """Its norms come after what they follow, so attention reads the stream itself."""

    def plan(self, n_loops: int) -> list[Slot]:
        return [
            replace(
                s, sites=(*(x for x in s.sites if not x.startswith("ln1")), "ln1.hook_normalized")
            )
            for s in super().plan(n_loops)
        ]


def test_a_norm_that_attention_does_not_read_through_is_not_folded() -> None:
    model = odd_one(NormAfter)
    with pytest.raises(
        ValueError, match=r"loops\.0\.blocks\.0 reads the stream itself; pass fold_ln=False"
    ):
        qk_circuit(model, 0)
    assert_close(qk_circuit(model, 0, 1, fold_ln=False).AB, dense(model, 0, 1, False)["qk"])


class TwoStacks(RecurrentDepth):
    """Every block is numbered 0."""

    def plan(self, n_loops: int) -> list[Slot]:
        return [replace(slot, layer=0) for slot in super().plan(n_loops)]


def test_layers_that_name_several_blocks_are_refused() -> None:
    with pytest.raises(
        ValueError, match="one block must be layer 0 of an iteration, but in this model 2 blocks"
    ):
        ov_circuit(odd_one(TwoStacks), 0)


# Families with norms inside the attention, and with other inputs than embeddings


def inside_norms(model: LoopedModel, layer: int, head: int, fold_ln: bool) -> dict[str, Tensor]:
    """Both circuits of a head of a family with RMS norms, multiplied out: what is normed with a
    divisor of 1 is multiplied by the norm's weight.
    """
    block = next(v for v in model.schedule(1) if v.loop is not None and v.layer == layer).block
    attn, group = block.attn, head * block.attn.W_K.shape[0] // block.attn.W_Q.shape[0]
    q, k, v, o = attn.W_Q[head], attn.W_K[group], attn.W_V[group], attn.W_O[head]
    if getattr(attn, "q_norm", None) is not None:
        per_head = attn.q_norm.w.numel() == q.shape[1]
        at = slice(None) if per_head else slice(head * q.shape[1], (head + 1) * q.shape[1])
        of = slice(None) if per_head else slice(group * q.shape[1], (group + 1) * q.shape[1])
        q, k = q * attn.q_norm.w[at], k * attn.k_norm.w[of]
    if block.of_output:
        o = o * block.ln1_post.w
    reads = block.ln1.w.diag() if fold_ln else torch.eye(len(q), dtype=q.dtype)
    return {"qk": reads @ q @ k.T @ reads.T, "ov": reads @ v @ o}


SANDWICH = [
    ("ouro", True),
    ("ouro", False),
    ("retrofit_olmo", False),
    ("training_free_blend", True),
]


def with_uneven_norms(name: str) -> LoopedModel:
    model = TOYS[name].make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim == 1):
            parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("name", "fold_ln"), SANDWICH)
def test_norms_inside_the_attention_belong_to_the_circuit(name: str, fold_ln: bool) -> None:
    model = with_uneven_norms(name)
    layer = next(v.layer for v in model.schedule(1) if v.loop is not None)
    for head in range(model.cfg.n_heads):
        expected = inside_norms(model, layer, head, fold_ln)
        assert_close(qk_circuit(model, layer, head, fold_ln=fold_ln).AB, expected["qk"])
        assert_close(ov_circuit(model, layer, head, fold_ln=fold_ln).AB, expected["ov"])


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_reads_what_an_output_norm_writes(kind: str) -> None:
    model = with_uneven_norms("ouro")
    found = composition_scores(model, kind).values
    layers, heads, _, _ = found.shape
    circuits = {
        place: inside_norms(model, *place, True)
        for place in itertools.product(range(layers), range(heads))
    }
    for src, dst in itertools.product(circuits, circuits):
        written, read = circuits[src]["ov"], circuits[dst]["ov" if kind == "V" else "qk"]
        read = read.T if kind == "K" else read
        expected = (written @ read).norm() / written.norm() / read.norm()
        assert_close(found[src + dst], expected)


@pytest.mark.parametrize(
    "name", ["huginn", "retrofit_llama", "retrofit_olmo", "parcae", "hyperloop"]
)
@pytest.mark.parametrize("circuit", [full_qk, full_ov])
def test_a_core_that_reads_no_embeddings_has_no_circuit_between_tokens(
    circuit: Circuit, name: str
) -> None:
    model = TOYS[name].make()
    layer = next(v.layer for v in model.schedule(1) if v.loop is not None)
    with pytest.raises(ValueError, match=r"reads a mix of states and inputs, not token embeddings"):
        circuit(model, layer, fold_ln=False)


def test_a_factor_on_the_embeddings_is_included(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = full_qk(plain, 0, 1).AB
    monkeypatch.setattr(type(plain), "embedding_scale", 3.0, raising=False)
    assert_close(full_qk(plain, 0, 1).AB, 9.0 * before)
    assert_close(full_ov(plain, 0, 1).A, 3.0 * plain.W_E @ ov_circuit(plain, 0, 1).A)


def test_a_gated_output_is_refused() -> None:
    model = TOYS["spiral"].make()
    with pytest.raises(ValueError, match="through a gate that changes from run to run"):
        ov_circuit(model, 0, fold_ln=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_circuits_of_narrow_weights_are_computed_in_float32(dtype: torch.dtype) -> None:
    model = with_uneven_norms("ouro").to(dtype)
    for found, wide in (
        (composition_scores(model, "K").values, composition_scores(model.float(), "K").values),
        (full_ov(model.to(dtype), 0, 1).AB, full_ov(model.float(), 0, 1).AB),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wide)
