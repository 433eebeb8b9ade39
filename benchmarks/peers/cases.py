"""The looped modules that every tool is asked about, with the cells to write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import hrm_text
from benchmarks.plain_ouro import PlainOuro
from loopscope.models.core.registry import build
from loopscope.models.families.ouro import OuroConfig

D_MODEL, LOOPS, BLOCKS, LENGTH = 64, 4, 2, 11
CYCLES = (2, 3)


@dataclass(frozen=True)
class Case:
    """A looped module, and the cells to write.

    Attributes:
        module: From tokens to logits.
        blocks: The paths of the blocks to patch, with how often each runs.
        clean, corrupted: Int[Tensor, "1 pos"].
        ours: This library's model of the same weights.
        places: This library's name of each call of each block.
        bridge: The name of each block on TransformerLens's bridge; None where it has no adapter.
        positions: Where to write.
    """

    module: nn.Module
    blocks: dict[str, int]
    clean: Tensor
    corrupted: Tensor
    ours: Any
    places: dict[tuple[str, int], str]
    bridge: Any = None
    positions: tuple[int, ...] = (0, 3, 6, 9)

    @property
    def cells(self) -> list[tuple[str, int, int]]:
        """Block, call and position, all counted from 0; the last position is only read."""
        return [
            (path, call, position)
            for path, calls in self.blocks.items()
            for call in range(calls)
            for position in self.positions
        ]


class Logits(nn.Module):
    """A language model of transformers as a module from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


def hand_written() -> Case:
    """An Ouro-like module with random weights."""
    config = OuroConfig(
        n_layers=BLOCKS, n_loops=LOOPS, d_model=D_MODEL, n_heads=4, d_mlp=128,
        d_vocab=97, n_ctx=32, exit_gate=False,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = build(config).eval()
    places = {
        (f"blocks.{layer}", loop): f"loops.{loop}.blocks.{layer}"
        for layer in range(BLOCKS)
        for loop in range(LOOPS)
    }
    module = PlainOuro(ours, config.rope_theta).eval()
    blocks = {f"blocks.{layer}": LOOPS for layer in range(BLOCKS)}
    return Case(module, blocks, *_tokens(config.d_vocab), ours, places)


def transformers_own() -> Case:
    """transformers' own class with random weights."""
    high, low = CYCLES
    theirs, ours = hrm_text.random_pair(
        high, low, vocab_size=97, hidden_size=D_MODEL, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, head_dim=16,
    )  # fmt: skip
    lows, highs = "model.model.L_module.layers.0", "model.model.H_module.layers.0"
    places = {
        (lows, h * low + step): f"loops.{h}.low.{step}.blocks.0"
        for h in range(high)
        for step in range(low)
    } | {(highs, h): f"loops.{h}.high.blocks.0" for h in range(high)}
    return Case(
        Logits(theirs), {lows: high * low, highs: high}, *_tokens(97), ours, places,
        {lows: "L_blocks.0", highs: "H_blocks.0"},
    )  # fmt: skip


def _tokens(d_vocab: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return iter(torch.randint(1, d_vocab, (2, 1, LENGTH), generator=generator))


CASES = {"A hand-written module": hand_written, "transformers' HRM-Text": transformers_own}
