"""A tokenizer of a few words, as a released language model has one beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

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
