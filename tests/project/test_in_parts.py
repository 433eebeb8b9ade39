"""`import loopscope` imports what its models need, and a package in parts is that package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from loopscope._in_parts import PackageInParts, import_in_parts

FILES = {
    "__init__.py": """
from . import low
from .Shape import Shape
from shop_of_parts.low import count as counted
TABLE = {"parts": low.count}
def __getattr__(name):
    raise ImportError(f"{name} went away")
""",
    "low.py": "count = 7",
    "Shape.py": "class Shape: sides = 3",
    "broken/__init__.py": "from .one import one\nraise RuntimeError('no disk')",
    "broken/one.py": "one = 1",
}
HEAVY = ("datasets", "matplotlib", "pandas", "plotly", "sklearn", "tokenizers", "transformers")
LOAD = f"""
import json, sys
import loopscope
model = loopscope.load("mini/multi_hop/r_dyn")
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
from transformer_lens import ActivationCache, HookedRootModule, evals
import transformer_lens
print(json.dumps([
    isinstance(model, HookedRootModule),
    transformer_lens.HookedRootModule is HookedRootModule,
    evals is sys.modules["transformer_lens.evals"],
    "SVDInterpreter" in dir(transformer_lens),
    type(transformer_lens) is type(sys),
]))
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for name, text in FILES.items():
        file = tmp_path / "shop_of_parts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    import_in_parts("shop_of_parts", "shop_of_parts.broken")
    yield sys.modules["shop_of_parts"]
    for name in [each for each in sys.modules if each.startswith("shop_of_parts")]:
        del sys.modules[name]


def test_a_name_is_found_in_its_module_and_the_rest_does_not_run(shop: ModuleType) -> None:
    from shop_of_parts.Shape import Shape  # type: ignore[import-not-found]

    assert shop.Shape is Shape  # and not the module of that name
    assert shop.counted == 7
    assert shop.low is sys.modules["shop_of_parts.low"]
    assert shop.broken is sys.modules["shop_of_parts.broken"]
    assert type(shop) is PackageInParts
    assert not hasattr(shop, "__wrapped__")
    assert type(shop) is PackageInParts


def test_another_name_runs_the_init_and_keeps_what_was_given_out(shop: ModuleType) -> None:
    shape = shop.Shape
    assert shop.TABLE == {"parts": 7}
    assert type(shop) is ModuleType
    assert shop.Shape is shape
    with pytest.raises(ImportError, match="gone went away"):
        _ = shop.gone


def test_the_names_of_a_package_are_those_after_its_init(shop: ModuleType) -> None:
    assert {"Shape", "TABLE", "counted", "low"} <= set(dir(shop))


def test_an_init_that_fails_says_so_each_time(shop: ModuleType) -> None:
    broken = sys.modules["shop_of_parts.broken"]
    assert broken.one == 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no disk"):
            _ = broken.two


def test_what_is_imported_already_and_what_is_absent_stay_as_they_are(shop: ModuleType) -> None:
    assert shop.TABLE
    import_in_parts("shop_of_parts", "no_shop_of_parts")
    assert sys.modules["shop_of_parts"] is shop
    assert type(shop) is ModuleType
    assert "no_shop_of_parts" not in sys.modules


@pytest.mark.slow
def test_loading_a_checkpoint_imports_no_tables_figures_or_tokenizers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    heavy, same = map(json.loads, done.stdout.splitlines())
    assert heavy == []
    assert same == [True] * 5
