"""Released sizes: folders of random bfloat16 weights in the shapes of Ouro-1.4B and Huginn-3.5B,
loaded, read by the lens and patched, with plain hooks and nnsight beside.

`python -m benchmarks.real_size` makes the folders in a temporary place (3 and 7 GB), and needs
about 12 GB of memory. Memory that the process reuses after freeing it is not counted in a peak.
Where a sweep would take more than `PATIENCE` seconds, some of its cells are patched, spread over
the whole, and the line says how many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from nnsight import NNsight
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import results
from benchmarks.flops import causal_cone
from benchmarks.plain_ouro import PlainOuro
from benchmarks.timing import GIB, Measured, measured
from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.load import load
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables import huginn, ouro
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build

LENGTH, LOOPS, PATIENCE = 12, 4, 600.0
_SHARD = 2**31
_METRIC = logit_diff(torch.tensor([3]), torch.tensor([5]))

_OURO = {
    "model_type": "ouro",
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 5632,
    "vocab_size": 49152,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "total_ut_steps": LOOPS,
    "tie_word_embeddings": False,
}
_HUGINN = {
    "model_type": "huginn_raven",
    "block_class_name": "SandwichBlock",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "injection_type": "linear",
    "state_init": "like-init",
    "n_layers_in_recurrent_block": 4,
    "n_layers_in_prelude": 2,
    "n_layers_in_coda": 2,
    "mean_recurrence": 32,
    "n_embd": 5280,
    "n_heads": 55,
    "num_key_value_heads": 55,
    "head_dim": 96,
    "intermediate_size": 17920,
    "padded_vocab_size": 65536,
    "block_size": 4096,
    "rope_base": 50000,
    "norm_eps": 1e-6,
    "tie_embeddings": True,
}


@dataclass(frozen=True)
class Setting:
    """A release to measure.

    Attributes:
        name: The release whose shapes these are.
        table: How its family's releases are read.
        config: The content of config.json.
        gate: Keys that the config does not tell.
        cells: Layers and positions of the sample that is patched, of all iterations.
    """

    name: str
    table: Table
    config: Mapping[str, Any]
    gate: tuple[str, ...]
    cells: Mapping[str, list[int]]


SETTINGS = (
    Setting(
        "Ouro-1.4B",
        ouro.TABLE,
        _OURO,
        ("model.early_exit_gate.weight",),
        {"layers": [1, 9, 16, 23], "positions": [1, 6, 11]},
    ),
    Setting("Huginn-3.5B", huginn.TABLE, _HUGINN, (), {"layers": [0, 3], "positions": [1, 6, 11]}),
)


def make(setting: Setting, folder: Path) -> float:
    """Write the folder of a release with random weights, in shards; give their size in GiB."""
    config = folder / "config.json"
    config.write_text(json.dumps(setting.config))
    fields = ConfigFields(setting.config, config)
    cfg = setting.table.config(fields, dict.fromkeys(setting.gate, torch.zeros(0)), {})
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in build(cfg).state_dict().items()}
    random = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = 0
    keys = {key: name for key, name in setting.table.names(cfg).items() if name in shapes}
    for key, name in keys.items():
        shard[key] = _weight(shapes[name], random)
        where[key] = f"model-{total // _SHARD}.safetensors"
        total += shard[key].nbytes
        if total // _SHARD != (total - shard[key].nbytes) // _SHARD or len(where) == len(keys):
            save_file(shard, folder / where[key])
            shard.clear()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    return total / GIB


def _weight(shape: torch.Size, random: torch.Generator) -> Tensor:
    """A norm's ones, or small random numbers."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)


def run(setting: Setting, folder: Path) -> Iterator[str]:
    """The lines about one release, as they come."""
    size = make(setting, folder)
    loaded = measured(lambda: load(folder))
    model = loaded.result
    count = sum(each.numel() for each in model.parameters())
    head = f"**{setting.name}'s shapes**, {count / 1e9:.2f} billion weights in bfloat16, {size:.2f}"
    yield f"{head} GiB: loaded in {_took(loaded)}, the weights among them"
    clean, corrupted = _pair(model)
    lens = measured(lambda: readout_lens(model, clean, LOOPS, positions="all"))
    yield f"readout lens after each of {LOOPS} iterations, {LENGTH} tokens: {_took(lens)}"
    attributed = measured(lambda: _sweep(attribution_patch, model, clean, corrupted))
    whole = attributed.result.cells
    yield f"{len(whole)} cells of resid_post by attribution patching: {_took(attributed)}"
    sample = measured(lambda: _sweep(activation_patch, model, clean, corrupted, **setting.cells))
    share = _cone(model, whole) / _cone(model, sample.result.cells)
    if sample.seconds * share < PATIENCE:
        exact = measured(lambda: _sweep(activation_patch, model, clean, corrupted))
        yield f"by exact patching, all {len(whole)} cells: {_took(exact)}"
    else:
        yield (
            f"by exact patching: {len(sample.result.cells)} of the cells in {_took(sample)}; the"
            f" whole needs {share:.1f} times the arithmetic, about"
            f" {sample.seconds * share / 60:.0f} min"
        )
    if setting.table is ouro.TABLE:
        yield from _by_others(model, clean, corrupted, sample)


