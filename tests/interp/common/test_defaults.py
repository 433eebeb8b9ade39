"""PyTorch's default device and default number format change no result of a model that is on the
CPU in float32: whatever a method makes is made where its inputs are, as they are.

The device "meta" stands for another device: a tensor that is made there by mistake holds no
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

import loopscope
from loopscope.analyses import trials
from loopscope.checkpoints.load import load
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.exits.exits import StepBelow
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import FAMILIES

RUN, ANSWERS = 2, [3, 5, 7]
METRIC = logit_diff(ANSWERS, 9)
CPU = torch.device("cpu")


@contextmanager
def on_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = pytest.mark.parametrize("default", [on_meta, in_float64])


def assert_same(one: Any, other: Any) -> None:
    """Two results hold the same numbers, on the same devices and in the same formats."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other)
    elif is_dataclass(one):
        parts = [each.name for each in fields(one)]
        assert_same([getattr(one, x) for x in parts], [getattr(other, x) for x in parts])
    elif isinstance(one, Mapping):
        assert_same(list(one.items()), list(other.items()))
    elif isinstance(one, Sequence) and not isinstance(one, str):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, float):
        assert one == other or (math.isnan(one) and math.isnan(other))
    else:
        assert isinstance(one, nn.Module) or callable(one) or one == other


def shown(record: Any) -> list[Any]:
    """A record with its frame, once it has been drawn and printed."""
    made = [record]
    if not isinstance(record, Tensor | pd.DataFrame) and hasattr(record, "frame"):
        made.append(record.frame())
    if hasattr(record, "plot") and not isinstance(record, pd.DataFrame):
        record.plot()
    str(record)
    return made


def outcome(method: Callable[..., Any], inputs: Any) -> Any:
    """What a method finds, or the sentence with which it refuses the family."""
    try:
        found = trials.ask(method, inputs)
    except (ValueError, TypeError) as refusal:
        return str(refusal)
    if isinstance(found, loopscope.ActivationStore):  # its folder is gone
        return [found.frame(), found.tokens]
    if isinstance(found, FactoredMatrix):
        return [found.A, found.B]
    return shown(found)


@cache
def inputs_of(family: str) -> Any:
    return trials.TrialInputs.of(trials.tiny(family).float())


def check(family: str, method: str, default: Callable[[], Any]) -> None:
    ask = partial(outcome, trials.methods()[method], inputs_of(family))
    expected = ask()
    with default():
        found = ask()
    assert_same(expected, found)


@DEFAULTS
@pytest.mark.parametrize("method", sorted(trials.methods()))
def test_a_default_changes_no_method(method: str, default: Callable[[], Any]) -> None:
    check("recurrent_depth", method, default)


@pytest.mark.slow
@DEFAULTS
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"recurrent_depth"}))
def test_a_default_changes_no_method_of_a_family(family: str, default: Callable[[], Any]) -> None:
    for method in trials.methods():
        check(family, method, default)


# With lists and texts for inputs, and with what is written and read again


@cache
def shipped() -> LoopedModel:
    return load("ltg_trained")


@cache
def texts() -> tuple[list[str], list[str]]:
    words = shipped().vocab.words
    e, r = ([word for word in words if word.startswith(f"<{kind}_")] for kind in "er")
    chosen = [(0, 0, 1), (1, 1, 2), (2, 0, 2)]
    clean = [e[i] + r[j] + r[k] for i, j, k in chosen]
    return clean, [e[i + 3] + r[j] + r[k] for i, j, k in chosen]


def logits() -> Tensor:
    return shipped()(texts()[0], n_loops=RUN)


def circuits(folder: Path) -> list[Any]:
    given = (shipped(), *texts())
    scores = loopscope.circuit_scores(*given, METRIC, RUN, steps=1, by_position=True, heads=False)
    scores.save(folder / "scores.json")
    chosen = loopscope.select_circuit(loopscope.Circuit.load(folder / "scores.json"), 9)
    said = loopscope.evaluate_circuit(*given, chosen, "kl", minimality=True, replace="resample")
    return [scores, chosen.frame(), said, said.frame(), said.cpr]


def sweeps(folder: Path) -> list[Any]:
    sweep = loopscope.activation_patch(
        shipped(), *texts(), METRIC, RUN, positions=[0, 1], group_by="abcd", save_to=folder / "w"
    )
    groups = sweep.by_group(resamples=9)
    return [sweep, loopscope.merge(folder / "w"), sweep.bootstrap(resamples=9), groups.frame()]


def lenses(folder: Path) -> list[Any]:
    model, (clean, _) = shipped(), texts()
    lens = loopscope.logit_lens(model, clean, RUN, save_to=folder / "l", shard=(0, 1))
    words = model.to_str_tokens(clean[0])[:2]
    tuned = loopscope.train_tuned_lens(
        model, clean, RUN, steps=2, batch_size=2, save_to=folder / "t"
    )
    merged = [loopscope.merge(folder / "l", model), loopscope.merge(folder / "t", model)]
    ranks = loopscope.rank_trajectory(lens, words)
    return [lens.frame(ANSWERS), lens.first_hit(ANSWERS), ranks.frame(), tuned, *merged]


