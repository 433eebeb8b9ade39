"""Folders with one random thing wrong: each loads and computes, or is refused in one line.

By default some 1,500 mutants are tried. The environment variable LOOPSCOPE_MUTANTS sets another
number, and LOOPSCOPE_SEED another seed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from family_toys import TOYS
from golden_cases import GOLDEN
from language_toys import make_tokenizer
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load, save
from mutants import Files, Mutant, draw
from release_files import FACTS, toy_model, write_release

MUTANTS = int(os.environ.get("LOOPSCOPE_MUTANTS", "1500"))
SEED = int(os.environ.get("LOOPSCOPE_SEED", "0"))
SECONDS, GROWTH, LOOPS, POS = 5, 1 << 30, 2, 3
PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GOOD = ("agrees", "another model", "refused", "refused at the call")


@dataclass(frozen=True)
class Subject:
    """A good folder: its files, how it is loaded and run, and what it computes."""

    name: str
    files: Files
    options: dict[str, Any]
    begin: dict[str, Any] = field(default_factory=dict)

    def logits(self, folder: Path) -> Tensor:
        model = load(folder, **self.options)
        tokens = torch.arange(1, 1 + 2 * POS).view(2, POS) % model.cfg.d_vocab
        with torch.no_grad():
            return model(tokens, n_loops=LOOPS, **self.begin)


def subject(name: str, folder: Path, options: dict[str, Any], begin: dict[str, Any]) -> Subject:
    skipped = (
        "golden.safetensors",
        "golden64.safetensors",
        "activations.safetensors",
        "meta.json",
    )
    files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in skipped}
    return Subject(name, files, options, begin)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    """Every golden release, every family in our own format, pickles, and a tokenizer."""
    place, found = tmp_path_factory.mktemp("good"), []
    for folder in sorted(GOLDEN.iterdir()):
        options: dict[str, Any] = {"window": (1, 2)} if "training_free" in folder.name else {}
        options = {"n_heads": 1, "input_injection": False} if "ltg" in folder.name else options
        seeded = {"seed": 5} if folder.name in SEEDED else {}
        if folder.is_dir() and folder.name not in ("ltg_trained", "deepseek_v4_mhc"):
            found.append(subject(folder.name, folder, options, seeded))
    for name, toy in TOYS.items():
        model = toy.make().float()
        save(model, place / name, card={"note": 1})
        found.append(subject(f"own {name}", place / name, {}, dict(seed_of(name))))
    save(toy_model("learned", read_at="last_real"), place / "words")
    found.append(subject("own with words", place / "words", {}, {}))
    write_release(place / "bare" / "a.pt")
    found.append(subject("bare pickle", place / "bare", dict(FACTS), {}))
    shutil.copytree(GOLDEN / "ouro", place / "tokens")
    make_tokenizer(place / "tokens", 40)
    found.append(subject("ouro with a tokenizer", place / "tokens", {}, {}))
    return found


SEEDED = ("huginn", "parcae", "retrofit_llama", "retrofit_olmo")


def seed_of(name: str) -> dict[str, int]:
    return {"seed": 5} if name in SEEDED else {}


class TooLong(BaseException):
    """A call that did not end in time."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """A limit on the time of the processor, and a wide one on the time by the clock."""

    def stop(*_: object) -> None:
        raise TooLong

    kinds = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {kind: signal.signal(kind, stop) for kind in kinds}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 20 * seconds)
    try:
        yield
    finally:
        for kind, timer in kinds.items():
            signal.setitimer(timer, 0)
            signal.signal(kind, before[kind])


def peak() -> int:
    """The largest memory of this process since the last `forget_peak`, in bytes."""
    lines = PEAK[0].read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def judge(one: Subject, mutant: Mutant, right: Tensor, folder: Path) -> str:
    """What became of a mutant; a word of `GOOD`, or the fault."""
    PEAK[1].write_text("5")
    before = peak()
    try:
        with at_most(SECONDS):
            verdict = outcome(one, mutant, right, folder)
    except TooLong:
        return f"no end within {SECONDS} s"
    return f"{peak() - before >> 20} MB more" if peak() - before > GROWTH else verdict


def outcome(one: Subject, mutant: Mutant, right: Tensor, folder: Path) -> str:
    loaded = False
    try:
        model = load(folder, **one.options)
        loaded = True
        tokens = torch.arange(1, 1 + 2 * POS).view(2, POS) % model.cfg.d_vocab
        with torch.no_grad():
            found = model(tokens, n_loops=LOOPS, **one.begin)
    except CheckpointError as error:
        sentence = str(error)
        fine = "\n" not in sentence and str(folder) in sentence
        return "refused" if fine else f"a sentence without its file: {sentence[:300]}"
    except (Exception, RecursionError) as error:
        if loaded and type(error) is ValueError and "\n" not in str(error):
            return "refused at the call"
        when = "the first call" if loaded else "load"
        return f"{type(error).__name__} at {when}: {str(error)[:200]}"
    if not bool(found.isfinite().all()):
        return "NaN without a word"
    same = found.shape == right.shape and torch.allclose(
        found.double(), right, rtol=1e-4, atol=1e-4
    )
    return "agrees" if same else "loads as another model" if mutant.same else "another model"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    not PEAK[1].exists(), reason="a process can reset its peak memory on Linux only"
)
def test_every_mutant_computes_or_is_refused_in_one_line(
    subjects: list[Subject], tmp_path: Path
) -> None:
    rng, table, faults = random.Random(SEED), Counter[str](), []
    right = {}
    for one in subjects:
        Mutant("unchanged", one.files).write(tmp_path / one.name)
        right[one.name] = one.logits(tmp_path / one.name).double()
    for number in range(MUTANTS):
        one = subjects[number % len(subjects)]
        mutant, folder = draw(one.files, rng), tmp_path / f"m{number}"
        mutant.write(folder)
        verdict = judge(one, mutant, right[one.name], folder)
        shutil.rmtree(folder)
        table[verdict if verdict in GOOD else "other"] += 1
        if verdict not in GOOD:
            faults.append(f"{number} {one.name}: {mutant.label}: {verdict}")
    print(dict(table))
    assert not faults, "\n".join(faults)
    assert min(table[kind] for kind in ("agrees", "another model", "refused")) > MUTANTS / 50
