"""A GGUF file of an ordinary model: its fields, its tensors and its tokenizer in one file."""

from __future__ import annotations

import torch

from loopscope.checkpoints.formats.base import Format, Given, Located
from loopscope.checkpoints.formats.released_folder import family_of, open_release
from loopscope.checkpoints.gguf.kinds import config_of, keys_of, tensors_of
from loopscope.checkpoints.gguf.reader import SUFFIX, GgufFile
from loopscope.models.core.base import LoopedModel


def _open(located: Located, given: Given) -> tuple[LoopedModel, str | None]:
    file = GgufFile(located.files.weights)
    return open_release(located, (config_of(file), tensors_of(file)), given)


def _family(located: Located) -> str:
    file = GgufFile(located.files.weights)
    return family_of(
        located, (config_of(file), dict.fromkeys(keys_of(file), torch.empty(0, device="cpu")))
    )


GGUF = Format(lambda located: located.files.weights.suffix == SUFFIX, _family, _open)
