"""The same question to every tool: write one value at one call of a block, and read the logits.

`python -m benchmarks.peers` asks each tool that is installed in a process of its own, compares its
answers with plain hooks that count their calls, and writes docs/peers.md.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import loopscope
from benchmarks.plain_ouro import PlainOuro
from benchmarks.results import machine
from loopscope.models.core.registry import build
from loopscope.models.families.ouro import OuroConfig

PAGE = Path(__file__).parent.parent / "docs" / "peers.md"
D_MODEL, LOOPS, BLOCKS, LENGTH = 64, 4, 2, 11
CYCLES = (2, 3)
EXACT = 1e-4
_BYTES = 1024  # ru_maxrss counts in kibibytes

_TEXT = """# The same analysis in other tools

Written by `python -m benchmarks.peers` on: {machine}.

This page asks several tools to do the same patching experiment on a model whose blocks run several
times in one forward pass. One *cell* of the experiment is: at one call of a block, at one position,
write the value of the clean run, and read the logits at the last position.

There are two models. One is a hand-written module like Ouro ({blocks} blocks, {loops} iterations,
d={d_model}, {length} tokens); the other is HRM-Text of transformers ({high} high cycles,
with {low} low cycles in each). The right values come from plain PyTorch hooks that count their
calls.

* *off by*: the largest error over all cells of the difference between two logits, in standard
  deviations of that difference over the cells;
* *a cell*: processor time per cell, in a process of its own with one thread;
* *memory*: how much the cells added to the largest size of the process.

{tables}

## How each tool was used

{how}

## What is left

A tool that counts calls, or names them as TorchLens does (`blocks.0:2`), answers this question
exactly. What this library adds is that the iteration is an axis: of the hook names that caches,
filters and gradients share, of every record's table, of lenses, exits and sweeps; that the cells of
a sweep run as rows of few forward passes that begin where the patch is; and that it knows what a
family does between iterations (injected inputs, boundary norms, gates, key-value caches).
"""


@dataclass(frozen=True)
class Case:
    """A looped module, and the cells to write.

    Attributes:
        module: From tokens to logits.
        blocks: The paths of the blocks to patch, with how often each runs.
        clean, corrupted: Int[Tensor, "1 pos"].
        ours: This library's model of the same weights.
        places: This library's name of each call of each block.
        bridge: The name of each block on TransformerLens's bridge; None where it has no adapter.
        positions: Where to write.
    """

    module: nn.Module
    blocks: dict[str, int]
    clean: Tensor
    corrupted: Tensor
    ours: Any
    places: dict[tuple[str, int], str]
    bridge: Any = None
    positions: tuple[int, ...] = (0, 3, 6, 9)

    @property
    def cells(self) -> list[tuple[str, int, int]]:
        """Block, call and position, all counted from 0; the last position is only read."""
        return [
            (path, call, position)
            for path, calls in self.blocks.items()
            for call in range(calls)
            for position in self.positions
        ]


@dataclass(frozen=True)
class Answer:
    """What a tool gives for a case.

    Attributes:
        effects: Float[Tensor, " cell"], the metric of each; None where it refuses.
        seconds: Processor time for all cells.
        peak: Bytes that the process grew by.
        refusal: Why there is no answer.
    """

    effects: Tensor | None
    seconds: float = 0.0
    peak: int = 0
    refusal: str = ""


class Logits(nn.Module):
    """A language model of transformers as a module from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


