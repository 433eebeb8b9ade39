"""Patching sweeps against TransformerLens's on the unrolled view of the same model, and against
nnsight's per-call patching.

One pair of questions; the numbers of both sides are compared before a time is believed. Where the
other side would take many minutes it is given some of the patches, spread over the sweep, and its
time is scaled; the line says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from nnsight import NNsight
from torch import Tensor, nn
from transformer_lens import patching as tl_patching

from benchmarks.flops import causal_cone, executed
from benchmarks.timing import interleaved, paper_size
from loopscope.checkpoints.load import load
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.views import unrolled

MINI, LOOPS, MINI_HOPS, PAPER_HOPS = "mini/multi_hop/r_dyn", 8, 10, 12
_TOOLS = {
    "resid_pre": tl_patching.get_act_patch_resid_pre,
    "z": tl_patching.get_act_patch_attn_head_out_by_pos,
}
_METRIC = logit_diff(torch.tensor([3]), torch.tensor([5]))


@dataclass(frozen=True)
class Setting:
    """A model and a pair of questions; our sweep is timed a few rounds, and the fastest counts."""

    label: str
    model: LoopedModel
    clean: Batch
    corrupted: Batch
    rounds: int

    @classmethod
    def of(cls, label: str, model: LoopedModel, hops: int, rounds: int) -> Setting:
        """Two random inputs as long as questions of a hop count, read at the last token."""
        tokens = torch.randint(
            1, model.cfg.d_vocab, (2, hops + 1), generator=torch.Generator().manual_seed(0)
        )
        clean, corrupted = (
            Batch(row[None], torch.ones_like(row[None]), torch.tensor([hops])) for row in tokens
        )
        return cls(
            f"{label}, {LOOPS} iterations, {hops} hops", model.eval(), clean, corrupted, rounds
        )

    def sweep(self, site: str, **places: list[int]) -> Sweep:
        """Ours; at the sites of heads, head by head."""
        heads = places.pop("heads", "all" if site == "z" else None)
        return activation_patch(
            self.model,
            self.clean,
            self.corrupted,
            _METRIC,
            LOOPS,
            sites=site,
            heads=heads,
            **places,
        )  # type: ignore[arg-type]


@torch.no_grad()
def run() -> str:
    """A line for each comparison."""
    mini = Setting.of("d=64, L=2", load(MINI), MINI_HOPS, rounds=5)
    paper = Setting.of("d=768, L=4", paper_size(), PAPER_HOPS, rounds=1)
    some = {"positions": [0, 4, 8, 12], "heads": [0, 6]}
    lines = [
        _forward(mini),
        *(_against_tl(mini, site) for site in _TOOLS),
        _against_nnsight(mini),
        *(_flops(mini, site) for site in _TOOLS),
    ]
    lines += [
        _forward(paper),
        _against_tl(paper, "resid_pre", every=8),
        _against_tl(paper, "z", every=8, **some),
        _flops(paper, "resid_pre"),
    ]
    return "\n".join(lines)


def _forward(setting: Setting) -> str:
    plain, tokens = unrolled(setting.model, LOOPS), setting.clean.tokens
    both: dict[str, Callable[[], object]] = {
        "unrolled": lambda: plain(tokens),
        "looped": lambda: setting.model(tokens, n_loops=LOOPS),
    }
    seconds = interleaved(both, 15)
    ratio = seconds["unrolled"] / seconds["looped"]
    if ratio > 1.1:
        raise RuntimeError(
            f"the unrolled forward costs {ratio:.2f} times the looped one, so it is no fair"
            " baseline"
        )
    return (
        f"{setting.label}: one forward of the unrolled view costs {ratio:.2f} times the looped"
        " one's"
    )


def _against_tl(setting: Setting, site: str, every: int = 1, **places: list[int]) -> str:
    """Our sweep, and TransformerLens's on every n-th of its patches."""
    plain = unrolled(setting.model, LOOPS)
    _, cache = plain.run_with_cache(setting.clean.tokens)
    sweep = setting.sweep(site, **places)
    n_layers = setting.model.cfg.n_layers
    index = pd.DataFrame(
        [(cell.loop * n_layers + cell.layer, cell.position, cell.head) for cell in sweep.cells][
            ::every
        ]
    )  # type: ignore[operator]
    index.columns = ["layer", "pos", "head_index"]
    tool = _TOOLS[site]

    def theirs() -> Tensor:
        measure = lambda logits: _METRIC(logits[:, -1]).mean()  # noqa: E731
        if every == 1:
            return tool(plain, setting.corrupted.tokens, cache, measure).flatten()
        axes = index if site == "z" else index[["layer", "pos"]]
        return tool(
            plain, setting.corrupted.tokens, cache, measure, index_axis_names=None, index_df=axes
        ).flatten()

    found, seconds = _timed(theirs)
    order = index.sort_values(["layer", "pos", "head_index"]).index if every == 1 else index.index
    _check(sweep.values[::every, 0][torch.tensor(order.to_numpy())], found)
    ours = min(_timed(lambda: setting.sweep(site, **places))[1] for _ in range(setting.rounds))
    total = seconds * len(sweep.cells) / len(index)
    scaled = "" if every == 1 else f" (scaled from {len(index)} of them)"
    part = (
        f" (positions {places['positions']}, heads {places['heads']} only)"
        if "heads" in places
        else ""
    )
    return (
        f"{setting.label}: {len(sweep.cells)} patches of {site}{part}: {ours:.2f} s,"
        f" TransformerLens {total:.1f} s{scaled}: {total / ours:.1f} times faster"
    )


