"""What analyses are run on: questions, texts, token ids; and the figures of states on families
without questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

from golden_cases import GOLDEN
from loopscope.analyses.cli import main
from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.inputs_of import open_inputs, token_id, words
from loopscope.analyses.figures.dynamics import steps
from loopscope.analyses.figures.dynamics.steps import StepsConfig
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.models.basis.tokens import Readout
from paths import SHIPPED

CHECKPOINT = "mini/multi_hop/r_dyn"
COMMANDS: dict[str, dict[str, Any]] = {
    "ranks": {"track": ("3", "9"), "n_loops": 3},
    "orbits": {"positions": "tokens", "n_loops": 8},
    "steps": {"positions": "real", "n_loops": 3},
    "attention-settling": {"n_loops": 3},
    "exit-gate": {"thresholds": (0.0, 0.5, 1.0), "n_loops": 3},
    "layers": {"n_loops": 3},
    "lyapunov": {"n_loops": 3},
    "attractors": {"n_loops": 3, "n_starts": 2},
    "schedule-edit": {"n_loops": 2},
}
FAMILIES = ("albert", "hrm_text", "huginn", "ouro", "parcae")


def test_the_questions_come_in_groups_of_one_hop_count() -> None:
    asked = open_inputs(InputsConfig(checkpoint=CHECKPOINT, per_hop=3))
    groups = asked.groups()
    assert [group.hops for group in groups] == list(range(1, 17))
    for group in groups:
        questions = asked.subject.questions[group.hops or 0]
        assert group.texts == tuple(question.text for question in questions)
        assert group.answers == tuple(question.answer for question in questions)
        assert torch.equal(group.batch.tokens, asked.subject.model.encode(group.texts).tokens)
    assert [group.hops for group in asked.groups(5)] == [5]
    assert asked.group().hops == 6
    with pytest.raises(ValueError, match="questions of 1 to 16 hops, got hops=40"):
        asked.group(40)


def test_texts_are_run_as_they_are_written() -> None:
    asked = open_inputs(InputsConfig(checkpoint=CHECKPOINT, text=("<e_3><r_1>", "<e_4><r_2><r_3>")))
    (group,) = asked.groups()
    assert group is asked.group()
    assert group.hops is None
    assert group.batch.tokens.shape == (2, 3)
    assert group.batch.readout.tolist() == [1, 2]
    assert words(asked.subject.model, group.batch.tokens[1]) == ("<e_4>", "<r_2>", "<r_3>")
    assert asked.subject.graph is not None


def test_ids_are_what_encode_makes_of_the_text() -> None:
    model = load(CHECKPOINT)
    for readout in ("last_real", "first_pad", "column:5"):
        model.read_at = Readout.parse(readout)
        batch = model.encode("<e_4><r_2><r_3>")
        ids = tuple(batch.tokens[0, :3].tolist())
        got = (
            open_inputs(InputsConfig(checkpoint=CHECKPOINT, tokens=ids, readout=readout))
            .group()
            .batch
        )
        assert all(
            torch.equal(getattr(got, name), getattr(batch, name))
            for name in ("tokens", "mask", "readout")
        )


def test_tokens_have_names_with_and_without_a_vocabulary() -> None:
    asked = open_inputs(InputsConfig(checkpoint=str(GOLDEN / "ouro"), tokens=(5, 7)))
    assert asked.group().texts == ("#5 #7",)
    assert token_id(asked.subject.model, "48") == 48
    with pytest.raises(
        ValueError, match=r"has no vocabulary, so tokens are ids in 0\.\.48, got '49'"
    ):
        token_id(asked.subject.model, "49")
    with pytest.raises(ValueError, match=r"so tokens are ids in 0\.\.48, got '<e_1>'"):
        token_id(asked.subject.model, "<e_1>")
    assert token_id(load(CHECKPOINT), "<e_3>") == load(CHECKPOINT).to_single_token("<e_3>")


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not both; pass --text or --tokens"):
        open_inputs(InputsConfig(text=("<e_1>",), tokens=(3,)))
    with pytest.raises(ValueError, match="--hops chooses among the checkpoint's questions"):
        open_inputs(InputsConfig(text=("<e_1>",), hops=2))
    with pytest.raises(ValueError, match="pass --data with the questions"):
        open_inputs(InputsConfig(checkpoint=str(GOLDEN / "ouro")))
    with pytest.raises(ValueError, match="has no vocabulary"):
        open_inputs(InputsConfig(checkpoint=str(GOLDEN / "ouro"), text=("hello",)))
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.48"):
        open_inputs(InputsConfig(checkpoint=str(GOLDEN / "ouro"), tokens=(5, 49)))
    weights = SHIPPED / "ltg_trained" / "checkpoint_epoch_19559.pt"
    (tmp_path / weights.name).symlink_to(weights)
    with pytest.raises(ValueError, match="does not say where its answers are read; pass --readout"):
        open_inputs(
            InputsConfig(checkpoint=str(tmp_path), n_heads=3, input_injection=False, tokens=(1, 2))
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_figure_of_states_is_drawn_for_token_ids(family: str) -> None:
    for command, options in COMMANDS.items():
        analysis = FIGURES[command].module()
        source = FIGURES[command].config()(
            checkpoint=str(GOLDEN / family), tokens=(5, 7, 11), readout="last_real", **options
        )
        if command == "exit-gate" and family != "ouro":
            with pytest.raises(ValueError, match="has no exit gate to read"):
                analysis.run(source)
            continue
        record = analysis.run(source)
        assert len(record.frame()) > 0
        assert len(record.summary()) > 0
        assert isinstance(analysis.figure(record), go.Figure)


def test_the_commands_take_token_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "exit-gate",
            str(GOLDEN / "ouro"),
            "--tokens",
            "5",
            "7",
            "11",
            "--out",
            str(tmp_path),
            "--no-html",
        ]
    )
    assert "mean iterations" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "exit-gate.csv",
        "exit-gate.json",
        "exit-gate.settings.json",
    ]
    saved = ["--from-file", str(tmp_path / "exit-gate.settings.json"), "--no-html", "--overwrite"]
    before = (tmp_path / "exit-gate.csv").read_text()
    main(["exit-gate", *saved, "--out", str(tmp_path)])
    assert (tmp_path / "exit-gate.csv").read_text() == before


def test_an_ordinary_model_is_opened_with_the_layers_to_loop() -> None:
    folder = str(GOLDEN / "training_free_llama")
    record = steps.run(StepsConfig(checkpoint=folder, window=(1, 3), tokens=(5, 7, 11), n_loops=4))
    assert record.values.isfinite().any()
    asked = open_inputs(StepsConfig(checkpoint=folder, window=(1, 3), tokens=(5, 7, 11)))
    assert [visit.layer for visit in asked.subject.model.schedule(2) if visit.loop == 1] == [
        1,
        2,
        3,
    ]
    with pytest.raises(CheckpointError, match="say which of them to loop: window= takes the first"):
        open_inputs(StepsConfig(checkpoint=folder, tokens=(5, 7, 11)))
