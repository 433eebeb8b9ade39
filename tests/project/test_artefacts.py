"""The wheel and the source distribution hold one package, and work outside the checkout."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import nbformat
import pytest

import loopscope
from paths import ROOT

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = tuple(map(str, command))
    done = subprocess.run(command, cwd=cwd, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both artefacts, built from the files that git knows."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--outdir", out, source, cwd=out)
    return out


def test_the_wheel_holds_one_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    about = f"loopscope-{loopscope.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"loopscope", about}
    shipped = "loopscope/checkpoints/shipped/ltg_trained/checkpoint_epoch_19559.pt"
    assert {shipped, "loopscope/py.typed", "loopscope/__init__.pyi"} < set(names)


def test_the_source_distribution_holds_one_package(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    folders = {m.name.split("/")[1] for m in members if m.isfile() and m.name.count("/") > 1}
    assert folders == {"loopscope", "loopscope.egg-info"}
    assert not any(member.issym() for member in members)


def test_both_are_fit_for_an_index(built: Path) -> None:
    tools, artefacts = Path(sys.executable).parent, sorted(built.iterdir())
    said = run(tools / "twine", "check", "--strict", *artefacts, cwd=built)
    assert said.count("PASSED") == len(artefacts) == 2
    ignored = ("--ignore", "W002")  # each shipped checkpoint is whole, with its own test.json
    run(tools / "check-wheel-contents", *ignored, *built.glob("*.whl"), cwd=built)


def environment(artefact: Path, home: Path) -> Path:
    """The folder of the programs of a fresh environment with one artefact.

    Its dependencies are those of the environment that runs the tests, seen through one line of a
    `.pth` file, which brings no editable install along.
    """
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python")
    run(*pip, "install", "-q", "--no-deps", "--no-compile", artefact, cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel."""
    (wheel,) = built.glob("*.whl")
    return environment(wheel, tmp_path_factory.mktemp("venv"))


def files_of(programs: Path) -> dict[str, str]:
    """The files of the installed package, each with its hash."""
    (record,) = programs.parent.glob("lib/python*/site-packages/loopscope-*.dist-info/RECORD")
    rows = csv.reader(record.read_text().splitlines())
    return {name: code for name, code, _ in rows if name.startswith("loopscope/")}


def test_the_source_distribution_installs_what_the_wheel_does(
    installed: Path, built: Path, tmp_path: Path
) -> None:
    (sdist,) = built.glob("*.tar.gz")
    programs = environment(sdist, tmp_path)
    assert files_of(programs) == files_of(installed)
    assert len(files_of(installed)) > 400
    assert "ltg_trained" in run(programs / "loopscope", "list", cwd=tmp_path)


def test_an_installed_loopscope_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run(
        installed / "python", "-c", "import loopscope; print(loopscope.__file__)", cwd=tmp_path
    )
    assert where.startswith(str(installed.parent))
    version = f"loopscope {loopscope.__version__}\n"
    assert run(installed / "loopscope", "--version", cwd=tmp_path) == version
    assert "ltg_trained" in run(installed / "loopscope", "list", cwd=tmp_path)
    run(installed / "loopscope", "report", "ltg_trained", "--per-hop", "5", cwd=tmp_path)
    assert (tmp_path / "out" / "report.html").stat().st_size > 1_000_000
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)[0]
    assert "loops.7.blocks.1" in run(installed / "python", "-c", example, cwd=tmp_path)


def test_the_first_cells_of_the_notebooks_run_there(installed: Path, tmp_path: Path) -> None:
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert len(paths) >= 5
    cells = (nbformat.read(path, as_version=4).cells for path in paths)
    firsts = [next(each.source for each in some if each.cell_type == "code") for some in cells]
    script = "import json, sys; [exec(each, {}) for each in json.loads(sys.argv[1])]"
    run(installed / "python", "-c", script, json.dumps(firsts), cwd=tmp_path)
