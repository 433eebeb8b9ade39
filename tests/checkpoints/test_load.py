"""Released pickles: what is read from the file, how it is read, and what has to be asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.checkpoints.locate import SHIPPED
from loopscope.models.basis.tokens import Readout
from loopscope.tasks.questions import by_hops, read_questions
from paths import GOLDEN
from release_files import (
    D_MLP,
    D_MODEL,
    D_VOCAB,
    FACTS,
    N_LAYERS,
    N_POSITIONS,
    loaded,
    release_tensors,
    write_release,
)

CASES = (
    "ltg_nope",
    "ltg_nope_compiled_injection",
    "ltg_sinusoidal",
    "ltg_systematicity",
    "ltg_trained",
)


def golden(case: str) -> tuple[Path, dict[str, Any]]:
    (path,) = (SHIPPED / case if case == "ltg_trained" else GOLDEN / case).glob("*.pt")
    return path, json.loads((GOLDEN / case / "meta.json").read_text())


def weights_of(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, weights_only=True)["model_state_dict"]
    return {key.removeprefix("_orig_mod."): value for key, value in state.items()}


# What is in the file


@pytest.mark.parametrize("case", CASES)
def test_a_golden_release_loads_with_its_sizes(case: str) -> None:
    path, meta = golden(case)
    cfg = load(path, n_heads=meta["n_heads"], input_injection=meta["input_injection"]).cfg
    sizes = ("d_model", "n_layers", "n_heads", "d_vocab", "positions", "input_injection")
    assert {name: getattr(cfg, name) for name in sizes} == {name: meta[name] for name in sizes}
    assert cfg.d_head * meta["n_heads"] == meta["d_model"]
    assert cfg.d_mlp == 4 * meta["d_model"]
    assert cfg.n_ctx == (None if meta["positions"] == "none" else meta["n_positions"])


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_the_files_own_values(case: str) -> None:
    path, meta = golden(case)
    model = load(path, n_heads=meta["n_heads"], input_injection=meta["input_injection"])
    theirs = weights_of(path)
    assert torch.equal(model.W_E, theirs["token_embedding.weight"])
    assert torch.equal(model.final_norm.w, theirs["ln_f.weight"])
    assert torch.equal(model.final_norm.b, theirs["ln_f.bias"])
    for layer, block in enumerate(model.blocks):
        ours = [
            block.ln1.w,
            block.ln1.b,
            block.attn.W_QKV,
            block.attn.b_QKV,
            block.attn.W_O_flat,
            block.attn.b_O,
        ]
        ours += [
            block.ln2.w,
            block.ln2.b,
            block.mlp.W_in,
            block.mlp.b_in,
            block.mlp.W_out,
            block.mlp.b_out,
        ]
        parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        names = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
        for tensor, name in zip(ours, names, strict=True):
            assert torch.equal(tensor, theirs[f"blocks.{layer}.{name}"]), f"blocks.{layer}.{name}"
    stored = sum(value.numel() for key, value in theirs.items() if key != "lm_head.weight")
    assert sum(value.numel() for value in model.state_dict().values()) == stored


@pytest.mark.parametrize(
    ("positions", "key"), [("learned", "position_embedding.weight"), ("sinusoidal", "pe")]
)
def test_position_tables_are_taken_from_the_file(tmp_path: Path, positions: str, key: str) -> None:
    model = loaded(tmp_path / "a.pt", positions)
    assert (model.cfg.positions, model.cfg.n_ctx) == (positions, N_POSITIONS)
    assert torch.equal(model.W_pos, release_tensors(positions)[key])


def test_only_a_learned_position_table_can_be_trained(tmp_path: Path) -> None:
    learned, fixed = loaded(tmp_path / "a.pt", "learned"), loaded(tmp_path / "b.pt", "sinusoidal")
    assert "W_pos" in dict(learned.named_parameters())
    assert "W_pos" in dict(fixed.named_buffers())


def test_sizes_are_told_from_the_shapes(tmp_path: Path) -> None:
    cfg = loaded(tmp_path / "a.pt").cfg
    assert (cfg.d_model, cfg.n_layers, cfg.d_mlp, cfg.d_vocab, cfg.n_ctx) == (
        D_MODEL,
        N_LAYERS,
        D_MLP,
        D_VOCAB,
        None,
    )


def test_a_single_block_and_a_narrow_mlp_load(tmp_path: Path) -> None:
    path = write_release(tmp_path / "a.pt", release_tensors(n_layers=1, d_mlp=23))
    cfg = load(path, **FACTS).cfg
    assert (cfg.n_layers, cfg.d_mlp) == (1, 23)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_old_torch_format_loads_too(tmp_path: Path, legacy: bool) -> None:
    model = load(write_release(tmp_path / "a.pt", legacy=legacy), **FACTS)
    assert torch.equal(model.W_E, release_tensors()["token_embedding.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_the_weights_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_release(
        tmp_path / "a.pt", {key: value.to(dtype) for key, value in release_tensors().items()}
    )
    assert {parameter.dtype for parameter in load(path, **FACTS).parameters()} == {dtype}


def test_a_compiled_model_loads_as_the_plain_one(tmp_path: Path) -> None:
    plain = loaded(tmp_path / "plain.pt")
    prefixed = {f"_orig_mod.{key}": value for key, value in release_tensors().items()}
    compiled = load(write_release(tmp_path / "compiled.pt", prefixed), **FACTS)
    tokens = torch.tensor([[1, 6, 7], [2, 8, 6]])
    assert torch.equal(plain(tokens, n_loops=3), compiled(tokens, n_loops=3))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_old_causal_mask_buffers_are_ignored(tmp_path: Path, prefix: str) -> None:
    tensors = release_tensors()
    for layer in range(N_LAYERS):
        tensors[f"blocks.{layer}.attn.bias"] = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
        tensors[f"blocks.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    with_buffers = load(
        write_release(tmp_path / "a.pt", {prefix + key: value for key, value in tensors.items()}),
        **FACTS,
    )
    assert set(with_buffers.state_dict()) == set(loaded(tmp_path / "b.pt").state_dict())


def test_a_head_that_is_not_stored_is_the_embedding(tmp_path: Path) -> None:
    tensors = release_tensors()
    del tensors["lm_head.weight"]
    model = load(write_release(tmp_path / "a.pt", tensors), **FACTS)
    assert torch.equal(model.W_U, tensors["token_embedding.weight"].T)


def test_an_equal_head_in_its_own_storage_is_tied(tmp_path: Path) -> None:
    tensors = {
        **release_tensors(),
        "lm_head.weight": release_tensors()["token_embedding.weight"].clone(),
    }
    assert torch.equal(
        load(write_release(tmp_path / "a.pt", tensors), **FACTS).W_E, tensors["lm_head.weight"]
    )


def test_a_head_that_differs_in_one_value_is_refused(tmp_path: Path) -> None:
    head = release_tensors()["token_embedding.weight"].clone()
    head[4, 3] += 1e-3
    path = write_release(tmp_path / "a.pt", {**release_tensors(), "lm_head.weight": head})
    with pytest.raises(
        CheckpointError,
        match=(
            r"lm_head\.weight differs from token_embedding\.weight, but this family's head is tied"
        ),
    ):
        load(path, **FACTS)


def test_a_loaded_model_is_in_eval_mode(tmp_path: Path) -> None:
    model = loaded(tmp_path / "a.pt")
    model(torch.tensor([[1, 6]]), n_loops=4)
    assert not any(module.training for module in model.modules())


# How it is read


@pytest.fixture
def torch_load(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every torch.load call's arguments and result; what lies beside the weights may not be
    touched.
    """
    calls: list[dict[str, Any]] = []
    real = torch.load

    def spy(*args: Any, **kwargs: Any) -> Any:
        content = real(*args, **kwargs)
        content["optimizer_state_dict"] = Untouchable()
        calls.append({**kwargs, "content": content})
        return content

    monkeypatch.setattr(torch, "load", spy)
    return calls


