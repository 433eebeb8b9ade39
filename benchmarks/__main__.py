"""Run every benchmark, print its lines as they come, and keep them in RESULTS.md with the machine
and the versions.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import memory, overhead, patching, sweep, training

_RESULTS = Path(__file__).parent / "RESULTS.md"
_PACKAGES = ("torch", "transformer-lens", "nnsight")


def main() -> None:
    """Run all in one process with one thread, which is steady on shared machines and the same for
    both sides.
    """
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    machine = (
        f"{_processor()}, {os.cpu_count()} cores, 1 thread, Python {platform.python_version()},"
        f" {versions}"
    )
    print(machine, flush=True)
    lines = []
    for benchmark in (overhead, memory, sweep, training, patching):
        for line in benchmark.run().splitlines():
            lines.append(f"* {line}")
            print(line, flush=True)
    _RESULTS.write_text(
        "\n".join(["# Benchmarks", "", f"One run of `make bench` on: {machine}.", "", *lines])
        + "\n"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
