"""The explorer's computations: functions of a checkpoint and the typed text, without a browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.analyses.common.subject import answer_logits, words
from loopscope.analyses.explorer.questions import Query
from loopscope.interp.common.metrics import margin
from loopscope.interp.common.places import one_in_range
from loopscope.interp.common.precision import widened
from loopscope.interp.common.ranking import top_tokens
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import Visit

TOP = 5
SITE = "hook_resid_post"
SWEEP_BUDGET = 6e8  # rows times parameters: about 0.15 s on one slow core


@dataclass(frozen=True)
class Answers:
    """The answers of a run at the readout.

    Attributes:
        top: The most likely tokens with their probabilities.
        margin: Logit of the query's answer minus the largest other logit.
    """

    top: tuple[tuple[str, float], ...]
    margin: float


@dataclass(frozen=True)
class LensTable:
    """The logit lens at every column after every block.

    Attributes:
        blocks: The visit of each row, such as "loops.3.blocks.0".
        closing: The rows that end a loop.
        top: The most likely tokens of each row and column.
        prob: Float[Tensor, "visit pos k"], their probabilities.
    """

    blocks: tuple[str, ...]
    closing: tuple[int, ...]
    top: tuple[tuple[tuple[str, ...], ...], ...]
    prob: Float[Tensor, "visit pos k"]


@dataclass(frozen=True)
class MarginCurve:
    """The answer after 1, 2, ... iterations.

    Attributes:
        margin: Float[Tensor, " r"], of the query's answer, in logits.
        top: The most likely tokens after each, with their probabilities.
    """

    margin: Float[Tensor, " r"]
    top: tuple[tuple[tuple[str, float], ...], ...]

    @property
    def best(self) -> int:
        """The number of iterations with the largest margin, the first of equals."""
        return int(self.margin.argmax()) + 1


@dataclass(frozen=True)
class Patterns:
    """Attention patterns side by side.

    Attributes:
        titles: What each is.
        pattern: Float[Tensor, "panel query key"].
    """

    titles: tuple[str, ...]
    pattern: Float[Tensor, "panel query key"]


@dataclass(frozen=True)
class PatchGrid:
    """The margin of A's answer when one residual of B is put into A's run, cell by cell.

    Attributes:
        blocks: The visit of each row, such as "loops.3.blocks.0".
        margin: Float[Tensor, "visit pos"], after the patch, in logits.
        margin_a, margin_b: Of A's answer, without a patch, in either run.
        stride: Every so many iterations have rows; 0 where even one of them would take too long.
    """

    blocks: tuple[str, ...]
    margin: Float[Tensor, "visit pos"]
    margin_a: float
    margin_b: float
    stride: int

    @property
    def change(self) -> Float[Tensor, "visit pos"]:
        """The change of the margin by each patch, in logits."""
        return self.margin - self.margin_a


def answers(model: LoopedModel, logits: Float[Tensor, "one d_vocab"], answer_id: int) -> Answers:
    """The top tokens of one row of logits, and the margin of an answer."""
    size = float(margin(logits, torch.tensor([answer_id], device=logits.device))[0])
    return Answers(_likely(model, logits[0]), size)


def _likely(model: LoopedModel, logits: Float[Tensor, " d_vocab"]) -> tuple[tuple[str, float], ...]:
    """The most likely tokens of one row of logits, with their probabilities."""
    logits = widened(logits)
    top = top_tokens(logits, min(TOP, len(logits)))
    return tuple(zip(words(model, top), logits.softmax(-1)[top].tolist(), strict=True))


def lens_table(model: LoopedModel, query: Query, n_loops: int) -> LensTable:
    """The logit lens of every column after every block."""
    lens = logit_lens(model, query.batch, n_loops, positions="all")
    top = lens.top(min(TOP, model.cfg.d_vocab))
    named = [words(model, visit) for visit in top.tokens.reshape(len(lens.names), -1)]
    k = top.tokens.shape[-1]
    rows = tuple(tuple(tuple(row[i : i + k]) for i in range(0, len(row), k)) for row in named)
    ends = tuple(end - 1 for end in model.iteration_ends(n_loops))
    return LensTable(lens.names, ends, rows, top.probs.cpu())


def margins(model: LoopedModel, query: Query, n_loops: int) -> MarginCurve:
    """The answer after each number of iterations up to `n_loops`, from one run where the family
    allows it.
    """
    if type(model).prefix_readout:
        lens = readout_lens(model, query.batch, n_loops, keep_logits=True)
        assert lens.logits is not None, "they were asked for"
        logits = lens.logits[:, 0]
    else:
        logits = torch.cat([answer_logits(model, query.batch, loop + 1) for loop in range(n_loops)])
    size = margin(logits, torch.full((n_loops,), query.answer_id, device=logits.device))
    return MarginCurve(size.cpu(), tuple(map(partial(_likely, model), logits)))


def heads_of(model: LoopedModel, query: Query, n_loops: int, loop: int, block: int) -> Patterns:
    """Every head's pattern in one block of one loop; `block` is the place of its visit in the loop,
    from 0.
    """
    visits = _visits(model, n_loops, loop)
    one_in_range("blocks", block, len(visits))
    pattern = _patterns(model, query, n_loops, [visits[block]])[0]
    return Patterns(tuple(f"head {head}" for head in range(len(pattern))), pattern)


def loops_of(model: LoopedModel, query: Query, n_loops: int, block: int, head: int) -> Patterns:
    """One head's pattern in one block of every loop."""
    found = [
        (loop, visits[block])
        for loop in range(n_loops)
        if len(visits := _visits(model, n_loops, loop)) > block
    ]
    pattern = _patterns(model, query, n_loops, [visit for _, visit in found])[:, head]
    return Patterns(tuple(f"loop {loop}" for loop, _ in found), pattern)


