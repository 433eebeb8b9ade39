"""A small model of every family, in float64, with an input for it: the golden cases' folders, or a
config where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from golden_cases import GOLDEN
from loopscope.checkpoints.load import load
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build
from loopscope.models.families.albert import AlbertConfig
from loopscope.models.families.hyperloop import HyperloopConfig
from loopscope.models.families.inkling.config import InklingConfig
from loopscope.models.families.melt import MeltConfig
from loopscope.models.families.puzzle_solvers.trm import TrmConfig
from loopscope.models.families.training_free.gemma import TrainingFreeGemmaConfig
from loopscope.models.families.training_free.gpt2 import TrainingFreeGPT2Config
from loopscope.models.families.training_free.model import TrainingFreeConfig
from loopscope.models.families.training_free.neox import TrainingFreeNeoXConfig
from loopscope.models.families.training_free.olmo import TrainingFreeOlmoConfig
from loopscope.models.families.training_free.rules import WindowConfig
from toy import randomize_

BATCH, POS, POSITION, HEAD, LOOPS, LENGTHS = 3, 7, 2, 1, 3, (7, 4, 5)


@dataclass(frozen=True)
class Toy:
    """How to make a family's model.

    Attributes:
        make: The model in float64.
        begin: What its `begin` takes besides tokens, by the inputs' tokens.
        unread: Sites whose value nothing downstream reads.
    """

    make: Callable[[], LoopedModel]
    begin: Callable[[Tensor], Mapping[str, Any]] = field(default=lambda tokens: {})
    unread: tuple[str, ...] = ()


def latents(tokens: Tensor, d_model: int) -> Tensor:
    """An initial state of its own for each row."""
    return torch.randn(
        *tokens.shape, d_model, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )


def golden(name: str, **options: Any) -> Callable[[], LoopedModel]:
    return lambda: load(GOLDEN / name, **options).double()


def position_solver(n_ctx: int = 5) -> LoopedModel:
    """A solver whose blocks have an MLP along the positions, so that it needs all of them."""
    cfg = TrmConfig(
        n_layers=1, n_loops=LOOPS, n_cycles=1, n_low_loops=1, d_model=6, n_heads=1, d_mlp=256,
        d_vocab=11, n_prefix=2, d_puzzle=6, n_puzzles=1, positions="none", d_pos_mlp=256,
        n_ctx=n_ctx,
    )  # fmt: skip
    return randomize_(build(cfg)).double()


def hyperloop() -> LoopedModel:
    cfg = HyperloopConfig(
        n_prelude_layers=1,
        n_layers=2,
        n_coda_layers=1,
        n_loops=LOOPS,
        n_streams=5,
        d_model=15,
        n_heads=6,
        n_key_value_heads=2,
        head_dim=4,
        d_mlp=22,
        d_vocab=29,
    )
    return randomize_(build(cfg)).double()


def inkling() -> LoopedModel:
    cfg = InklingConfig(
        n_prelude_layers=1, n_layers=2, n_coda_layers=1, n_loops=LOOPS, layers_per_block=1,
        full_layers=(2,), d_model=15, n_heads=6, n_key_value_heads=3, head_dim=4, d_mlp=7,
        n_sliding_heads=6, n_sliding_key_value_heads=2, window=4, rel_extent=5, d_rel=3,
        log_floor=3, qk_clip=0.9, rel_clip=0.8, kernel=3, n_experts=3, n_chosen=2, gate_rank=4,
        route_scale=1.7, gate_cap=1.5, up_cap=2.0, logit_cap=6.0, d_vocab=29, d_vocab_padded=31,
    )  # fmt: skip
    return randomize_(build(cfg)).double()


def melt(**options: Any) -> Callable[[], LoopedModel]:
    sizes = {
        "n_layers": 2,
        "n_loops": LOOPS,
        "d_model": 15,
        "n_heads": 6,
        "head_dim": 4,
        "d_mlp": 22,
        "d_vocab": 29,
    }
    cfg = MeltConfig(**{**sizes, **options})
    return lambda: randomize_(build(cfg)).double()


def albert_groups() -> LoopedModel:
    cfg = AlbertConfig(
        n_layers=2,
        n_loops=LOOPS,
        n_groups=3,
        n_grouped_loops=LOOPS,
        d_model=15,
        d_factor=11,
        n_heads=5,
        d_mlp=22,
        d_vocab=29,
        n_ctx=11,
    )
    return randomize_(build(cfg)).double()


def fields_of(kind: type[WindowConfig]) -> set[str]:
    return {each.name for each in fields(kind)}


def training_free(
    kind: type[WindowConfig] = TrainingFreeConfig, **options: Any
) -> Callable[[], LoopedModel]:
    sizes: dict[str, Any] = {
        "n_loops": LOOPS,
        "d_model": 15,
        "d_mlp": 22,
        "d_vocab": 29,
        "n_ctx": 11,
    }
    grouped = {"n_heads": 6, "n_key_value_heads": 2, "head_dim": 4}
    heads = grouped if "head_dim" in fields_of(kind) else {"n_heads": 5}
    cfg = kind(**{**sizes, **heads, **options})
    return lambda: randomize_(build(cfg)).double()


TOYS: dict[str, Toy] = {
    "hyperloop": Toy(hyperloop),
    "melt": Toy(melt(n_key_value_heads=2), unread=("hook_exit_logit",)),
    "melt_raw": Toy(melt(h_0="zero", gate_input="raw", tied=True), unread=("hook_exit_logit",)),
    "dory": Toy(golden("dory")),
    "inkling2_loop": Toy(inkling, unread=("hook_mixed_post",)),
    "nanbeige": Toy(golden("nanbeige")),
    "nanbeige_mhc": Toy(golden("nanbeige_mhc")),
    "hrm_text": Toy(golden("hrm_text")),
    "hrm_text_prefix": Toy(
        golden("hrm_text"),
        lambda tokens: {
            "token_types": (torch.arange(tokens.shape[1]) < 3).expand_as(tokens).long()
        },
    ),
    "trm": Toy(golden("trm"), unread=("hook_halt_logit", "hook_continue_logit")),
    "hrm": Toy(golden("hrm"), unread=("hook_halt_logit", "hook_continue_logit")),
    "ouro": Toy(golden("ouro"), unread=("hook_exit_logit",)),
    "parcae": Toy(golden("parcae"), lambda tokens: {"state": latents(tokens, 32)}),
    "spiral": Toy(golden("spiral"), unread=("hook_halt_logit",)),
    "huginn": Toy(golden("huginn")),
    "retrofit_llama": Toy(golden("retrofit_llama"), lambda tokens: {"seed": 5}),
    "retrofit_olmo": Toy(golden("retrofit_olmo"), lambda tokens: {"state": latents(tokens, 24)}),
    "albert": Toy(golden("albert"), lambda tokens: {"token_types": tokens % 2}),
    "albert_groups": Toy(albert_groups),
    "smollm": Toy(golden("smollm")),
    "training_free": Toy(training_free(n_layers=4, window=(1, 2), rule="euler", beta=None)),
    "training_free_blend": Toy(training_free(n_layers=3, window=(1, 2), beta=0.3, qk_norm=True)),
    "training_free_layers": Toy(
        training_free(n_layers=3, window=(0, 1), mode="layer", attention_bias=True, mlp_bias=True)
    ),
    "training_free_gpt2": Toy(training_free(TrainingFreeGPT2Config, n_layers=3, window=(1, 1))),
    "training_free_gemma": Toy(
        training_free(
            TrainingFreeGemmaConfig,
            n_layers=3,
            window=(1, 2),
            rule="naive",
            beta=None,
            mode="layer",
            sliding_window=3,
            full_layers=(1,),
            sliding_rope_theta=50.0,
            qk_norm=True,
            score_width=3.0,
            score_cap=1.5,
            logit_cap=4.0,
        )
    ),
    "training_free_olmo": Toy(
        training_free(
            TrainingFreeOlmoConfig, n_layers=3, window=(0, 1), rule="naive", beta=None, mode="layer"
        )
    ),
    "training_free_neox": Toy(
        training_free(
            TrainingFreeNeoXConfig,
            n_layers=3,
            window=(1, 2),
            rule="naive",
            beta=None,
            mode="layer",
            d_model=20,
            n_turned=2,
        )
    ),
}


def random_tokens(model: LoopedModel, seed: int = 0, pos: int = POS, rows: int = BATCH) -> Tensor:
    return torch.randint(
        1, model.cfg.d_vocab, (rows, pos), generator=torch.Generator().manual_seed(seed)
    )


def full(toy: Toy, model: LoopedModel, seed: int = 0) -> Batch:
    """A batch without padding, read at its last column."""
    tokens = random_tokens(model, seed)
    return Batch(tokens, torch.ones_like(tokens), torch.full((BATCH,), POS - 1), toy.begin(tokens))


def padded(toy: Toy, model: LoopedModel, seed: int = 0, rows: int = BATCH) -> Batch:
    """A right-padded batch of a multiple of three rows, read at the last real token of each."""
    lengths = torch.tensor(LENGTHS * (rows // len(LENGTHS)))
    mask = (torch.arange(POS) < lengths[:, None]).long()
    tokens = random_tokens(model, seed, rows=rows) * mask
    return Batch(tokens, mask, lengths - 1, toy.begin(tokens))
