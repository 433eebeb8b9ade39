"""Configurations, the registry of families, vocabularies, and where answers are read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch

from loopscope.models.basis.tokens import Batch, Readout, Vocabulary, pad_right
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.registry import FAMILIES, build, config_from_dict, family
from loopscope.models.families.recurrent_depth import RecurrentDepth, RecurrentDepthConfig

SIZES: dict[str, Any] = {"n_layers": 3, "d_model": 35, "n_heads": 5, "d_mlp": 44, "d_vocab": 29}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_loops": 7},
    {"input_injection": True, "n_loops": 1, "eps": 1e-6},
    {"positions": "learned", "n_ctx": 11},
    {"positions": "sinusoidal", "n_ctx": 13, "input_injection": True},
]


def config(**changes: Any) -> RecurrentDepthConfig:
    return RecurrentDepthConfig(**{**SIZES, **changes})


# Configurations


def test_the_width_of_a_head_follows_from_the_others() -> None:
    assert config().d_head == 7
    assert config(n_heads=1).d_head == 35
    assert dataclasses.replace(config(), n_heads=7).d_head == 5


def test_the_defaults_are_the_releases() -> None:
    cfg = config()
    assert (cfg.n_loops, cfg.n_ctx, cfg.positions, cfg.input_injection) == (
        None,
        None,
        "none",
        False,
    )
    assert (cfg.act_fn, cfg.normalization_type, cfg.eps) == ("gelu_new", "LN", 1e-5)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["n_layers", "d_model", "n_heads", "d_mlp", "d_vocab", "n_loops"])
def test_sizes_are_at_least_one(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        config(**{name: value})


@pytest.mark.parametrize("n_heads", [2, 3, 6, 36])
def test_heads_divide_the_width_and_those_that_do_are_named(n_heads: int) -> None:
    with pytest.raises(
        ValueError, match=rf"{n_heads} heads do not divide d_model=35; pass one of \[1, 5, 7, 35\]"
    ):
        config(n_heads=n_heads)


@pytest.mark.parametrize(
    ("positions", "n_ctx"), [("none", 11), ("learned", None), ("sinusoidal", None)]
)
def test_a_longest_input_belongs_to_positions(positions: str, n_ctx: int | None) -> None:
    with pytest.raises(
        ValueError,
        match=(
            f"n_ctx must be given with positions and only then, got n_ctx={n_ctx},"
            f" positions='{positions}'"
        ),
    ):
        config(positions=positions, n_ctx=n_ctx)


def test_unknown_positions_are_refused() -> None:
    cfg = config()
    object.__setattr__(
        cfg, "positions", "rotary"
    )  # past the type checks of the test run, which users do not have
    with pytest.raises(
        ValueError, match="positions must be 'learned', 'sinusoidal' or 'none', got 'rotary'"
    ):
        cfg.__post_init__()


@pytest.mark.parametrize("name", ["n_loops", "d_head", "positions", "new_field"])
def test_a_config_is_frozen(name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
        setattr(config(), name, 1)


def test_equal_configs_are_equal_and_can_be_keys() -> None:
    assert config() == config()
    assert config() != config(input_injection=True)
    assert len({config(), config(), config(n_loops=2)}) == 2


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_config_survives_a_dictionary_and_json(changes: dict[str, Any]) -> None:
    cfg = config(**changes)
    assert RecurrentDepthConfig.from_dict(cfg.to_dict()) == cfg
    assert config_from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_a_dictionary_names_the_family_and_leaves_out_what_follows() -> None:
    values = config().to_dict()
    assert values["family"] == "recurrent_depth"
    assert "d_head" not in values
    assert set(values) == {
        "family",
        *SIZES,
        "n_loops",
        "n_ctx",
        "eps",
        "positions",
        "input_injection",
        "dropout",
    }


def test_the_dictionary_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="of the family 'recurrent_depth', got 'ouro'"):
        RecurrentDepthConfig.from_dict({**config().to_dict(), "family": "ouro"})


@pytest.mark.parametrize("key", ["n_experts", "d_head", "N_LAYERS"])
def test_an_unknown_key_is_refused_with_the_known_ones(key: str) -> None:
    with pytest.raises(
        ValueError, match=f"RecurrentDepthConfig has no field '{key}'; its fields are .*'d_mlp'"
    ):
        RecurrentDepthConfig.from_dict({**config().to_dict(), key: 7})


@pytest.mark.parametrize("key", sorted(SIZES))
def test_a_missing_key_is_named(key: str) -> None:
    values = config().to_dict()
    del values[key]
    with pytest.raises(
        ValueError, match=f"RecurrentDepthConfig needs the field '{key}', which was not given"
    ):
        RecurrentDepthConfig.from_dict(values)


def test_the_dictionary_that_is_read_is_left_alone() -> None:
    values = config().to_dict()
    before = dict(values)
    config_from_dict(values)
    assert values == before


# The registry


def test_the_family_of_this_project_is_registered() -> None:
    assert FAMILIES["recurrent_depth"] == (RecurrentDepthConfig, RecurrentDepth)


@pytest.mark.parametrize("name", ["elsewhere", "", None])
def test_an_unknown_family_is_refused_with_the_known_ones(name: str | None) -> None:
    with pytest.raises(
        ValueError, match=rf"family must be one of \[.*'recurrent_depth'.*\], got {name!r}"
    ):
        config_from_dict({**config().to_dict(), "family": name})


def test_values_without_a_family_are_refused() -> None:
    with pytest.raises(ValueError, match=r"family must be one of .*got None"):
        config_from_dict(SIZES)


def test_a_new_family_is_one_decorator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopscope.models.core.registry.FAMILIES", dict(FAMILIES))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OddConfig(RecurrentDepthConfig):
        family: ClassVar[str] = "odd"
        oddness: int

    @family(OddConfig)
    class Odd(RecurrentDepth):
        pass

    cfg = config_from_dict({**config().to_dict(), "family": "odd", "oddness": 3})
    assert cfg == OddConfig(**SIZES, oddness=3)
    assert type(build(cfg)) is Odd
    assert "odd" not in FAMILIES, "only the copy was changed"


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_built_model_has_its_config_and_is_in_eval_mode(changes: dict[str, Any]) -> None:
    model = build(config(**changes))
    assert model.cfg == config(**changes)
    assert not any(module.training for module in model.modules())
    assert model(torch.tensor([[1, 2, 3]]), n_loops=2).shape == (1, 3, 29)


def test_the_base_config_belongs_to_no_family() -> None:
    assert LoopedConfig(**SIZES).family == ""
    assert RecurrentDepthConfig.family == "recurrent_depth"


# Vocabularies

WORDS = ("<e_0>", "<e_1>", "<r_0>", "</a>")


def test_padding_is_put_in_front_where_it_is_absent() -> None:
    assert Vocabulary(WORDS).words == ("<pad>", *WORDS)
    assert Vocabulary(["<pad>", *WORDS]).words == ("<pad>", *WORDS)
    assert len(Vocabulary(WORDS)) == len(Vocabulary(["<pad>", *WORDS])) == 5


def test_ids_are_places_in_the_list() -> None:
    vocabulary = Vocabulary(WORDS)
    assert vocabulary.ids("<e_0><r_0><e_1></a><pad>") == [1, 3, 2, 4, 0]
    assert [vocabulary.ids(word) for word in vocabulary.words] == [[i] for i in range(5)]


@pytest.mark.parametrize("words", [["<a>", "<b>", "<a>"], ["<pad>", "<a>", "<a>"]])
def test_a_word_that_occurs_twice_is_named(words: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="must hold each token once, but '<a>' occurs more often"):
        Vocabulary(words)


def test_padding_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="'<pad>' must have id 0, got 2"):
        Vocabulary(["<a>", "<b>", "<pad>"])


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("<e_0><e_7>", "<e_7>"),
        ("<e_0>r_0", "r_0"),
        ("e_0", "e_0"),
        ("<e_0><r_0", "<"),
        ("<E_0>", "<E_0>"),
        ("<e_0>,<r_0>", ","),
    ],
)
def test_a_piece_that_is_no_token_is_named(text: str, piece: str) -> None:
    match = (
        rf"'{piece}' is not one of the 5 tokens of this vocabulary \(such as <e_0>, <e_1>, <r_0>\)"
    )
    with pytest.raises(ValueError, match=match):
        Vocabulary(WORDS).ids(text)


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a text must hold at least one token, got an empty one"):
        Vocabulary(WORDS).ids(text)


# Where answers are read


@pytest.mark.parametrize(
    ("text", "readout"),
    [
        ("last_real", Readout("last_real")),
        ("first_pad", Readout("first_pad")),
        ("column:0", Readout("column", 0)),
        ("column:49", Readout("column", 49)),
    ],
)
def test_a_readout_is_written_as_it_is_read(text: str, readout: Readout) -> None:
    assert Readout.parse(text) == readout
    assert str(readout) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "last",
        "first_pad:1",
        "column",
        "column:",
        "column:-1",
        "column:1.5",
        "Last_real",
        "column:4:5",
    ],
)
def test_a_text_that_is_no_readout_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=f"readout must be 'last_real', 'first_pad' or 'column:K', got '{text}'"
    ):
        Readout.parse(text)


@pytest.mark.parametrize(
    ("kind", "column"), [("column", None), ("column", -1), ("last_real", 3), ("first_pad", 0)]
)
def test_a_column_belongs_to_a_fixed_readout(kind: Any, column: int | None) -> None:
    with pytest.raises(
        ValueError,
        match=r"a fixed readout column must be given with kind 'column' only and be >= 0",
    ):
        Readout(kind, column)


@pytest.mark.parametrize(
    ("readout", "lengths", "n_ctx", "columns", "width"),
    [
        ("last_real", [3, 5], None, [2, 4], 5),
        ("last_real", [3, 5], 5, [2, 4], 5),
        ("first_pad", [3, 5], None, [3, 5], 6),
        ("first_pad", [3, 5], 11, [3, 5], 6),
        ("first_pad", [3, 5], 6, [3, 5], 6),
        (
            "first_pad",
            [3, 5],
            5,
            [3, 4],
            5,
        ),  # no column is left after the longest: its last one is read
        ("first_pad", [5], 5, [4], 5),
        ("column:9", [3, 5], None, [5, 5], 6),  # without positions all padding columns are alike
        ("column:9", [3, 5], 10, [9, 9], 10),
        ("column:4", [3, 5], None, [4, 4], 5),
        ("column:4", [3, 5], 10, [4, 4], 5),
        ("column:0", [1, 1], None, [0, 0], 1),
    ],
)
def test_readouts_are_placed_here(
    readout: str, lengths: list[int], n_ctx: int | None, columns: list[int], width: int
) -> None:
    assert Readout.parse(readout).place(lengths, n_ctx, positional=n_ctx is not None) == (
        columns,
        width,
    )


@pytest.mark.parametrize("positional", [False, True])
def test_an_input_that_reaches_past_a_fixed_column_is_refused(positional: bool) -> None:
    with pytest.raises(
        ValueError, match="answers are read at column 3, so inputs have at most 4 tokens, got 5"
    ):
        Readout("column", 3).place([2, 5], 10 if positional else None, positional)


# Batches


def test_rows_are_padded_on_the_right_with_id_0() -> None:
    tokens, mask = pad_right([[4, 2], [7, 8, 9]], 5)
    assert tokens.tolist() == [[4, 2, 0, 0, 0], [7, 8, 9, 0, 0]]
    assert mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


def test_rows_of_a_batch_are_a_batch() -> None:
    tokens, mask = pad_right([[4, 2], [7, 8, 9], [5]], 5)
    batch = Batch(tokens, mask, torch.tensor([1, 2, 0]))
    for rows in (slice(1, 3), torch.tensor([1, 2])):
        part = batch[rows]
        assert (len(batch), len(part)) == (3, 2)
        assert torch.equal(part.tokens, tokens[1:])
        assert torch.equal(part.mask, mask[1:])
        assert part.readout.tolist() == [2, 0]