class Untouchable(dict[str, Any]):
    """Stands in for the optimiser's state; any look at it is an error."""

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("the optimiser's state was read")

    __getitem__ = __iter__ = __len__ = __contains__ = get = items = keys = values = _refuse


def test_a_release_is_read_safely_and_memory_mapped(
    tmp_path: Path, torch_load: list[dict[str, Any]]
) -> None:
    loaded(tmp_path / "a.pt")
    (call,) = torch_load
    assert call["weights_only"] is True
    assert call["mmap"] is True


def test_the_parameters_are_the_files_tensors_and_not_copies(
    tmp_path: Path, torch_load: list[dict[str, Any]]
) -> None:
    model = loaded(tmp_path / "a.pt", "learned")
    state = torch_load[0]["content"]["model_state_dict"]
    theirs = {value.data_ptr() for key, value in state.items() if key != "lm_head.weight"}
    assert {value.data_ptr() for value in model.state_dict().values()} == theirs


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="memory maps are listed on Linux only"
)
def test_the_parameters_lie_in_the_mapped_file(tmp_path: Path) -> None:
    model = loaded(tmp_path / "mapped.pt")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        [int(end, 16) for end in line[0].split("-")]
        for line in lines
        if line[-1].endswith(str(tmp_path / "mapped.pt"))
    ]
    assert mapped
    for name, parameter in model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in mapped), name


