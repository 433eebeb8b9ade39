"""ALBERT: its golden outputs, transformers' own model, its groups of blocks, its embeddings and
head, and what it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AlbertConfig as ReferenceConfig
from transformers import AlbertForMaskedLM, AlbertForPreTraining

from golden_cases import GOLDEN, Compute, GoldenCase, check_case
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load, save
from loopscope.interp.attribution.direct_logit import direct_logit_attribution
from loopscope.interp.generation import generate
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.weights.circuits import full_ov, qk_circuit
from loopscope.models.core.registry import build
from loopscope.models.families.albert import Albert, AlbertConfig
from loopscope.models.views import untied
from toy import assert_close, randomize_

NO_TYPES = {"token_types": None}
BIAS, BIAS_AGAIN, WORDS = (
    "predictions.bias",
    "predictions.decoder.bias",
    "predictions.decoder.weight",
)


def group(case: GoldenCase, t: str) -> Tensor:
    assert isinstance(case.model, Albert)
    found = case.model.schedule()[int(t) * case.model.cfg.n_layers].block
    return torch.tensor(
        [[found in list(blocks.children()) for blocks in case.model.groups.children()].index(True)]
    )


def masked(case: GoldenCase) -> Tensor:
    return case.logits(mask=case.golden["variant.masked.attention_mask"])


BLOCK = r"iter\.(\d+)\.block\.(\d+)\."
TABLE: dict[str, Compute] = {
    r"(input_ids|token_type_ids|variant\.masked\.attention_mask)": GoldenCase.stored,
    r"position_ids": lambda case: torch.arange(case.tokens.shape[1]),
    r"embed": lambda case: case.activation("ln_embed.hook_out"),
    r"init_state": lambda case: case.activation("hook_embed"),
    r"iter\.(\d+)\.group": group,
    r"iter\.(\d+)\.state_(in|out)": lambda case, t, where: case.activation(
        f"loops.{t}.hook_state_{where}"
    ),
    BLOCK + r"(attn|mlp)_out": lambda case, t, j, part: case.activation(
        f"loops.{t}.blocks.{j}.hook_{part}_out"
    ),
    BLOCK + r"resid_(mid|post)": lambda case, t, j, where: case.activation(
        f"loops.{t}.blocks.{j}.hook_resid_{where}"
    ),
    BLOCK + r"attn\.pattern": lambda case, t, j: case.activation(
        f"loops.{t}.blocks.{j}.attn.hook_pattern"
    ),
    BLOCK + r"attn\.(q|k|v)": (
        lambda case, t, j, which: case.activation(
            f"loops.{t}.blocks.{j}.attn.hook_{which}"
        ).flatten(-2)
    ),
    r"iter\.(\d+)\.readout_logits": lambda case, t: case.logits(int(t) + 1),
    r"logits": lambda case: case.logits(),
    r"variant\.no_types\.logits": lambda case: case.logits(**NO_TYPES),
    r"variant\.masked\.logits": masked,
}


def toy(**changes: Any) -> Albert:
    sizes: dict[str, Any] = {
        "n_layers": 2,
        "n_loops": 5,
        "n_groups": 2,
        "n_grouped_loops": 5,
        "n_token_types": 3,
        **changes,
    }
    model = build(
        AlbertConfig(**sizes, d_model=15, d_factor=11, n_heads=3, d_mlp=22, d_vocab=29, n_ctx=11)
    )
    assert isinstance(model, Albert)
    return randomize_(model).double()


def inputs(n_types: int = 3, d_vocab: int = 29) -> dict[str, Tensor]:
    """Tokens, token types and a mask of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, d_vocab, (3, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([7, 4, 5])[:, None]).long()
    return {
        "tokens": tokens * mask,
        "token_types": torch.randint(n_types, (3, 7), generator=generator),
        "mask": mask,
    }


