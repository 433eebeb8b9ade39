"""A run's folder after something went wrong: cut logs, damaged states, drafts, a second process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loopscope.checkpoints.load import load
from loopscope.training.folder import claim
from loopscope.training.trainer import Trainer
from paths import HELPERS
from tiny_run import TINY

SHORT = replace(TINY, stages=tuple(replace(stage, max_updates=4) for stage in TINY.stages))


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    Trainer(SHORT, folder).run()
    return folder


@pytest.fixture
def done(run_once: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(run_once, tmp_path / "done")


@pytest.mark.slow
def test_a_log_line_that_was_cut_is_left_out_and_the_run_goes_on(done: Path) -> None:
    whole = (done / "log.jsonl").read_text()
    (done / "log.jsonl").write_text(whole + '{"stage": 1, "stage_up')
    Trainer(SHORT, done, resume=True).run()
    assert (done / "log.jsonl").read_text() == whole
    assert len(whole.splitlines()) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[: len(content) // 2],
        lambda content: b"no state",
        lambda content: content[:-40] + bytes(40),
    ],
    ids=["empty", "start", "half", "text", "end"],
)
def test_a_damaged_state_is_refused_in_one_line(
    done: Path, damage: Callable[[bytes], bytes]
) -> None:
    (done / "state.pt").write_bytes(damage((done / "state.pt").read_bytes()))
    with pytest.raises(
        ValueError, match=r"state\.pt is damaged \(\w+\), so .*; remove it"
    ) as caught:
        Trainer(SHORT, done, resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"recipe": "other"}, [1], {"progress": {"x": 1}}])
def test_a_state_that_holds_something_else_is_refused(done: Path, content: object) -> None:
    torch.save(content, done / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt is damaged \(\w+\)"):
        Trainer(SHORT, done, resume=True)


def test_drafts_of_a_killed_process_are_removed_and_nothing_else(done: Path) -> None:
    for name in (".state.pt.a1b2", ".log.jsonl.x", "released/final/.checkpoint_epoch_3.pt.y"):
        (done / name).parent.mkdir(parents=True, exist_ok=True)
        (done / name).write_bytes(bytes(9))
    (done / ".final.abc").mkdir()
    (done / ".final.abc" / "model.safetensors").write_bytes(bytes(9))
    (done / ".notes").write_text("mine")
    Trainer(SHORT, done, resume=True)
    hidden = [path.name for path in done.rglob(".*")]
    assert hidden == [".notes"]


HOLD = """
import sys
from pathlib import Path
from loopscope.training.folder import claim
claim(Path(sys.argv[1]), [])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HELPERS.parent.parent
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            ValueError, match=rf"another process \(number {holder.pid}\) writes to .*run; wait"
        ):
            Trainer(TINY, tmp_path / "run")
        holder.kill()
    claim(tmp_path / "run", [])


def test_one_process_may_take_its_folder_again(tmp_path: Path) -> None:
    claim(tmp_path, [])
    claim(tmp_path, [])


@pytest.mark.slow
def test_a_finished_run_makes_its_last_checkpoint_again(done: Path) -> None:
    before = load(done / "final").state_dict()
    card = json.loads((done / "final" / "card.json").read_text())
    shutil.rmtree(done / "final")
    Trainer(SHORT, done, resume=True).run()
    after = load(done / "final").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = json.loads((done / "final" / "card.json").read_text())
    assert {**again, "seconds": 0} == {**card, "seconds": 0}


def test_the_checkpoint_of_an_earlier_stage_cannot_be_made_again_and_that_is_said(
    done: Path,
) -> None:
    shutil.rmtree(done / "2_hops")
    with pytest.warns(
        UserWarning, match=r"done lacks the checkpoint of .* '2_hops', whose weights"
    ):
        Trainer(SHORT, done, resume=True).run()
    assert not (done / "2_hops").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("writing\nfailed")]
)
def test_a_full_disk_leaves_the_state_and_says_what_to_do(
    done: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainer, before = Trainer(SHORT, done, resume=True), (done / "state.pt").read_bytes()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(
        OSError, match=r"state\.pt could not be written, .*--resume: .*[a-z]$"
    ) as caught:
        trainer.save()
    assert "\n" not in str(caught.value)
    assert (done / "state.pt").read_bytes() == before
    assert [path.name for path in done.glob(".*")] == []
