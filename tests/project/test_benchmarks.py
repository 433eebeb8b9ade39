"""Benchmarks say where what they measure is not there, and their steps run on a CPU."""

from __future__ import annotations

import math
import os

import pytest
import torch

from benchmarks import gpu, growth, scale


def test_without_a_gpu_the_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="measures a GPU, but torch finds none"):
        gpu.main([])


def test_its_steps_run_on_a_cpu_and_leave_no_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = gpu.results._RESULTS.read_text(encoding="utf-8")
    gpu.main(["--device", "cpu", "--tiny", "--dtype", "bfloat16"])
    out = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in out] == [
        "forward",
        "readout",
        "sweep",
        "attribution",
        "collection",
        "probe",
        "training",
    ]
    assert gpu.results._RESULTS.read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("load", "cores", "words"),
    [
        (0.2, {0, 1}, ""),
        (3.26, {0, 1}, "; the machine was not idle (load average 3.3)"),
        (0.9, {1}, "; the machine was not idle (load average 0.9), there is one core only"),
    ],
)
def test_times_of_a_busy_machine_say_so(
    load: float, cores: set[int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores)
    assert scale.busy() == words


def test_the_slope_of_a_power_is_its_exponent() -> None:
    sizes = (3, 5, 11)
    assert growth.slope(sizes, [7 * size**2.5 for size in sizes]) == pytest.approx(2.5)
    assert growth.slope(sizes, [0.0, 0.5, 9.0], 1.0) != growth.slope(sizes, [0.0, 0.5, 9.0])
    assert math.isnan(growth.slope(sizes, [0.0, 0.5, 9.0], 1.0))


@pytest.mark.parametrize("method", growth.IDEAL)
def test_growth_is_measured_and_drawn(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = {"iterations": 2, "positions": 3, "batch": 1, "width": 8}
    monkeypatch.setattr(growth, "START", start)
    found = [growth.grown(method, axis, (4, 8), rounds=1) for axis in growth.SIZES]
    assert [each.line().split(" 4, 8:")[0] for each in found] == [
        f"* {method}, {axis}" for axis in growth.SIZES
    ]
    assert all(min(each.seconds) > 0 and min(each.mib) >= 0 for each in found)
    figure = growth.drawn(found)
    assert len(figure.data) == 3 * len(found) + 1
    ideal = figure.data[1]
    assert ideal.y[1] / ideal.y[0] == pytest.approx(2 ** growth.IDEAL[method]["iterations"])
