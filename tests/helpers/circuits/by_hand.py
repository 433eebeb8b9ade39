"""Runs of circuits by hand: what readers read, and masked runs with one run for each reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from family_toys import TOYS
from family_toys import full as full_of
from loopscope.interp.circuits.building import graph_of
from loopscope.interp.circuits.gradients import Written
from loopscope.interp.circuits.graph import Graph
from loopscope.interp.circuits.masked import MAX_BYTES, MaskedRuns
from loopscope.interp.circuits.names import end_of
from loopscope.interp.common.inputs import begin_batch
from loopscope.interp.common.metrics import logit_diff
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from toy import assert_close, full, toy

SHORT = 2
difference = logit_diff(1, 2)
Values = dict[str, Tensor]


def logits_of(model: LoopedModel, batch: Batch) -> Tensor:
    return model.readout(model.advance(begin_batch(model, batch, SHORT)), batch.readout)


def recorded(model: LoopedModel, batch: Batch, graph: Graph) -> Values:
    """Everything by hand that the tests need of one run."""
    values: Values = {}
    sites = ("embed", "resid_pre", "resid_mid", "attn_out", "mlp_out", "q", "k", "v", "z")
    names = [n for n in model.hook_names(SHORT) if n.rpartition("hook_")[2] in sites]
    names.append(model.schedule(SHORT)[-1].hook_names()[-1])

    def keep(value: Tensor, hook: object) -> None:
        values[hook.name] = value  # type: ignore[attr-defined]

    with model.hooks([(names, keep)], n_loops=SHORT):
        model.advance(begin_batch(model, batch, SHORT))
    return values


def added_by(graph: Graph, values: Values, writer: str) -> tuple[str, Tensor]:
    """Where a writer adds to the stream, and what."""
    end = end_of(writer)
    if writer == "embed":
        return "hook_embed", values["hook_embed"]
    kind, _, head = end.component.partition(".")
    at = f"{end.visit}.hook_{kind}_out"
    if not head:
        return at, values[at]
    stage = next(s for s in graph.stages if s.visit.name == end.visit)
    weights = stage.visit.block.attn.W_O  # type: ignore[union-attr]
    return at, values[f"{end.visit}.attn.hook_z"][:, :, int(head)] @ weights[int(head)]


def stream_by_hand(
    model: LoopedModel, batch: Batch, base: Values, moved: Values, site: str
) -> Tensor:
    """The stream at a site when components add what they do in a run, but for what is moved."""
    seen: list[Tensor] = []
    added = [n for n in base if n.endswith(("hook_attn_out", "hook_mlp_out"))] + ["hook_embed"]
    hooks = [(n, lambda v, hook, n=n: base[n] + moved.get(n, 0)) for n in added]
    hooks.append((site, lambda v, hook: seen.append(v)))
    with model.hooks(hooks, n_loops=SHORT):
        model.advance(begin_batch(model, batch, SHORT))
    return seen[0]


def read_by_hand(
    model: LoopedModel, batch: Batch, graph: Graph, base: Values, reader: str, stream: Tensor
) -> Tensor:
    """The metric when one reader alone reads a stream in a run that is free otherwise."""
    end = end_of(reader)
    if reader == "final":
        state = model.advance(begin_batch(model, batch, SHORT))
        return difference(model.readout(replace(state, resid=stream), batch.readout))
    visit = next(v for v in model.schedule(SHORT) if v.name == end.visit)
    kind, _, head = end.component.partition(".")
    site = f"{end.visit}.hook_resid_{'pre' if kind == 'attn' else 'mid'}"
    out = f"attn.hook_{end.input}" if end.input else f"hook_{kind}_out"
    seen: list[Tensor] = []
    state = model.advance(begin_batch(model, batch, SHORT), visit.index)
    hooks = [(site, lambda v, hook: stream), (f"{end.visit}.{out}", lambda v, hook: seen.append(v))]
    with model.hooks(hooks, n_loops=SHORT):
        model.advance(state, visit.index + 1)

    def put(value: Tensor, hook: object) -> Tensor:
        if not end.input:
            return seen[0]
        heads = [int(h) for h in head.split("-")]
        group = heads[0] // (len(heads) if len(heads) == 1 else heads[1] - heads[0] + 1)
        patched = value.clone()
        patched[:, :, group] = seen[0][:, :, group]
        return patched

    with model.hooks([(f"{end.visit}.{out}", put)], n_loops=SHORT):
        return difference(logits_of(model, batch))


def by_hand(
    model: LoopedModel, graph: Graph, mask: Tensor, clean: Batch, corrupted: Batch
) -> Tensor:
    """The logits with every edge outside a mask patched by hand: each reader reads the stream of a
    run of its own, in which every writer adds, at each position, what it does now or in the
    corrupted run.
    """
    other = recorded(model, corrupted, graph)
    now = {"hook_embed": recorded(model, clean, graph)["hook_embed"]}
    written = {"embed": now["hook_embed"]}

    def stream(reader: int, site: str) -> Tensor:
        moved: Values = {}
        for writer, value in written.items():
            at, old = added_by(graph, other, writer)
            kept = mask[reader, graph.writers.index(writer)].to(old)[:, None]
            moved[at] = moved.get(at, 0) + kept * (value - old)
        return stream_by_hand(model, clean, other, moved, site)

    for stage in graph.stages:
        block = stage.visit.block
        numbers = range(stage.readers.start, stage.readers.stop)
        seen: Values = {}
        hooks: list[tuple[str, Callable[..., object]]] = []
        if stage.heads:
            norm = block.ln1  # type: ignore[union-attr]
            parts = iter(numbers)
            for what in "qkv":
                weights = getattr(block.attn, f"W_{what.upper()}")  # type: ignore[union-attr]
                biases = getattr(block.attn, f"b_{what.upper()}")  # type: ignore[union-attr]
                read = [
                    (x if norm is None else norm(x, {})) @ w + b
                    for w, b in zip(weights, biases, strict=True)
                    for x in [stream(next(parts), stage.stream)]
                ]
                value = torch.stack(read, dim=2)
                hooks.append(
                    (f"{stage.visit.name}.attn.hook_{what}", lambda v, hook, value=value: value)
                )
        else:
            value = stream(numbers[0], stage.stream)
            hooks.append((stage.stream, lambda v, hook, value=value: value))
        out = f"{stage.visit.name}.attn.hook_z" if stage.heads else stage.added
        hooks.append((out, lambda v, hook, seen=seen: seen.update({hook.name: v})))
        with model.hooks(hooks, n_loops=SHORT):
            model.advance(begin_batch(model, clean, SHORT))
        for writer in graph.writers[stage.writers]:
            written[writer] = added_by(graph, seen, writer)[1]
    last = model.schedule(SHORT)[-1].hook_names()[-1]
    end = model.advance(begin_batch(model, clean, SHORT))
    return model.readout(replace(end, resid=stream(len(mask) - 1, last)), clean.readout)


def check_masked_runs(name: str, by_position: bool) -> None:
    """All edges give the clean run, none the corrupted one, and some what by hand gives.

    Args:
        name: "toy", "toy_injected" or a toy of a family.
    """
    if name.startswith("toy"):
        model: LoopedModel = toy("learned", name.endswith("injected"))
        clean, corrupted = full(1), full(2)
    else:
        model = TOYS[name].make()
        clean, corrupted = (full_of(TOYS[name], model, seed) for seed in (1, 2))
    heads = None if name in ("toy", "huginn") else False
    graph = graph_of(model, clean, SHORT, heads, by_position)
    other = Written.of(model, corrupted, graph)
    runs = MaskedRuns.of(model, graph, clean, other, "corrupted", 0, MAX_BYTES)
    chances = torch.rand(graph.every.shape, generator=torch.Generator().manual_seed(1))
    masks = torch.stack([graph.every, torch.zeros_like(graph.every), graph.every & (chances < 0.6)])
    whole, replaced, mixed = runs.logits(masks)
    assert_close(whole, logits_of(model, clean))
    assert_close(replaced, logits_of(model, corrupted))
    assert_close(mixed, by_hand(model, graph, masks[2], clean, corrupted))
    assert not torch.allclose(mixed, whole)
