"""Identity 1: the golden outputs of the public reference implementation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.checkpoints.locate import SHIPPED
from loopscope.interp.exits.halting import Halting, HaltingRule, halting
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.lens.record import Lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.cache import LoopCache
from loopscope.tasks.questions import by_hops, read_questions
from paths import GOLDEN

CASES = ("ltg_nope", "ltg_nope_compiled_injection", "ltg_sinusoidal", "ltg_systematicity")
FLOAT32, FLOAT64 = 1e-5, 1e-9
DRIFT_AFTER, DRIFT_FACTOR = 4, 10
Run = Callable[..., Tensor]


def read_meta(case: str) -> dict:
    return json.loads((GOLDEN / case / "meta.json").read_text())


def read_golden(case: str, precision: str) -> dict[str, Tensor]:
    return load_file(
        GOLDEN / case / ("golden.safetensors" if precision == "float32" else "golden64.safetensors")
    )


class Case:
    """Our model on one case's inputs; each method computes what a group of golden keys holds."""

    def __init__(self, name: str, precision: str) -> None:
        meta = read_meta(name)
        model = load(
            GOLDEN / name,
            n_heads=meta["n_heads"],
            input_injection=meta["input_injection"],
            readout="first_pad",
        )
        self.model = model.double() if precision == "float64" else model
        self.n_loops = meta["n_loops"]
        self.given = {
            key: value for key, value in read_golden(name, "float32").items() if key in INPUTS
        }

    def batch(self, readout: str) -> Batch:
        lengths, width = self.given["input_lengths"], self.given["input_ids"].shape[1]
        columns = {
            "first_pad": lengths.clamp(max=width - 1),
            "inp_len": lengths - 1,
            "last_token": torch.full_like(lengths, width - 1),
        }
        return Batch(self.given["input_ids"], self.given["attention_mask"], columns[readout])

    @cached_property
    def cache(self) -> LoopCache:
        batch = self.batch("first_pad")
        return self.model.run_with_cache(batch.tokens, n_loops=self.n_loops, mask=batch.mask)[1]

    @cached_property
    def lens(self) -> Lens:
        return readout_lens(self.model, self.batch("first_pad"), self.n_loops)

    def activation(self, name: str) -> Tensor:
        return self.cache[name]

    def logits(self, loop: str) -> Tensor:
        batch = self.batch("first_pad")
        return self.model(batch.tokens, n_loops=int(loop) + 1, mask=batch.mask)

    def margin(self) -> Tensor:
        return self.lens.margin(self.given["targets"])

    def first_hit(self) -> Tensor:
        return zero_based(self.lens.first_hit(self.given["targets"]))

    def halted(self, readout: str, kl: str, entropy: str) -> Halting:
        return halting(
            self.model, self.batch(readout), HaltingRule(float(kl), float(entropy)), self.n_loops
        )

    def iterations_used(self, readout: str, kl: str, entropy: str) -> Tensor:
        return self.halted(readout, kl, entropy).iterations

    def halting_logits(self, readout: str, kl: str, entropy: str) -> Tensor:
        return self.halted(readout, kl, entropy).logits

    def input(self, key: str) -> Tensor:
        if key == "input_lengths":
            return self.given["attention_mask"].sum(1)
        return self.given[key]


def zero_based(first_hit: Tensor) -> Tensor:
    """Our first hits, from 1 and NaN for never, in the reference's form."""
    return torch.where(first_hit.isnan(), 0.0, first_hit).long() - 1


INPUTS = ("input_ids", "attention_mask", "input_lengths", "targets")
TABLE: dict[str, Run] = {
    rf"({'|'.join(INPUTS)})": Case.input,
    r"(loops\.\d+\.blocks\.\d+\.hook_resid_post)": Case.activation,
    r"loops\.(\d+)\.logits": Case.logits,
    r"margin\.first_pad": Case.margin,
    r"first_hit\.first_pad": Case.first_hit,
    r"halting\.(inp_len|last_token)\.eps([\d.]+)\.H([\d.]+)\.iterations_used": Case.iterations_used,
    r"halting\.(inp_len|last_token)\.eps([\d.]+)\.H([\d.]+)\.logits": Case.halting_logits,
}


class Trained:
    """The shipped checkpoint on its own test questions."""

    def __init__(self, precision: str) -> None:
        model = load("ltg_trained")
        self.model = model.double() if precision == "float64" else model
        self.n_loops = read_meta("ltg_trained")["n_loops"]
        self.questions = by_hops(read_questions(SHIPPED / "ltg_trained" / "test.json"))
        self.lenses: dict[int, Lens] = {}

    def batch(self, hops: int) -> Batch:
        return self.model.encode([question.text for question in self.questions[hops]])

    def answers(self, hops: int) -> Tensor:
        return self.model.to_tokens([question.answer for question in self.questions[hops]])[:, 0]

    def lens(self, hops: int) -> Lens:
        if hops not in self.lenses:
            self.lenses[hops] = readout_lens(self.model, self.batch(hops), self.n_loops)
        return self.lenses[hops]

    def accuracy(self) -> Tensor:
        return torch.stack(
            [self.lens(hops).correct(self.answers(hops)).float().mean(1) for hops in self.questions]
        )

    def margin(self, hops: str) -> Tensor:
        return self.lens(int(hops)).margin(self.answers(int(hops)))

    def first_hit(self, hops: str) -> Tensor:
        return zero_based(self.lens(int(hops)).first_hit(self.answers(int(hops))))

    def halted(self, hops: str) -> Halting:
        return halting(
            self.model, self.batch(int(hops)), HaltingRule(kl=0.01, entropy=3.0), self.n_loops
        )

    def iterations_used(self, hops: str) -> Tensor:
        return self.halted(hops).iterations

    def halting_correct(self, hops: str) -> Tensor:
        return self.halted(hops).correct(self.answers(int(hops)))


