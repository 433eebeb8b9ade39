"""Next-token training on molecule strings: the recipe, the rows, the loss, what is measured, and
the run.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.load import load, read_card
from loopscope.models.core.base import LoopedModel
from loopscope.tasks.smiles import BOS, EOS, SmilesVocabulary, well_formed
from loopscope.training.language import data as language_data
from loopscope.training.language import trainer as language
from loopscope.training.language.data import Batches, Corpus, as_tokens, make_corpus, to_rows
from loopscope.training.language.recipes import LANGUAGE_RECIPES, LanguageRecipe, SmilesTask
from loopscope.training.language.scores import next_token_loss, sample_strings, score_passes, shares
from loopscope.training.language.trainer import (
    LanguageTrainer,
    fresh_language_model,
    train_language,
)

TINY = LanguageRecipe(
    name="tiny",
    task=SmilesTask(molecules=53, held_out=11, writings=2, atoms=(5, 13), seed=3),
    d_model=18,
    n_heads=3,
    n_loops=3,
    context=23,
    updates=14,
    lr=1e-2,
    warmup=3,
    batch_size=7,
    eval_every=4,
    eval_questions=5,
)
TEXTS = ["CCO", "c1ccccc1", "C(F)(Cl)C", "N", "CC(=O)[O-]"]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus(TINY)


@pytest.fixture(scope="module")
def folder_with_data(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the strings of the recipe and no run."""
    folder = tmp_path_factory.mktemp("data")
    LanguageTrainer(TINY, folder).log.close()
    return folder


@pytest.fixture
def run_folder(folder_with_data: Path, tmp_path: Path) -> Path:
    """A new folder with these strings."""
    shutil.copy(folder_with_data / "data.npz", tmp_path)
    return tmp_path


@pytest.fixture
def exact() -> LoopedModel:
    """A fresh model in float64 whose passes differ, in eval mode."""
    model = fresh_language_model(TINY).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# The recipe


def test_the_rate_rises_and_falls_as_half_a_cosine() -> None:
    (stage,) = replace(TINY, updates=100, lr=0.5, lr_end=0.1, warmup=4).stages
    assert [stage.rate(i) for i in range(3)] == pytest.approx(
        [(i + 1) / 4 * (0.1 + 0.4 * (1 + math.cos(math.pi * i / 100)) / 2) for i in range(3)],
        abs=1e-12,
    )
    assert stage.rate(50) == pytest.approx(0.3, abs=1e-12)
    assert stage.rate(100) == pytest.approx(0.1, abs=1e-12)
    assert all(stage.rate(i) > stage.rate(i + 1) for i in range(4, 99))
    (plain,) = replace(TINY, warmup=0, lr=0.5).stages
    assert plain.rate(0) == 0.5


def test_what_only_questions_need_is_no_argument() -> None:
    for name, value in {
        "halting_gate": True,
        "label_smoothing": 0.1,
        "stages": (),
        "eval_loops": 4,
    }.items():
        with pytest.raises(TypeError, match=name):
            LanguageRecipe(name="x", task=SmilesTask(), updates=1, **{name: value})
    assert (TINY.eval_loops, TINY.loops.low, TINY.loops.high, TINY.padded_to) == (3, 3, 3, 23)
    assert str(TINY.task) == "2 SMILES of each of 53 molecules of 5 to 13 heavy atoms"


@pytest.mark.parametrize(
    "change",
    [{"updates": 0}, {"batch_size": 0}, {"eval_every": 0}, {"eval_questions": 0}, {"context": 2}],
)
def test_numbers_that_are_too_small_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, and context at least 3, got"):
        replace(TINY, **change)


def test_the_named_recipes_make_a_model_of_one_block_and_eight_passes() -> None:
    for name, recipe in LANGUAGE_RECIPES.items():
        model = fresh_language_model(recipe)
        assert recipe.name == name
        assert (model.cfg.n_layers, model.cfg.n_loops, model.cfg.d_model, model.cfg.n_heads) == (
            1,
            8,
            64,
            4,
        )


def test_the_model_encodes_molecules() -> None:
    model, words = fresh_language_model(TINY), SmilesVocabulary()
    batch = model.encode(["<bos>CCO", "<bos>c1[nH]cc"])
    assert batch.tokens.tolist() == [[*words.ids("<bos>CCO"), 0, 0], words.ids("<bos>c1[nH]cc")]
    assert batch.readout.tolist() == [3, 5]
    assert model.to_single_token("[nH]") == words.ids("[nH]")[0]
    assert model.to_str_tokens("ClC") == ["Cl", "C"]
    with pytest.raises(ValueError, match="'P' is not one of the"):
        model.encode("CP")


