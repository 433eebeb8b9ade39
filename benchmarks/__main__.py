"""Run every benchmark but those of real size, of stores and of GPUs, print their lines as they
come, and keep them in RESULTS.md.
"""

from __future__ import annotations

import torch

from benchmarks import compiled, growth, memory, overhead, patching, results, sweep, training


def main() -> None:
    """Run all in one process with one thread, which is steady on shared machines and the same for
    both sides.
    """
    torch.set_num_threads(1)
    print(results.machine(), flush=True)
    lines = []
    for benchmark in (overhead, memory, sweep, training, patching):
        for line in benchmark.run().splitlines():
            lines.append(f"* {line}")
            print(line, flush=True)
    results.write("Small models and the paper's size", "make bench", lines)
    compiled.main()
    growth.main()


if __name__ == "__main__":
    main()
