"""A tokenizer of a few words, and a toy Ouro with one, as users of language models have it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from golden_cases import GOLDEN

CAT, DOG = "the cat sat on the mat", "the dog sat on the mat"
TEXTS = ["the cat sat on the mat", "the dog sat", "a cat and a dog"]


def make_tokenizer(
    folder: Path, size: int, extra: Sequence[str] = (), adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer over the letters of a few words, which puts BOS before a text or does
    not.
    """
    raw = Tokenizer(BPE())
    raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    raw.train_from_iterator(
        TEXTS, BpeTrainer(vocab_size=size, special_tokens=["<s>", *extra], show_progress=False)
    )
    if adds_bos:
        raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    made.save_pretrained(folder)
    return made


@cache
def ouro_folder() -> str:
    """A toy Ouro with an exit gate and a byte-level tokenizer, made once for the whole run."""
    folder = Path(mkdtemp(prefix="loopscope-")) / "ouro-toy"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "ouro" / name, folder)
    make_tokenizer(folder, 49)
    return str(folder)
