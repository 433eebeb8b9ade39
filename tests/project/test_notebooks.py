"""Every notebook is stored with its outputs, and a fresh run gives the same."""

from __future__ import annotations

import base64
import warnings

import pytest
from nbformat import NotebookNode

from shipped_pages import assert_same_page

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the Jupyter client's own, on import
    from notebooks import outputs

LARGEST = 600_000  # bytes of a notebook


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_a_warning_after_a_progress_bar_is_kept() -> None:
    text = "\r 10%\r100%\nUserWarning: odd\n"
    warned, bar = (
        outputs.NotebookNode(output_type="stream", name="stderr", text=each)
        for each in (text, "\r 10%\r100%\n")
    )
    kept = [each for each in (warned, bar) if outputs._without_bars(each)]
    assert [each.text.strip() for each in kept] == ["UserWarning: odd"]


@pytest.mark.slow
@pytest.mark.parametrize("name", outputs.names())
def test_a_fresh_run_gives_the_stored_outputs(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the Jupyter client's own, at exit
        fresh = outputs.executed(name, pictures=False)
    for ran, stored in zip(code(fresh), code(outputs.stored(name)), strict=True):
        assert len(outputs.figures(ran)) == len(outputs.figures(stored)), ran.source
        for now, then in zip(outputs.texts(ran), outputs.texts(stored), strict=True):
            assert_same_page(now, then)


@pytest.mark.parametrize("name", outputs.names())
def test_a_stored_notebook_shows_everything_without_being_run(name: str) -> None:
    cells = code(outputs.stored(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(len(outputs.figures(cell)) for cell in cells) >= 1
    for cell in cells:
        assert all("/tmp/" not in text and "/root" not in text for text in outputs.texts(cell))
        kinds = {output.get("name", output.output_type) for output in cell.outputs}
        assert kinds <= {"stdout", "display_data", "execute_result"}, "bars and warnings are stderr"
        for figure in outputs.figures(cell):
            picture = base64.b64decode(figure[outputs.PICTURE])
            assert picture.startswith(b"\x89PNG")
            assert len(picture) > 5_000
    assert (outputs.FOLDER / f"{name}.ipynb").stat().st_size < LARGEST
