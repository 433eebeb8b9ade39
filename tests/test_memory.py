"""Loading a release of the paper's size takes memory for its weights, not for the optimiser's state beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

WEIGHTS = 4 * (217 * 768 + 4 * (12 * 768**2 + 13 * 768) + 2 * 768)  # bytes: embedding, four blocks, final norm
MEASURE = """
import json, sys, torch, loopscope
from pathlib import Path

def peak():  # of this process alone: getrusage's begins with that of the process that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

load = loopscope.load
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
model = load(sys.argv[1])
assert all(bool(tensor.sum().isfinite()) for tensor in model.state_dict().values())
after = peak()
weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
print(json.dumps({"growth": after - before, "weights": weights}))
"""
WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from release_files import release_tensors, write_release
write_release(Path(sys.argv[1]), release_tensors(d_model=768, n_layers=4, d_mlp=3072, d_vocab=217))
"""


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "checkpoint_epoch_5388.pt"
    subprocess.run([sys.executable, "-c", WRITE, str(path), str(Path(__file__).parent)], check=True, timeout=120)
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process can read its own peak memory on Linux only")
def test_loading_grows_peak_memory_by_little_more_than_the_weights(release: Path) -> None:
    assert release.stat().st_size > 2.9 * WEIGHTS, "the optimiser's state is in the file"
    done = subprocess.run([sys.executable, "-c", MEASURE, str(release)], check=True, capture_output=True, text=True, timeout=120)
    measured = json.loads(done.stdout)
    assert measured["weights"] == WEIGHTS
    assert measured["growth"] >= 0.9 * WEIGHTS, "every weight was read, so they are all counted"
    assert measured["growth"] <= 1.3 * WEIGHTS
