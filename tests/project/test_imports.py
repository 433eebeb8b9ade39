"""Who may import whom: the folders, their rooms, and no cycle of any kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from import_graph import Arrow, arrows, cycle, forbidden, room_cycle
from paths import ROOT, write


@pytest.fixture(scope="module")
def ours() -> set[Arrow]:
    return arrows(ROOT)


def test_folders_import_only_what_they_may(ours: set[Arrow]) -> None:
    assert forbidden(ours) == []


def test_there_is_no_cycle_of_modules_also_not_inside_functions(ours: set[Arrow]) -> None:
    assert cycle(ours) == []


def test_there_is_no_cycle_of_rooms(ours: set[Arrow]) -> None:
    assert room_cycle(ours) == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("loopscope.checkpoints.load", "loopscope.models.core.base"),
        ("loopscope.interp.lens.lens", "loopscope.models.core.base"),
        ("loopscope.__main__", "loopscope.analyses.cli"),
    ],
)
def test_the_walk_sees_arrows_that_are_there(ours: set[Arrow], source: str, target: str) -> None:
    assert (source, target) in ours


@pytest.mark.parametrize(
    "line",
    [
        "import loopscope.interp.lens",
        "import loopscope.interp.lens as lens",
        "from loopscope.interp import lens",
        "from loopscope import interp",
        "from loopscope.interp.lens import logit_lens",
        "from ..interp import lens",
        "from loopscope.interp import *",
        "def f():\n    from loopscope.interp.lens import logit_lens",
        "def f():\n    import_module('loopscope.interp.lens')",
        "class A:\n    def f(self):\n        import loopscope.interp",
        "try:\n    import loopscope.interp.lens\nexcept ImportError:\n    pass",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import loopscope.interp.lens",
    ],
)
def test_the_walk_finds_a_forbidden_arrow(tmp_path: Path, line: str) -> None:
    write(tmp_path, {"models/base.py": line, "interp/lens.py": "", "interp/__init__.py": ""})
    assert [arrow.split(" ")[0] for arrow in forbidden(arrows(tmp_path))] == [
        "loopscope.models.base"
    ]


@pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_imports_for_the_type_checker_do_not_count(tmp_path: Path, test: str) -> None:
    line = f"if {test}:\n    from loopscope.interp.lens import Lens"
    write(tmp_path, {"models/base.py": line, "interp/lens.py": ""})
    assert arrows(tmp_path) == set()


@pytest.mark.parametrize(
    "line",
    [
        "from loopscope.models import a",
        "from loopscope.models.a import x",
        "import loopscope.models.a",
        "from . import a",
        "from .a import x",
        "def f():\n    from loopscope.models.a import x",
        "def f():\n    from . import a",
    ],
)
def test_the_walk_finds_a_cycle_of_modules(tmp_path: Path, line: str) -> None:
    write(
        tmp_path,
        {"models/__init__.py": "", "models/a.py": "import loopscope.models.b", "models/b.py": line},
    )
    assert set(cycle(arrows(tmp_path))) == {"loopscope.models.a", "loopscope.models.b"}


def test_the_walk_finds_a_cycle_of_rooms(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "interp/lens/a.py": "from loopscope.interp.edit.b import x",
            "interp/edit/b.py": "",
            "interp/edit/c.py": "def f():\n    from loopscope.interp.lens.d import y",
            "interp/lens/d.py": "",
        },
    )
    found = arrows(tmp_path)
    assert cycle(found) == []
    assert set(room_cycle(found)) == {"loopscope.interp.lens", "loopscope.interp.edit"}