def _visits(model: LoopedModel, n_loops: int, loop: int) -> list[Visit]:
    return [visit for visit in model.schedule(n_loops) if visit.loop == loop]


def blocks_per_loop(model: LoopedModel) -> int:
    """How many visits loop 0 has."""
    return len(_visits(model, 1, 0))


@torch.no_grad()
def _patterns(
    model: LoopedModel, query: Query, n_loops: int, visits: Sequence[Visit]
) -> Float[Tensor, "visit head query key"]:
    names = [f"{visit.name}.attn.hook_pattern" for visit in visits]
    batch = query.batch
    cache = model.run_with_cache(
        batch.tokens, n_loops=n_loops, mask=batch.mask, names_filter=names, remove_batch_dim=True
    )[1]
    return torch.stack([cache[name] for name in names]).cpu()


# Patching


def patch_grid(
    model: LoopedModel, a: Query, b: Query, n_loops: int, budget: float | int = SWEEP_BUDGET
) -> PatchGrid:
    """Put B's residual after each block at each column into A's run, one cell at a time.

    Args:
        budget: How much may be computed, in rows times parameters; beyond it only every second,
            third, ... iteration is patched.
    """
    width = len(a.tokens)
    metric = a.metric
    strides = (
        stride for stride in range(1, n_loops + 1) if _cost(model, a, n_loops, stride) <= budget
    )
    stride = next(strides, 0)
    if not stride:
        margin_a, margin_b = (
            float(metric(answer_logits(model, query.batch, n_loops))) for query in (a, b)
        )
        return PatchGrid((), torch.zeros(0, width), margin_a, margin_b, 0)
    loops = None if stride == 1 else range(0, n_loops, stride)
    sweep = activation_patch(
        model, a.batch, b.batch, metric, n_loops, sites=[SITE], loops=loops, direction="noise"
    )
    blocks = tuple(cell.name.removesuffix(f".{SITE}") for cell in sweep.cells[::width])
    values = sweep.values.view(len(blocks), width).cpu()
    return PatchGrid(blocks, values, float(sweep.clean), float(sweep.corrupted), stride)


def _cost(model: LoopedModel, query: Query, n_loops: int, stride: int) -> float:
    """Rows that run after the patches, times the parameters that they pass: what a sweep's time is
    nearly proportional to.
    """
    visits = model.schedule(n_loops)
    sizes = [sum(weight.numel() for weight in visit.block.parameters()) for visit in visits]
    later = sum(
        sum(sizes[visit.index + 1 :]) for visit in visits if (visit.loop or 0) % stride == 0
    )
    rows = (query.readout + 1) * (query.readout + 2) / 2
    return rows * later


@torch.no_grad()
def patch_cell(
    model: LoopedModel, a: Query, b: Query, n_loops: int, block: str, position: int
) -> tuple[Answers, Answers]:
    """The answers of A's run before and after one residual is replaced by B's.

    Args:
        block: A visit of the schedule, such as "loops.3.blocks.0"; the residual after it is
            replaced.
        position: The column, from 0.

    Raises:
        KeyError: No such visit.
        ValueError: No such column.
    """
    one_in_range("positions", position, len(a.tokens))
    name, batch = f"{block}.{SITE}", b.batch
    source = model.run_with_cache(
        batch.tokens, n_loops=n_loops, mask=batch.mask, names_filter=name
    )[1][name][:, [position]]

    def put(resid: Tensor, hook: HookPoint) -> Tensor:
        return resid.index_copy(1, torch.tensor([position], device=resid.device), source)

    before = answer_logits(model, a.batch, n_loops)
    with model.hooks([(name, put)], n_loops=n_loops):
        after = answer_logits(model, a.batch, n_loops)
    return answers(model, before, a.answer_id), answers(model, after, a.answer_id)
