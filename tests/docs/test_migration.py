"""The pages for users of other tools: our lines run, and theirs where the tool is installed."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest

from paths import DOCS

TOOLS = ("transformer_lens", "nnsight", "torchlens")


def run(page: str, tmp_path: Path, languages: str) -> None:
    """Run the blocks of some languages as one file, as nnsight reads the source of its blocks."""
    text = (DOCS / "migration" / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(rf"^```(?:{languages})\n(.*?)^```", text, flags=re.S | re.M)
    assert found
    script = tmp_path / f"from_{page}.py"
    script.write_text("\n".join(found), encoding="utf-8")
    runpy.run_path(str(script))


@pytest.mark.parametrize("page", [*TOOLS, "hooks"])
def test_our_lines_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, tmp_path, "python")


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_both_sides_give_the_same(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tools' own
        pytest.importorskip(tool)
        monkeypatch.chdir(tmp_path)
        run(tool, tmp_path, f"python|python {tool}")
