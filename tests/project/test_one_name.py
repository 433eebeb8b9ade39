"""One name for each module, one list of the public calls, and a light `import loopscope`."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import loopscope
from import_graph import FOLDERS, modules
from loopscope.analyses.common.figures import FIGURES
from paths import ROOT, write

COMMANDS = (
    "list",
    "report",
    "explore",
    *FIGURES,
    "replication",
    "findings",
    "families",
    "gallery",
    "dictionaries",
    "data",
    "train",
)


# One name for each module


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


IMPORT_ALL = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
files = {}
for name, module in list(sys.modules.items()):
    if getattr(module, "__file__", None):
        files.setdefault(module.__file__, set()).add(name)
ours = {f: sorted(n) for f, n in files.items() if any(x.startswith("loopscope") for x in n)}
print(json.dumps(ours))
"""


@pytest.mark.slow
def test_each_module_is_reachable_under_one_name(tmp_path: Path) -> None:
    names = sorted(set(modules(ROOT)) - {"loopscope.__main__"})
    done = python("-c", IMPORT_ALL, json.dumps(names), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sorted(name for each in found.values() for name in each) == names
    assert {len(each) for each in found.values()} == {1}
    assert len({Path(file).resolve() for file in found}) == len(names)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("line", ["import {}", "from {} import anything", "import {}.core"])
def test_in_a_checkout_the_folders_are_no_packages_of_their_own(folder: str, line: str) -> None:
    done = python("-c", line.format(folder), cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: the code of {folder!r} is imported as 'loopscope.{folder}', so that there "
        f"is one copy of it; write 'from loopscope.{folder} import ...'"
    )


OWN = {
    "models.py": "mine = 1",
    "tasks/__init__.py": "mine = 1",
    "training/__init__.py": "mine = 1",
    "interp/__init__.py": "mine = 1",
    "analyses/__init__.py": "mine = 1",
    "checkpoints/multi_hop/weights.txt": "data",
    "torch_utils.py": "mine = 1",
}
USE_OWN = "import models, tasks, training, interp, analyses, torch_utils"
USE_OURS = (
    "import loopscope; model = loopscope.load('ltg_trained'); from loopscope.analyses import cli"
)
SHOW = "print(models.mine, tasks.mine, training.mine, interp.mine, analyses.mine, torch_utils.mine)"


@pytest.mark.parametrize(
    ("lines", "form"),
    [
        pytest.param((USE_OWN, USE_OURS), "models.py", id="theirs first, a file"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ((USE_OURS, USE_OWN), "models/__init__.py"),
                ((USE_OURS, USE_OWN), "models.py"),
                ((USE_OWN, USE_OURS), "models/__init__.py"),
            ]
        ),
    ],
)
def test_the_users_own_packages_of_these_names_stay_the_users(
    tmp_path: Path, lines: tuple[str, str], form: str
) -> None:
    write(tmp_path, {form if name == "models.py" else name: text for name, text in OWN.items()})
    done = python("-c", "; ".join((*lines, SHOW)), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "1 1 1 1 1 1\n"), done.stderr


@pytest.mark.slow
def test_without_links_the_folders_are_found_beside_the_package(tmp_path: Path) -> None:
    for folder in FOLDERS:
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "loopscope").mkdir()
    for path in (ROOT / "loopscope").glob("*.py*"):
        (tmp_path / "loopscope" / path.name).write_bytes(path.read_bytes())
    line = "import loopscope.models.core.base as base; print(base.__file__)"
    done = python("-c", line, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "models" / "core" / "base.py"), done.stderr


# What is left for later

HEAVY = {"torch", "pandas", "plotly", "transformer_lens.hook_points", "transformers"}


def test_import_loopscope_does_not_import_torch(tmp_path: Path) -> None:
    code = f"import loopscope, sys; print(sorted({HEAVY} & set(sys.modules)))"
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "[]"


def test_help_lists_the_commands_and_does_not_import_torch(tmp_path: Path) -> None:
    done = python("-X", "importtime", "-m", "loopscope", "--help", cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0, done.stderr
    assert [command for command in COMMANDS if command not in done.stdout.split()] == []
    assert "loopscope" in imported
    assert imported & HEAVY == set()


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert (
        python("-m", "loopscope", "--version", cwd=tmp_path).stdout
        == f"loopscope {loopscope.__version__}\n"
    )


# The public calls


def test_each_public_call_is_made_where_the_stub_says() -> None:
    assert len(loopscope.__all__) > 60
    for name, home in loopscope._HOME.items():
        assert getattr(loopscope, name) is getattr(importlib.import_module(home), name)
        assert getattr(loopscope, name).__module__ == home


def test_dir_lists_the_public_calls() -> None:
    assert set(dir(loopscope)) == {*loopscope.__all__, "plots", "__version__"}


@pytest.mark.parametrize("name", ["lode", "HookedTransformer", "_private"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        AttributeError, match=f"module 'loopscope' has no attribute '{name}'; it has .*load"
    ):
        getattr(loopscope, name)