# Rows and batches


def test_rows_lie_between_bos_and_eos_and_long_strings_are_left_out() -> None:
    words = SmilesVocabulary()
    for context, kept in ((8, [0, 3]), (9, [0, 3, 4]), (10, [0, 1, 2, 3, 4])):
        rows = to_rows(TEXTS, context)
        assert rows.shape == (len(kept), context)
        assert [words.text(row).replace("<pad>", "") for row in rows.tolist()] == [
            f"<bos>{TEXTS[i]}<eos>" for i in kept
        ]
    assert as_tokens(to_rows(TEXTS[:1], 23)).tolist() == [words.ids("<bos>CCO<eos>")]


def test_the_corpus_is_deterministic_and_held_out_strings_do_not_depend_on_the_training_ones(
    corpus: Corpus,
) -> None:
    again, fewer = (
        make_corpus(TINY),
        make_corpus(replace(TINY, task=replace(TINY.task, molecules=5, writings=1))),
    )
    assert np.array_equal(again.train, corpus.train)
    assert np.array_equal(again.held_out, corpus.held_out)
    assert np.array_equal(fewer.held_out, corpus.held_out)
    assert len(fewer.train) <= 5 < len(corpus.train) <= 106
    assert not np.array_equal(
        make_corpus(replace(TINY, task=replace(TINY.task, seed=4))).held_out, corpus.held_out
    )


def test_no_molecule_is_in_both_parts(corpus: Corpus) -> None:
    from rdkit import Chem

    words = SmilesVocabulary()

    def molecules(rows: np.ndarray) -> set[str]:
        texts = (words.text([i for i in row if i > 2]) for row in rows.tolist())
        return {Chem.MolToSmiles(Chem.MolFromSmiles(text)) for text in texts}

    assert molecules(corpus.train).isdisjoint(molecules(corpus.held_out))
    assert len(molecules(corpus.train)) > 45


def test_an_epoch_has_each_string_at_most_once_in_whole_batches(corpus: Corpus) -> None:
    batches = Batches(corpus.train, 7, 5)
    n = len(corpus.train) // 7
    assert batches.per_epoch == n
    epochs = []
    for epoch in range(2):
        rows = [
            np.pad(b, ((0, 0), (0, 23 - b.shape[1])))
            for b in (batches(epoch * n + i).numpy() for i in range(n))
        ]
        assert all(len(row) == 7 for row in rows)
        epochs.append(np.concatenate(rows))
        given, there = (sorted(map(bytes, x.astype(np.uint8))) for x in (epochs[-1], corpus.train))
        assert len(given) == 7 * n
        for row in set(given):
            assert given.count(row) <= there.count(row)
    assert not np.array_equal(*epochs)
    assert torch.equal(Batches(corpus.train, 7, 5)(n + 1), batches(n + 1))
    assert not all(torch.equal(Batches(corpus.train, 7, 6)(i), batches(i)) for i in range(n))


def test_strings_of_a_batch_have_similar_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 41, size=16 * 32)
    rows = (np.arange(41) < lengths[:, None]).astype(np.uint8)
    batches = Batches(rows, 16, 0)
    widths = [batches(i).shape[1] for i in range(32)]
    assert sum(widths) * 16 < 1.1 * lengths.sum()
    assert widths != sorted(widths)


# What is trained and measured