# What has to be asked for


def test_heads_are_asked_for_where_nothing_tells_them(tmp_path: Path) -> None:
    path = write_release(tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError,
        match=r"a\.pt does not say into how many heads its d_model=15 is split; pass n_heads=",
    ):
        load(path, input_injection=False)


def test_injection_is_asked_for_where_nothing_tells_it(tmp_path: Path) -> None:
    path = write_release(tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError,
        match=(
            r"whether the embedding is added again .*input_injection=True or input_injection=False"
        ),
    ):
        load(path, n_heads=5)


@pytest.fixture(scope="module")
def paper_width(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = release_tensors(d_model=768, n_layers=1, d_mlp=8, d_vocab=5)
    return write_release(tmp_path_factory.mktemp("wide") / "a.pt", tensors, optimizer_state_dict={})


def test_at_the_papers_width_there_are_12_heads_and_no_injection(paper_width: Path) -> None:
    cfg = load(paper_width).cfg
    assert (cfg.n_heads, cfg.d_head, cfg.input_injection) == (12, 64, False)


def test_arguments_win_over_the_papers_values(paper_width: Path) -> None:
    cfg = load(paper_width, n_heads=6, input_injection=True).cfg
    assert (cfg.n_heads, cfg.input_injection) == (6, True)


@pytest.mark.parametrize("n_heads", [0, -1])
def test_fewer_than_one_head_is_refused(paper_width: Path, n_heads: int) -> None:
    with pytest.raises(ValueError, match=f"n_heads must be at least 1, got {n_heads}"):
        load(paper_width, n_heads=n_heads)


def test_injection_changes_what_the_model_computes(tmp_path: Path) -> None:
    path, tokens = write_release(tmp_path / "a.pt"), torch.tensor([[1, 6, 7]])
    with_it, without = (load(path, n_heads=5, input_injection=flag) for flag in (True, False))
    assert torch.equal(with_it(tokens, n_loops=1), without(tokens, n_loops=1))
    assert not torch.allclose(with_it(tokens, n_loops=2), without(tokens, n_loops=2))


# Iterations


def test_the_recorded_number_of_iterations_is_the_default_of_a_call(tmp_path: Path) -> None:
    model, tokens = loaded(tmp_path / "a.pt", n_loops=4), torch.tensor([[1, 6, 7]])
    assert torch.equal(model(tokens), model(tokens, n_loops=4))


def test_a_call_asks_for_iterations_where_none_are_recorded(tmp_path: Path) -> None:
    model = loaded(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="records no number of iterations; pass n_loops="):
        model(torch.tensor([[1, 6, 7]]))


@pytest.mark.parametrize("n_loops", [0, -2])
def test_fewer_than_one_iteration_is_refused(tmp_path: Path, n_loops: int) -> None:
    path = write_release(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"n_loops must be at least 1, got {n_loops}"):
        load(path, **FACTS, n_loops=n_loops)


# The shipped checkpoint


def test_the_shipped_checkpoint_loads_by_name() -> None:
    model = load("ltg_trained")
    assert (model.cfg.n_loops, model.cfg.n_heads, model.cfg.input_injection) == (8, 3, False)
    assert model.read_at == Readout("last_real")
    assert model.vocab is not None
    assert len(model.vocab) == model.cfg.d_vocab


def test_the_shipped_weights_are_those_of_the_golden_case() -> None:
    assert torch.equal(
        load("ltg_trained").W_E, weights_of(golden("ltg_trained")[0])["token_embedding.weight"]
    )


def test_the_shipped_checkpoint_answers_its_questions() -> None:
    model = load("ltg_trained")
    questions = by_hops(read_questions(SHIPPED / "ltg_trained" / "test.json"))[3]
    batch = model.encode([question.text for question in questions])
    read = model(batch.tokens, mask=batch.mask)[torch.arange(len(batch)), batch.readout].argmax(-1)
    right = read == torch.tensor([model.to_single_token(question.answer) for question in questions])
    assert float(right.float().mean()) >= 0.98


def test_a_copied_folder_loads_like_the_shipped_one(tmp_path: Path) -> None:
    model, shipped = (
        load(shutil.copytree(SHIPPED / "ltg_trained", tmp_path / "copy")),
        load("ltg_trained"),
    )
    assert (model.cfg, model.read_at) == (shipped.cfg, shipped.read_at)
    assert torch.equal(model(torch.tensor([[1, 33, 35]])), shipped(torch.tensor([[1, 33, 35]])))
