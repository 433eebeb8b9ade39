"""The part of the explorer about a dictionary's features, without a browser and in one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from dash import no_update

from explored import served, text_of
from loopscope.analyses.common.configs import ExploreConfig, SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.explorer.app import make_explorer
from loopscope.analyses.explorer.features import FeaturePart
from loopscope.checkpoints.load import load
from loopscope.interp.dictionaries.sae_files import save_dictionary
from loopscope.interp.dictionaries.trainer import DictionaryTraining
from loopscope.interp.dictionaries.training import train_dictionary

NAME = "mini/multi_hop/r2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dictionary") / "own"
    few = DictionaryTraining(16, 2, steps=3, batch_size=4)
    own = train_dictionary(load(NAME), ["<e_3><r_1><r_2>", "<e_7><r_4>"], training=few)
    save_dictionary(own, place)
    return place


def test_a_feature_is_shown_and_one_that_cannot_be_says_why(folder: Path) -> None:
    subject = open_subject(SourceConfig(checkpoint=NAME, per_hop=1))
    part = FeaturePart.of(subject, folder, "", threading.Lock())
    drawn, said, number, took = part.show_feature(None, None)
    assert said.startswith(f"Feature {number} is on in ")
    assert len(drawn["data"]) == 4
    assert took.endswith(" ms")
    assert part.show_feature(number, None)[2] is no_update
    kept, why, _, _ = part.show_feature(16, None)
    assert kept is no_update
    assert why == "feature must be in 0..15, got 16."
    text = str(part.section())
    assert "Feature (0 to 15)" in text
    assert f"among {len(part.inputs.batch)}," in text


def test_a_dictionary_that_does_not_fit_is_refused_before_there_is_a_page(folder: Path) -> None:
    for changes, why in (
        ({"checkpoint": "mini/multi_hop/r4"}, "with other weights or another configuration"),
        ({"checkpoint": "mini/sudoku/trm"}, "boards and no features of a dictionary"),
        ({"dictionary": folder / "absent"}, "is no dictionary in SAELens's format"),
    ):
        settings: dict[str, Any] = {"checkpoint": NAME, "dictionary": folder, **changes}
        with pytest.raises(ValueError, match=why):
            make_explorer(ExploreConfig(port=0, per_hop=1, **settings))


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_shows_another_feature_when_its_number_is_typed(folder: Path) -> None:
    config = ExploreConfig(checkpoint=NAME, port=0, per_hop=1, dictionary=folder)
    said = text_of("feature-said")
    with served(config, said) as page:
        page.wait("document.querySelectorAll('#feature-page .heatmaplayer image').length")
        page.type_into("#feature", "5")
        page.wait(f"{said}.includes('eature 5 ')")