def _took(each: Measured) -> str:
    return f"{each.seconds:.1f} s, peak {each.peak:.2f} GiB"


def _pair(model: LoopedModel) -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    rows = torch.randint(1, model.cfg.d_vocab, (2, 1, LENGTH), generator=random)
    options = {"seed": 0} if model.cfg.family == "huginn" else {}
    last = torch.tensor([LENGTH - 1])
    return [Batch(row, torch.ones_like(row), last, options) for row in rows]


def _sweep(
    method: Callable[..., Sweep],
    model: LoopedModel,
    clean: Batch,
    corrupted: Batch,
    **places: list[int],
) -> Sweep:
    inputs = (model, clean, corrupted, _METRIC, LOOPS)
    return method(*inputs, sites="resid_post", visits="loops.**", **places)


def _cone(model: LoopedModel, cells: Any) -> int:
    return causal_cone(model, cells, LOOPS, LENGTH - 1)


def _by_others(
    model: LoopedModel, clean: Batch, corrupted: Batch, sample: Measured, every: int = 8
) -> Iterator[str]:
    """Some of the sample's cells by plain hooks and by nnsight, one run each, on the hand-written
    module.
    """
    cells = sample.result.cells[::every]
    plain = PlainOuro(model, float(_OURO["rope_theta"]))  # type: ignore[arg-type]
    values = _activations(plain, clean.tokens)

    @torch.no_grad()
    def by_hooks() -> Tensor:
        return torch.stack([_hooked(plain, corrupted.tokens, cell, values) for cell in cells])

    @torch.no_grad()
    def by_nnsight() -> Tensor:
        traced = NNsight(plain)  # last, because it changes how the module's calls run
        return torch.stack([_traced(traced, corrupted.tokens, cell, values) for cell in cells])

    ours = sample.result.values[::every, 0]
    for name, job in (("plain hooks", by_hooks), ("nnsight", by_nnsight)):
        found = measured(job)
        apart = float((found.result - ours).abs().max() / ours.abs().max())
        each, mine = found.seconds / len(cells), sample.seconds / len(sample.result.cells)
        yield (
            f"{len(cells)} of them by {name} on a hand-written module with the same weights:"
            f" {_took(found)}; {each:.1f} s a cell against {mine:.1f} s of ours, {each / mine:.1f}"
            f" times; largest difference {apart:.1e} of the largest value"
        )


@torch.no_grad()
def _activations(plain: PlainOuro, tokens: Tensor) -> dict[tuple[int, int], Tensor]:
    """Each block's output in each iteration, by iteration and layer."""
    found: dict[tuple[int, int], Tensor] = {}
    calls = dict.fromkeys(range(len(plain.blocks)), 0)

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: Tensor) -> None:
            found[calls[layer], layer] = output
            calls[layer] += 1

        return hook

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(plain.blocks)]
    plain(tokens)
    for handle in handles:
        handle.remove()
    return found


def _hooked(plain: PlainOuro, tokens: Tensor, cell: Any, values: Mapping[Any, Tensor]) -> Tensor:
    """The metric of a run with one cell patched by a forward hook that counts its calls."""
    calls = 0

    def hook(module: object, inputs: object, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls - 1 != cell.loop:
            return output
        patched = output.clone()
        patched[:, cell.position] = values[cell.loop, cell.layer][:, cell.position]
        return patched

    handle = plain.blocks[cell.layer].register_forward_hook(hook)
    logits = plain(tokens)
    handle.remove()
    return _METRIC(logits[:, -1].float()).mean()


def _traced(traced: NNsight, tokens: Tensor, cell: Any, values: Mapping[Any, Tensor]) -> Tensor:
    """The metric of a run with one cell patched by nnsight."""
    source = values[cell.loop, cell.layer][:, cell.position]
    with traced.trace(tokens) as tracer:
        for _ in tracer.iter[cell.loop]:
            traced.blocks[cell.layer].output[:, cell.position] = source
        logits = traced.output.save()
    return _METRIC(logits[:, -1].float()).mean()


def main() -> None:
    """Measure each release in a folder of its own, which is removed again."""
    torch.set_num_threads(1)
    print(results.machine(), flush=True)
    lines = []
    for setting in SETTINGS:
        with TemporaryDirectory(prefix="loopscope-") as place:
            for line in run(setting, Path(place)):
                lines.append(f"* {line}")
                print(line, flush=True)
    results.write("Released sizes", "python -m benchmarks.real_size", lines)


if __name__ == "__main__":
    main()
