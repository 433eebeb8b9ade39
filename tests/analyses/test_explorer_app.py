"""The explorer's callbacks and its server, without a browser."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from explored import A_TEXT, B_TEXT, around, serving, valid
from loopscope.analyses.common.configs import ExploreConfig
from loopscope.analyses.explorer import app as explorer
from loopscope.analyses.explorer import callbacks, wiring
from loopscope.analyses.explorer.app import make_explorer
from loopscope.analyses.explorer.callbacks import Explorer
from loopscope.analyses.explorer.model import patch_cell
from loopscope.analyses.explorer.questions import ask
from toy import HEADS, LOOPS, toy

# The page's callbacks


@pytest.fixture
def made() -> Explorer:
    return Explorer(around(toy()), LOOPS, LOOPS)


def test_what_can_be_asked_is_passed_on_and_what_cannot_is_explained(made: Explorer) -> None:
    keep = callbacks.no_update
    assert made.check("<w_1> <w_2>", "<w_3><w_2>", None) == (
        "<w_1><w_2>",
        {"a": "<w_1><w_2>", "b": "<w_3><w_2>"},
        "",
        "",
        "",
        "",
        "",
    )
    assert made.check("<w_1><w_2>", "<w_3><w_2>", "<w_1><w_2>")[0] is keep
    wrong = made.check("<x>", "<w_3><w_2>", "<w_1><w_2>")
    assert wrong[:2] == (keep, keep)
    assert wrong[2].startswith("A: '<x>' is not one of the 29 tokens")
    assert wrong[5:] == (callbacks.STALE, callbacks.STALE)
    assert made.check(None, "<w_1>", None)[2].startswith("A: a text must hold at least one token")
    longer = made.check("<w_1><w_2>", "<w_3>", "<w_1><w_2>")
    assert longer[1:3] == (keep, "")
    assert longer[3].startswith("B: B must have as many tokens as A, which has 2, got 1; nothing")
    assert longer[5:] == ("", callbacks.STALE)


@pytest.mark.shapes
def test_each_answer_is_drawn_under_the_lock_and_timed(
    made: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    for name in ("lens_table", "margins", "heads_of", "loops_of", "patch_grid", "patch_cell"):
        real = getattr(callbacks, name)

        def watched(*args: Any, real: Any = real, **options: Any) -> Any:
            held.append(made.lock.locked())
            return real(*args, **options)

        monkeypatch.setattr(callbacks, name, watched)
    asked = {"a": A_TEXT, "b": B_TEXT}
    assert made.show_map(None, 2, "all", None) == (*[callbacks.no_update] * 7, "")
    assert valid(made.show_lens(A_TEXT, 3, "iterations")[0]).data[0].y == ("0.1", "1.1", "2.1")
    assert len(valid(made.show_margin(A_TEXT, 3)[0]).data[0].x) == made.most == 12
    assert len(valid(made.show_attention(A_TEXT, 3, "heads", 9, 1, 0)[0]).data) == HEADS
    assert len(valid(made.show_attention(A_TEXT, 3, "loops", 1, 1, 0)[0]).data) == 3
    figure, shown, _, blocks, positions, block, position, took = made.show_map(
        asked, 2, "all", None, "loops.3.blocks.0", 5
    )
    assert (len(figure["data"][0]["y"]), len(blocks), len(positions)) == (4, 4, 6)
    assert (block, position) == (None, 5), "a block that is no longer there is not kept"
    assert shown["n_loops"] == 2
    assert took.endswith(" ms")
    table, frame, _ = made.show_cell("loops.1.blocks.0", 3, shown)
    after = patch_cell(made.subject.model, *made.pair(asked), 2, "loops.1.blocks.0", 3)[1]
    assert f"to {after.margin:.2f} logits" in str(table)
    assert "shapes" in str(frame.to_plotly_json())
    assert made.show_cell(None, 3, shown)[2] == ""
    assert held == [True] * 6


def test_no_question_is_asked_while_another_computation_has_hooks_on_the_model(
    made: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def watched(*args: Any) -> Any:
        held.append(made.lock.locked())
        return ask(*args)

    monkeypatch.setattr(callbacks, "ask", watched)
    made.reads(A_TEXT, None)
    made.check(A_TEXT, B_TEXT, None)
    made.show_lens(A_TEXT, 1, "blocks")
    assert held == [True] * 3


def test_the_answer_is_read_at_the_chosen_position_of_both_texts(made: Explorer) -> None:
    options, kept = made.reads(A_TEXT, 2)
    assert [each["label"] for each in options][2:4] == ["2 <w_2>", "3 <w_20>"]
    assert kept is callbacks.no_update
    assert made.reads("<w_1><w_2>", 5)[1] is None
    query = ask(made.subject, A_TEXT, LOOPS, 2)
    model = made.subject.model
    logits = model(query.batch.tokens, n_loops=LOOPS, mask=query.batch.mask)[0, 2]
    assert (query.readout, query.known, query.answer_id) == (2, False, int(logits.argmax()))
    known = "<w_1><w_2><w_3>"
    assert not ask(made.subject, known, LOOPS, 1).known, "a true answer is of the own readout"
    assert ask(made.subject, known, LOOPS, 99).readout == ask(made.subject, known, LOOPS).readout
    asked = {"a": A_TEXT, "b": B_TEXT}
    shown = made.show_map(asked, 2, "all", 2)[1]
    assert shown["read"] == 2
    a, b = made.pair(shown)
    assert (a.readout, b.readout) == (2, 2)
    assert "Top tokens at 2 <w_2>" in str(made.show_margin(A_TEXT, 3, 2)[2])


def test_iterations_outside_the_slider_are_brought_inside(made: Explorer) -> None:
    assert [made.limit(n, 9) for n in (None, 0, 2, 99)] == [(3, 3), (3, 3), (1, 1), (11, 9)]


# Serving


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(ExploreConfig(port=0, per_hop=3)) as found:
        yield found


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    assert "loopscope: mini/multi_hop/r_dyn" in text
    assert 'src="http' not in text
    assert 'href="http' not in text
    assert "--accent: #0b4f8a" in text, "the report's colours are the page's"


POST = "POST /_dash-update-component HTTP/1.1\r\nHost: 127.0.0.1\r\n"
JSON = "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"


@pytest.mark.parametrize(
    ("request_text", "code"),
    [
        (POST + JSON.format(3) + "{{{", 400),
        (POST + JSON.format(2) + "{}", 400),
        (POST + JSON.format(2) + "[]", 400),
        (POST + JSON.format(14) + '{"output": 73}', 400),
        (POST + JSON.format(99_999_999) + "x", 413),
        (POST + "Content-Length: 2\r\n\r\n{}", 415),
        (POST + "Content-Length: many\r\n\r\n{}", 415),
        ("GET /_dash-component-suites/../x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
    ],
)
def test_a_bad_request_is_refused_with_one_line(
    request_text: str, code: int, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = int(address.rpartition(":")[2].strip("/"))
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(request_text.encode())
        answer = client.recv(100).decode()
    assert f" {code} " in answer.splitlines()[0]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("refused ")
    assert f": {code}, " in lines[0]
    assert len(lines[0]) < 320
    assert urllib.request.urlopen(address).status == 200


def test_an_error_inside_a_callback_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(wiring, "set_props", lambda key, props: said.append(props["children"]))
    try:
        ask(None, "<e_1>", 1)  # type: ignore[arg-type]
    except Exception as error:
        wiring._report(error)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"could not be computed: \w+: .* \(.*\.py:\d+\)$", line)
    assert said[0].startswith("This could not be computed: ")


def test_a_request_by_another_name_is_refused(address: str) -> None:
    request = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="403") as refused:
        urllib.request.urlopen(request)
    refused.value.close()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"host": "0.0.0.0"}, r"this machine alone, at 127\.0\.0\.1, got the host '0\.0\.0\.0'"),
        ({"host": "localhost"}, "got the host 'localhost'"),
        ({"port": 70000}, "a port is between 0 .* and 65535, got 70000"),
        ({"n_loops": 0}, "n_loops must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_explorer(ExploreConfig(per_hop=1, **{"port": 0, **changes}))


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"port {port} cannot be used .*--port 0 for a free one"
        ):
            make_explorer(ExploreConfig(per_hop=1, port=port))


def test_a_model_without_a_recorded_number_of_iterations_needs_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explorer, "open_subject", lambda config, **_: around(toy(n_loops=None)))
    with pytest.raises(ValueError, match="records no number of iterations"):
        make_explorer(ExploreConfig(port=0))
    make_explorer(ExploreConfig(port=0, n_loops=3)).server_close()


def test_the_command_prints_one_line_and_ends_with_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(server: Any, *_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explorer.BaseWSGIServer, "serve_forever", interrupted)
    explorer.explore(ExploreConfig(port=0, per_hop=1))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Explore mini/multi_hop/r_dyn at http://127.0.0.1:")
    assert list(tmp_path.iterdir()) == []
