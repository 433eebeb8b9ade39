"""The benchmark of a GPU says where there is none, and its steps run on a CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu


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
    ]
    assert gpu.results._RESULTS.read_text(encoding="utf-8") == page
