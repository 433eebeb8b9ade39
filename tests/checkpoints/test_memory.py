"""Loading takes memory for the weights once: not for the optimiser's state beside them, and not for
copies of shards.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paths import HELPERS

WEIGHTS = 4 * (
    217 * 768 + 4 * (12 * 768**2 + 13 * 768) + 2 * 768
)  # bytes: embedding, four blocks, final norm
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

OURO = {
    "model_type": "ouro",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 6,
    "hidden_act": "silu",
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
}
WRITE_OURO = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.tables.ouro import TABLE
from loopscope.models.core.registry import build

folder = Path(sys.argv[1])
values = json.loads((folder / "config.json").read_text())
cfg = TABLE.config(ConfigFields(values, folder), {}, {})
with torch.device("meta"):
    shapes = {name: tensor.shape for name, tensor in build(cfg).state_dict().items()}
keys = [(key, shapes[name]) for key, name in TABLE.names(cfg).items()]
where = {}
for shard in range(3):
    name = f"model-0000{shard + 1}-of-00003.safetensors"
    draw = lambda shape: torch.randn(shape, dtype=torch.bfloat16) * 0.02
    tensors = {key: draw(shape) for key, shape in keys[shard::3]}
    save_file(tensors, folder / name)
    where |= dict.fromkeys(tensors, name)
(folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
"""
RUN_OURO = """
import json, sys, torch, loopscope
model = loopscope.load(sys.argv[1])
with torch.no_grad():
    logits = model(torch.tensor([[5, 7, 11]]), n_loops=2)
dtypes = [str(tensor.dtype) for tensor in (logits, next(model.parameters()))]
print(json.dumps([*dtypes, bool(logits.isfinite().all())]))
"""


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "checkpoint_epoch_5388.pt"
    subprocess.run([sys.executable, "-c", WRITE, str(path), str(HELPERS)], check=True, timeout=120)
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="a process can read its own peak memory on Linux only",
)
def test_loading_grows_peak_memory_by_little_more_than_the_weights(release: Path) -> None:
    assert release.stat().st_size > 2.9 * WEIGHTS, "the optimiser's state is in the file"
    measured = json.loads(python(MEASURE, release))
    assert measured["weights"] == WEIGHTS
    assert measured["growth"] >= 0.9 * WEIGHTS, "every weight was read, so they are all counted"
    assert measured["growth"] <= 1.3 * WEIGHTS


def python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="a process can read its own peak memory on Linux only",
)
def test_a_sharded_gigabyte_of_ouro_is_read_once_and_runs_in_bfloat16(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OURO))
    python(WRITE_OURO, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size > 1e9
    measured = json.loads(python(MEASURE, tmp_path))
    assert 0.99 * size < measured["weights"] <= size
    assert 0.9 * size <= measured["growth"] <= 1.2 * size
    assert json.loads(python(RUN_OURO, tmp_path)) == ["torch.bfloat16", "torch.bfloat16", True]
    for path in tmp_path.iterdir():
        path.unlink()
