"""What names without an iteration do to a looped model: TransformerLens's bridge and ours.

`python -m benchmarks.why` measures it in some seconds and writes docs/why.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hrm_text import random_pair
from loopscope.models.core.base import LoopedModel

PAGE = Path(__file__).parent.parent / "docs" / "why.md"
CYCLES = (2, 3)
STACKS = {"L_blocks": "low", "H_blocks": "high"}
SITES = (
    "hook_resid_pre",
    "attn.hook_v",
    "attn.hook_z",
    "hook_attn_out",
    "hook_mlp_out",
    "hook_resid_post",
)
POSITION, HEAD = 2, 1
SAME = 1e-4
Run = Callable[..., Tensor]


_TEXT = """# Why the iteration needs a name

Written by `python -m benchmarks.why` with {versions}.

A looped model runs the same blocks several times. A hook point that belongs to a block then fires
several times under one name, and a tool that finds activations by name is left with one of the
values. Here is what that does, on one random HRM-Text with two blocks in each of its two stacks,
{high} high cycles and {low} runs of the low stack in each: once through TransformerLens's own
bridge (`TransformerBridge`, whose adapter for this family states the limit), once through this
library. Both hold the same weights and compute the same logits.

## One name, several values

{names}

`run_with_cache` on the bridge keeps the value of the last visit. The largest difference between
what it cached as `L_blocks.0.hook_resid_pre` and our activation of each visit of that block:

{distance}

## Writing a value back where it came from

Cache a run, then run again with the cached value written back at the same site, at position
{position} of 0 to 7 (and head {head} of 0 to 2 where the site has heads). This must change nothing.
Where the point fires several times, the last visit's value is written at all of them. How far the
logits move, in their standard deviations; as a control, the bridge of a model of the same sizes
whose blocks are visited once; and the largest change over all visits here (0 is exactly 0):

{moved}

Patching by such a name is patching every visit at once, with a value that belongs to the last one.

## Other tools

A hook on the bridge can count its own calls, and nnsight 0.8 can address the n-th call of a module.
TorchLens 2.36 has a name for every pass of a module (`blocks.0:2`, counted from 1). It refuses the
bare name of a module with several calls, and the one self-patch that was tried on it, of one site
at one pass, changed nothing. So a name for the visit is not ours alone.

What is left here is what follows from the name `loops.{{h}}.low.{{l}}.blocks.{{i}}`:

* The iteration is an axis of caches and records, and a column of every table.
* Lenses, exits, dynamics, probes, path patching and gradients ask by iteration, in one call each.
* A sweep runs many patches side by side, and each of them only from the patched visit on.
* What is injected, what closes an iteration, nested cycles and exit gates belong to the model: a
  family declares its facts, and a method that they rule out says so.

[Coming from another tool](migration/index.md) puts the same lines side by side.
"""


@dataclass(frozen=True)
class Pair:
    """One random HRM-Text with two blocks in each stack, as TransformerLens's bridge and as ours.

    Attributes:
        bridge: A TransformerBridge; it has no types.
        ours: A model of the same weights.
        tokens: Int[Tensor, "batch pos"], an input.
    """

    bridge: Any
    ours: LoopedModel
    tokens: Tensor


@dataclass(frozen=True)
class Moved:
    """How far writing a run's own value back at one position moves the logits, in their standard
    deviations.

    Attributes:
        name: The bridge's name of the site.
        bridge: Its run with the cached value written back.
        once: The same on a bridge whose blocks are visited once.
        ours: The largest of our runs, one for each visit of the block.
    """

    name: str
    bridge: float
    once: float
    ours: float


@dataclass(frozen=True)
class Facts:
    """What was measured.

    Attributes:
        visits: Visits of a block in one forward pass.
        bridge_names, our_names: Names of `hook_resid_pre` in each cache.
        calls: How often each of the bridge's points fires in one forward pass.
        distance: For each of our visits of the low stack's first block, how far its
            `hook_resid_pre` is from the bridge's cached one.
        moved: For each site.
    """

    visits: int
    bridge_names: int
    our_names: int
    calls: dict[str, int]
    distance: dict[str, float]
    moved: list[Moved]


def pair(high: int, low: int) -> Pair:
    """Both models with `high` cycles of `low` runs of the low stack and one of the high stack."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    theirs, ours = random_pair(
        high, low, vocab_size=41, hidden_size=24, intermediate_size=36, num_hidden_layers=2,
        num_attention_heads=3, head_dim=8,
    )  # fmt: skip
    bridge = build_bridge_from_module(theirs, "HrmTextForCausalLM", hf_config=theirs.config)
    tokens = torch.randint(0, 41, (3, 8), generator=torch.Generator().manual_seed(1))
    if not torch.allclose(bridge(tokens), ours(tokens), atol=SAME):
        raise RuntimeError("the bridge and our model compute different logits")
    return Pair(bridge, ours, tokens)


