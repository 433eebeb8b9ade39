"""Saving and loading: the same model comes back, nothing is overwritten, and nobody's files or
objects change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loopscope.checkpoints import load as loading
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load, read_card, save
from loopscope.checkpoints.release import save_release
from loopscope.models.core.base import LoopedModel
from loopscope.tasks.graphs import PermutationGraph
from release_files import FACTS, WORDS, files_under, release_tensors, toy_model, write_release

LOOPS = 4
VARIANTS = [
    (positions, injection)
    for positions in ("none", "learned", "sinusoidal")
    for injection in (False, True)
]
READOUTS = ("last_real", "first_pad", "column:9", None)
IDS = [f"{positions}{'-injected' if injection else ''}" for positions, injection in VARIANTS]


def logits_of(model: LoopedModel, n_loops: int | None = None) -> torch.Tensor:
    tokens, mask = (
        torch.tensor([[1, 6, 7, 8, 2], [3, 8, 6, 0, 0], [5, 7, 0, 0, 0]]),
        torch.ones(3, 5, dtype=torch.int64),
    )
    mask[1, 3:], mask[2, 2:] = 0, 0
    return model(tokens, n_loops=n_loops, mask=mask)


# The same model comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("positions", "injection"), VARIANTS, ids=IDS)
def test_a_saved_model_loads_with_identical_logits(
    tmp_path: Path, positions: str, injection: bool, dtype: torch.dtype
) -> None:
    model = toy_model(positions, injection, dtype=dtype)
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.cfg == model.cfg
    assert torch.equal(logits_of(again), logits_of(model))
    assert torch.equal(logits_of(again, LOOPS + 3), logits_of(model, LOOPS + 3))


@pytest.mark.parametrize(("positions", "injection"), VARIANTS, ids=IDS)
def test_a_saved_model_loads_with_identical_tensors(
    tmp_path: Path, positions: str, injection: bool
) -> None:
    model = toy_model(positions, injection)
    save(model, tmp_path / "saved")
    ours, theirs = load(tmp_path / "saved").state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
        for name in theirs
    )


def test_a_release_saved_in_our_format_gives_identical_logits(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(WORDS))
    model = load(
        write_release(tmp_path / "a.pt", release_tensors("learned")),
        **FACTS,
        n_loops=3,
        readout="first_pad",
    )
    save(model, tmp_path / "saved")
    again, tokens = load(tmp_path / "saved"), torch.tensor([[1, 6, 7], [2, 8, 0]])
    assert torch.equal(again(tokens), model(tokens))
    assert (again.cfg, again.read_at, again.vocab is None) == (model.cfg, model.read_at, False)


def test_the_file_can_be_named_instead_of_the_folder(tmp_path: Path) -> None:
    save(toy_model(), tmp_path / "saved")
    assert torch.equal(
        logits_of(load(tmp_path / "saved" / "model.safetensors")), logits_of(toy_model())
    )


@pytest.mark.parametrize("readout", READOUTS)
def test_where_answers_are_read_is_kept(tmp_path: Path, readout: str | None) -> None:
    model = toy_model(read_at=readout)
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.read_at == model.read_at
    assert read_card(tmp_path / "saved").get("readout") == readout


@pytest.mark.parametrize("n_loops", [None, 1, 6])
def test_the_recorded_iterations_are_kept(tmp_path: Path, n_loops: int | None) -> None:
    save(toy_model(n_loops=n_loops), tmp_path / "saved")
    assert load(tmp_path / "saved").cfg.n_loops == n_loops


def test_the_vocabulary_is_kept_and_encodes_alike(tmp_path: Path) -> None:
    model = toy_model(read_at="first_pad")
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.vocab is not None
    assert model.vocab is not None
    assert again.vocab.words == model.vocab.words
    texts = ["<e_4><r_2>", "<e_1>"]
    assert torch.equal(again.encode(texts).tokens, model.encode(texts).tokens)
    assert torch.equal(again.encode(texts).readout, model.encode(texts).readout)


def test_a_model_without_vocabulary_or_readout_is_saved_without_them(tmp_path: Path) -> None:
    save(toy_model(), tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "card.json",
        "config.json",
        "model.safetensors",
    ]
    again = load(tmp_path / "saved")
    assert (again.vocab, again.read_at) == (None, None)


def test_the_card_and_the_graph_are_written(tmp_path: Path) -> None:
    card, graph = (
        {"recipe": "11,000 updates", "accuracy": {"2": 0.5}},
        {"permutations": [[1, 2, 0], [2, 0, 1]]},
    )
    save(toy_model(read_at="last_real"), tmp_path / "saved", card, graph)
    assert read_card(tmp_path / "saved") == {**card, "readout": "last_real"}
    assert PermutationGraph.read(tmp_path / "saved" / "graph.json").walk("<e_0><r_0><r_1>") == [
        "<e_0>",
        "<e_1>",
        "<e_0>",
    ]


def test_iterations_can_be_replaced_while_loading(tmp_path: Path) -> None:
    save(toy_model(), tmp_path / "saved")
    again = load(tmp_path / "saved", n_loops=7)
    assert again.cfg.n_loops == 7
    assert torch.equal(logits_of(again), logits_of(toy_model(), 7))


@pytest.mark.parametrize(
    ("argument", "value", "recorded"), [("n_heads", 7, 5), ("input_injection", True, False)]
)
def test_arguments_that_contradict_the_config_are_refused(
    tmp_path: Path, argument: str, value: Any, recorded: Any
) -> None:
    save(toy_model(), tmp_path / "saved")
    with pytest.raises(
        CheckpointError, match=rf"config\.json says {argument}={recorded}, but {value} was passed"
    ):
        load(tmp_path / "saved", **{argument: value})


def test_arguments_that_agree_with_the_config_are_welcome(tmp_path: Path) -> None:
    save(toy_model(), tmp_path / "saved")
    assert load(tmp_path / "saved", n_heads=5, input_injection=False).cfg == toy_model().cfg


def test_a_loaded_model_is_in_eval_mode_whatever_was_saved(tmp_path: Path) -> None:
    save(toy_model().train(), tmp_path / "saved")
    assert not any(module.training for module in load(tmp_path / "saved").modules())


def test_a_model_that_ran_and_holds_hooks_is_saved_as_its_weights(tmp_path: Path) -> None:
    model = toy_model()
    logits_of(model, 9)
    model.add_hook("loops.2.blocks.0.hook_resid_pre", lambda value, hook: value * 0)
    save(model, tmp_path / "saved")
    assert torch.equal(logits_of(load(tmp_path / "saved")), logits_of(toy_model()))


# Nothing is overwritten, and nothing is left behind


@pytest.mark.parametrize("there", ["notes.txt", "model.safetensors", ".hidden"])
def test_a_folder_that_holds_something_is_refused_and_left_alone(
    tmp_path: Path, there: str
) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / there).write_text("mine")
    before = files_under(tmp_path)
    with pytest.raises(
        CheckpointError, match="saved exists and is not empty; saving never overwrites"
    ):
        save(toy_model(), tmp_path / "saved")
    assert files_under(tmp_path) == before


def test_a_second_save_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    save(toy_model(seed=1), tmp_path / "saved")
    before = files_under(tmp_path)
    with pytest.raises(CheckpointError, match="choose another folder or remove it"):
        save(toy_model(seed=2), tmp_path / "saved")
    assert files_under(tmp_path) == before


def test_a_file_in_the_folders_place_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(CheckpointError, match="saving never overwrites"):
        save(toy_model(), tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "mine"


def test_an_empty_folder_and_missing_parents_are_welcome(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "saved"):
        save(toy_model(), folder)
        assert torch.equal(logits_of(load(folder)), logits_of(toy_model()))
        assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["save_file", "write_json"])
@pytest.mark.parametrize("folder", ["saved", "empty"])
def test_a_failure_in_the_middle_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    step: str,
    error: type[BaseException],
) -> None:
    (tmp_path / "empty").mkdir()
    before = files_under(tmp_path)

    def fail(*_: object) -> None:
        raise error("the disk is full")

    monkeypatch.setattr(loading, step, fail)
    with pytest.raises(error, match="the disk is full"):
        save(toy_model(), tmp_path / folder)
    assert files_under(tmp_path) == before


def test_a_failed_save_takes_the_parents_that_it_made_away_again(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(toy_model(), tmp_path / "new" / "parents" / "saved", card={"recipe": object()})
    assert files_under(tmp_path) == {}


def test_a_card_that_is_no_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(toy_model(), tmp_path / "saved", card={"recipe": object()})
    assert files_under(tmp_path) == {}


# Nobody's files and objects change


def test_loading_changes_no_file(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(WORDS))
    (tmp_path / "card.json").write_text(json.dumps(FACTS))
    release = write_release(tmp_path / "a.pt")
    save(toy_model(read_at="last_real"), tmp_path / "saved", {"seed": 1}, {"permutations": [[0]]})
    before = files_under(tmp_path)
    for source in (release, tmp_path / "saved"):
        load(source)(torch.tensor([[1, 6]]), n_loops=2)
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("own", [False, True])
def test_editing_loaded_weights_does_not_change_the_file(tmp_path: Path, own: bool) -> None:
    source = write_release(tmp_path / "a.pt")
    if own:
        save(load(source, **FACTS), tmp_path / "saved")
        source = tmp_path / "saved"
    before, model = files_under(tmp_path), load(source, n_heads=5, input_injection=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert files_under(tmp_path) == before
    assert torch.equal(
        load(source, n_heads=5, input_injection=False).W_E,
        release_tensors()["token_embedding.weight"],
    )


def test_two_loads_of_one_file_share_no_weights(tmp_path: Path) -> None:
    path = write_release(tmp_path / "a.pt")
    first, second = (load(path, **FACTS) for _ in range(2))
    with torch.no_grad():
        first.W_E.zero_()
    assert torch.equal(second.W_E, release_tensors()["token_embedding.weight"])


def test_saving_changes_neither_the_model_nor_the_card(tmp_path: Path) -> None:
    model, card = toy_model("sinusoidal", read_at="last_real"), {"seed": 4}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    expected = logits_of(model)
    save(model, tmp_path / "saved", card)
    assert card == {"seed": 4}
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits_of(model), expected)


def test_the_source_file_may_be_deleted_while_its_model_is_in_use(tmp_path: Path) -> None:
    path = write_release(tmp_path / "a.pt")
    model, tokens = load(path, **FACTS), torch.tensor([[1, 6, 7]])
    expected = load(path, **FACTS)(tokens, n_loops=2)
    path.unlink()
    assert torch.equal(model(tokens, n_loops=2), expected)


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize("epoch", [None, 41])
def test_the_released_layout_comes_back_the_same(
    tmp_path: Path, positions: str, epoch: int | None
) -> None:
    model = toy_model(positions)
    save_release(model, tmp_path / "a.pt", epoch)
    again = load(tmp_path / "a.pt", **FACTS, n_loops=model.cfg.n_loops)
    assert again.cfg == model.cfg
    assert {name: tensor.tolist() for name, tensor in again.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content.get("epoch") == epoch
    assert (
        content["model_state_dict"]["lm_head.weight"].data_ptr()
        == content["model_state_dict"]["token_embedding.weight"].data_ptr()
    )


def test_what_is_saved_has_the_usual_permissions(tmp_path: Path) -> None:
    save(toy_model(), tmp_path / "saved")
    (tmp_path / "plain").write_text("")
    assert {path.stat().st_mode for path in (tmp_path / "saved").iterdir()} == {
        (tmp_path / "plain").stat().st_mode
    }