class _Plain(nn.Module):
    """A looped model as nnsight takes it: tokens in, logits out."""

    def __init__(self, model: LoopedModel) -> None:
        super().__init__()
        self.model = model
        self.blocks = model.blocks

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, n_loops=LOOPS)
        return logits


def _against_nnsight(setting: Setting) -> str:
    """Every resid_post, patched call by call with tracer.iter."""
    sweep = setting.sweep("resid_post")
    traced = NNsight(_Plain(setting.model))
    _, cache = setting.model.run_with_cache(
        setting.clean.tokens, n_loops=LOOPS, names_filter="loops.*.blocks.*.hook_resid_post"
    )

    def theirs() -> Tensor:
        found = []
        for cell in sweep.cells:
            with traced.trace(setting.corrupted.tokens) as tracer:
                for _ in tracer.iter[cell.loop]:
                    traced.blocks[cell.layer].output[:, cell.position] = cache[cell.name][
                        :, cell.position
                    ]
                logits = traced.output.save()
            found.append(_METRIC(logits[:, -1]).mean())
        return torch.stack(found)

    found, seconds = _timed(theirs)
    _check(sweep.values[:, 0], found)
    ours = min(_timed(lambda: setting.sweep("resid_post"))[1] for _ in range(setting.rounds))
    what = f"{setting.label}: {len(sweep.cells)} patches of resid_post"
    return f"{what}: {ours:.2f} s, nnsight {seconds:.1f} s: {seconds / ours:.1f} times faster"


def _flops(setting: Setting, site: str) -> str:
    cells = setting.sweep(site).cells
    needed = causal_cone(setting.model, cells, LOOPS, int(setting.clean.readout[0]))
    done = executed(lambda: setting.sweep(site))
    return (
        f"{setting.label}: sweep of {site}: {done / 1e9:.2f} GFLOP executed, {done / needed:.2f}"
        f" times the causal cone's {needed / 1e9:.2f}"
    )


def _timed(job: Callable[[], object]) -> tuple[object, float]:
    started = time.perf_counter()
    result = job()
    return result, time.perf_counter() - started


def _check(ours: Tensor, theirs: Tensor) -> None:
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    if apart > 1e-4:
        raise RuntimeError(f"the two sweeps disagree by {apart:.1e} of the largest value")