@torch.no_grad()
def measure() -> Facts:
    """Everything that the page tells."""
    both, single = pair(*CYCLES), pair(1, 1)
    _, theirs = both.bridge.run_with_cache(both.tokens)
    _, ours = both.ours.run_with_cache(both.tokens)
    visits = [visit.name for visit in both.ours.schedule()]
    lows = [name for name in visits if ".low." in name and name.endswith(".0")]
    return Facts(
        visits=len(visits),
        bridge_names=len([name for name in theirs if name.endswith("hook_resid_pre")]),
        our_names=len([name for name in ours if name.endswith("hook_resid_pre")]),
        calls=calls(both, [f"{stack}.0.hook_resid_pre" for stack in STACKS]),
        distance={
            name: _far(ours[f"{name}.hook_resid_pre"], theirs["L_blocks.0.hook_resid_pre"])
            for name in lows
        },
        moved=[moved(both, single, stack, site) for stack in STACKS for site in SITES],
    )


def calls(both: Pair, names: list[str]) -> dict[str, int]:
    """How often the bridge's points fire in one forward pass."""
    counted = dict.fromkeys(names, 0)

    def count(value: Tensor, hook: Any, name: str) -> None:
        counted[name] += 1

    both.bridge.run_with_hooks(
        both.tokens,
        fwd_hooks=[
            (name, lambda value, hook, name=name: count(value, hook, name)) for name in names
        ],
    )
    return counted


def moved(both: Pair, single: Pair, stack: str, site: str) -> Moved:
    """One site of the first block of a stack."""
    name = f"{stack}.0.{site}"
    own = [
        visit.name
        for visit in both.ours.schedule()
        if f".{STACKS[stack]}." in f"{visit.name}." and visit.layer == 0
    ]
    return Moved(
        name=name,
        bridge=self_patched(both.bridge.run_with_hooks, both.tokens, name),
        once=self_patched(single.bridge.run_with_hooks, single.tokens, name),
        ours=max(
            self_patched(both.ours.run_with_hooks, both.tokens, f"{place}.{site}") for place in own
        ),
    )


@torch.no_grad()
def self_patched(run: Run, tokens: Tensor, name: str) -> float:
    """How far the logits move when the value that a point had last is written back at one position
    (and head), in their deviations.
    """
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        seen[name] = value.clone()

    def write(value: Tensor, hook: Any) -> Tensor:
        index: tuple[slice | int, ...] = (
            (slice(None), POSITION, HEAD) if value.ndim == 4 else (slice(None), POSITION)
        )
        patched = value.clone()
        patched[index] = seen[name][index]
        return patched

    plain = run(tokens, fwd_hooks=[(name, keep)])
    return _far(run(tokens, fwd_hooks=[(name, write)]), plain) / float(plain.std())


def _far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def page(facts: Facts) -> str:
    """The page; its third line names the versions."""
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens")
    )
    names = [
        ("visits of a block in one forward pass", facts.visits, facts.visits),
        ("names of `hook_resid_pre`", facts.bridge_names, facts.our_names),
        *(
            (f"times that `{name}` fires", count, "once per name")
            for name, count in facts.calls.items()
        ),
    ]
    distance = [(f"`{name}`", _shown(far)) for name, far in facts.distance.items()]
    moved = [
        (f"`{one.name}`", _shown(one.bridge), _shown(one.once), _shown(one.ours))
        for one in facts.moved
    ]
    return _TEXT.format(
        versions=versions,
        high=CYCLES[0],
        low=CYCLES[1],
        names=_table(("", "the bridge", "here"), names),
        distance=_table(("visit", "difference"), distance),
        position=POSITION,
        head=HEAD,
        moved=_table(("site", "the bridge", "the bridge, visited once", "here"), moved),
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _shown(size: float) -> str:
    """Two decimals, but 0 only for exactly 0."""
    return "0" if size == 0.0 else "less than 0.0001" if size < SAME else f"{size:.2f}"


def main() -> None:
    """Measure and write the page."""
    torch.set_num_threads(1)
    PAGE.write_text(page(measure()), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