@pytest.fixture
def reference(tmp_path: Path) -> Callable[..., tuple[AlbertForMaskedLM, Path]]:
    """transformers' own model of random weights, biases and norms included, and the folder that it
    saved.
    """

    def make(kind: type = AlbertForMaskedLM, **changes: object) -> tuple[AlbertForMaskedLM, Path]:
        sizes: dict[str, Any] = {
            "num_hidden_layers": 5,
            "num_hidden_groups": 2,
            "inner_group_num": 3,
            **changes,
        }
        config = ReferenceConfig(
            **sizes,
            vocab_size=29,
            embedding_size=11,
            hidden_size=15,
            num_attention_heads=3,
            intermediate_size=22,
            max_position_embeddings=13,
            type_vocab_size=3,
        )
        model = kind(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                around = 1.0 if "LayerNorm.weight" in name or "layer_norm.weight" in name else 0.0
                parameter.copy_(around + 0.4 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / "theirs")
        return model, tmp_path / "theirs"

    return make


def rewritten(folder: Path, changes: Mapping[str, Tensor | None]) -> Path:
    """The folder with some tensors changed, added, or (None) taken away."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file(
        {key: tensor.clone() for key, tensor in tensors.items() if tensor is not None},
        folder / "model.safetensors",
    )
    return folder


def test_golden_outputs(record_error: Callable[[str, str, float], None]) -> None:
    check_case(GoldenCase("albert", begin={"token_types": "token_type_ids"}), TABLE, record_error)


@pytest.mark.parametrize("hidden_act", ["gelu_new", "gelu"])
@pytest.mark.parametrize("kind", [AlbertForMaskedLM, AlbertForPreTraining])
def test_transformers_model_of_several_groups_gives_the_same(
    kind: type, hidden_act: str, reference: Callable[..., Any]
) -> None:
    theirs, folder = reference(kind, hidden_act=hidden_act)
    ours, batch = load(folder).double(), inputs()
    with torch.no_grad():
        found = theirs.double()(
            batch["tokens"],
            attention_mask=batch["mask"],
            token_type_ids=batch["token_types"],
            output_hidden_states=True,
        )
        logits, cache = ours.run_with_cache(**batch, names_filter="**.hook_resid_post")
    assert_close(logits, found.prediction_logits if kind is AlbertForPreTraining else found.logits)
    states = [cache[f"loops.{t}.blocks.{j}.hook_resid_post"] for t in range(5) for j in range(3)]
    assert len(found.hidden_states) == len(states) + 1
    for state, expected in zip(states, found.hidden_states[1:], strict=True):
        assert_close(state, expected)


def test_groups_follow_the_reference_also_where_they_do_not_divide_the_iterations(
    reference: Callable[..., Any],
) -> None:
    for layers, groups in ((7, 3), (3, 3), (2, 3), (5, 4)):
        expected = [int(i / (layers / groups)) for i in range(layers)]
        cfg = toy(n_loops=layers, n_groups=groups, n_grouped_loops=layers).cfg
        assert isinstance(cfg, AlbertConfig)
        assert [cfg.group_of(t) for t in range(layers)] == expected


def test_a_shorter_call_keeps_the_groups_where_they_are() -> None:
    model, batch = toy(), inputs()
    state = model.begin(batch["tokens"], batch["mask"], token_types=batch["token_types"])
    for t, end in enumerate(model.iteration_ends(5)):
        state = model.advance(state, end)
        assert_close(model(**batch, n_loops=t + 1), model.readout(state))
    blocks = [[visit.block for visit in model.schedule(n)] for n in (2, 5)]
    assert blocks[1][:4] == blocks[0]
    assert len(set(blocks[0])) == 2
    assert len(set(blocks[1])) == 4
    assert_close(untied(model, 4)(**batch), model(**batch, n_loops=4))


def test_more_iterations_than_several_groups_were_shared_out_among_are_refused(
    reference: Callable[..., Any],
) -> None:
    with pytest.raises(
        ValueError,
        match="2 groups of blocks among 5 iterations, so n_loops must be at most that, got 6",
    ):
        toy()(**inputs(), n_loops=6)
    with pytest.raises(
        ValueError,
        match="2 groups of blocks among 5 iterations, so n_loops must be at most that, got 6",
    ):
        load(reference()[1], n_loops=6)
    one = toy(n_groups=1, n_grouped_loops=None)
    assert len({visit.block for visit in one.schedule(9)}) == 2
    assert one(**inputs(), n_loops=9).isfinite().all()


@pytest.mark.shapes
def test_a_fresh_model_is_the_obvious_computation() -> None:
    model, batch = toy(), inputs()
    types, real = batch["token_types"], batch["mask"].bool()
    x = model.embedding[batch["tokens"]] + model.W_pos[:7] + model.W_type[types]
    x = affine(layer_norm(x, model.embed_norm), model.embed_in)
    for group in (0, 0, 0, 1, 1):
        for block in model.groups[group]:
            x = layer_norm(x + attended(x, block.attn, real), block.ln1_post)
            x = layer_norm(
                x + affine(gelu_new(affine(x, block.mlp.up)), block.mlp.down), block.ln2_post
            )
    head = layer_norm(gelu_new(affine(x, model.head_in)), model.head_norm)
    with torch.no_grad():
        assert_close(model(**batch), head @ model.embedding.T + model.head_bias)


def affine(x: Tensor, linear: Any) -> Tensor:
    return x @ linear.weight.T + linear.bias


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt() * norm.w + norm.b


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def attended(x: Tensor, attn: Any, real: Tensor) -> Tensor:
    """Attention row by row and head by head over the real tokens, wherever they stand."""
    q, k, v = (affine(x, linear).unflatten(-1, (3, 5)) for linear in (attn.q, attn.k, attn.v))
    out = torch.zeros_like(x)
    for row, keys in enumerate(real):
        for head in range(3):
            scores = q[row, :, head] @ k[row, keys, head].T / 5**0.5
            out[row, :, head * 5 : head * 5 + 5] = scores.softmax(-1) @ v[row, keys, head]
    return affine(out, attn.o)


def test_a_later_token_changes_an_earlier_result_and_padding_does_not() -> None:
    model, batch = toy(), inputs()
    logits = model(**batch)
    changed = {**batch, "tokens": batch["tokens"].clone()}
    changed["tokens"][0, 6] = 3 if changed["tokens"][0, 6] != 3 else 4
    assert not torch.allclose(model(**changed)[0, 0], logits[0, 0])
    padding = {**batch, "tokens": batch["tokens"].clone()}
    padding["tokens"][1, 5] = 7
    assert_close(model(**padding)[1, :4], logits[1, :4])
    assert not Albert.causal


def test_token_types_are_zeros_unless_they_are_given() -> None:
    model, batch = toy(), inputs()
    types = batch.pop("token_types")
    assert torch.equal(model(**batch), model(**batch, token_types=torch.zeros_like(types)))
    assert not torch.allclose(model(**batch), model(**batch, token_types=types))
    with pytest.raises(
        ValueError, match=r"token types must be in 0\.\.2 \(n_token_types=3\), got 3"
    ):
        model(**batch, token_types=torch.full_like(types, 3))
    with pytest.raises(
        ValueError, match=r"one token type for each of the tokens \[3, 7\], got \[3, 6\]"
    ):
        model(**batch, token_types=types[:, :6])
    with pytest.raises(TypeError, match=r"token types must be integers, got torch\.float32"):
        model(**batch, token_types=types.float())


def test_the_lenses_read_through_the_whole_head() -> None:
    model, tokens = toy(), inputs()["tokens"].clamp(min=1)
    lens = logit_lens(model, tokens, readout=2, keep_logits=True)
    again = readout_lens(model, tokens, readout=2, keep_logits=True)
    assert lens.logits is not None
    assert again.logits is not None
    for t in range(5):
        expected = model(tokens, n_loops=t + 1)[:, 2]
        assert_close(lens.logits[2 * t + 1], expected)
        assert_close(again.logits[t], expected)


def test_what_needs_a_logit_that_is_linear_in_the_stream_refuses() -> None:
    model, batch = toy(), inputs()
    with pytest.raises(
        ValueError, match="direct_logit_attribution needs a residual stream that is the sum"
    ):
        direct_logit_attribution(model, batch["tokens"], batch["tokens"][:, 0], readout=2)
    for circuit in (qk_circuit, full_ov):
        with pytest.raises(
            ValueError,
            match=r"fold_ln needs a norm in front of the attention, but loops\.0\.blocks\.0 reads",
        ):
            circuit(model, 0)
    with pytest.raises(ValueError, match="this Albert is not causal"):
        generate(model, batch["tokens"], 2)


@pytest.mark.shapes
def test_weight_views_are_the_matrices_on_the_way_in_and_out() -> None:
    model = toy()
    assert_close(model.W_E, model.embed_in(model.embedding) - model.embed_in.bias)
    resid = torch.randn(3, 15, dtype=torch.float64)
    assert_close(
        resid @ model.W_U + model.b_U, model.unembed((resid @ model.head_in.weight.T)[None])[0]
    )


def test_texts_cannot_be_encoded_before_the_readout_is_given(tmp_path: Path) -> None:
    model = load(GOLDEN / "albert")
    assert model.read_at is None
    with pytest.raises(
        ValueError, match="does not say where its answers are read; load it with readout="
    ):
        model.encode("any")
    assert str(load(GOLDEN / "albert", readout="column:3").read_at) == "column:3"


def test_head_and_bias_may_be_stored_once_or_twice(reference: Callable[..., Any]) -> None:
    theirs, folder = reference()
    batch, logits = inputs(), load(reference()[1])(**inputs())
    weights = theirs.state_dict()
    for kept in ({BIAS}, {BIAS_AGAIN}, {BIAS, BIAS_AGAIN, WORDS}):
        changes = {key: weights[key] if key in kept else None for key in (BIAS, BIAS_AGAIN, WORDS)}
        assert torch.equal(load(rewritten(folder, changes))(**batch), logits)
    pooler = {
        "albert.pooler.weight": torch.ones(15, 15),
        "sop_classifier.classifier.bias": torch.ones(2),
    }
    assert torch.equal(
        load(
            rewritten(folder, {**pooler, "albert.embeddings.position_ids": torch.arange(13)[None]})
        )(**batch),
        logits,
    )


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (BIAS_AGAIN, f"{BIAS_AGAIN} differs from {BIAS}"),
        (WORDS, f"{WORDS} differs from albert.emb"),
    ],
)
def test_head_and_bias_that_are_not_tied_are_refused(
    key: str, what: str, folder_with: Callable[..., Path]
) -> None:
    folder = folder_with("albert", {})
    changed = load_file(folder / "model.safetensors")[key] + 1.0
    with pytest.raises(CheckpointError, match=what):
        load(rewritten(folder, {key: changed}))


def test_a_checkpoint_without_the_head_is_refused(folder_with: Callable[..., Path]) -> None:
    folder = folder_with("albert", {})
    headless = {
        key: None
        for key in load_file(folder / "model.safetensors")
        if key.startswith("predictions.")
    }
    with pytest.raises(CheckpointError, match=r"lacks 5 key.* first 'predictions.bias'"):
        load(rewritten(folder, headless))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "relu", "hidden_act must be 'gelu_new' or 'gelu', got 'relu'"),
        (
            "position_embedding_type",
            "relative_key",
            "position_embedding_type must be 'absolute', got 'relative_key'",
        ),
        ("tie_word_embeddings", False, "tie_word_embeddings must be True, got False"),
        ("is_decoder", True, "is_decoder must be False, got True"),
        ("num_hidden_layers", "4", "num_hidden_layers must be a whole number, got '4'"),
        ("num_hidden_groups", 0, "n_groups must be at least 1, got 0"),
        (
            "num_hidden_groups",
            2,
            (
                "lacks 16 key.* first"
                " 'albert.encoder.albert_layer_groups.1.albert_layers.0.attention.query.weight'"
            ),
        ),
        ("num_attention_heads", 5, "5 heads do not divide d_model=24"),
        (
            "embedding_size",
            24,
            (
                r"'albert.embeddings.word_embeddings.weight' must have the shape \[47, 24\], got"
                r" \[47, 14\]"
            ),
        ),
        ("loop_gain", 2.0, "has the field 'loop_gain' .* which this family's loader does not know"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    field: str, value: object, message: str, folder_with: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder_with("albert", {field: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "relu"}, "act_fn must be 'gelu_new' or 'gelu', got 'relu'"),
        (
            {"n_grouped_loops": None},
            (
                "n_grouped_loops must be given where there are several groups and only there, got"
                " None with n_groups=2"
            ),
        ),
        (
            {"n_groups": 1},
            (
                "n_grouped_loops must be given where there are several groups and only there, got 5"
                " with n_groups=1"
            ),
        ),
        ({"n_token_types": 0}, "n_token_types must be at least 1, got 0"),
    ],
)
def test_configs_that_make_no_model_are_refused(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy(**changes)


def test_saving_keeps_groups_and_activation(tmp_path: Path) -> None:
    model = toy(act_fn="gelu")
    save(model, tmp_path / "own")
    again = load(tmp_path / "own", n_loops=3)
    assert again.cfg.n_loops == 3
    assert_close(again(**inputs()), model(**inputs(), n_loops=3))
