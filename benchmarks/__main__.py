"""Run every benchmark but those of real size, print their lines as they come, and keep them in
RESULTS.md.
"""

from __future__ import annotations

import torch

from benchmarks import compiled, memory, overhead, patching, results, sweep, training


def main() -> None:
    """Run all in one process with one thread, which is steady on shared machines and the same for
    both sides.
    """
    torch.set_num_threads(1)
    print(results.machine(), flush=True)
    lines = []
    for benchmark in (overhead, memory, compiled, sweep, training, patching):
        for line in benchmark.run().splitlines():
            lines.append(f"* {line}")
            print(line, flush=True)
    results.write("Small models and the paper's size", "make bench", lines)


if __name__ == "__main__":
    main()
