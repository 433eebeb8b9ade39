"""Every field of every family's config: values that it cannot hold are refused with its name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

import pytest

from family_toys import TOYS
from loopscope.models.basis.fields import MOST, MOST_BLOCKS, check_fields
from loopscope.models.core.registry import config_from_dict
from toy import toy_config

NASTY: tuple[Any, ...] = (
    None, "", "x", "1", True, False, [], {}, [1], {"type": []}, -1, 0, 0.5, 1.5, 10**9, 10**19,
    10**400, math.nan, math.inf, -math.inf, 1e308, -1.0, b"1",
)  # fmt: skip


def configs() -> dict[str, dict[str, Any]]:
    """A valid config of each family as a dictionary."""
    made = {toy.make().cfg for toy in TOYS.values()} | {toy_config()}
    return {cfg.family: cfg.to_dict() for cfg in sorted(made, key=repr)}


CONFIGS = configs()
FIELDS = [(family, name) for family, cfg in CONFIGS.items() for name in cfg if name != "family"]


def refusal(values: dict[str, Any]) -> str | None:
    """The sentence with which a config is refused; None where it is not."""
    try:
        config_from_dict(values)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("family", "name"), FIELDS, ids=lambda value: value)
def test_a_field_holds_what_it_can_or_is_refused_by_name(family: str, name: str) -> None:
    kind = type(config_from_dict(CONFIGS[family]))
    hint = str(get_type_hints(kind)[name])
    for value in NASTY:
        said = refusal({**CONFIGS[family], name: value})
        if said is not None:
            assert "\n" not in said
            assert len(said) < 1000
            continue
        held = getattr(config_from_dict({**CONFIGS[family], name: value}), name)
        if isinstance(value, float | int) and not isinstance(value, bool):
            assert math.isfinite(held)
            assert abs(held) <= (MOST if "float" not in hint else 1e308)
        if "bool" in hint:
            assert isinstance(value, bool)


@pytest.mark.parametrize("family", CONFIGS)
def test_numbers_of_wrong_range_name_their_field(family: str) -> None:
    wrong = {
        "eps": (math.nan, -1, math.inf, "1e-5"),
        "rope_theta": (math.nan, 0, -1.0, math.inf, None),
        "n_heads": (0, -1, True, "3"),
        "n_layers": (0, 10**9, 10**19),
        "d_model": (10**9, 10**19, None),
        "n_loops": (0, 10**9),
        "embedding_scale": (math.nan, math.inf, "x"),
        "logit_softcap": (math.nan, 0.0, -1.0, math.inf),
        "input_injection": ("x", 1, None),
        "tied": ("false", 0),
        "positions": ([], None, 3),
        "h_0": ([], "one"),
    }
    for name, values in wrong.items():
        for value in values if name in CONFIGS[family] else ():
            with pytest.raises(ValueError, match=rf"^{name} must be "):
                config_from_dict({**CONFIGS[family], name: value})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": []}, "must be of the type"),
        ({"rope_type": "linear", "factor": math.nan}, "factor must be finite and above 0"),
        ({"rope_type": "linear", "factor": "2"}, "factor must be a number, got '2'"),
        ({"rope_type": "linear", "factor": 0}, "factor must be finite and above 0"),
        ("linear", "rope_scaling must be a mapping, got 'linear'"),
    ],
)
def test_rope_scaling_that_cannot_be_computed_is_refused(scaling: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({**CONFIGS["ouro"], "rope_scaling": scaling})


@pytest.mark.parametrize("name", [[], {}, None, 3, "nope"])
def test_what_is_no_familys_name_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="the family must be one of"):
        config_from_dict({"family": name})


def test_a_size_that_heads_do_not_divide_lists_the_divisors_at_once() -> None:
    with pytest.raises(ValueError, match=r"pass one of \[1, 2, 4, .*16777216\]"):
        toy_config_of_width(MOST)


def toy_config_of_width(d_model: int) -> object:
    return config_from_dict({**CONFIGS["recurrent_depth"], "d_model": d_model, "n_heads": 3})


def test_limits_stand_at_the_field() -> None:
    @dataclasses.dataclass
    class Sizes:
        layers: int = dataclasses.field(default=1, metadata={})
        share: float | int = 0.5

    check_fields(Sizes, {"layers": MOST, "share": 1})
    with pytest.raises(ValueError, match=f"layers must be at most {MOST}"):
        check_fields(Sizes, {"layers": MOST + 1})
    assert MOST_BLOCKS < MOST
