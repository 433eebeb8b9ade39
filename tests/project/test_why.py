"""docs/why.md: what names without an iteration do, measured again."""

from __future__ import annotations

import pytest

from benchmarks.why import CYCLES, PAGE, SAME, Facts, Pair, measure, page, pair, self_patched


@pytest.fixture(scope="module")
def facts() -> Facts:
    return measure()


@pytest.fixture(scope="module")
def both() -> Pair:
    return pair(*CYCLES)


@pytest.mark.slow
def test_every_visit_has_a_name_here_and_shares_one_there(facts: Facts) -> None:
    high, low = CYCLES
    assert facts.visits == facts.our_names == 2 * high * (low + 1)
    assert facts.bridge_names == 2 + 2
    assert facts.calls == {
        "L_blocks.0.hook_resid_pre": high * low,
        "H_blocks.0.hook_resid_pre": high,
    }


def test_the_bridge_caches_the_last_visit(facts: Facts) -> None:
    *earlier, last = facts.distance.items()
    assert last[0] == "loops.1.low.2.blocks.0"
    assert last[1] < SAME
    assert len(earlier) == 5
    assert min(far for _, far in earlier) > 0.1


def test_a_self_patch_moves_the_bridge_and_nothing_here(facts: Facts) -> None:
    assert len(facts.moved) == 12
    for one in facts.moved:
        assert one.bridge > 0.1, one.name
        assert one.once == 0.0, one.name
        assert one.ours == 0.0, one.name


def test_the_probe_sees_a_value_of_another_visit_here_too(both: Pair) -> None:
    """Written at every visit at once, our own last value moves the logits as far as the
    bridge's.
    """
    site = "attn.hook_v"
    there = self_patched(both.bridge.run_with_hooks, both.tokens, f"L_blocks.0.{site}")
    here = self_patched(both.ours.run_with_hooks, both.tokens, f"loops.*.low.*.blocks.0.{site}")
    assert here == pytest.approx(there, rel=1e-3)


def test_the_page_is_what_the_command_writes(facts: Facts) -> None:
    def without_versions(text: str) -> list[str]:
        lines = text.splitlines()
        assert lines[2].startswith("Written by `python -m benchmarks.why` with torch ")
        return lines[:2] + lines[3:]

    assert without_versions(PAGE.read_text(encoding="utf-8")) == without_versions(page(facts))