def stores(folder: Path) -> list[Any]:
    (folder / "texts.txt").write_text("\n".join(texts()[0]))
    store = loopscope.collect(shipped(), folder / "texts.txt", n_loops=RUN, to=folder / "s")
    return [store.read().values, [part.values for part in store.batches(2, seed=3)]]


def dictionaries(folder: Path) -> list[Any]:
    model, (clean, _) = shipped(), texts()
    states, reading = loopscope.loop_states(model, clean, RUN), loopscope.Reading.of(model, RUN)
    drawn = loopscope.random_dictionary(states, reading, 9, 2)
    loopscope.save_dictionary(drawn, folder / "d")
    labels = torch.zeros(states.shape[:2], dtype=torch.int64, device=CPU)
    labels[::2] = 1
    with loopscope.splice(model, drawn, loopscope.FeatureEdit([1, 2], into=[3, 4])):
        spliced = logits()
    how = loopscope.DictionaryTraining(9, 2, "batch_topk", steps=3, batch_size=2)
    return [
        spliced,
        loopscope.load_dictionary(folder / "d"),
        loopscope.pca_dictionary(states, reading, 2),
        loopscope.feature_labels(drawn, states, labels, states, labels).frame(),
        loopscope.train_dictionary(model, clean, RUN, kind="crosscoder", training=how),
    ]


def interventions(folder: Path) -> list[Any]:
    model, other = shipped(), texts()[1]
    mlp, vector = loopscope.Component("mlp"), [0.5] * model.cfg.d_model
    contexts = [
        loopscope.ablate(model, mlp, how="mean", reference=other, n_loops=RUN),
        loopscope.ablate(model, mlp, how="resample", reference=other, n_loops=RUN),
        loopscope.realign(model, 0, tokens=ANSWERS, n_loops=RUN),
        loopscope.set_to(model, vector, loops=0, layers=0, n_loops=RUN),
    ]
    found = []
    for context in contexts:
        with context:
            found.append(logits())
    return found


def probes(folder: Path) -> list[Any]:
    model, classes = shipped(), [0, 1, 1] * 4
    clean, other = (each * 4 for each in texts())
    held = [True, False, False] * 4
    given = {"n_loops": RUN, "types": [0, 1, 2] * 4}
    logistic = loopscope.probe(model, clean, classes, kind="logistic", bits=True, **given)
    ridge = loopscope.probe(model, clean, classes, held_out=held, save_to=folder / "p", **given)
    preferred = [True, False, True] * 4
    pairs = loopscope.difference_probe(model, clean, other, preferred, n_loops=RUN)
    return [logistic.frame(), ridge.frame(), pairs.frame()]


def trajectories(folder: Path) -> list[Any]:
    model, (clean, _) = shipped(), texts()
    path, answers = loopscope.dynamics(model, clean, 4), torch.tensor(ANSWERS, device=CPU)
    return [
        *(path.frame(), path.orbits(), path.period(1), path.effective_rank()),
        loopscope.fixed_points(model, clean, 4).by_answer(ANSWERS),
        loopscope.basins(model, clean, 3, n_loops=3).vote().accuracy(ANSWERS),
        loopscope.finite_time_exponent(model, clean, 3).separation(answers).frame(),
        loopscope.lyapunov_spectrum(model, clean, 2, 3).singular_rates(),
        loopscope.exits(model, clean, StepBelow(), 3).frame(ANSWERS),
        loopscope.decodability(model, clean, [[3], [4], [5]], [1], RUN).frame(),
    ]


def models(folder: Path) -> list[Any]:
    model, (clean, _) = load("ltg_trained"), texts()
    loopscope.save(model, folder / "m")
    _, cache = model.run_with_cache(clean, n_loops=RUN)
    cache.save(folder / "cache")
    sampled = loopscope.Sampling(0.9, 5, 0.9)
    said = loopscope.generate(model, clean, 2, RUN, sampling=sampled, stop_at=["<e_1>", 3])
    loopscope.check_family(model, RUN)
    return [
        dict(model.state_dict()),
        dict(load(folder / "m").state_dict()),
        loopscope.LoopCache.load(folder / "cache").stack("resid_post"),
        said,
        model([[3, 4, 5]], n_loops=RUN),
        model(clean, n_loops=RUN, return_type="loss"),
    ]


CALLS = [
    circuits, sweeps, lenses, stores, dictionaries, interventions, probes, trajectories, models,
]  # fmt: skip


@DEFAULTS
@pytest.mark.parametrize("call", CALLS)
def test_a_default_changes_no_call_with_lists_and_files(
    call: Callable[[Path], list[Any]], default: Callable[[], Any], tmp_path: Path
) -> None:
    texts()
    folders = [tmp_path / "plain", tmp_path / "changed"]
    for folder in folders:
        folder.mkdir()
    expected = call(folders[0])
    with default():
        found = call(folders[1])
    assert_same(expected, found)
