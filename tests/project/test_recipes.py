"""The recipes of docs/scale.md run, and what they write is the record of one run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopscope import merge
from loopscope.interp.patching.sweep import Sweep
from paths import HELPERS, ROOT

RECIPE = ROOT / "docs" / "recipes" / "sweep.py"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": os.pathsep.join(
        (str(HELPERS / "slurm"), str(Path(sys.executable).parent), os.environ["PATH"])
    ),
}
PATCH = f"{sys.executable} -m loopscope patch --per-hop 2 --n-loops 3 --no-html"


def scale() -> list[str]:
    """The lines of docs/scale.md."""
    return (ROOT / "docs" / "scale.md").read_text().splitlines()


def run(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The record of the figure that one process makes."""
    folder = tmp_path_factory.mktemp("one")
    run(f"{PATCH} --out one", folder)
    return json.loads((folder / "one" / "patch.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit", "ray"])
def test_a_launcher_gives_the_sweep_of_one_process(launcher: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(launcher) is None:
        pytest.skip(f"{launcher} is not installed (the extras [slurm] and [ray])")
    run(f"{sys.executable} {RECIPE} {tmp_path}/two 2 {launcher}", tmp_path)
    run(
        f'{sys.executable} -c \'import sys; sys.path.insert(0, "{RECIPE.parent}"); import sweep;'
        f' from pathlib import Path; sweep.shard(Path("{tmp_path}/one"), 0, 1)\'',
        tmp_path,
    )
    two, one = merge(tmp_path / "two"), merge(tmp_path / "one")
    assert isinstance(two, Sweep)
    assert isinstance(one, Sweep)
    assert two.cells == one.cells
    assert torch.equal(two.values, one.values)


@pytest.mark.slow
def test_gnu_parallel_gives_the_figure_of_one_run(one_run: object, tmp_path: Path) -> None:
    """The line of docs/scale.md, with two shards of a smaller figure."""
    found = shutil.which("parallel")
    version = [found or "", "--version"]
    if found is None or "GNU parallel" not in subprocess.check_output(version, text=True):
        pytest.skip("GNU parallel is not installed")
    line = next(line for line in scale() if line.startswith("seq 0 7 | parallel "))
    small = line.replace("seq 0 7", "seq 0 1").replace("{}/8", "{}/2")
    run(small.replace("loopscope patch", f"{PATCH} --out p"), tmp_path)
    run("loopscope merge w", tmp_path)
    assert json.loads((tmp_path / "p" / "patch.json").read_text()) == one_run


@pytest.mark.slow
def test_xargs_and_an_array_job_give_the_figure_of_one_run(one_run: object, tmp_path: Path) -> None:
    run(f"seq 0 1 | xargs -P 2 -I@ {PATCH} --out x --work wx --shard @/2", tmp_path)
    run("loopscope merge wx", tmp_path)
    line = next(line for line in scale() if line.startswith("sbatch ")).replace(
        "docs/recipes", str(ROOT / "docs" / "recipes")
    )
    flags = PATCH.partition("loopscope patch")[2]
    run(f"{line.replace('sbatch', 'sbatch --array=0-1', 1)} {flags} --out a", tmp_path)
    run("loopscope merge w", tmp_path)
    records = [json.loads((tmp_path / name / "patch.json").read_text()) for name in "xa"]
    assert records == [one_run] * 2