def slow_nats(model: LoopedModel, texts: list[str], n_loops: int) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of the next token, string by string and token by token."""
    words, nats, right = SmilesVocabulary(), [], []
    for text in texts:
        ids = words.ids(f"{BOS}{text}{EOS}")
        logits = model(torch.tensor([ids]), n_loops=n_loops)[0]
        for here, following in enumerate(ids[1:]):
            weights = logits[here].exp()
            nats.append(-math.log(float((weights[following] / weights.sum()).detach())))
            right.append(int(logits[here].argmax()) == following)
    return sum(nats) / len(nats), sum(right) / len(right)


def test_the_loss_is_the_mean_over_real_tokens(exact: LoopedModel) -> None:
    loss = next_token_loss(exact, as_tokens(to_rows(TEXTS, 23)))
    assert float(loss.detach()) == pytest.approx(slow_nats(exact, TEXTS, 3)[0], abs=1e-9)


def test_more_padding_changes_neither_loss_nor_gradient(exact: LoopedModel) -> None:
    rows = to_rows(TEXTS, 23)
    gradients: list[list[Tensor]] = []
    for tokens in (as_tokens(rows), torch.from_numpy(rows.astype(np.int64))):
        exact.zero_grad()
        next_token_loss(exact, tokens).backward()
        gradients.append([p.grad.clone() for p in exact.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(exact.parameters()))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(*gradients, strict=True))


def test_passes_are_scored_as_calls_with_fewer_iterations(exact: LoopedModel) -> None:
    scores = score_passes(exact, to_rows(TEXTS, 23), 4, batch_size=2)
    assert len(scores.nats) == len(scores.accuracy) == 4
    for t in range(4):
        nats, right = slow_nats(exact, TEXTS, t + 1)
        assert scores.nats[t] == pytest.approx(nats, abs=1e-9)
        assert scores.accuracy[t] == pytest.approx(right, abs=1e-12)
    assert len({round(x, 6) for x in scores.nats}) == 4


def test_samples_at_a_low_temperature_are_the_most_likely_tokens(exact: LoopedModel) -> None:
    words = SmilesVocabulary()
    ids = words.ids(BOS)
    while len(ids) < 11 and ids[-1] != words.ids(EOS)[0]:
        ids.append(int(exact(torch.tensor([ids]))[0, -1].argmax()))
    assert sample_strings(exact, 3, 0, context=11, temperature=1e-9) == [words.text(ids[1:])] * 3


def test_samples_follow_the_model_probabilities(exact: LoopedModel) -> None:
    words, count = SmilesVocabulary(), 3000
    probs = exact(torch.tensor([words.ids(BOS)]))[0, -1].softmax(-1).tolist()
    firsts = sample_strings(exact, count, 4, context=2)
    for word, p in zip(words.words, probs, strict=True):
        assert abs(firsts.count(word) / count - p) < 5 * (p * (1 - p) / count) ** 0.5 + 1e-12
    assert (
        firsts
        == sample_strings(exact, count, 4, context=2)
        != sample_strings(exact, count, 5, context=2)
    )


def test_samples_end_at_eos_or_at_the_context() -> None:
    model, words = fresh_language_model(TINY), SmilesVocabulary()
    samples = sample_strings(model, 120, 1, context=13)
    assert any(EOS in text for text in samples)
    assert any(EOS not in text for text in samples)
    for text in samples:
        assert text.count(EOS) == text.endswith(EOS)
        assert len(words.ids(text)) == 12 or text.endswith(EOS)


def test_sampling_needs_a_vocabulary_and_a_positive_temperature() -> None:
    model = fresh_language_model(TINY)
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0\.0"):
        sample_strings(model, 1, 0, context=5, temperature=0.0)
    model.vocab = None
    with pytest.raises(ValueError, match="a model with a SMILES vocabulary"):
        sample_strings(model, 1, 0, context=5)


def test_only_strings_that_end_count() -> None:
    samples = [
        "CCO<eos>",
        "CCO<eos>",
        "C1CC1",
        "C(<eos>",
        "C(C)(C)(C)(C)C<eos>",
        "<eos>",
        "C<pad>C<eos>",
        "N<eos>",
    ]
    assert shares(samples) == {"ended": 0.875, "well_formed": 0.5, "valid": 0.375, "distinct": 0.25}


# The run


def weights(trainer: LanguageTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def lines(folder: Path) -> list[dict[str, object]]:
    return [
        {**json.loads(line), "seconds": 0}
        for line in (folder / "log.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_a_run_improves_logs_and_exports(run_folder: Path, corpus: Corpus) -> None:
    recipe = replace(TINY, updates=42, eval_every=12)
    before = torch.get_rng_state()
    done = train_language(recipe, run_folder)
    assert torch.equal(torch.get_rng_state(), before)
    found = lines(run_folder)
    assert [line["update"] for line in found] == [12, 24, 36, 42]
    assert found[-1]["held_out"] < found[0]["held_out"] < math.log(len(SmilesVocabulary()))
    assert found[-1]["loss"] < found[0]["loss"]
    assert done == run_folder / "final"
    model, card = load(done), read_card(done)
    scores = score_passes(model, corpus.held_out, 3)
    assert card["passes"]["nats"] == [round(x, 4) for x in scores.nats]
    assert card["held_out_nats"] == card["passes"]["nats"][-1] < math.log(len(SmilesVocabulary()))
    assert card["samples"]["count"] == 200
    assert (
        0
        <= card["samples"]["distinct"]
        <= card["samples"]["valid"]
        <= card["samples"]["ended"]
        <= 1
    )
    assert card["recipe"]["n_loops"] == 3
    assert card["updates"] == 42
    assert len(card["held_out_strings"]) == len(corpus.held_out)
    texts = [text.removeprefix(BOS).removesuffix(EOS) for text in card["held_out_strings"]]
    assert np.array_equal(to_rows(texts, 23), corpus.held_out)
    assert all(map(well_formed, texts))
    assert not list(run_folder.glob(".*"))


def test_a_resumed_run_equals_a_whole_one(tmp_path: Path, folder_with_data: Path) -> None:
    recipe = replace(TINY, dropout=0.2)
    for run in ("whole", "parts"):
        (tmp_path / run).mkdir()
        shutil.copy(folder_with_data / "data.npz", tmp_path / run)
    whole, first = (
        LanguageTrainer(recipe, tmp_path / "whole"),
        LanguageTrainer(recipe, tmp_path / "parts"),
    )
    whole.run()
    for _ in range(5):
        first.step()
    first.save()
    first.step()  # lost
    first.log.close()
    second = LanguageTrainer(recipe, tmp_path / "parts", resume=True)
    assert second.progress.update == 5
    second.run()
    assert same(weights(second), weights(whole))
    assert not same(weights(first), weights(whole))
    ours, theirs = lines(tmp_path / "parts"), lines(tmp_path / "whole")
    assert [{**line, "loss": 0} for line in ours[1:]] == [
        {**line, "loss": 0} for line in theirs[2:]
    ]


def test_a_seed_decides_the_run(folder_with_data: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        trainer = LanguageTrainer(replace(TINY, seed=seed), folder_with_data)
        losses.append([trainer.step() for _ in range(3)])
        trainer.log.close()
    assert losses[0] == losses[1] != losses[2]


def test_a_folder_with_another_run_or_other_data_is_refused(run_folder: Path) -> None:
    trainer = LanguageTrainer(TINY, run_folder)
    trainer.save()
    trainer.log.close()
    with pytest.raises(ValueError, match="holds a run already; pass --resume"):
        LanguageTrainer(TINY, run_folder)
    with pytest.raises(ValueError, match="was written by a run of another recipe"):
        LanguageTrainer(replace(TINY, lr=1e-3), run_folder, resume=True)
    (run_folder / "state.pt").unlink()
    with pytest.raises(
        ValueError, match=r"data\.npz holds the strings of another task, .*; choose another folder"
    ):
        LanguageTrainer(replace(TINY, task=replace(TINY.task, writings=3)), run_folder)
    with pytest.raises(ValueError, match=r"data\.npz holds the strings of another task"):
        LanguageTrainer(replace(TINY, context=24), run_folder)


def test_too_few_strings_are_refused(tmp_path: Path, folder_with_data: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"needs at least 900 training strings, its batch, .* ask for more molecules",
    ):
        LanguageTrainer(replace(TINY, batch_size=900), folder_with_data)
    with pytest.raises(
        ValueError, match="tokens, got 0 and 0; ask for more molecules, or for a longer context"
    ):
        LanguageTrainer(replace(TINY, context=3), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_the_data_are_made_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(language_data.np, "savez_compressed", fails)
    with pytest.raises(OSError, match="disk full"):
        LanguageTrainer(TINY, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.shapes
def test_a_loss_that_is_no_number_stops_the_run(run_folder: Path) -> None:
    trainer = LanguageTrainer(TINY, run_folder)
    trainer.save()
    before = (run_folder / "state.pt").read_bytes()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss became nan at update 0"):
        trainer.run()
    trainer.log.close()
    assert (run_folder / "state.pt").read_bytes() == before


def test_main_runs_a_named_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LANGUAGE_RECIPES, "tiny", TINY)
    language.main("tiny", tmp_path)
    assert capsys.readouterr().out.strip() == str(tmp_path / "final")
    with pytest.raises(
        SystemExit, match="there is no recipe 'maxi'; the recipes are mini/smiles, tiny"
    ):
        language.main("maxi", tmp_path)
