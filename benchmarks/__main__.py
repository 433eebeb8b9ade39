"""Run every benchmark and print one line each, with the machine."""

from __future__ import annotations

import platform

import torch

from benchmarks import overhead, sweep, training


def main() -> None:
    """Print the machine, then each benchmark's line."""
    torch.set_num_threads(1)  # steady on shared machines, and the same for both sides
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}")
    for benchmark in (overhead, sweep, training):
        print(benchmark.run(), flush=True)


if __name__ == "__main__":
    main()
