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

A looped model runs the same blocks several times, so a hook point that belongs to a block fires
several times under one name. A tool that finds activations by name can then keep or change only one
of these values, or all of them at once. This page measures what follows from that. (One run of one
block is called a [visit](glossary.md#visit).)

The model is one random HRM-Text with two stacks (low and high) of two blocks each. One forward pass
makes {high} high cycles, and each of them runs the low stack {low} times and the high stack once.
The same weights are run twice: through TransformerLens's own wrapper (`TransformerBridge`, "the
bridge" below, whose adapter for this family names this limit) and through this library ("here").
Both compute the same logits.

## One name, several values

{names}

`run_with_cache` on the bridge keeps the value of the last visit only. The table compares what the
bridge cached as `L_blocks.0.hook_resid_pre` with the activation of each visit of that block here,
by the largest absolute difference. Only the last visit agrees:

{distance}

## Writing a value back where it came from

A patch must change nothing if it writes a run's own value back where it came from. So: cache a run,
then run again and write the cached value back at the same site, at position {position} of 0 to 7
(and for head {head} of 0 to 2 where the site has heads). On the bridge the point fires several
times, and the value of the last visit is written at all of them.

The table shows the largest change of a logit, in standard deviations of the logits. *The bridge,
visited once* is a control: a model of the same sizes whose blocks run only once. *Here* is the
largest change over all visits of the block. 0 means exactly 0.

{moved}

So a patch by such a name changes every visit at once, with a value that belongs to the last one.

## Other tools

Other ways to tell the visits apart exist. A hook on the bridge can count its own calls, and nnsight
0.8 can address the n-th call of a module. TorchLens 2.36 has a name for every pass of a module
(`blocks.0:2`, counted from 1) and refuses the bare name of a module with several calls. One
self-patch was tried on TorchLens, of one site at one pass, and it changed nothing. So this library
is not alone in naming visits.

It adds methods that use the name `loops.{{h}}.low.{{l}}.blocks.{{i}}`:

* Caches and results have the iteration as an axis, and tables have it as a column.
* Lenses, exit rules, dynamics, probes, path patching and gradients cover all iterations in one
  call.
* A patching sweep runs many patches side by side, and computes each one only from the patched visit
  on.
* Each family declares what its iterations do: what is injected, whether a norm closes an iteration,
  nested cycles, an exit gate. A method that cannot be right for a family refuses it and says why.

[Coming from another tool](migration/index.md) shows the same lines in other tools and here.
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
