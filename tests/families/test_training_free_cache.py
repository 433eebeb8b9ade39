"""What training-free looping leaves for later tokens, against runs over whole sequences without any
cache.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loopscope.interp.edit.schedule import schedule_edit
from loopscope.models.core.attention import Rows
from loopscope.models.core.registry import build
from loopscope.models.families.training_free.cache import decode_bypass, decode_looped, prefill
from loopscope.models.families.training_free.gpt2 import TrainingFreeGPT2Config
from loopscope.models.families.training_free.model import (
    TrainingFreeConfig,
    WindowLoops,
    advance_stashing,
    for_passes,
    stash,
)
from toy import assert_close, hook_count, is_close, randomize_

FIRST, LAST, LAYERS, LOOPS = 1, 3, 5, 3
LENGTHS = (6, 2, 5)
SIZES: dict[str, Any] = {
    "n_layers": LAYERS,
    "d_mlp": 17,
    "d_vocab": 19,
    "d_model": 15,
    "window": (FIRST, LAST),
    "n_ctx": 11,
}
Kinds = pytest.mark.parametrize(
    ("gpt2", "rule", "mode"),
    [
        (False, "euler", "block"),
        (True, "blend", "block"),
        (False, "blend", "layer"),
        (True, "naive", "layer"),
    ],
)
Sources = pytest.mark.parametrize("source", ["first", "last"])


def windowed(gpt2: bool = False, rule: str = "blend", mode: str = "block") -> WindowLoops:
    options: dict[str, Any] = {
        **SIZES,
        "rule": rule,
        "mode": mode,
        "beta": 0.3 if rule == "blend" else None,
    }
    grouped = {"n_heads": 6, "head_dim": 4, "n_key_value_heads": 2, "qk_norm": True}
    cfg = (
        TrainingFreeGPT2Config(**options, n_heads=5)
        if gpt2
        else TrainingFreeConfig(**options, **grouped)
    )
    model = randomize_(build(cfg)).double().requires_grad_(False)
    assert isinstance(model, WindowLoops)
    return model


def random_tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, SIZES["d_vocab"], (len(LENGTHS), length), generator=torch.Generator().manual_seed(seed)
    )


class WholeSequences:
    """One sequence that grows, computed without a cache: of each layer, the streams that earlier
    tokens' keys are made from are kept.
    """

    def __init__(self, model: WindowLoops, source: str) -> None:
        self.model, self.source = model, source
        self.tokens = torch.empty(1, 0, dtype=torch.int64)
        self.seen = [
            torch.empty(1, 0, SIZES["d_model"], dtype=torch.float64) for _ in range(LAYERS)
        ]

    def block(self, layer: int, past: Tensor, x: Tensor) -> Tensor:
        """What a layer makes of some rows after the streams of the rows before them."""
        whole = torch.cat([past, x], 1)
        state = self.model.begin(torch.zeros(whole.shape[:2], dtype=torch.int64), n_loops=1)
        return self.model.blocks[layer](whole, Rows.make(state, type(self.model).visible), {})[
            :, past.shape[1] :
        ]

    def add(self, tokens: Tensor, n_loops: int, stashed: bool = True) -> Tensor:
        """Logits of some tokens after the others, with the passes that a step makes; `stashed` is
        false for a step without looping.
        """
        self.tokens = torch.cat([self.tokens, tokens], 1)
        x = self.model.begin(self.tokens, n_loops=1).resid[:, -tokens.shape[1] :]
        window = range(FIRST, LAST + 1)
        units = (
            [[layer] for layer in window]
            if self.model.cfg.mode == "layer" and stashed
            else [list(window)]
        )
        for unit in (
            [[layer] for layer in range(FIRST)]
            + units
            + [[layer] for layer in range(LAST + 1, LAYERS)]
        ):
            x = (
                self.looped(unit, x, n_loops)
                if stashed and unit[0] in window
                else self.kept(unit, x)
            )
        return self.model.unembed(self.model.normalize(x))

    def kept(self, unit: list[int], x: Tensor) -> Tensor:
        """Run layers once, and keep what their keys are made from."""
        for layer in unit:
            past, self.seen[layer] = self.seen[layer], torch.cat([self.seen[layer], x], 1)
            x = self.block(layer, past, x)
        return x

    def looped(self, unit: list[int], start: Tensor, n_loops: int) -> Tensor:
        cfg, x, results = self.model.cfg, start, []
        for _ in range(n_loops):
            g = x
            for layer in unit:
                g = self.block(layer, self.seen[layer], g)
            results.append(g)
            x = g if cfg.rule == "naive" else x + (g - x) / n_loops
        if cfg.rule == "blend":
            x = 0.3 * results[0] + 0.7 * x
        self.kept(unit, start if self.source == "first" else x)
        return x


@Sources
@Kinds
def test_looped_steps_equal_whole_sequences(gpt2: bool, rule: str, mode: str, source: str) -> None:
    model, tokens = windowed(gpt2, rule, mode), random_tokens(9)[:1]
    by_hand = WholeSequences(model, source)
    state, cache = prefill(model, tokens[:, :5], n_loops=LOOPS, source=source)
    assert_close(model.readout(state), by_hand.add(tokens[:, :5], LOOPS))
    for step, n_loops in ((slice(5, 6), LOOPS), (slice(6, 8), 2)):
        state, cache = decode_looped(model, tokens[:, step], cache, n_loops=n_loops, source=source)
        assert_close(model.readout(state), by_hand.add(tokens[:, step], n_loops))
    state, cache = decode_bypass(model, tokens[:, 8:], cache)
    assert_close(model.readout(state), by_hand.add(tokens[:, 8:], 1, stashed=False))
    assert all(entry.k.shape[1] == 9 for entry in cache.values())


@Kinds
def test_rows_of_unequal_length_decode_as_they_do_alone(gpt2: bool, rule: str, mode: str) -> None:
    model, tokens, new = (
        windowed(gpt2, rule, mode),
        random_tokens(max(LENGTHS)),
        random_tokens(2, seed=1),
    )
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    _, cache = prefill(model, tokens, mask, n_loops=LOOPS)
    looped, cache = decode_looped(model, new[:, :1], cache, n_loops=LOOPS)
    plain, _ = decode_bypass(model, new[:, 1:], cache)
    for row, length in enumerate(LENGTHS):
        _, alone = prefill(model, tokens[row : row + 1, :length], n_loops=LOOPS)
        state, alone = decode_looped(model, new[row : row + 1, :1], alone, n_loops=LOOPS)
        assert_close(model.readout(looped)[row], model.readout(state)[0])
        assert_close(
            model.readout(plain)[row],
            model.readout(decode_bypass(model, new[row : row + 1, 1:], alone)[0])[0],
        )


@Kinds
def test_one_pass_with_the_entries_from_before_it_is_the_ordinary_model(
    gpt2: bool, rule: str, mode: str
) -> None:
    model, tokens = windowed(gpt2, rule, mode), random_tokens(8)
    expected = model(tokens, n_loops=1)
    state, cache = prefill(model, tokens[:, :6], n_loops=1, source="first")
    assert_close(model.readout(state), expected[:, :6])
    state, cache = decode_looped(model, tokens[:, 6:7], cache, n_loops=1, source="first")
    assert_close(model.readout(state), expected[:, 6:7])
    assert_close(model.readout(decode_bypass(model, tokens[:, 7:], cache)[0]), expected[:, 7:])


def test_first_and_last_differ_only_inside_the_window_and_only_for_later_tokens() -> None:
    model, tokens = windowed(), random_tokens(6)
    runs = {
        source: prefill(model, tokens, n_loops=LOOPS, source=source) for source in ("first", "last")
    }
    assert torch.equal(runs["first"][0].resid, runs["last"][0].resid)
    assert_close(model.readout(runs["last"][0]), model(tokens, n_loops=LOOPS))
    caches = {source: cache for source, (_, cache) in runs.items()}
    assert (
        list(caches["first"]) == list(caches["last"]) == [visit.name for visit in model.schedule(1)]
    )
    for visit, entry in caches["first"].items():
        assert is_close(entry.k, caches["last"][visit].k) != visit.startswith("loops"), visit


@pytest.mark.shapes
def test_a_step_leaves_the_callers_cache_as_it_was() -> None:
    model, tokens = windowed(), random_tokens(6)
    _, cache = prefill(model, tokens, n_loops=2)
    before = {visit: entry.k.clone() for visit, entry in cache.items()}
    _, longer = decode_looped(model, tokens[:, :1], cache, n_loops=2)
    decode_bypass(model, tokens[:, :1], cache)
    assert all(torch.equal(cache[visit].k, k) for visit, k in before.items())
    assert all(entry.k.shape[1] == 7 for entry in longer.values())


# The stash pass and its hook points


@pytest.mark.parametrize("mode", ["block", "layer"])
def test_a_hook_in_the_stash_pass_changes_what_later_tokens_read_and_not_the_prompt(
    mode: str,
) -> None:
    model, tokens = windowed(mode=mode), random_tokens(6)
    state, cache = prefill(model, tokens, n_loops=2)
    logits = model.readout(decode_bypass(model, tokens[:, :1], cache)[0])
    with model.hooks([("stash.blocks.2.attn.hook_v", lambda v, hook: v * 0)], n_loops=2):
        hooked, changed = prefill(model, tokens, n_loops=2)
    assert torch.equal(hooked.resid, state.resid)
    assert not changed["loops.0.blocks.2"].v.any()
    assert is_close(changed["loops.0.blocks.3"].k, cache["loops.0.blocks.3"].k) == (mode == "layer")
    assert not is_close(model.readout(decode_bypass(model, tokens[:, :1], changed)[0]), logits)


def test_the_stash_pass_has_every_site_of_its_layers_and_a_plain_call_has_none_of_them() -> None:
    model, tokens, seen = windowed(), random_tokens(4), []
    assert not any(name.startswith("stash") for name in model.hook_names(2))
    with model.hooks([("stash.**", lambda value, hook: seen.append(hook.name))], n_loops=2):
        prefill(model, tokens, n_loops=2)
    sites = [
        name.removeprefix("loops.0.")
        for name in model.hook_names(1)
        if name.startswith("loops.0.blocks")
    ]
    assert [name.removeprefix("stash.") for name in seen] == sites
    assert model.hook_dict["stash.blocks.2.attn.hook_k"].layer() == 2
    assert model.hook_dict["stash.blocks.2.attn.hook_k"].loop() is None


def test_a_list_may_name_points_of_both() -> None:
    model, seen = windowed(), []
    names = ["coda.4.hook_resid_post", "stash.blocks.1.hook_resid_pre", "loops.1.hook_state_out"]
    with model.hooks([(names, lambda value, hook: seen.append(hook.name))], n_loops=2):
        prefill(model, random_tokens(4), n_loops=2)
    assert seen == [
        "loops.1.hook_state_out",
        "stash.blocks.1.hook_resid_pre",
        "coda.4.hook_resid_post",
    ]


def test_hooks_that_would_never_fire_are_refused() -> None:
    model, tokens = windowed(), random_tokens(4)
    with pytest.raises(
        ValueError,
        match=(
            r"a hook is attached at 'stash\.blocks\.2\.attn\.hook_k', but a plain call makes no"
            r" stash pass"
        ),
    ):
        model.run_with_hooks(
            tokens, n_loops=2, fwd_hooks=[("stash.blocks.2.attn.hook_k", lambda value, hook: None)]
        )
    assert hook_count(model) == 0
    with pytest.raises(KeyError, match=r"'stash\.blocks\.0\.attn\.hook_k' matches no hook point"):
        model.add_hook("stash.blocks.0.attn.hook_k", lambda value, hook: None)


def test_a_stash_pass_alone_reads_the_state_it_is_given() -> None:
    model, tokens = windowed(), random_tokens(6)
    state = model.advance(model.begin(tokens, n_loops=LOOPS), "loops.0.blocks.1")
    entries, store = stash(model, state, range(1, 4)), {}
    model.advance(state, "loops.1.blocks.1", store=store)
    assert list(entries) == list(store)
    for visit, entry in entries.items():
        assert_close(entry.k, store[visit].k)
        assert_close(entry.v, store[visit].v)


def test_every_pass_is_given_the_one_entry_of_its_layer() -> None:
    model = windowed()
    _, cache = prefill(model, random_tokens(4), n_loops=2)
    spread = for_passes(model, cache, 3)
    assert list(spread) == [visit.name for visit in model.schedule(3)]
    assert spread["loops.2.blocks.1"] is spread["loops.0.blocks.1"] is cache["loops.0.blocks.1"]
    assert spread["coda.4"] is cache["coda.4"]


# What is refused


def test_a_source_that_does_not_exist_is_refused() -> None:
    model = windowed()
    with pytest.raises(
        ValueError,
        match=r"the state before the passes \('first'\) or after them \('last'\), got 'none'",
    ):
        prefill(model, random_tokens(4), n_loops=2, source="none")


def test_a_state_inside_the_window_is_refused() -> None:
    model = windowed()
    state = model.advance(model.begin(random_tokens(4), n_loops=2), "loops.1.blocks.1")
    with pytest.raises(
        ValueError,
        match=r"the state must stand at or before the window \(visit 1\), got one before visit 4",
    ):
        advance_stashing(model, state, {})


def test_tokens_beyond_the_longest_input_are_refused() -> None:
    model = windowed(gpt2=True)
    _, cache = prefill(model, random_tokens(11), n_loops=1)
    with pytest.raises(ValueError, match="at most n_ctx=11 positions in this model, got 12"):
        decode_bypass(model, random_tokens(1), cache)


def test_a_cache_of_an_edited_schedule_is_refused() -> None:
    model = windowed()
    _, cache = prefill(model, random_tokens(4), n_loops=2)
    with schedule_edit(model, ["loops.0", "loops.1"], 2):
        for call in (
            lambda: prefill(model, random_tokens(4), n_loops=2),
            lambda: decode_bypass(model, random_tokens(1), cache),
        ):
            with pytest.raises(ValueError, match="there is none inside schedule_edit"):
                call()
