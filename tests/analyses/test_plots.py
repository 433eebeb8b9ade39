"""Figures from Python: of a loaded model, a name or a path, with a title and what made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

import loopscope
from language_toys import CAT, DOG, ouro_folder
from loopscope import plots
from loopscope.analyses.cli import main
from loopscope.analyses.common.configs import DEFAULT_CHECKPOINT
from loopscope.analyses.common.figures import FIGURES
from loopscope.checkpoints.load import load
from paths import ROOT


@pytest.mark.parametrize("name", plots.__all__)
def test_the_example_of_every_figure_runs(name: str) -> None:
    function = getattr(plots, name)
    example = FIGURES[name.replace("_", "-")].module().EXAMPLE
    assert example.startswith(f"plots.{name}(")
    assert example in function.__doc__
    figure = eval(example.replace("path/to/ouro", ouro_folder()), {"plots": plots})
    assert isinstance(figure, go.Figure)
    assert figure.layout.title.text.startswith(f"<b>{name.replace('_', ' ')}</b>")


def test_a_loaded_model_a_path_and_a_name_give_the_same_figure() -> None:
    model = load(ouro_folder())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = [
        plots.lens(source, text=CAT, n_loops=2)
        for source in (model, ouro_folder(), Path(ouro_folder()))
    ]
    assert [figure.data[0].text for figure in drawn] == [drawn[0].data[0].text] * 3
    titles = [figure.layout.title.text for figure in drawn]
    assert titles[0].startswith("<b>lens</b>: Ouro model<br>")
    assert titles[1] == titles[2]
    assert "ouro-toy" in titles[1]
    assert "2 iterations" in titles[0]
    assert not model.any_hook()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_models_and_names_stand_side_by_side() -> None:
    model, data = (
        load("mini/multi_hop/r2"),
        ROOT / "checkpoints/shipped/mini/multi_hop/r2/test.json",
    )
    figure = plots.flips([model, "mini/multi_hop/r4", model], data=data, n_loops=3, per_hop=2)
    named = "RecurrentDepth model 0, mini/multi_hop/r4, RecurrentDepth model 1"
    assert figure.layout.title.text.startswith(f"<b>flips</b>: {named}<br>")


def test_a_model_in_memory_has_no_questions_of_its_own() -> None:
    model = load(DEFAULT_CHECKPOINT)
    with pytest.raises(ValueError, match=r"RecurrentDepth model has no test\.json"):
        plots.recurrence(model, n_loops=2)
    with pytest.raises(TypeError, match="has no setting 'loops'; its settings are data"):
        plots.lens(model, loops=2)
    with pytest.raises(TypeError, match="this figure is of one checkpoint, got 2"):
        plots.lens([model, model], text="<e_3><r_1>")
    with pytest.raises(AttributeError, match="plots has no 'lense'; it has attention_settling"):
        plots.lense  # noqa: B018 - it is the access that raises


def test_a_title_says_checkpoint_input_and_settings() -> None:
    figure = plots.patch(ouro_folder(), clean=CAT, corrupted=DOG, answer=" mat", site="resid_pre")
    title = figure.layout.title.text
    assert "ouro-toy" in title
    assert f"{CAT} against {DOG}, answer ␣mat" in title
    assert "4 iterations" in title
    assert "site resid_pre" in title
    own = plots.readouts("mini/smiles", text="<bos>C").layout.title.text
    assert "&lt;bos&gt;C, answer" in own
    assert "(the model's own top token)" in own
    assert "questions of 3 hops" in plots.steps(hops=3, n_loops=2, per_hop=1).layout.title.text


def run(args: list[Any], folder: Path) -> dict[str, Any]:
    main([*map(str, args), "--out", str(folder), "--no-html"])
    found: dict[str, Any] = json.loads((folder / f"{args[0]}.settings.json").read_text())
    return found


def test_settings_say_what_made_the_results_and_can_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(["lens", ouro_folder(), "--text", CAT], tmp_path / "a")
    made = said["made_with"]
    assert made["loopscope"] == loopscope.__version__
    assert made["torch"] == torch.__version__
    assert ("commit" in made) == (ROOT / ".git").exists()
    (facts,) = made["checkpoints"].values()
    assert (facts["n_loops"], facts["family"], facts["readout"]) == (4, "ouro", "last_real")
    assert "loaded" not in said
    saved = tmp_path / "a" / "lens.settings.json"
    again = run(["lens", "--from-file", saved], tmp_path / "b")
    assert again == said
    smiles = run(["lens", "mini/smiles", "--text", "CCO"], tmp_path / "c")["made_with"]
    (other,) = smiles["checkpoints"].values()
    assert len(other["weights"]) == len(facts["weights"]) >= 32
    assert other["weights"] != facts["weights"]
    capsys.readouterr()


def test_the_weights_hash_is_of_the_weights_alone() -> None:
    model = load(ouro_folder())
    first = plots_facts(model)
    assert first == plots_facts(load(ouro_folder()))
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert plots_facts(model) != first


def plots_facts(model: Any) -> str:
    from loopscope.analyses.standalone import _facts

    return str(_facts(model)["weights"])


@pytest.mark.browser
def test_a_sentence_becomes_a_pdf_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["lens", ouro_folder(), "--text", CAT, "--pdf", "--out", str(tmp_path)])
    assert (tmp_path / "lens.pdf").read_bytes().startswith(b"%PDF")
    assert f"wrote {tmp_path / 'lens.pdf'}" in capsys.readouterr().out


def test_the_room_is_an_attribute_of_the_package() -> None:
    assert loopscope.plots is plots
    assert {"plots", "load"} <= set(dir(loopscope))
    assert plots.__dir__() == [*plots.__all__, "attention_view"]


def test_the_attention_view_has_every_head_of_every_iteration() -> None:
    model = load(ouro_folder())
    page = str(plots.attention_view(model, CAT, 3, layer=1))
    given = json.loads(page.partition("AttentionHeads,")[2].partition("\n    )")[0])
    assert given["tokens"] == model.to_str_tokens(CAT)
    heads = model.cfg.n_heads
    assert len(given["attention"]) == len(given["attentionHeadNames"]) == 3 * heads
    assert given["attentionHeadNames"][heads + 1] == "loop 1 · block 1 · head 1"
    name = "loops.1.blocks.1.attn.hook_pattern"
    _, cache = model.run_with_cache(CAT, n_loops=3, names_filter=name)
    assert given["attention"][heads + 1] == pytest.approx(cache[name][0, 1].numpy(), abs=1e-6)
    with pytest.raises(ValueError, match="attention_view shows one input, got 2"):
        plots.attention_view(model, [CAT, CAT])
    with pytest.raises(KeyError, match=r"blocks\.99"):
        plots.attention_view(model, CAT, layer=99)
