"""Work in shards and activations on disk: two processes against one on a sweep, and the memory that
a collection takes.

`python -m benchmarks.scale --gigabytes 5` writes that much into a temporary folder. Each process
has one thread; its start (imports, making the model) is measured beside its work.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import results
from benchmarks.timing import paper_size
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.merging import merge
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from loopscope.interp.store.collect import collect
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

LOOPS, LENGTH, PAIRS, ROUNDS = 8, 12, 16, 2
_MIB, _IDLE = 2**20, 0.5  # the load average above which another process takes part of a core


def inputs(rows: int, length: int, seed: int) -> Batch:
    """Random tokens, read at the last one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 217, (rows, length), generator=generator)
    return Batch(tokens, torch.ones_like(tokens), torch.full((rows,), length - 1))


def sweep(
    model: LoopedModel, folder: Path | None = None, shard: tuple[int, int] | None = None
) -> Sweep:
    """A sweep of the paper's width, or a shard of it."""
    clean, corrupted = inputs(PAIRS, LENGTH, 0), inputs(PAIRS, LENGTH, 1)
    metric = logit_diff(torch.full((PAIRS,), 3), torch.full((PAIRS,), 5))
    return activation_patch(model, clean, corrupted, metric, LOOPS, save_to=folder, shard=shard)


def _model() -> LoopedModel:
    return paper_size(d_model=256, n_layers=2, n_heads=4)


def _shard(folder: Path, shard: tuple[int, int], ready: Barrier, told: Any) -> None:
    torch.set_num_threads(1)
    model = _model()
    ready.wait()
    begun = time.process_time()
    sweep(model, folder, shard)
    told.put(time.process_time() - begun)


class Times(NamedTuple):
    """Seconds of a sweep by some processes.

    Attributes:
        start: Until all processes have their model.
        work: From then on until the last one is done.
        busiest: Processor time of the work of the busiest process.
    """

    start: float
    work: float
    busiest: float


def timed(processes: int) -> tuple[Times, Sweep]:
    """The times of a sweep by so many processes, and the merged record."""
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(processes + 1), context.Queue()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "sweep")
        shards = [(folder, (i, processes), ready, told) for i in range(processes)]
        started = [context.Process(target=_shard, args=args) for args in shards]
        before = time.perf_counter()
        for process in started:
            process.start()
        ready.wait()
        begun = time.perf_counter()
        busiest = max(told.get() for _ in started)
        ended = time.perf_counter()
        for process in started:
            process.join()
        found = merge(folder)
        assert isinstance(found, Sweep), "the folder holds a sweep"
        return Times(begun - before, ended - begun, busiest), found


def busy() -> str:
    """What else the machine does: words for the end of a line, empty where it is idle and has two
    cores.
    """
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    said = [f"the machine was not idle (load average {load:.1f})"] if load > _IDLE else []
    said += [] if cores > 1 else ["there is one core only"]
    return "; " + ", ".join(said) if said else ""


def two_processes() -> str:
    """One line: the times of one and of two processes, in turns, the least of each."""
    records = {}
    best: dict[int, list[Times]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for count, known in best.items():
            times, records[count] = timed(count)
            known.append(times)
    if not torch.equal(records[1].values, records[2].values):
        raise RuntimeError("two shards and one run give different values")
    one, two = (Times(*map(min, zip(*known, strict=True))) for known in best.values())
    return (
        f"sweep of {len(records[1].cells)} cells at d=256, L=2, {LOOPS} iterations, {PAIRS} pairs:"
        f" {one.work:.1f} s in one process, {two.work:.1f} s in two, {one.work / two.work:.2f}"
        f" times as fast (processor time of the busiest process {one.busiest:.1f} s and"
        f" {two.busiest:.1f} s, {one.busiest / two.busiest:.2f} times); the start, with imports and"
        f" the model, took {one.start:.1f} s and {two.start:.1f} s; equal to the last bit"
    )


def _peak() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _collect(gigabytes: float, max_bytes: int, length: int, told: Any) -> None:
    """Collect in a process of its own, and tell the peaks before and after."""
    torch.set_num_threads(1)
    model = _model()
    per_token = 4 * model.cfg.d_model * 2 * LOOPS
    rows = max(1, int(gigabytes * 1e9 / per_token / length))
    texts = inputs(rows, length, 0)
    with torch.no_grad():
        model(texts.tokens[:32], n_loops=LOOPS)
    before, begun = _peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store = collect(model, texts, n_loops=LOOPS, to=folder, max_bytes=max_bytes, batch_size=32)
        wrote = sum(path.stat().st_size for path in Path(folder).iterdir())
        told.put((before, _peak(), time.perf_counter() - begun, wrote, len(store)))


def collection(gigabytes: float, max_bytes: int = 256 * _MIB, length: int = 64) -> dict[str, float]:
    """The peak over the model (MiB), seconds and bytes of a collection in a process of its own."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    process = context.Process(target=_collect, args=(gigabytes, max_bytes, length, told))
    process.start()
    before, after, took, wrote, tokens = told.get()
    process.join()
    return {"over": after - before, "seconds": took, "bytes": wrote, "tokens": tokens}


def main() -> None:
    """Print the lines and keep them in RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    gigabytes = parser.parse_args().gigabytes
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    note = busy()
    lines = [two_processes() + note]
    print(lines[0], flush=True)
    found = collection(gigabytes)
    lines.append(
        f"collection of resid_post at d=256, L=2, {LOOPS} iterations: {found['tokens']:.0f} tokens,"
        f" {found['bytes'] / 1e9:.2f} GB in {found['seconds']:.0f} s, peak {found['over']:.0f} MiB"
        f" over the model with max_bytes of 256 MiB{note}"
    )
    print(lines[1])
    results.write(
        "Shards and stores",
        f"python -m benchmarks.scale --gigabytes {gigabytes:g}",
        [f"* {line}" for line in lines],
    )


if __name__ == "__main__":
    main()
