"""The cache with an iteration axis: keys, stacking, what is kept, and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loopscope.models.basis import cpu_copies
from loopscope.models.core.cache import LoopCache
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_HEAD,
    D_MODEL,
    HEADS,
    LAYERS,
    LOOPS,
    POS,
    expected_shape,
    hook_count,
    random_tokens,
    toy,
)


@pytest.fixture
def everything() -> LoopCache:
    """All activations of a call with positions and injection."""
    return toy("learned", True).run_with_cache(random_tokens(), n_loops=LOOPS, names_filter="**")[1]


# Keys

KEYS = {
    ("resid_post", 3, 0): "loops.3.blocks.0.hook_resid_post",
    ("hook_resid_post", 3, 0): "loops.3.blocks.0.hook_resid_post",
    ("q", 1, 0): "loops.1.blocks.0.attn.hook_q",
    ("attn.hook_q", 1, 0): "loops.1.blocks.0.attn.hook_q",
    ("attn.q", 1, 0): "loops.1.blocks.0.attn.hook_q",
    ("ln1.scale", 2, 1): "loops.2.blocks.1.ln1.hook_scale",
    ("ln2.normalized", 0, 1): "loops.0.blocks.1.ln2.hook_normalized",
    ("pre", 0, 1): "loops.0.blocks.1.mlp.hook_pre",
    ("state_in", 2): "loops.2.hook_state_in",
    ("injected", 1): "loops.1.hook_injected",
    ("embed",): "hook_embed",
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "ln_final.scale": "ln_final.hook_scale",
    ("q", -1, 0): "loops.3.blocks.0.attn.hook_q",
    ("q", -4, -1): "loops.0.blocks.1.attn.hook_q",
    ("resid_mid", 1, -2): "loops.1.blocks.0.hook_resid_mid",
    ("state_out", -1): "loops.3.hook_state_out",
    "loops.1.blocks.0.attn.hook_pattern": "loops.1.blocks.0.attn.hook_pattern",
}


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_keys(key: str | tuple, everything: LoopCache) -> None:
    named = dict(everything.items())
    assert key in everything
    assert everything[key] is named[KEYS[key]]


MISSING = {
    ("resid_post", 4, 0): r"\('resid_post', 4, 0\) is not in this cache.*nearest: loops",
    ("resid_post", 0, 2): r"is not in this cache",
    ("resid_post", -5, 0): r"is not in this cache",
    ("resid_post", 0, -3): r"is not in this cache",
    ("resid_post", 3): r"is not in this cache",
    ("resid_post", "prelude", 0): r"is not in this cache",
    ("state_in", 1, 0): r"is not in this cache",
    ("input", 0): r"is not in this cache",
    "resid_post": r"'resid_post',?\)? is not in this cache",
    "blocks.0.hook_resid_pre": r"nearest: loops\.\d\.blocks\.0\.hook_resid_pre.*names_filter",
    ("nowhere", 0, 0): r"is not in this cache",
    (
        "scale",
        1,
        0,
    ): (
        r"could be loops\.1\.blocks\.0\.ln1\.hook_scale or loops\.1\.blocks\.0\.ln2\.hook_scale;"
        r" name the site in full"
    ),
    # ln_final has a "normalized" too, which stands in no layer
    ("normalized", -1, -1): r"could be loops\.3\.blocks\.1\.ln1\.hook_normalized or",
}


@pytest.mark.parametrize("key", MISSING, ids=str)
def test_missing_and_ambiguous_keys_raise(key: str | tuple, everything: LoopCache) -> None:
    assert key not in everything
    with pytest.raises(KeyError, match=MISSING[key]):
        everything[key]


@pytest.mark.parametrize("key", [None, 3, 2.5], ids=str)
def test_what_is_no_key_is_not_in_the_cache(key: object, everything: LoopCache) -> None:
    assert key not in everything


def test_negative_iterations_count_from_the_end_of_the_call_not_of_what_is_kept(
    plain: RecurrentDepth,
) -> None:
    _, cache = plain.run_with_cache(
        random_tokens(), n_loops=4, names_filter=["loops.0.hook_state_in", "loops.1.hook_state_in"]
    )
    assert cache["state_in", -3] is cache["loops.1.hook_state_in"]
    with pytest.raises(KeyError, match="is not in this cache of 2 activations"):
        cache["state_in", -1]


# What is kept


def test_only_the_residual_stream_is_kept_by_default(model: RecurrentDepth) -> None:
    _, cache = model.run_with_cache(random_tokens(), n_loops=LOOPS)
    stream = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
    assert list(cache) == [
        name
        for name in model.hook_names(LOOPS)
        if name.endswith(stream) and name != "hook_pos_embed"
    ]
    assert len(cache) == 1 + 3 * LOOPS * LAYERS


def test_everything_is_kept_when_asked_for(model: RecurrentDepth) -> None:
    logits, cache = model.run_with_cache(random_tokens(), n_loops=LOOPS, names_filter="**")
    assert list(cache) == model.hook_names(LOOPS)
    assert len(cache) == len(list(cache.items()))
    for name, value in cache.items():
        assert value.shape == expected_shape(name), name
        assert not value.requires_grad
    assert logits.shape == (BATCH, POS, model.cfg.d_vocab)
    assert hook_count(model) == 0


def test_number_of_iterations_may_be_positional(plain: RecurrentDepth) -> None:
    _, cache = plain.run_with_cache(random_tokens(), 2, names_filter="**.hook_state_in")
    assert list(cache) == ["loops.0.hook_state_in", "loops.1.hook_state_in"]
    assert cache.n_loops == 2


def test_activations_fit_together(model: RecurrentDepth) -> None:
    """Worked example: each value follows from the ones before it."""
    _, cache = model.run_with_cache(random_tokens(), n_loops=2, names_filter="**")
    embedded = cache["embed"] + (cache["pos_embed"] if model.positional else 0)
    block = model.blocks[1]
    at = {
        site: cache[site, 1, 1]
        for site in (
            "resid_pre",
            "attn_out",
            "resid_mid",
            "mlp_out",
            "resid_post",
            "pattern",
            "v",
            "z",
            "post",
        )
    }
    expected = {
        "state_in": (cache["state_in", 0], embedded),
        "chain": (cache["resid_pre", 1, 1], cache["resid_post", 1, 0]),
        "mid": (at["resid_mid"], at["resid_pre"] + at["attn_out"]),
        "post": (at["resid_post"], at["resid_mid"] + at["mlp_out"]),
        "pattern": (at["pattern"], cache["attn_scores", 1, 1].softmax(-1)),
        "z": (at["z"], torch.einsum("bhqk,bkhd->bqhd", at["pattern"], at["v"])),
        "attn_out": (
            at["attn_out"],
            torch.einsum("bqhd,hdm->bqm", at["z"], block.attn.W_O) + block.attn.b_O,
        ),
        "q": (
            cache["q", 1, 1],
            torch.einsum("bpm,hmd->bphd", cache["ln1.out", 1, 1], block.attn.W_Q) + block.attn.b_Q,
        ),
        "k": (
            cache["k", 1, 1],
            torch.einsum("bpm,hmd->bphd", cache["ln1.out", 1, 1], block.attn.W_K) + block.attn.b_K,
        ),
        "v": (
            at["v"],
            torch.einsum("bpm,hmd->bphd", cache["ln1.out", 1, 1], block.attn.W_V) + block.attn.b_V,
        ),
        "pre": (
            cache["pre", 1, 1],
            cache["ln2.out", 1, 1] @ block.mlp.W_in + block.mlp.b_in,
        ),
        "mlp_out": (at["mlp_out"], at["post"] @ block.mlp.W_out + block.mlp.b_out),
        "scale": (
            cache["ln1.scale", 1, 1].squeeze(-1),
            (at["resid_pre"].var(-1, unbiased=False) + model.cfg.eps).sqrt(),
        ),
        "state_out": (cache["state_out", 1], at["resid_post"]),
        "injection": (
            cache["resid_pre", 1, 0],
            cache["state_in", 1] + (embedded if model.cfg.input_injection else 0),
        ),
    }
    tolerance = 1e-9 if embedded.dtype == torch.float64 else 1e-4
    for name, (value, wanted) in expected.items():
        torch.testing.assert_close(
            value,
            wanted,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# Stacking


def test_stack_of_a_blocks_site(everything: LoopCache) -> None:
    stacked = everything.stack("resid_post")
    assert stacked.shape == (LOOPS, LAYERS, BATCH, POS, D_MODEL)
    for loop in range(LOOPS):
        for layer in range(LAYERS):
            assert torch.equal(stacked[loop, layer], everything["resid_post", loop, layer])


@pytest.mark.parametrize(
    ("site", "shape"),
    [
        ("q", (LOOPS, LAYERS, BATCH, POS, HEADS, D_HEAD)),
        ("attn.hook_z", (LOOPS, LAYERS, BATCH, POS, HEADS, D_HEAD)),
        ("pattern", (LOOPS, LAYERS, BATCH, HEADS, POS, POS)),
        ("ln1.scale", (LOOPS, LAYERS, BATCH, POS, 1)),
        ("state_in", (LOOPS, BATCH, POS, D_MODEL)),
        ("hook_state_out", (LOOPS, BATCH, POS, D_MODEL)),
    ],
)
def test_stack_shapes(site: str, shape: tuple[int, ...], everything: LoopCache) -> None:
    stacked = everything.stack(site)
    assert stacked.shape == shape
    name = ("loops.2" if len(shape) == 4 else "loops.2.blocks.1") + ".hook_state_in"
    if site == "state_in":
        assert torch.equal(stacked[2], everything[name])
    elif len(shape) > 4:
        assert torch.equal(stacked[2, 1], everything[site, 2, 1])


def test_stack_of_one_layer_keeps_the_layer_axis(plain: RecurrentDepth) -> None:
    _, cache = plain.run_with_cache(
        random_tokens(), n_loops=3, names_filter="loops.*.blocks.1.hook_mlp_out"
    )
    assert cache.stack("mlp_out").shape == (3, 1, BATCH, POS, D_MODEL)


def test_stack_with_a_missing_iteration_raises(plain: RecurrentDepth) -> None:
    names = [
        "loops.0.blocks.*.hook_mlp_out",
        "loops.1.blocks.1.hook_mlp_out",
        "loops.2.blocks.*.hook_mlp_out",
    ]
    _, cache = plain.run_with_cache(random_tokens(), n_loops=3, names_filter=names)
    with pytest.raises(
        KeyError,
        match=(
            r"'mlp_out' was not cached at \(1, 0\) \(iteration, layer\); stack needs every"
            r" iteration"
        ),
    ):
        cache.stack("mlp_out")


def test_stack_of_what_the_first_iteration_lacks_raises(everything: LoopCache) -> None:
    with pytest.raises(KeyError, match="'input' was not cached at"):
        everything.stack("input")


@pytest.mark.parametrize("site", ["nowhere", "embed", "ln_final.scale"])
def test_stack_of_a_site_outside_the_loop_raises(site: str, everything: LoopCache) -> None:
    with pytest.raises(KeyError, match="is not in this cache"):
        everything.stack(site)


@pytest.mark.parametrize("site", ["scale", "hook_scale", "normalized"])
def test_stack_of_an_ambiguous_site_raises(site: str, everything: LoopCache) -> None:
    """A block has two norms, so a bare "scale" names two sites."""
    with pytest.raises(KeyError, match=r"could be .*ln1.* or .*ln2"):
        everything.stack(site)


# Devices, batch dimension, files


def test_device_of_a_cache(plain: RecurrentDepth) -> None:
    _, cache = plain.run_with_cache(random_tokens(), n_loops=2, device="cpu")
    assert {value.device.type for value in cache.values()} == {"cpu"}
    moved = cache.to("meta")
    assert {value.device.type for value in moved.values()} == {"meta"}
    assert (list(moved), moved.n_loops) == (list(cache), 2)


def test_run_with_cache_can_put_activations_elsewhere(plain: RecurrentDepth) -> None:
    logits, cache = plain.run_with_cache(random_tokens(), n_loops=2, device="meta")
    assert {value.device.type for value in cache.values()} == {"meta"}
    assert logits.device.type == "cpu"


def test_remove_batch_dim(plain: RecurrentDepth) -> None:
    one = random_tokens()[:1]
    _, whole = plain.run_with_cache(one, n_loops=2, names_filter="**")
    logits, cache = plain.run_with_cache(one, n_loops=2, names_filter="**", remove_batch_dim=True)
    assert whole.has_batch_dim
    assert not cache.has_batch_dim
    assert logits.shape[0] == 1
    for name, value in whole.items():
        assert torch.equal(cache[name], value[0])
    assert cache.stack("resid_post").shape == (2, LAYERS, POS, D_MODEL)


def test_remove_batch_dim_of_more_than_one_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match="remove_batch_dim needs a batch of one, got 3"):
        plain.run_with_cache(random_tokens(), remove_batch_dim=True)
    with pytest.raises(
        ValueError, match="remove_batch_dim needs a batch of one, got 3"
    ):  # however the tokens are passed
        plain.run_with_cache(tokens=random_tokens(), remove_batch_dim=True)
    assert hook_count(plain) == 0


@pytest.mark.parametrize("remove_batch_dim", [False, True])
def test_save_and_load(remove_batch_dim: bool, plain: RecurrentDepth, tmp_path: Path) -> None:
    _, cache = plain.run_with_cache(
        random_tokens()[:1], n_loops=3, names_filter="**", remove_batch_dim=remove_batch_dim
    )
    path = tmp_path / "new folder" / "cache.safetensors"
    cache.save(path)
    loaded = LoopCache.load(path)
    assert set(loaded) == set(cache)
    assert all(torch.equal(loaded[name], value) for name, value in cache.items())
    assert (loaded.n_loops, loaded.has_batch_dim) == (3, not remove_batch_dim)
    assert torch.equal(loaded.stack("q"), cache.stack("q"))
    assert [file.name for file in path.parent.iterdir()] == ["cache.safetensors"]


def test_tensors_that_share_memory_are_saved_apart(plain: RecurrentDepth, tmp_path: Path) -> None:
    names = ["loops.0.hook_state_in", "loops.0.blocks.0.hook_resid_pre", "hook_embed"]
    _, cache = plain.run_with_cache(random_tokens(), n_loops=1, names_filter=names)
    assert cache["hook_embed"].data_ptr() == cache["loops.0.hook_state_in"].data_ptr()
    cache.save(tmp_path / "cache.safetensors")
    loaded = LoopCache.load(tmp_path / "cache.safetensors")
    assert all(torch.equal(loaded[name], cache[name]) for name in names)


def test_failed_save_leaves_the_old_file(
    everything: LoopCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.safetensors"
    everything.save(path)
    before = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("loopscope.models.core.cache.save_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        everything.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]


def test_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    save_file({"hook_embed": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors was not written by LoopCache\.save"):
        LoopCache.load(tmp_path / "other.safetensors")


def test_what_a_cache_says_of_itself(plain: RecurrentDepth) -> None:
    assert (
        repr(plain.run_with_cache(random_tokens(), n_loops=3)[1])
        == "LoopCache(19 activations of 3 iterations)"
    )


# Caches on disk


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cache_in_a_file_is_the_one_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    model, path = toy("learned").to(dtype), tmp_path / "run.safetensors"
    logits, cache = model.run_with_cache(random_tokens(), n_loops=3, names_filter="**", to=path)
    expected, memory = model.run_with_cache(random_tokens(), n_loops=3, names_filter="**", to="cpu")
    assert torch.equal(logits, expected)
    assert set(cache) == set(memory)
    for found in (cache, LoopCache.load(path)):
        assert all(torch.equal(found[name], memory[name]) for name in memory)
        assert (found.n_loops, found.has_batch_dim) == (3, True)
    assert cache.stack("q").shape == (3, LAYERS, BATCH, POS, HEADS, D_HEAD)


def test_a_value_is_waited_for_where_its_copy_was_only_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The functions stand for those of a GPU: a copy has its numbers after the wait."""
    begun: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin(value: torch.Tensor) -> torch.Tensor:
        begun.append((torch.full_like(value, torch.nan), value))
        return begun[-1][0]

    def wait(device: torch.device) -> None:
        assert device == torch.device("cpu")
        for copy, value in begun:
            copy.copy_(value)

    monkeypatch.setattr(cpu_copies, "begun_copy", begin)
    monkeypatch.setattr(cpu_copies, "wait_for_copies", wait)
    model = toy()
    _, cache = model.run_with_cache(random_tokens(), n_loops=2, to="cpu")
    _, expected = model.run_with_cache(random_tokens(), n_loops=2)
    assert len(begun) == len(cache) == len(expected)
    assert all(torch.equal(cache[name], expected[name]) for name in expected)


def test_a_run_that_fails_leaves_no_file(plain: RecurrentDepth, tmp_path: Path) -> None:
    def fail(value: torch.Tensor, hook: object) -> None:
        raise OSError("the disk is full")

    late = "loops.2.blocks.1.hook_resid_post"
    with plain.hooks([(late, fail)], n_loops=3), pytest.raises(OSError, match="the disk is full"):
        plain.run_with_cache(random_tokens(), n_loops=3, to=tmp_path / "run.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="leave device=cpu out"):
        plain.run_with_cache(random_tokens(), n_loops=3, to="cpu", device="cpu")
