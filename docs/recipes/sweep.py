"""A patching sweep in shards, started by one of several launchers.

`python docs/recipes/sweep.py FOLDER N LAUNCHER`, where LAUNCHER is `processes`, `submitit` (jobs on
this machine), `slurm` (jobs of a cluster, through submitit) or `ray`. Every launcher calls `shard`
for i = 0..N - 1; a shard that is done already costs nothing, so the command is simply run again
after a failure.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

from loopscope import merge


def shard(folder: Path, i: int, n: int) -> None:
    """Do the i-th of n shares of the sweep."""
    import torch

    from loopscope import activation_patch, load, logit_diff

    torch.set_num_threads(1)
    model = load("mini/multi_hop/r_dyn")
    clean = model.encode(["<e_1><r_1><r_2>", "<e_2><r_3><r_1>"])
    corrupted = model.encode(["<e_3><r_1><r_2>", "<e_4><r_3><r_1>"])
    metric = logit_diff(torch.tensor([5, 6]), torch.tensor([7, 8]))
    sites = ["resid_pre", "z", "mlp_out"]
    activation_patch(model, clean, corrupted, metric, 8, sites=sites, save_to=folder, shard=(i, n))


def by_processes(folder: Path, n: int) -> None:
    """Processes of this machine."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=shard, args=(folder, i, n)) for i in range(n)]
    for process in started:
        process.start()
    for process in started:
        process.join()


def by_submitit(folder: Path, n: int, cluster: str = "local") -> None:
    """Jobs of submitit; on a cluster an array job."""
    import submitit

    executor = submitit.AutoExecutor(folder=folder.parent / "logs", cluster=cluster)
    executor.update_parameters(timeout_min=60)
    jobs = executor.map_array(shard, [folder] * n, range(n), [n] * n)
    for job in jobs:
        job.result()


def by_ray(folder: Path, n: int) -> None:
    """Tasks of Ray; on a cluster `folder` is on a disk that all machines share."""
    import ray

    ray.init(num_cpus=n, include_dashboard=False)
    task = ray.remote(num_cpus=1)(shard)
    ray.get([task.remote(folder, i, n) for i in range(n)])
    ray.shutdown()


def main(folder: Path, n: int, launcher: str) -> None:
    """Start the shards, wait for them, and print the merged record."""
    {
        "processes": by_processes,
        "submitit": by_submitit,
        "slurm": lambda folder, n: by_submitit(folder, n, "slurm"),
        "ray": by_ray,
    }[launcher](folder, n)
    print(merge(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3])
