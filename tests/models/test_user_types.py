"""Public calls have types for a user's type checker: none is Any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

USER_FILE = """
import torch
import loopscope

reveal_type(loopscope.load)
model = loopscope.load("ltg_trained")
reveal_type(model)
tokens = torch.tensor([[1, 2, 3]])
reveal_type(model(tokens, n_loops=2))
reveal_type(model.run_with_cache(tokens, n_loops=2))
reveal_type(model.run_with_hooks(tokens, n_loops=2))
reveal_type(model.encode(["<e_1><r_1>"]))
reveal_type(model.hook_names(2))
reveal_type(model.cfg)
reveal_type(model.begin(tokens))
reveal_type(model.to_tokens("<e_1>"))
reveal_type(model.W_U)
reveal_type(loopscope.activation_patch)
reveal_type(loopscope.logit_lens)
reveal_type(loopscope.gradients)
reveal_type(loopscope.ablate)
reveal_type(loopscope.available())
"""


@pytest.mark.slow
def test_no_public_call_is_any_to_a_users_type_checker(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text(USER_FILE)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "setup.cfg")]
    shared = f"--cache-dir={ROOT / '.mypy_cache'}"  # with the project's own check
    done = subprocess.run(
        [*command, shared, str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        # an editable install is no folder that a type checker finds by itself
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    revealed = [line for line in done.stdout.splitlines() if "Revealed type is" in line]
    assert len(revealed) == USER_FILE.count("reveal_type"), done.stdout + done.stderr
    for line in revealed:
        shown = line.split("Revealed type is ")[1].strip().strip('"')
        assert not shown.startswith("Any"), line
        assert not shown.endswith("-> Any"), line
