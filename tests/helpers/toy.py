"""Toy models of unequal odd sizes, and what several test files share.

Axes: batch 3, pos 7, head 5, d_head 7, d_model 35, d_mlp 44, d_vocab 29, loop 4, layer 2.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.models.basis.tokens import Batch, Readout, Vocabulary
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import Taps
from loopscope.models.core.registry import build
from loopscope.models.core.state import Slot, Visit
from loopscope.models.families.recurrent_depth import RecurrentDepth, RecurrentDepthConfig

BATCH, POS, HEADS, D_HEAD, D_MODEL, D_MLP, D_VOCAB, LAYERS, LOOPS, N_CTX = (
    3,
    7,
    5,
    7,
    35,
    44,
    29,
    2,
    4,
    11,
)
LENGTHS = (7, 4, 5)
POSITION, HEAD = 2, 3  # where one place is patched
SHORT, SHORTEST = (
    3,
    2,
)  # iterations where every hook point is tried; not what the checkpoint records
LATE = "loops.3.blocks.1.hook_resid_post"
VARIANTS = [
    (positions, injection, torch.float64)
    for positions in ("none", "learned", "sinusoidal")
    for injection in (False, True)
]
VARIANTS += [("none", False, torch.float32), ("learned", True, torch.float32)]
# each kind of positions, with and without injection, and both precisions, each at least once
SOME_VARIANTS = [VARIANTS[0], VARIANTS[5], VARIANTS[7]]


def variant_name(variant: tuple[str, bool, torch.dtype]) -> str:
    positions, injection, dtype = variant
    return (
        f"{positions}{'-injected' if injection else ''}-{'64' if dtype == torch.float64 else '32'}"
    )


every_variant = pytest.mark.parametrize("model", VARIANTS, ids=variant_name, indirect=True)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
HEAD_SITES = (
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
)
SWITCHING_SITES = ("hook_scale", "hook_normalized", "hook_attn_scores", "hook_pattern")
SHAPES = {
    "attn.hook_q": ("pos", HEADS, D_HEAD),
    "attn.hook_k": ("pos", HEADS, D_HEAD),
    "attn.hook_v": ("pos", HEADS, D_HEAD),
    "attn.hook_z": ("pos", HEADS, D_HEAD),
    "attn.hook_attn_scores": (HEADS, "pos", "pos"),
    "attn.hook_pattern": (HEADS, "pos", "pos"),
    "mlp.hook_pre": ("pos", D_MLP),
    "mlp.hook_post": ("pos", D_MLP),
    "ln1.hook_scale": ("pos", 1),
    "ln2.hook_scale": ("pos", 1),
    "ln_final.hook_scale": ("pos", 1),
}
BLOCK_SITES = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "ln1.hook_out",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "ln2.hook_out",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)

Model = TypeVar("Model", bound=LoopedModel)
Place = TypeVar("Place", bound=Hashable)


def toy_config(
    positions: str = "none", injection: bool = False, **changes: Any
) -> RecurrentDepthConfig:
    sizes: dict[str, Any] = {"n_layers": LAYERS, "n_loops": LOOPS, **changes}
    return RecurrentDepthConfig(
        **sizes,
        d_model=D_MODEL,
        n_heads=HEADS,
        d_mlp=D_MLP,
        d_vocab=D_VOCAB,
        n_ctx=None if positions == "none" else N_CTX,
        positions=positions,
        input_injection=injection,
    )


def toy(
    positions: str = "none",
    injection: bool = False,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> RecurrentDepth:
    """A model whose every parameter, biases and norms included, is far from zero."""
    model = build(toy_config(positions, injection, **changes))
    assert isinstance(model, RecurrentDepth)
    return randomize_(model).to(dtype)


def randomize_(model: Model, seed: int = 0) -> Model:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if name.endswith(("ln1.w", "ln2.w", "norm.w")) else 0.0
            parameter.copy_(around + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def settling() -> RecurrentDepth:
    """A model whose answers and states settle, so that rules and criteria hold at different
    iterations.
    """
    model = toy()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(0.6)
        model.embedding.mul_(0.5)
    return model


class Bidirectional(RecurrentDepth):
    """Not causal: every row sees every real token."""

    causal = False
    visible = staticmethod(
        lambda rows, keys: torch.ones(
            *rows.positions.shape, keys.positions.shape[1], dtype=torch.bool
        )
    )


class ShortEnding(RecurrentDepth):
    """Not prefix_readout: the last iteration leaves out the last block."""

    prefix_readout = False

    def plan(self, n_loops: int) -> list[Slot]:
        return super().plan(n_loops)[:-1]


class BatchCentred(RecurrentDepth):
    """Not batch_independent: each iteration ends by taking away the mean over the batch."""

    batch_independent = False

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return super().leave(visit, resid - resid.mean(0), parts, taps)


class CentredStream(BatchCentred):
    """The same, which says that its stream is no plain sum."""

    additive_residual = False


def odd_one(family: type[Model]) -> Model:
    """A toy of a family that exists only to say no to one of the declared facts."""
    return randomize_(family(toy_config()).eval()).double()


def with_words(model: LoopedModel, read_at: str | None = "last_real") -> LoopedModel:
    """The model with the vocabulary `<pad> <t_1> ... <t_28>` and a place where answers are read."""
    model.vocab = Vocabulary([f"<t_{i}>" for i in range(1, D_VOCAB)])
    model.read_at = None if read_at is None else Readout.parse(read_at)
    return model


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-9 (float32: 1e-4) of the largest finite magnitude."""
    if actual.dtype == expected.dtype and torch.equal(actual, expected):
        return  # a comparison of many tensors mostly ends here
    scale = expected.abs()[expected.isfinite()].max().item()
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=TOLERANCE[expected.dtype] * scale)


