"""One torch thread, the toy models as fixtures, and what is said at the end of a run."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import NO_BROWSER, browser_path
from loopscope.checkpoints.load import save
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from paths import GOLDEN
from release_files import toy_model
from toy import (
    SOME_VARIANTS,
    BatchCentred,
    Bidirectional,
    ShortEnding,
    odd_one,
    toy,
    variant_name,
)

torch.set_num_threads(1)
WORST_ERRORS = pytest.StashKey[dict[tuple[str, str], float]]()


@pytest.fixture(params=SOME_VARIANTS, ids=variant_name)
def model(request: pytest.FixtureRequest) -> RecurrentDepth:
    """A toy model for each kind of positions, with and without input injection, in float64 and in
    float32. Identities ask for every combination with `every_variant`.
    """
    return toy(*request.param)


@pytest.fixture
def plain() -> RecurrentDepth:
    """A toy model in float64 without positions and without injection."""
    return toy()


@pytest.fixture(params=[Bidirectional, ShortEnding, BatchCentred])
def odd_model(request: pytest.FixtureRequest) -> LoopedModel:
    """A family that says no to one of the declared facts."""
    return odd_one(request.param)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder in our own format."""
    save(toy_model("learned", read_at="last_real"), tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def folder_with(tmp_path: Path) -> Callable[..., Path]:
    """A golden case's folder with some config fields changed (None takes one away)."""

    def make(case: str, changes: Mapping[str, object]) -> Path:
        folder = tmp_path / case
        folder.mkdir()
        shutil.copy(GOLDEN / case / "model.safetensors", folder)
        values = {**json.loads((GOLDEN / case / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(
            json.dumps({name: value for name, value in values.items() if value is not None})
        )
        return folder

    return make


@pytest.fixture
def record_error(request: pytest.FixtureRequest) -> Callable[[str, str, float], None]:
    """Remember the worst error of a case for the summary."""
    worst = request.config.stash.setdefault(WORST_ERRORS, {})

    def record(case: str, precision: str, error: float) -> None:
        worst[case, precision] = max(error, worst.get((case, precision), 0.0))

    return record


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a browser where there is none."""
    if item.get_closest_marker("browser") and browser_path() is None:
        pytest.skip(NO_BROWSER)


def pytest_collection_finish() -> None:
    """The garbage collector need not look at what was imported so far again and again."""
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """Where several processes share the tests, gather the worst errors of all of them."""
    if config.pluginmanager.hasplugin("dsession"):
        config.pluginmanager.register(GatherErrors(config))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands over the worst errors that it met."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        worst = session.config.stash.get(WORST_ERRORS, {})
        output["worst"] = [[*key, error] for key, error in worst.items()]


class GatherErrors:
    """Collects the worst errors of the workers.

    Attributes:
        config: The configuration of the process that reports.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_testnodedown(self, node: Any) -> None:
        """Take what one worker hands over when it ends."""
        worst = self.config.stash.setdefault(WORST_ERRORS, {})
        for case, precision, error in getattr(node, "workeroutput", {}).get("worst", []):
            worst[case, precision] = max(error, worst.get((case, precision), 0.0))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The table of worst errors, and one line on the tests that no browser could run."""
    worst = config.stash.get(WORST_ERRORS, {})
    if worst:
        terminalreporter.section("golden outputs: worst error, relative to the largest magnitude")
        for (case, precision), error in sorted(worst.items()):
            terminalreporter.write_line(f"{case:32} {precision:24} {error:.1e}")
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NO_BROWSER in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(
            f"{count} tests were skipped, because they need a browser: install Chromium "
            "(Debian: apt-get install chromium) and run the tests again",
            yellow=True,
        )
