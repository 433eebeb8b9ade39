"""A folder as users of language models have it: a toy Ouro with a tokenizer."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from golden_cases import GOLDEN
from small_tokenizer import make_tokenizer

CAT, DOG = "the cat sat on the mat", "the dog sat on the mat"


@cache
def ouro_folder() -> str:
    """A toy Ouro with an exit gate and a byte-level tokenizer, made once for the whole run."""
    folder = Path(mkdtemp(prefix="loopscope-")) / "ouro-toy"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "ouro" / name, folder)
    make_tokenizer(folder, 49)
    return str(folder)
