"""The config fields of public releases at reduced width (tests/configs), weights for them, and the
page that says which have a reference class. `python tests/helpers/release_configs.py` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables import TABLES
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "releases.md"
_GATE = dict.fromkeys(("model.early_exit_gate.weight", "model.early_exit_gate.bias"), torch.ones(1))
_ABOUT = """# Releases

A release is a published model. `loopscope list` names the known ones, and `loopscope fetch NAME`
says how large one is and downloads it. Then `load(NAME)` loads it. Useful arguments of `load`:

| argument | what it does |
|---|---|
| `ignore=("field",)` | reads config.json without these fields |
| `dtype="bfloat16"`, `device="cuda"` | the number format and the place of all weights |
| `adapter=folder` | merges a LoRA adapter in peft's layout, as peft does |
| `vocab=False` | no vocabulary, and no warning about a tokenizer that cannot be used |

`load(folder, window=(first, last))` loops some layers of an ordinary model without training. This
works for Llama, SmolLM2, Mistral, Qwen2 and 2.5, Qwen3, Gemma 2, Gemma 3 (text), OLMo-2, GPT-NeoX
(Pythia) and GPT-2. Llama, Qwen2, Qwen3, Gemma 2, Gemma 3 and GPT-2 may also be one GGUF file. To
read its fields, tensors and tokenizer install the extra `loopscope[gguf]`. Quantised numbers become
float32.

If a tokenizer cannot be used, the weights load all the same and one warning gives the reason. A
file that mixes number formats of 16 and 32 bits loads in float32 with a warning, unless you give
`dtype=`.

The release of a puzzle solver is one pickle without a suffix, `step_<N>` or `checkpoint`, beside
`all_config.yaml`; `load` reads it without executing code from it. The tests load small folders of
this layout, because the files below are too large for them.

| release | family | what it solves |
|---|---|---|
| sapientinc/HRM-checkpoint-sudoku-extreme | hrm | Sudoku, 81 cells |
| sapientinc/HRM-checkpoint-maze-30x30-hard | hrm | mazes of 30 x 30 cells |
| sapientinc/HRM-checkpoint-ARC-2 | hrm | ARC-AGI-2 |
| Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-mlp | trm | Sudoku, an MLP along positions |
| Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-att | trm | Sudoku, attention |
| Sanjin2024/TinyRecursiveModel-Maze-Hard | trm | mazes of 30 x 30 cells |
| Sanjin2024/TinyRecursiveModels-ARC-AGI-1 | trm | ARC-AGI-1 |
| Sanjin2024/TinyRecursiveModels-ARC-AGI-2 | trm | ARC-AGI-2 |
| arcprize/trm_arc_prize_verification | trm | ARC-AGI-1 and 2, each in a folder of its own |

The HRM releases are those of its authors. The authors of TRM have published none that is known
here; the TRM releases are from others who ran their code.

## Fields of config.json, and reference classes

Does `load` read the config of each release correctly? The config fields of each release below are
kept at reduced width in `tests/configs/`. Those of Ouro-1.4B, Ouro-2.6B and Ouro-2.6B-Thinking come
from the files themselves; the others are put together from public descriptions, golden cases and
the releases' own code. A test loads each of them with random weights:

* If transformers has a class for the release, the logits must equal those of the class, to 5e-5 of
  the largest logit ("yes" in the table).
* If it has none ("no reference"), this test only loads the fields and runs the model. The family is
  compared with outputs of the release's own code elsewhere (`tests/golden/`).

Fields on which no result depends are ignored; `checkpoints/fields/harmless.py` lists them with the
reasons, and the tables in `checkpoints/tables/` list those of one family. Any other unknown field
is an error that names it, unless you write `load(..., ignore=("field",))`.

| fields of | exact to the reference class |
|---|---|
"""


def release_configs() -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: the file's stem, which names the family or the kind, and the fields."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in sorted((ROOT / "tests" / "configs").glob("*.json")):
        for name, fields in json.loads(path.read_text(encoding="utf-8")).items():
            like = found[fields["like"]][1] if "like" in fields else {}
            own = {key: value for key, value in fields.items() if key != "like"}
            found[name] = path.stem, {**like, **own}
    return found


def reference_class(fields: Mapping[str, Any]) -> Any:
    """The class of transformers for a config; None where it has none of its own."""
    return getattr(transformers, fields.get("architectures", ["none"])[0], None)


def write_reference(fields: Mapping[str, Any], folder: Path) -> Any:
    """A random model of the reference class, written as a release with exactly these fields."""
    kind = reference_class(fields)
    torch.manual_seed(0)
    config = kind.config_class(**fields)
    model = kind._from_config(config, experts_implementation="eager", dtype="float32").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            size = float(parameter.abs().mean()) or 0.2
            parameter.add_(0.5 * size * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    model.config.use_cache = False  # some classes want more of a config than released ones say
    (folder / "config.json").write_text(json.dumps(fields))
    return model


def write_release_of(name: str, stem: str, fields: Mapping[str, Any], folder: Path) -> LoopedModel:
    """A random model of our own, written under the release's keys with exactly these fields."""
    family = (
        ("retrofit_olmo" if "OLMo" in name else "retrofit_llama") if stem == "retrofit" else stem
    )
    table: Table = next(each for each in TABLES if each.family == family)
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    cfg = table.config(ConfigFields(fields, path, harmless=table.harmless), _GATE, {})
    torch.manual_seed(0)
    model = build(cfg)
    state, names = model.state_dict(), table.names(cfg)
    tensors = {key: state[ours].clone() for key, ours in names.items() if ours in state}
    save_file(tensors, folder / "model.safetensors")
    return model


def page() -> str:
    """The page of releases, in Markdown."""
    rows = []
    for name, (_, fields) in release_configs().items():
        kind = reference_class(fields)
        said = "no reference" if kind is None else f"yes, to `{kind.__name__}`"
        rows.append(f"| {name} | {said} |\n")
    return _ABOUT + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
