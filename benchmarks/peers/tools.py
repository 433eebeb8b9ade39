"""Every tool's way of writing one value at one call of a block, for all cells of a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import loopscope
from benchmarks.peers.cases import CYCLES, D_MODEL, Case


def metric(logits: Tensor) -> Tensor:
    """The difference of two logits, one number a row."""
    return logits[:, 3] - logits[:, 5]


def plain_hooks(case: Case) -> Tensor:
    """Forward hooks that count the calls of a block; one run per cell."""
    found = []
    kept = _outputs(case)
    for path, call, position in case.cells:
        with _hooked(case, path) as calls:
            calls.write = lambda number, out, here=(path, call, position): (
                _written(out, kept[here[0]][here[1]], here[2]) if number == here[1] else None
            )
            found.append(metric(case.module(case.corrupted)[:, -1]))
    return torch.cat(found)


@contextmanager
def _hooked(case: Case, path: str) -> Iterator[SimpleNamespace]:
    calls = SimpleNamespace(number=0, write=None)

    def hook(module: nn.Module, args: object, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        new = calls.write(calls.number, first)
        calls.number += 1
        return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

    handle = case.module.get_submodule(path).register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def _outputs(case: Case) -> dict[str, list[Tensor]]:
    """Every call's output in the clean run, by block."""
    kept: dict[str, list[Tensor]] = {}
    for path in case.blocks:
        with _hooked(case, path) as calls:
            calls.write = lambda number, out, path=path: kept.setdefault(path, []).append(
                out.clone()
            )
            case.module(case.clean)
    return kept


def _written(out: Tensor, source: Tensor, position: int) -> Tensor:
    new = out.clone()
    new[:, position] = source[:, position]
    return new


def this_library(case: Case) -> Tensor:
    """`activation_patch` at `resid_post`: all cells of a sweep."""
    return _swept(case, case.ours)


def this_library_wrapped(case: Case) -> Tensor:
    """`wrap` of the same module, and the same sweep; whole runs."""
    stacks = {path.rpartition(".")[0]: path for path in case.blocks}
    blocks: Any = next(iter(stacks))
    if len(stacks) > 1:
        low, high = stacks
        blocks = {"low": (low, CYCLES[1]), "high": high}
    return _swept(case, loopscope.wrap(case.module, blocks, n_loops=_loops(case)))


def _loops(case: Case) -> int:
    return min(case.blocks.values())


def _swept(case: Case, model: Any) -> Tensor:
    sweep = loopscope.activation_patch(
        model, case.clean, case.corrupted, metric, sites="resid_post", readout=-1,
        positions=list(case.positions),
    )  # fmt: skip
    order = {(cell.name, cell.position): row for row, cell in enumerate(sweep.cells)}
    rows = [
        order[f"{case.places[path, call]}.hook_resid_post", position]
        for path, call, position in case.cells
    ]
    return sweep.values[rows, 0]


def transformer_lens(case: Case) -> Tensor:
    """The bridge's `run_with_cache`, and a hook at the block's one name."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    if case.bridge is None:
        raise NotImplementedError("it has no adapter for a module of one's own")
    theirs: Any = case.module.model
    bridge = build_bridge_from_module(theirs, "HrmTextForCausalLM", hf_config=theirs.config)
    _, cache = bridge.run_with_cache(case.clean)
    found = []
    for path, _, position in case.cells:
        name = f"{case.bridge[path]}.hook_resid_post"
        logits = bridge.run_with_hooks(
            case.corrupted,
            fwd_hooks=[(name, lambda out, hook, at=position: _written(out, cache[hook.name], at))],
        )
        found.append(metric(logits[:, -1]))
    return torch.cat(found)


def nnsight(case: Case) -> Tensor:
    """`tracer.iter[n]`; one trace per cell."""
    from nnsight import NNsight

    kept = _outputs(case)
    traced = NNsight(case.module)
    found = []
    for path, call, position in case.cells:
        with traced.trace(case.corrupted) as tracer:
            for _ in tracer.iter[call]:
                _at(traced, path).output[:, position] = kept[path][call][:, position]
            logits = traced.output.save()
        found.append(metric(logits[:, -1]))
    return torch.cat(found)


def _at(traced: Any, path: str) -> Any:
    for part in path.split("."):
        traced = traced[int(part)] if part.isdigit() else getattr(traced, part)
    return traced


def torchlens(case: Case) -> Tensor:
    """`trace`, then `fork`, `set` at `PATH:CALL` and `push`; one push per cell."""
    import torchlens as tl

    capture = tl.options.CaptureOptions(intervention_ready=True)
    clean, corrupted = (
        tl.trace(case.module, tokens, capture=capture) for tokens in (case.clean, case.corrupted)
    )
    found = []
    for path, call, position in case.cells:
        name = f"{path}:{call + 1}"  # its passes count from 1
        fork = corrupted.fork()
        fork.set(corrupted[name].label, _written(corrupted[name].out, clean[name].out, position))
        fork.push()
        found.append(metric(fork[fork.output_layers[0]].out[:, -1]))
        fork.cleanup()
    return torch.cat(found)


def pyvene(case: Case) -> Tensor:
    """`IntervenableModel` with a `VanillaIntervention` at the block's output."""
    import pyvene as pv

    needed = {
        "config": SimpleNamespace(to_dict=dict, name_or_path=""),
        "device": torch.device("cpu"),
    }
    for name, value in needed.items():
        setattr(case.module, name, value)
    found = []
    for path, _, position in case.cells:
        written = pv.VanillaIntervention(embed_dim=D_MODEL)
        place = {"component": f"{path}.output", "unit": "pos", "intervention": written}
        model = pv.IntervenableModel([place], model=case.module)
        _, logits = model(
            {"tokens": case.corrupted},
            [{"tokens": case.clean}],
            {"sources->base": (position, position)},
        )
        found.append(metric(logits[:, -1]))
    return torch.cat(found)


def nnterp(case: Case) -> Tensor:
    """`StandardizedTransformer`, which needs nnsight below 0.8 and finds no layers in a model that
    has none by that name.
    """
    from nnterp import StandardizedTransformer

    theirs = getattr(case.module, "model", case.module)
    standard: Any = StandardizedTransformer(theirs)
    raise NotImplementedError(f"{len(standard.layers)} layers are all that it names")


TOOLS: dict[str, tuple[str, Callable[[Case], Tensor]]] = {
    "plain hooks": ("torch", plain_hooks),
    "loopscope": ("loopscope", this_library),
    "loopscope.wrap": ("loopscope", this_library_wrapped),
    "TransformerLens": ("transformer-lens", transformer_lens),
    "nnsight": ("nnsight", nnsight),
    "TorchLens": ("torchlens", torchlens),
    "pyvene": ("pyvene", pyvene),
    "nnterp": ("nnterp", nnterp),
}