def hand_written() -> Case:
    """An Ouro-like module with random weights."""
    config = OuroConfig(
        n_layers=BLOCKS, n_loops=LOOPS, d_model=D_MODEL, n_heads=4, d_mlp=128,
        d_vocab=97, n_ctx=32, exit_gate=False,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = build(config).eval()
    places = {
        (f"blocks.{layer}", loop): f"loops.{loop}.blocks.{layer}"
        for layer in range(BLOCKS)
        for loop in range(LOOPS)
    }
    module = PlainOuro(ours, config.rope_theta).eval()
    blocks = {f"blocks.{layer}": LOOPS for layer in range(BLOCKS)}
    return Case(module, blocks, *_tokens(config.d_vocab), ours, places)


def hrm_text() -> Case:
    """transformers' own class with random weights."""
    from transformers import HrmTextConfig, HrmTextForCausalLM

    high, low = CYCLES
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=97, hidden_size=D_MODEL, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, head_dim=16, max_position_embeddings=32, H_cycles=high,
        L_cycles=low, initializer_range=0.2,
    )  # fmt: skip
    theirs = HrmTextForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = loopscope.load(folder)
    lows, highs = "model.model.L_module.layers.0", "model.model.H_module.layers.0"
    places = {
        (lows, h * low + step): f"loops.{h}.low.{step}.blocks.0"
        for h in range(high)
        for step in range(low)
    } | {(highs, h): f"loops.{h}.high.blocks.0" for h in range(high)}
    return Case(
        Logits(theirs), {lows: high * low, highs: high}, *_tokens(97), ours, places,
        {lows: "L_blocks.0", highs: "H_blocks.0"},
    )  # fmt: skip


def _tokens(d_vocab: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return iter(torch.randint(1, d_vocab, (2, 1, LENGTH), generator=generator))


CASES = {"A hand-written module": hand_written, "transformers' HRM-Text": hrm_text}


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


def ask(tool: str, case: str) -> Answer:
    """One tool's answer to one case; an error of the tool is a refusal."""
    torch.set_num_threads(1)
    made, run = CASES[case](), TOOLS[tool][1]
    with torch.no_grad():
        try:
            run(replace(made, positions=made.positions[:1]))  # a warm-up
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            return Answer(None, refusal=f"{type(error).__name__}: {said[0][:160]}")
        before, started = _peak(), time.process_time()
        effects = run(made)
        return Answer(effects.float().clone(), time.process_time() - started, _peak() - before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES


def _apart(tool: str, case: str) -> Answer:
    """The answer of a process that nothing else was imported into."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.pt"
        subprocess.run([sys.executable, "-m", "benchmarks.peers", tool, case, path], check=True)
        return Answer(**torch.load(path, weights_only=True))


def main() -> None:
    """Ask every tool about every case, each in a new process, and write the page."""
    torch.set_num_threads(1)
    tables = []
    for case in CASES:
        answers = {}
        for tool in TOOLS:
            answers[tool] = _apart(tool, case)
            print(case, tool, answers[tool].seconds, answers[tool].refusal, flush=True)
        tables.append(f"## {case}\n\n{table(answers)}")
    how = [
        f"* **{tool}**: {' '.join((run.__doc__ or '').split())}" for tool, (_, run) in TOOLS.items()
    ]
    PAGE.write_text(
        _TEXT.format(
            machine=machine(), tables="\n\n".join(tables), how="\n".join(how), blocks=BLOCKS,
            loops=LOOPS, d_model=D_MODEL, length=LENGTH, high=CYCLES[0], low=CYCLES[1],
        ),
        encoding="utf-8",
    )  # fmt: skip
    print(f"wrote {PAGE}")


def table(answers: dict[str, Answer]) -> str:
    """One row a tool."""
    right = answers["plain hooks"].effects
    assert right is not None
    rows = [("tool", "version", "off by", "a cell", "memory"), ("---",) * 5]
    for tool, answer in answers.items():
        number = "not installed"
        with suppress(PackageNotFoundError):
            number = version(TOOLS[tool][0])
        if answer.effects is None:
            rows.append((tool, number, f"no answer ({answer.refusal})", "-", "-"))
            continue
        apart = float((answer.effects - right).abs().max() / right.std())
        rows.append(
            (
                tool,
                number,
                "exact" if apart < EXACT else f"{apart:.2f}",
                f"{1e3 * answer.seconds / len(right):.2f} ms",
                f"{answer.peak / 2**20:.0f} MiB",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        torch.save(asdict(ask(*sys.argv[1:3])), sys.argv[3])
    else:
        main()
