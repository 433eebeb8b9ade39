"""Who may import whom, what `import loopscope` finds and refuses, and what it leaves for later."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import loopscope
from analyses.figure_configs import ANALYSES
from loopscope._siblings import SIBLINGS

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = {"models", "checkpoints", "tasks", "interp", "training", "analyses", "loopscope"}
ALLOWED: dict[str, set[str]] = {
    "tasks": set(),
    "models": set(),
    "checkpoints": {"tasks", "models"},
    "interp": {"models"},
    "training": {"tasks", "models", "checkpoints", "interp"},
    "analyses": EVERYTHING,
    "loopscope": EVERYTHING,
}
COMMANDS = ("list", "report", "explore", *ANALYSES, "replication", "findings", "families", "gallery", "data", "train")


# The import graph, read from the sources


@dataclass(frozen=True)
class Arrow:
    """`source` imports `target`, both full module names; `late` where that happens inside a function."""

    source: str
    target: str
    late: bool


def arrows(root: Path) -> set[Arrow]:
    """Every import of one of our modules by another; those for the type checker alone do not count."""
    files = {module_name(path.relative_to(root)): path for package in EVERYTHING for path in (root / package).rglob("*.py")}
    found = set()
    for name, path in files.items():
        for target, late in imports_of(path, name):
            ours = target if target in files else target.rpartition(".")[0]
            if ours in files and ours != name:
                found.add(Arrow(name, ours, late))
    return found


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, name: str) -> Iterator[tuple[str, bool]]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node, late in executed(ast.parse(path.read_text()), False):
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", late) for alias in node.names)


def executed(node: ast.AST, late: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below one, without what only the type checker sees, and whether a function must be called to get there."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            children: list[ast.AST] = list(child.orelse)
        else:
            children = [child]
        for kept in children:
            yield kept, late
            yield from executed(kept, late or isinstance(kept, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def package_of(module: str) -> str:
    return module.partition(".")[0]


def forbidden(found: set[Arrow]) -> list[str]:
    """The arrows between packages that are not allowed, with the modules that make them."""
    between = {(arrow.source, arrow.target) for arrow in found if package_of(arrow.source) != package_of(arrow.target)}
    return sorted(f"{source} -> {target}" for source, target in between if package_of(target) not in ALLOWED[package_of(source)])


def cycle(edges: set[tuple[str, str]]) -> list[str]:
    """One cycle of a graph, or an empty list."""
    graph: dict[str, set[str]] = {}
    for source, target in edges:
        graph.setdefault(source, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def package_cycle(found: set[Arrow]) -> list[str]:
    return cycle({(package_of(a.source), package_of(a.target)) for a in found if package_of(a.source) != package_of(a.target)})


def module_cycle(found: set[Arrow]) -> list[str]:
    """A cycle of modules while they are being imported."""
    return cycle({(arrow.source, arrow.target) for arrow in found if not arrow.late})


@pytest.fixture(scope="module")
def ours() -> set[Arrow]:
    return arrows(ROOT)


def test_packages_import_only_what_they_may(ours: set[Arrow]) -> None:
    assert forbidden(ours) == []


def test_there_is_no_cycle_between_packages(ours: set[Arrow]) -> None:
    assert package_cycle(ours) == []


def test_there_is_no_cycle_between_modules_while_importing(ours: set[Arrow]) -> None:
    assert module_cycle(ours) == []


@pytest.mark.parametrize(
    ("source", "target"), [("checkpoints.load", "models.base"), ("interp.lens", "models.base"), ("models", "models.recurrent_depth")]
)
def test_the_walk_sees_arrows_that_are_there(ours: set[Arrow], source: str, target: str) -> None:
    assert Arrow(source, target, late=False) in ours


@pytest.mark.parametrize(
    "line",
    [
        "import interp.lens",
        "import interp.lens as lens",
        "from interp import lens",
        "from interp.lens import logit_lens",
        "from interp import *",
        "def f():\n    from interp.lens import logit_lens",
        "class A:\n    def f(self):\n        import interp",
        "try:\n    import interp.lens\nexcept ImportError:\n    pass",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import interp.lens",
    ],
)
def test_the_walk_finds_a_forbidden_arrow(tmp_path: Path, line: str) -> None:
    write(tmp_path, {"models/base.py": line, "interp/lens.py": "", "interp/__init__.py": "", "models/__init__.py": ""})
    assert [arrow.split(" ")[0] for arrow in forbidden(arrows(tmp_path))] == ["models.base"]


@pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_imports_for_the_type_checker_do_not_count(tmp_path: Path, test: str) -> None:
    write(tmp_path, {"models/base.py": f"if {test}:\n    from interp.lens import Lens", "interp/lens.py": ""})
    assert arrows(tmp_path) == set()


@pytest.mark.parametrize(
    "line", ["from models import a", "from models.a import x", "import models.a", "from . import a", "from .a import x"]
)
def test_the_walk_finds_a_cycle_of_modules(tmp_path: Path, line: str) -> None:
    write(tmp_path, {"models/__init__.py": "", "models/a.py": "import models.b", "models/b.py": line})
    assert set(module_cycle(arrows(tmp_path))) == {"models.a", "models.b"}


def test_a_late_import_is_no_cycle_of_modules_but_one_of_packages(tmp_path: Path) -> None:
    write(tmp_path, {"analyses/a.py": "import loopscope.b", "loopscope/b.py": "def f():\n    import analyses.a"})
    assert module_cycle(arrows(tmp_path)) == []
    assert set(package_cycle(arrows(tmp_path))) == {"analyses", "loopscope"}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text + "\n")


# What is found from where


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


IMPORT = "import loopscope, sys; print(loopscope.__file__); print(loopscope.Batch.__module__)"
COMPLAIN = "try:\n    import loopscope\nexcept ImportError as error:\n    print(error)"


def test_every_package_is_checked_for_shadows() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} & EVERYTHING
    assert set(SIBLINGS) == packages - {"loopscope"}


def test_data_in_the_release_layout_does_not_hide_our_packages(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "multi_hop" / "final_models").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights.txt").write_text("data")
    done = python("-c", IMPORT, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(ROOT / "loopscope" / "__init__.py"), "models.tokens"]


@pytest.mark.parametrize("package", SIBLINGS)
@pytest.mark.parametrize("form", ["{}/__init__.py", "{}.py"])
def test_a_package_that_hides_ours_is_named_in_one_sentence(tmp_path: Path, package: str, form: str) -> None:
    shadow = form.format(package)
    write(tmp_path, {shadow: ""})
    (sentence,) = python("-c", COMPLAIN, cwd=tmp_path).stdout.splitlines()
    assert sentence.startswith(f"loopscope needs its own package '{package}' ({ROOT / package / '__init__.py'}), but Python finds ")
    assert str(tmp_path / shadow) in sentence
    assert sentence.endswith("rename that file or folder, or start Python from another directory")


def test_an_uncaught_shadow_ends_the_program_with_the_sentence(tmp_path: Path) -> None:
    write(tmp_path, {"models/__init__.py": ""})
    done = python("-m", "loopscope", "--help", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: loopscope needs its own package 'models'")


@pytest.mark.parametrize("made", ["types.ModuleType('models')", "types.SimpleNamespace(__file__='/elsewhere/models.py')"])
def test_a_foreign_package_that_is_imported_already_is_refused(tmp_path: Path, made: str) -> None:
    done = python("-c", f"import sys, types\nsys.modules['models'] = {made}\n{COMPLAIN}", cwd=tmp_path)
    assert done.stdout.startswith("loopscope needs its own package 'models'"), done.stderr


# What is left for later


def test_import_loopscope_does_not_import_torch(tmp_path: Path) -> None:
    code = "import loopscope, sys; print(sorted({'torch', 'pandas', 'plotly', 'transformer_lens', 'models'} & set(sys.modules)))"
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "[]"


def test_help_answers_in_under_a_second_and_lists_the_commands(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = python("-m", "loopscope", "--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1.0
    assert [command for command in COMMANDS if command not in done.stdout.split()] == []


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    done = python("-X", "importtime", "-m", "loopscope", "--help", cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0, done.stderr
    assert "loopscope" in imported
    assert imported & {"torch", "transformer_lens", "pandas", "plotly"} == set()


# The public calls

CALLS = {
    "available", "load", "save", "save_release", "train", "unrolled", "untied",
    "logit_lens", "readout_lens", "TunedLens", "train_tuned_lens", "decodability", "rank_trajectory", "halting", "exits", "apply_criterion",
    "KLBelow", "EntropyBelow", "TopStable", "CosineAbove", "StepBelow", "AccelerationBelow", "exit_distribution", "gate_logits",
    "activation_patch", "Sweep", "Cell", "causal_tracing", "denoising_map", "noising_map", "path_patch", "path_patch_sweep", "Sender",
    "Receiver", "attribution_patch", "edge_attribution", "gradients", "direct_logit_attribution",
    "qk_circuit", "ov_circuit", "full_qk", "full_ov", "composition_scores",
    "ablate", "Component", "steer", "set_to", "steering_vector", "attenuate_input", "swap_input",
    "dynamics", "effective_rank", "layer_dynamics", "attention_dynamics", "jacobian_spectrum",
}  # fmt: skip


def test_public_calls_are_the_packages_own() -> None:
    from checkpoints.catalog import available
    from checkpoints.load import load, save
    from interp.lens import logit_lens

    assert [loopscope.available, loopscope.load, loopscope.save, loopscope.logit_lens] == [available, load, save, logit_lens]


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(loopscope, name) is not None for name in loopscope.__all__)


def test_dir_lists_the_public_calls() -> None:
    assert set(dir(loopscope)) >= CALLS
    assert set(loopscope.__all__) <= set(dir(loopscope))


def test_the_type_checker_is_told_of_every_public_call() -> None:
    tree = ast.parse((ROOT / "loopscope" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.asname or alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == loopscope._HOME


@pytest.mark.parametrize("name", ["lode", "HookedTransformer", "_private"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'loopscope' has no attribute '{name}'; it has .*load"):
        getattr(loopscope, name)