TRAINED_TABLE: dict[str, Run] = {
    r"accuracy": Trained.accuracy,
    r"hop(\d+)\.margin": Trained.margin,
    r"hop(\d+)\.first_hit": Trained.first_hit,
    r"hop(\d+)\.halting\.iterations_used": Trained.iterations_used,
    r"hop(\d+)\.halting\.correct": Trained.halting_correct,
}


def ours(table: dict[str, Run], case: object, key: str) -> Tensor:
    """What our code computes for a golden key."""
    for pattern, compute in table.items():
        found = re.fullmatch(pattern, key)
        if found:
            return compute(case, *found.groups())
    raise AssertionError(f"{key!r} has no row in the table")


def unused_keys() -> dict[str, str]:
    lines = (GOLDEN / "UNUSED.md").read_text().splitlines()
    found = [re.fullmatch(r"- (\S+): (.+)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def scaled_error(value: Tensor, golden: Tensor) -> Tensor:
    """The largest difference of each row over the largest magnitude of the whole golden tensor."""
    assert value.shape == golden.shape
    return (value.double() - golden.double()).abs().flatten(1).amax(1) / golden.double().abs().max()


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("case", [*CASES, "ltg_trained"])
def test_every_golden_key_has_a_row_or_a_reason(case: str, precision: str) -> None:
    table = TRAINED_TABLE if case == "ltg_trained" else TABLE
    keys = read_golden(case, precision)
    known = {key for key in keys if any(re.fullmatch(pattern, key) for pattern in table)}
    excused = {key for key in keys if f"{case}/{key}" in unused_keys()}
    assert set(keys) == known | excused
    assert not known & excused


def test_unused_keys_exist() -> None:
    stored = {
        f"{case}/{key}" for case in (*CASES, "ltg_trained") for key in read_golden(case, "float32")
    }
    assert {key for key in unused_keys() if key.startswith("ltg_")} <= stored


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", FLOAT32), ("float64", FLOAT64)])
@pytest.mark.parametrize("name", CASES)
def test_random_models_reproduce_every_tensor(
    name: str, precision: str, tolerance: float, record_error: Callable[[str, str, float], None]
) -> None:
    case = Case(name, precision)
    wrong = {}
    for key, golden in read_golden(name, precision).items():
        value = ours(TABLE, case, key)
        if not golden.is_floating_point():
            assert torch.equal(value, golden), key
            continue
        assert value.dtype == golden.dtype
        error = scaled_error(value, golden).max().item()
        record_error(name, precision, error)
        if not error <= tolerance:
            wrong[key] = error
    assert not wrong


@pytest.mark.parametrize("name", CASES)
def test_whole_numbers_hold_in_float64_too(name: str) -> None:
    case = Case(name, "float64")
    whole = {
        key: value
        for key, value in read_golden(name, "float32").items()
        if not value.is_floating_point()
    }
    assert len(whole) == 11
    for key, golden in whole.items():
        assert torch.equal(ours(TABLE, case, key), golden), key


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained("float32")


@pytest.fixture(scope="module")
def trained64() -> Trained:
    return Trained("float64")


def trained_keys(ending: str) -> list[str]:
    return sorted(key for key in read_golden("ltg_trained", "float32") if key.endswith(ending))


def drift_tolerance(key: str) -> Tensor:
    """Per iteration: 1e-5, and after 4 iterations ten times the reference's own distance from
    float64.
    """
    distance = torch.tensor(
        read_meta("ltg_trained")["float32_vs_float64"]["by_iteration"][key], dtype=torch.float64
    )
    allowed = (DRIFT_FACTOR * distance).clamp(min=FLOAT32)
    allowed[:DRIFT_AFTER] = FLOAT32
    return allowed


@pytest.mark.slow
def test_trained_model_reproduces_whole_numbers_exactly(trained: Trained) -> None:
    golden = read_golden("ltg_trained", "float32")
    for key in trained_keys(("accuracy", "first_hit", "iterations_used", "correct")):
        assert torch.equal(ours(TRAINED_TABLE, trained, key).to(golden[key].dtype), golden[key]), (
            key
        )


@pytest.mark.slow
def test_trained_model_reproduces_whole_numbers_in_float64(trained64: Trained) -> None:
    golden = read_golden("ltg_trained", "float32")
    for key in trained_keys("first_hit"):
        assert torch.equal(
            ours(TRAINED_TABLE, trained64, key).to(golden[key].dtype), golden[key]
        ), key


@pytest.mark.parametrize("key", trained_keys("margin"))
def test_trained_margins_drift_no_more_than_the_reference(
    key: str, trained: Trained, record_error: Callable[[str, str, float], None]
) -> None:
    error = scaled_error(
        ours(TRAINED_TABLE, trained, key), read_golden("ltg_trained", "float32")[key]
    )
    record_error("ltg_trained", "float32, loops 1 to 4", error[:DRIFT_AFTER].max().item())
    record_error("ltg_trained", "float32, all loops", error.max().item())
    assert bool((error <= drift_tolerance(key)).all()), error / drift_tolerance(key)


@pytest.mark.parametrize("key", trained_keys("margin"))
@pytest.mark.slow
def test_trained_margins_in_float64(
    key: str, trained64: Trained, record_error: Callable[[str, str, float], None]
) -> None:
    value = ours(TRAINED_TABLE, trained64, key)
    assert value.dtype == torch.float64
    error = scaled_error(value, read_golden("ltg_trained", "float64")[key]).max().item()
    record_error("ltg_trained", "float64", error)
    assert error <= FLOAT64