def is_close(actual: Tensor, expected: Tensor) -> bool:
    try:
        assert_close(actual, expected)
    except AssertionError:
        return False
    return True


def random_tokens(seed: int = 0, batch: int = BATCH, pos: int = POS) -> Tensor:
    return torch.randint(1, D_VOCAB, (batch, pos), generator=torch.Generator().manual_seed(seed))


def padded(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, width: int = POS) -> Batch:
    """A right-padded batch that is read at the last real token of each row."""
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return Batch(random_tokens(seed, len(lengths), width) * mask, mask, torch.tensor(lengths) - 1)


def full(seed: int = 0, read_at: int = POS - 1) -> Batch:
    """A batch without padding, read at one column."""
    tokens = random_tokens(seed)
    return Batch(tokens, torch.ones_like(tokens), torch.full((BATCH,), read_at))


def run(model: LoopedModel, batch: Batch, n_loops: int = LOOPS) -> Tensor:
    return model(batch.tokens, n_loops=n_loops, mask=batch.mask)


def run_hooked(
    model: LoopedModel,
    batch: Batch,
    name: str,
    hook: Callable[..., Tensor | None],
    n_loops: int = LOOPS,
) -> Tensor:
    return model.run_with_hooks(
        batch.tokens, n_loops=n_loops, mask=batch.mask, fwd_hooks=[(name, hook)]
    )


def cached(
    model: LoopedModel, batch: Batch, names: str | list[str] = "**", n_loops: int = LOOPS
) -> dict[str, Tensor]:
    return dict(
        model.run_with_cache(batch.tokens, n_loops=n_loops, mask=batch.mask, names_filter=names)[1]
    )


def projection(seed: int = 5) -> Callable[[Tensor], Tensor]:
    """A metric that depends on every logit."""
    weights = torch.randn(
        D_VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )

    def projection(logits: Tensor) -> Tensor:
        return logits @ weights.to(logits.dtype)

    return projection


def hook_count(model: torch.nn.Module) -> int:
    """Every PyTorch and TransformerLens hook on every point."""
    points = model.hook_points()
    torch_hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    lens_hooks = ("fwd_hooks", "bwd_hooks")
    return sum(
        len(getattr(point, kind)) for point in points for kind in (*torch_hooks, *lens_hooks)
    )


def site_of(name: str) -> str:
    """`loops.3.blocks.0.attn.hook_z` is at the site `attn.hook_z`; worked out without the code
    under test.
    """
    return ".".join(
        segment
        for segment in name.split(".")
        if not segment.isdigit() and segment not in ("loops", "blocks")
    )


def expected_shape(name: str, batch: int = BATCH, pos: int = POS) -> tuple[int, ...]:
    return batch, *(
        pos if size == "pos" else size for size in SHAPES.get(site_of(name), ("pos", D_MODEL))
    )


def index_at(name: str, position: int, head: int | None = None) -> tuple[slice | int, ...]:
    """The index of one position, and of one head where the site has heads."""
    every = slice(None)
    if site_of(name) not in HEAD_SITES:
        return every, position
    chosen = every if head is None else head
    head_first = site_of(name) in ("attn.hook_attn_scores", "attn.hook_pattern")
    return (every, chosen, position) if head_first else (every, position, chosen)


def put(source: Tensor, index: tuple[slice | int, ...]) -> Callable[..., Tensor]:
    """A hook that takes one place of its value from `source`."""

    def replace_there(value: Tensor, hook: object) -> Tensor:
        changed = value.clone()
        changed[index] = source[index]
        return changed

    return replace_there


def noise(value: Tensor, index: tuple[slice | int, ...]) -> Tensor:
    """A copy of a value with noise at one place."""
    changed = value.clone()
    changed[index] += torch.randn(
        value[index].shape, generator=torch.Generator().manual_seed(3), dtype=value.dtype
    )
    return changed


def row_each(places: Sequence[Place], rows: int) -> Iterator[dict[Place, int]]:
    """Places in groups, each with a row of its own, so that one run can be changed in another row
    at each of them.
    """
    for start in range(0, len(places), rows):
        yield {place: row for row, place in enumerate(places[start : start + rows])}


def nothing(value: Tensor, hook: object) -> None:
    return None


def explode(value: Tensor, hook: object) -> None:
    raise RuntimeError("a hook failed")


class Calls:
    """A hook that keeps the names of the points that called it."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, value: Tensor, hook: HookPoint) -> None:
        self.names.append(hook.name)
