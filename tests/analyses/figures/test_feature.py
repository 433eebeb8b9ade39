"""The page of one feature: the numbers of its record, in its frame, its table and its drawing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loopscope.analyses.common.configs import ReportConfig
from loopscope.analyses.common.inputs_of import asked_of
from loopscope.analyses.common.sections import Opened
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.figures.circuit import feature
from loopscope.checkpoints.load import load
from loopscope.interp.dictionaries.sae_files import save_dictionary
from loopscope.interp.dictionaries.trainer import DictionaryTraining
from loopscope.interp.dictionaries.training import train_dictionary
from small_figures import ONE, small_config, small_figure


def record() -> feature.Feature:
    found = small_figure("feature")[0]
    assert isinstance(found, feature.Feature)
    return found


def test_the_frame_holds_every_number_once() -> None:
    found, frame = record(), record().frame()
    counts = frame["part"].value_counts()
    assert counts["activation"] == sum(map(len, found.tokens))
    assert counts["profile"] == counts["share"] == len(found.profile)
    assert counts["margin"] == counts["changed"] == len(found.profile) + 1
    assert frame.query("part == 'activation'")["value"].max() == found.activation.nan_to_num().max()
    table = found.summary()
    assert table["activation"].is_monotonic_decreasing
    assert table["input"].tolist() == list(found.texts)
    assert 3 == len(found.texts) <= found.on <= found.inputs == 20


def test_a_long_input_is_shown_around_its_strongest_token() -> None:
    tokens = tuple(f"t{i}" for i in range(61))
    size = torch.zeros(1, 61)
    size[0, 40] = 2.0
    long = replace(
        record(), texts=("x",), tokens=(tokens,), activation=size, loops=torch.tensor([2])
    )
    cells = feature.figure(long).data[0]
    assert len(cells.x) == 24
    assert cells.text[0][12] == "t40"
    assert cells.z[0][12] == 2.0
    assert cells.customdata[0][12] == "position 40 of input 0"
    ends = feature.figure(replace(long, activation=size.roll(20, 1))).data[0]
    assert list(ends.text[0][12:]) == ["t60", *[""] * 11]


def test_a_saved_dictionary_is_shown_by_the_command_and_the_report(tmp_path: Path) -> None:
    model = load(ONE[0])
    asked = asked_of(Subject("r2", model, {}, None, {}), ["<e_3><r_1><r_2>", "<e_7><r_4>"])
    few = DictionaryTraining(16, 2, steps=3, batch_size=4)
    own = train_dictionary(model, asked.groups()[0].batch, kind="per_iteration", training=few)
    save_dictionary(own, tmp_path / "own")
    config = small_config("feature", dictionary=tmp_path / "own", loop=0, feature=None)
    found = feature.run(config)
    assert found.kind == "per_iteration"
    assert set(found.summary()["loop"]) == {0}
    assert found.margin[1:-1].isnan().all()
    settings = ReportConfig(checkpoint=ONE[0], per_hop=1, dictionary=tmp_path / "own")
    opened = Opened(settings, open_subject(settings))
    assert feature.SECTION.serves(opened)
    said = feature.SECTION.found(feature.SECTION.measure(opened))
    assert "of 10 inputs. By itself it raises the logits of" in said
    assert not feature.SECTION.serves(Opened(replace(settings, dictionary=None), opened.subject))
    other = small_config("feature", checkpoint="mini/multi_hop/r4", dictionary=tmp_path / "own")
    with pytest.raises(ValueError, match="with other weights or another configuration"):
        feature.run(other)
