"""A visit is called by its own name: blocks before and after the loop, and nested cycles, too."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from golden_cases import GOLDEN
from loopscope.analyses.common.inputs_of import asked_of
from loopscope.analyses.common.pair_files import PairRow
from loopscope.analyses.common.pairs_of import make_pairs
from loopscope.analyses.common.subject import Subject
from loopscope.analyses.figures.circuit import lens, patch, shortcut
from loopscope.checkpoints.load import load
from loopscope.interp.drawing.labels import tick
from loopscope.models.basis.tokens import Readout, Vocabulary
from loopscope.tasks.questions import Question

FAMILIES = ("huginn", "parcae", "retrofit_llama", "hrm_text", "ouro", "albert")
TEXT, OTHER = "<w_3><w_8><w_2>", "<w_4><w_8><w_5>"


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest) -> Subject:
    """A golden case of a family with words for its tokens and two questions."""
    model = load(Path(GOLDEN / request.param)).eval()
    model.vocab = Vocabulary([f"<w_{i}>" for i in range(model.cfg.d_vocab)][: model.cfg.d_vocab])
    model.read_at = Readout("last_real")
    questions = [Question(TEXT, "<w_9>", 2), Question(OTHER, "<w_7>", 2)]
    return Subject(request.param, model, {2: questions}, None, {})


def test_rows_of_the_lens_are_the_visits_of_the_schedule(subject: Subject) -> None:
    names = tuple(visit.name for visit in subject.model.schedule(2))
    asked = asked_of(subject, [TEXT])
    record = lens.measure(asked, asked.one(), asked.answers(asked.one()), 2)
    assert record.visits == names
    frame = record.frame()
    assert list(dict.fromkeys(frame["visit"])) == list(names)
    places = frame[["visit", "loop", "layer"]].drop_duplicates().set_index("visit")
    for visit in subject.model.schedule(2):
        loop = places.loc[visit.name, "loop"]
        assert (None if loop is pd.NA else int(loop)) == visit.loop
    drawn = lens.figure(record).data[0]
    assert list(drawn.y) == [tick(name) for name in names]
    assert len(set(drawn.y)) == len(names)
    assert drawn.customdata[-1][0].startswith(f"{names[-1]}.hook_resid_post<br>")


def test_rows_of_the_patching_map_are_the_hook_points(subject: Subject) -> None:
    site = "attn_out" if subject.name == "albert" else "resid_post"
    pairs = make_pairs(subject, [PairRow(TEXT, OTHER)])
    record = patch.measure(subject, pairs, site, 2)
    names = [f"{visit.name}.hook_{site}" for visit in subject.model.schedule(2)]
    assert list(record.names) == ["hook_embed", *names]
    drawn = patch.figure(record).data[0]
    assert list(drawn.y) == [tick(name) for name in record.names]
    assert len(set(drawn.y)) == len(record.names)
    assert list(record.summary()["hook"]) == ["hook_embed", *names]
    assert drawn.customdata[-1][0].startswith(f"{names[-1]}<br>")


def test_steps_of_the_shortcut_are_written_likewise() -> None:
    names = ("hook_embed", "prelude.0.hook_resid_post", "loops.1.low.0.blocks.1.hook_resid_post")
    found = shortcut.ShortcutMap(2, ("q",), (), ("a",), names, torch.ones(3, 1), 1.0)
    assert found.steps() == ["embed", "prelude.0", "1.low.0.1"]
    assert found.frame()["loop"].tolist() == [pd.NA, pd.NA, 1]
