"""Figures of a text of the user's own: language models, and releases without a graph."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from language_toys import CAT, DOG, ouro_folder
from loopscope import plots
from loopscope.analyses.cli import main
from loopscope.analyses.common.configs import PairConfig, SourceConfig, TextConfig
from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.inputs_of import OWN, open_inputs
from loopscope.analyses.common.pairs_of import open_pairs
from loopscope.analyses.common.subject import open_subject, token_id
from loopscope.analyses.figures.answers import halting, overthinking, readouts, recurrence
from loopscope.analyses.figures.circuit import lens, patch
from loopscope.checkpoints.load import load
from loopscope.interp.drawing.labels import visible
from loopscope.interp.lens.lens import readout_lens
from paths import SHIPPED

OF_ONE: dict[str, dict[str, Any]] = {"lens": {}, "readouts": {}}
OF_SEVERAL: dict[str, dict[str, Any]] = {
    "overthinking": {"n_loops": 3},
    "recurrence": {"n_loops": 3},
    "halting": {"n_loops": 3},
    "ranks": {},
    "orbits": {"n_loops": 8},
    "steps": {"n_loops": 3},
    "attention-settling": {"n_loops": 3},
    "layers": {"n_loops": 3},
    "lyapunov": {"n_loops": 3},
    "attractors": {"n_loops": 3, "n_starts": 2},
    "schedule-edit": {"n_loops": 2},
}
MODELS = {"ouro": (CAT, DOG), "smiles": ("CC(=O)N", "CC(=S)N")}


def source(model: str) -> str:
    return ouro_folder() if model == "ouro" else "mini/smiles"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("command", [*OF_ONE, *OF_SEVERAL, "patch"])
def test_every_figure_of_a_text_is_drawn_without_questions(command: str, model: str) -> None:
    first, second = MODELS[model]
    given: dict[str, Any] = {"text": (first, second)} | OF_SEVERAL.get(command, {})
    if command in OF_ONE:
        given = {"text": first}
    if command == "patch":
        given = {"clean": first, "corrupted": second}
    module = FIGURES[command].module()
    record = module.run(FIGURES[command].config()(checkpoint=source(model), **given))
    assert len(record.frame()) > 0
    assert len(record.summary()) > 0
    assert len(module.figure(record).data) > 0


def test_the_answer_is_the_models_own_top_token_where_none_is_given() -> None:
    model = load(ouro_folder())
    logits = model(model.to_tokens(CAT))[0, -1]
    record = lens.run(lens.LensConfig(checkpoint=ouro_folder(), text=CAT))
    assert (record.answer, record.own) == (model.to_str_tokens(logits.argmax()[None])[0], True)
    assert record.rank[0, -1, record.readout] == 0
    assert "the model's own top token" in str(lens.figure(record).data[1].name)
    told = lens.run(lens.LensConfig(checkpoint=ouro_folder(), text=CAT, answer=" dog"))
    assert (told.answer, told.own, told.tracked) == (" dog", False, (" dog",))
    pair = patch.run(patch.PatchConfig(checkpoint=ouro_folder(), clean=CAT, corrupted=DOG))
    assert pair.measured == f"{record.answer.replace(' ', '␣')} (the model's own top token)"


def test_the_readouts_are_those_of_calls_with_so_many_iterations() -> None:
    record = readouts.run(readouts.ReadoutsConfig(checkpoint=ouro_folder(), text=CAT, n_loops=3))
    model = load(ouro_folder())
    for t in range(3):
        logits = model(model.to_tokens(CAT), n_loops=t + 1)[0]
        assert record.top[t] == tuple(model.to_str_tokens(logits.argmax(-1)))
        assert torch.allclose(record.prob[t], logits.softmax(-1).amax(-1), atol=1e-6)
    lens_there = readout_lens(model, [CAT], 3)
    assert torch.allclose(record.entropy, lens_there.entropy()[:, 0], atol=1e-6)
    assert torch.equal(record.kl.isnan(), torch.tensor([True, False, False]))


@torch.no_grad()
@pytest.mark.shapes
def test_a_pair_is_measured_by_the_logit_against_the_wrong_answer() -> None:
    config = patch.PatchConfig(
        checkpoint=ouro_folder(), clean=CAT, corrupted=DOG, answer=" mat", wrong=" dog"
    )
    record, model = patch.run(config), load(ouro_folder())
    right, wrong = map(model.to_single_token, (" mat", " dog"))
    for text, found in ((CAT, record.clean_margin), (DOG, record.corrupted_margin)):
        logits = model(model.to_tokens(text))[0, -1]
        assert found == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-5)
    assert record.measured == "␣mat against ␣dog"
    assert record.columns()[1] == "1 ␣cat / ␣dog"
    assert record.effect[-1, -1] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("command", ["overthinking", "recurrence", "halting"])
def test_a_text_that_is_shortened_in_a_figure_is_whole_in_the_hover_text(command: str) -> None:
    module, long = FIGURES[command].module(), "a" * 30 + "b" * 30
    record = module.run(
        FIGURES[command].config()(checkpoint=ouro_folder(), text=(CAT, DOG), n_loops=3)
    )
    names = "groups" if command == "overthinking" else "texts"
    renamed = replace(record, **{names: (long, *getattr(record, names)[1:])})
    drawn = json.dumps(module.figure(renamed).to_plotly_json(), default=str)
    assert long in drawn
    assert "a…" in drawn or "a\\u2026" in drawn


def test_overthinking_has_one_curve_for_each_text() -> None:
    config = overthinking.OverthinkingConfig(
        checkpoint=ouro_folder(), text=(CAT, "a dog"), n_loops=5, answer=" mat"
    )
    record = overthinking.run(config)
    assert record.hops == (None, None)
    assert record.groups == (f"{CAT} → ␣mat", "a dog → ␣mat")
    model = load(ouro_folder())
    answer = model.to_single_token(" mat")
    expected = readout_lens(model, ["a dog"], 5).margin([answer])[:, 0]
    assert torch.allclose(record.margin[1], expected, atol=1e-5)


def test_the_accuracy_of_a_text_is_whether_its_answer_is_on_top() -> None:
    given = {"checkpoint": ouro_folder(), "text": (CAT, "a dog"), "n_loops": 5}
    grid = recurrence.run(recurrence.RecurrenceConfig(**given))
    assert (grid.hops, grid.trained_hops, grid.questions) == ((), None, (1, 1))
    model = load(ouro_folder())
    tops = readout_lens(model, ["a dog"], 5).top(1).tokens[:, 0, 0]
    assert grid.accuracy[1].tolist() == (tops == tops[-1]).float().tolist()
    assert grid.texts[1] == f"a dog → {visible(model.to_string(tops[-1:]))} ({OWN})"
    assert grid.frame()["text"].unique().tolist() == list(grid.texts) == grid.heading().split("; ")
    told = {"answer": " mat", "kl": 0.0, "entropy": 0.0}
    curves = halting.run(halting.HaltingConfig(**given, **told))
    assert curves.iterations.eq(5).all()
    assert not curves.halted.any()
    mat = model.to_single_token(" mat")
    right = [
        bool(model(model.to_tokens(t), n_loops=5)[0, -1].argmax() == mat) for t in given["text"]
    ]
    assert curves.accuracy[0].tolist() == [float(each) for each in right]
    assert list(curves.frame().columns)[:2] == ["rule", "text"]


def test_a_text_is_read_at_its_last_token_where_the_checkpoint_does_not_say() -> None:
    subject = open_subject(SourceConfig(checkpoint=ouro_folder()), needs_questions=False)
    subject.model.read_at = None
    assert subject.batch([CAT, "a dog"]).readout.tolist() == [5, 1]
    assert subject.model.read_at is None


def lone_release(folder: Path) -> str:
    for name in ("checkpoint_epoch_19559.pt", "vocab.json"):
        (folder / name).symlink_to(SHIPPED / "ltg_trained" / name)
    return str(folder)


def test_a_release_without_a_graph_takes_the_answer_as_a_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--n-heads", "3", "--input-injection", "False", "--readout", "last_real"]
    pair = ["--clean", "<e_16><r_5><r_1>", "--corrupted", "<e_26><r_5><r_1>"]
    end = ["--n-loops", "3", "--out", str(tmp_path / "out"), "--no-html"]
    main(["patch", lone_release(tmp_path), *pair, *told, "--answer", "<e_25>", *end])
    assert "loops.2.blocks.1.hook_resid_post" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "patch.json").read_text())
    assert record["answers"] == ["<e_25>"]
    with pytest.raises(SystemExit):
        main(["patch", str(tmp_path), *pair[:2], *told, *end, "--overwrite"])
    assert "pass the corrupted text with --corrupted" in capsys.readouterr().err
    text = ["--text", "<e_16><r_5><r_1>"]
    main(["lens", str(tmp_path), *text, *told, *end])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["lens", "--text", CAT, "--answer", "mat on"], "'mat on' is 2 tokens, not one"),
        (["lens", "--text", CAT, "--answer", "sats"], "'sats' is 2 tokens, not one"),
        (["lens"], "has no test.json beside its weights; pass --data"),
        (["patch", "--clean", CAT], "pass the corrupted text with --corrupted"),
        (["patch", "--clean", CAT, "--corrupted", "a dog"], "6 tokens in the clean text and 2 in"),
        (["patch", "--answer", " mat", "--wrong", " dog"], "has no test.json"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(
    args: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([args[0], ouro_folder(), *args[1:], "--out", str(tmp_path / "out")])
    assert sentence in capsys.readouterr().err


# How a checkpoint is loaded


def changed_folder(folder: Path) -> Path:
    """The toy Ouro with a field that its family does not know."""
    shutil.copytree(ouro_folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "warp": 9}))
    return folder


def adapter_folder(folder: Path) -> Path:
    """A LoRA adapter of rank 1 that changes one matrix of the toy Ouro."""
    folder.mkdir()
    module, cfg = "base_model.model.model.layers.0.mlp.down_proj", load(ouro_folder()).cfg
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 3, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    factors = {"A": torch.ones(1, cfg.d_mlp), "B": torch.ones(cfg.d_model, 1)}
    save_file(
        {f"{module}.lora_{name}.weight": each for name, each in factors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def test_the_flags_of_loading_are_those_of_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed_folder(tmp_path / "ouro")
    command = ["lens", str(folder), "--text", CAT, "--no-html", "--no-csv"]
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path / "refused")])
    assert "; --ignore warp reads the config without it" in capsys.readouterr().err
    adapter = adapter_folder(tmp_path / "adapter")
    how = ["--ignore", "warp", "--dtype", "bfloat16", "--device", "cpu", "--adapter", str(adapter)]
    main([*command, *how, "--out", str(tmp_path / "out")])
    settings = json.loads((tmp_path / "out" / "lens.settings.json").read_text())
    assert settings["made_with"]["checkpoints"][str(folder)]["dtype"] == "bfloat16"
    assert settings["ignore"] == ["warp"]
    known = {"ignore": ("warp",), "dtype": "bfloat16", "adapter": adapter}
    record = lens.run(lens.LensConfig(checkpoint=str(folder), text=CAT, **known))
    plain = lens.run(lens.LensConfig(checkpoint=ouro_folder(), text=CAT, dtype="bfloat16"))
    assert record.frame().equals(lens.run(from_settings(settings)).frame())
    assert not torch.equal(record.entropy, plain.entropy)


def from_settings(settings: dict[str, Any]) -> lens.LensConfig:
    names = ("checkpoint", "text", "ignore", "dtype", "adapter")
    return lens.LensConfig(**{name: settings[name] for name in names})


@pytest.mark.parametrize("command", ["explore", "report", "patch", "halting-compare"])
def test_every_command_that_loads_explains_the_flags_of_loading(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--ignore FIELD", "--adapter", "--dtype", "--device"))


def test_a_loaded_model_takes_no_setting_of_loading() -> None:
    with pytest.raises(
        ValueError, match="dtype says how a checkpoint is loaded, but this model is in memory"
    ):
        plots.lens(load(ouro_folder()), text=CAT, dtype="bfloat16")


# Files of pairs


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
        return path
    cells = [list(rows[0]), *([str(row.get(name, "")) for name in rows[0]] for row in rows)]
    path.write_text("\n".join(",".join(row) for row in cells))
    return path


ROWS = [
    {"clean": CAT, "corrupted": DOG, "answer": " mat", "wrong": " dog"},
    {"clean": "a cat", "corrupted": "a dog", "answer": " and", "wrong": " sat"},
    {"clean": "the dog sat", "corrupted": "the cat sat", "answer": " on", "wrong": " mat"},
]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_pairs_of_a_file_are_patched_and_asked(kind: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / f"pairs.{kind}", ROWS)
    config = patch.PatchConfig(checkpoint=ouro_folder(), data=data)
    subject, pairs = open_pairs(config)
    assert pairs.clean == tuple(row["clean"] for row in ROWS)
    assert pairs.corrupted == tuple(row["corrupted"] for row in ROWS)
    model = subject.model
    assert pairs.answers.ids.tolist() == [model.to_single_token(row["answer"]) for row in ROWS]
    assert pairs.wrong_ids.tolist() == [model.to_single_token(row["wrong"]) for row in ROWS]
    record = patch.run(config)
    assert record.effect.shape == (13, 6)
    assert record.effect[0, 1] == pytest.approx(1.0, abs=1e-4)
    few = patch.run(patch.PatchConfig(checkpoint=ouro_folder(), data=data, per_hop=2))
    assert few.clean == record.clean[:2]
    curves = overthinking.run(
        overthinking.OverthinkingConfig(checkpoint=ouro_folder(), data=data, n_loops=2)
    )
    assert (curves.groups, curves.questions) == (("all",), (3,))


def test_the_columns_have_any_names_and_only_the_clean_text_is_needed(tmp_path: Path) -> None:
    rows = [{"prompt": row["clean"], "target": row["answer"]} for row in ROWS]
    data = write_rows(tmp_path / "pairs.csv", rows)
    columns = ("prompt", "other", "target", "foil")
    given = {"checkpoint": ouro_folder(), "data": data}
    subject = open_subject(SourceConfig(**given, columns=columns))
    assert [row.answer for row in subject.pairs] == [" mat", " and", " on"]
    assert [row.corrupted for row in subject.pairs] == [None] * 3
    assert open_inputs(TextConfig(**given, columns=columns)).one().texts == (CAT,)
    alone = write_rows(tmp_path / "texts.jsonl", [{"clean": CAT}])
    found = open_subject(SourceConfig(checkpoint=ouro_folder(), data=alone))
    (question,) = found.questions[0]
    assert token_id(found.model, question.answer) == int(
        found.model(found.model.to_tokens(CAT))[0, -1].argmax()
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([ROWS[0], {**ROWS[1], "corrupted": "a"}], r"row 1 of p\.csv has 2 tokens .* and 1 in"),
        ([{**ROWS[0], "answer": "mat on"}], r"row 0 of p\.csv: 'mat on' is 2 tokens, not one"),
        ([{"prompt": CAT}], "must have a column 'clean' with the clean texts, got prompt; name"),
        ([ROWS[0], {**ROWS[1], "wrong": ""}], "row 1 of p.csv must have a text in .* 'wrong'"),
        ([{**ROWS[0], "clean": "?"}], r"row 0 of p\.csv: a text must hold at least one token"),
    ],
)
def test_a_bad_row_is_named(rows: list[dict[str, Any]], sentence: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "p.csv", rows)
    with pytest.raises(ValueError, match=sentence):
        open_pairs(PairConfig(checkpoint=ouro_folder(), data=data))


def test_a_bad_file_of_pairs_is_named(tmp_path: Path) -> None:
    for name, content, sentence in (
        ("a.jsonl", '{"clean": "a"}\n[1]', "must hold one JSON object per line, got"),
        ("b.jsonl", "{", "is not valid JSONL, one object per line"),
        ("c.csv", "clean\n", "must hold at least one row, got none"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=sentence):
            open_subject(SourceConfig(checkpoint=ouro_folder(), data=tmp_path / name))


def test_the_answers_of_a_test_json_may_be_any_token(tmp_path: Path) -> None:
    items = [{"input_text": CAT, "target_text": f"{CAT} dog</a>"}]
    (tmp_path / "test.json").write_text(json.dumps(items))
    found = open_subject(SourceConfig(checkpoint=ouro_folder(), data=tmp_path / "test.json"))
    assert found.questions[0][0].answer == " dog"
