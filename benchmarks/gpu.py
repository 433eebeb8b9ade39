"""Every table of RESULTS.md on a GPU, by one command: `python -m benchmarks.gpu`.

`--device cpu --tiny` runs the same steps with toy sizes, to see that they run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable

import torch

from benchmarks import results
from benchmarks.scale import inputs
from benchmarks.timing import paper_size
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.lens.tuned_training import train_tuned_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.probes.probe import probe
from loopscope.interp.store.collect import collect
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

LOOPS = 8


def checked_device(name: str) -> torch.device:
    """The device to measure on.

    Raises:
        ValueError: A GPU that is not there.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "this benchmark measures a GPU, but torch finds none; pass --device cpu --tiny to try"
            " its steps"
        )
    return device


def measured(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of a run after one warm-up, and the peak of the device's memory in GiB over what was
    there before (0 on a CPU).
    """
    run()
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    begun = time.perf_counter()
    run()
    if device.type != "cuda":
        return time.perf_counter() - begun, 0.0
    torch.cuda.synchronize(device)
    took = time.perf_counter() - begun
    return took, (torch.cuda.max_memory_allocated(device) - before) / 2**30


def lines(device: torch.device, dtype: torch.dtype, tiny: bool) -> list[str]:
    """One line for each method."""
    width, pairs, length, texts = (32, 2, 5, 8) if tiny else (768, 16, 13, 4096)
    model = paper_size(d_model=width, n_layers=2 if tiny else 4, n_heads=4 if tiny else 12)
    model = model.to(device=device, dtype=dtype)
    clean, corrupted = (inputs(pairs, length, seed).to(device) for seed in (0, 1))
    what = f"d={width}, {LOOPS} iterations, {length} tokens, {dtype} on {_name(device)}"
    found = []
    for name, run in _methods(model, clean, corrupted, inputs(texts, length, 2)).items():
        took, peak = measured(run, device)
        found.append(f"{name}, {what}: {took:.3f} s, peak {peak:.2f} GiB")
    return found


def _methods(
    model: LoopedModel, clean: Batch, corrupted: Batch, texts: Batch
) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    pairs = len(clean)
    answer, other = (torch.full((pairs,), token, device=model.device) for token in (3, 5))
    metric = logit_diff(answer, other)

    def store() -> None:
        with tempfile.TemporaryDirectory() as folder:
            collect(model, texts, n_loops=LOOPS, to=folder, batch_size=256)

    return {
        f"forward of {len(texts)} texts": lambda: _forward(model, texts.to(model.device)),
        f"readout lens of {len(texts)} texts": lambda: readout_lens(model, texts, LOOPS),
        f"sweep of resid_pre over {pairs} pairs": lambda: activation_patch(
            model, clean, corrupted, metric, LOOPS, max_bytes=4 << 30
        ),
        f"attribution of resid_pre over {pairs} pairs": lambda: attribution_patch(
            model, clean, corrupted, metric, LOOPS
        ),
        f"collection of {len(texts)} texts": store,
        f"probe of {len(texts)} texts": lambda: probe(
            model, texts, texts.tokens[:, 0] % 2, n_loops=LOOPS, control=False
        ),
        f"training of a tuned lens on {len(texts)} texts": lambda: train_tuned_lens(
            model, texts, LOOPS, steps=20
        ),
    }


@torch.no_grad()
def _forward(model: LoopedModel, batch: Batch) -> None:
    model(batch.tokens, n_loops=LOOPS, mask=batch.mask)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main(args: list[str] | None = None) -> None:
    """Print every line; those of a GPU are kept in RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    given = parser.parse_args(args)
    device = checked_device(given.device)
    found = []
    for dtype in given.dtype:
        for line in lines(device, getattr(torch, dtype), given.tiny):
            print(line, flush=True)
            found.append(f"* {line}")
    if device.type == "cuda" and not given.tiny:
        results.write("GPU", "python -m benchmarks.gpu", found)


if __name__ == "__main__":
    main()
