"""Activation patching: put single activations of one run into another and see what becomes of the answer.

Each cell of a sweep is one (site, loop, layer, position, head). All cells of a visit share the base run up to that visit: the
run is continued from its stored state, with as many cells side by side as `batch_size` allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from interp.inputs import Inputs, Metric, ReadoutColumn, as_batch
from models.base import LoopedModel, at_columns
from models.cache import coordinate, is_site, site_of
from models.state import State, checked_loops
from models.tokens import Batch

Direction = Literal["denoise", "noise"]
_HEAD_AXIS = {"attn.hook_q": 2, "attn.hook_k": 2, "attn.hook_v": 2, "attn.hook_z": 2, "attn.hook_rot_q": 2, "attn.hook_rot_k": 2}
_HEAD_AXIS |= {"attn.hook_attn_scores": 1, "attn.hook_pattern": 1}


@dataclass(frozen=True)
class Cell:
    """One patch.

    Attributes:
        name: The hook point.
        site: What the caller called it, or its full name where that could be several.
        loop, layer: Where it is; None where the site has no such coordinate.
        position: The column that is replaced (the query position for scores and patterns).
        head: The head that is replaced; None for all of the site.
    """

    name: str
    site: str
    loop: int | None
    layer: int | None
    position: int
    head: int | None


@dataclass(frozen=True)
class Sweep:
    """The metric for every patch.

    Attributes:
        cells: One per patch, in the order of the schedule.
        values: Float[Tensor, "cell batch"], the metric of the patched run.
        clean, corrupted: Float[Tensor, " batch"], the metric of the two runs without a patch.
        metric: The metric's name.
        direction: "denoise" puts clean activations into the corrupted run, "noise" the reverse.
    """

    cells: tuple[Cell, ...]
    values: Float[Tensor, "cell batch"]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    metric: str
    direction: Direction

    def normalized(self) -> Float[Tensor, " cell"]:
        """Mean over the batch, on the scale where 0 is the corrupted run and 1 the clean one.

        Raises:
            ValueError: Both runs have the same mean metric, so there is no scale.
        """
        low, high = self.corrupted.mean(), self.clean.mean()
        if low == high:
            raise ValueError(f"the clean and the corrupted run have the same mean {self.metric} ({high:.4g}), so effects have no scale")
        return (self.values.mean(1) - low) / (high - low)

    def frame(self) -> pd.DataFrame:
        """One row per cell: site, loop, layer, position, head, metric, value (mean over the batch)."""
        rows = [(cell.site, cell.loop, cell.layer, cell.position, cell.head) for cell in self.cells]
        frame = pd.DataFrame(rows, columns=["site", "loop", "layer", "position", "head"])
        frame["metric"] = self.metric
        frame["value"] = self.values.mean(1).cpu().numpy()
        return frame.astype({column: "Int64" for column in ("loop", "layer", "position", "head")})


@torch.no_grad()
def activation_patch(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    n_loops: int | None = None,
    *,
    sites: str | Sequence[str] = ("resid_pre",),
    positions: Literal["all"] | Sequence[int] = "all",
    heads: Literal["all"] | Sequence[int] | None = None,
    loops: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    direction: Direction = "denoise",
    readout: ReadoutColumn = None,
    batch_size: int = 1024,
) -> Sweep:
    """Patch every chosen cell on its own and measure the answer (arXiv 2604.07822, figures 11 and 21).

    Args:
        clean, corrupted: Two inputs of the same shape, row by row a pair: batches, texts, or tokens with `readout`.
        metric: Of the logits at the readout, Float[Tensor, "batch d_vocab"] to Float[Tensor, " batch"].
        n_loops: Iterations; None means what the checkpoint records.
        sites: Site names ("resid_pre", "z", "mlp_out", "pattern", "ln1.normalized", "state_in", "embed", ...).
        positions: Columns to patch, "all" for every one.
        heads: Heads to patch one by one at sites that have heads, "all" for every one; None patches all heads together.
        loops, layers: Restrict the sweep; None means all.
        direction: "denoise" puts the clean activation into the corrupted run, "noise" the corrupted one into the clean run.
        batch_size: Rows continued side by side.

    Raises:
        KeyError: A site that this model does not have.
        ValueError: Inputs that do not match, or a position, head, loop or layer out of range.
    """
    n_loops, sites = checked_loops(n_loops, model.cfg.n_loops), [sites] if isinstance(sites, str) else sites
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction must be 'denoise' or 'noise', got {direction!r}")
    clean_batch, corrupted_batch = as_batch(model, clean, readout), as_batch(model, corrupted, readout)
    _check_pair(clean_batch, corrupted_batch)
    base, source = (corrupted_batch, clean_batch) if direction == "denoise" else (clean_batch, corrupted_batch)
    cells = _cells(model, n_loops, sites, _chosen("positions", positions, base.tokens.shape[1]), heads, loops, layers)
    source_values = _activations(model, source, {cell.name for cell in cells}, n_loops)
    size = max(1, batch_size // len(base))
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.name, []).append(cell)
    results: dict[Cell, Tensor] = {}
    with tqdm(total=len(cells), desc="patching", leave=False, disable=len(cells) * len(base) < 8 * batch_size) as bar:
        for name, start in _starts(model, base, n_loops, list(groups)):
            for packed in (groups[name][i : i + size] for i in range(0, len(groups[name]), size)):
                logits = _continue(model, start, base, n_loops, packed, source_values[name])
                results |= {cell: metric(part) for cell, part in zip(packed, logits.split(len(base)), strict=True)}
                bar.update(len(packed))
    unpatched = (metric(_final_logits(model, clean_batch, n_loops)), metric(_final_logits(model, corrupted_batch, n_loops)))
    values = torch.stack([results[cell] for cell in cells])
    label = getattr(metric, "__name__", type(metric).__name__)
    return Sweep(tuple(cells), values, *unpatched, label, direction)


def _check_pair(clean: Batch, corrupted: Batch) -> None:
    if clean.tokens.shape != corrupted.tokens.shape:
        raise ValueError(
            f"the clean and corrupted inputs must have one shape, got {list(clean.tokens.shape)} and {list(corrupted.tokens.shape)}"
        )
    if not torch.equal(clean.mask, corrupted.mask) or not torch.equal(clean.readout, corrupted.readout):
        raise ValueError("each clean input must be as long as its corrupted one and be read at the same column")


def _chosen(what: str, wanted: Literal["all"] | Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if wanted is None or wanted == "all" else [int(w) for w in wanted]
    outside = [w for w in chosen if not 0 <= w < count]
    if outside:
        raise ValueError(f"{what} must be in 0..{count - 1}, got {outside[0]}")
    return chosen


def _cells(
    model: LoopedModel,
    n_loops: int,
    sites: Sequence[str],
    positions: list[int],
    heads: Literal["all"] | Sequence[int] | None,
    loops: Sequence[int] | None,
    layers: Sequence[int] | None,
) -> list[Cell]:
    names = model.hook_names(n_loops)
    for site in sites:
        if not any(is_site(name, site) for name in names):
            known = sorted({site_of(name) for name in names})
            raise KeyError(f"this model has no site {site!r}; its sites are {', '.join(known)}")
    kept_loops = _chosen("loops", loops, n_loops)
    kept_layers = _chosen("layers", layers, model.cfg.n_layers)
    labels = _labels(names, sites)
    cells: list[Cell] = []
    for name in (name for name in names if any(is_site(name, site) for site in sites)):
        place = coordinate(name)
        loop = place[0] if place and isinstance(place[0], int) else None
        layer = place[-1] if len(place) > 1 and isinstance(place[-1], int) else None
        if (loop is None and loops is not None) or (loop is not None and loop not in kept_loops):
            continue
        if (layer is None and layers is not None) or (layer is not None and layer not in kept_layers):
            continue
        one_by_one = heads is not None and site_of(name) in _HEAD_AXIS
        head_list: list[int] | list[None] = _chosen("heads", heads, model.cfg.n_heads) if one_by_one else [None]
        label = labels[site_of(name)]
        cells += [Cell(name, label, loop, layer, position, head) for position, head in itertools.product(positions, head_list)]
    if not cells:
        raise ValueError(f"no cell is left: the sites {list(sites)} do not occur at loops={loops}, layers={layers}")
    return cells


def _labels(names: Sequence[str], sites: Sequence[str]) -> dict[str, str]:
    """What to call each site that is swept: as the caller did, unless that could be several ("scale")."""
    labels: dict[str, str] = {}
    for site in sites:
        meant = {site_of(name) for name in names if is_site(name, site)}
        labels |= {own: site if len(meant) == 1 else own.replace("hook_", "") for own in meant}
    return labels


def _activations(model: LoopedModel, batch: Batch, names: set[str], n_loops: int) -> dict[str, Tensor]:
    _, cache = model.run_with_cache(batch.tokens, n_loops=n_loops, mask=batch.mask, names_filter=sorted(names))
    return dict(cache)


def _final_logits(model: LoopedModel, batch: Batch, n_loops: int) -> Tensor:
    return model.readout(model.advance(model.begin(batch.tokens, batch.mask, n_loops=n_loops)), batch.readout)


def _starts(model: LoopedModel, base: Batch, n_loops: int, names: list[str]) -> Iterator[tuple[str, State | None]]:
    """Each hook point with the base run's state right before it; None where it comes before the first state."""
    before, after = model.edge_sites()
    yield from ((name, None) for name in names if name in before)
    state = model.begin(base.tokens, base.mask, n_loops=n_loops)
    for visit in model.schedule(n_loops):
        state = model.advance(state, visit.index)
        inside = set(visit.hook_names())
        yield from ((name, state) for name in names if name in inside)
    state = model.advance(state)
    yield from ((name, state) for name in names if name in after)


def _continue(
    model: LoopedModel, start: State | None, base: Batch, n_loops: int, cells: list[Cell], source: Tensor
) -> Float[Tensor, "row d_vocab"]:
    """Logits at the readout of the base run with each cell patched; rows are (cell, batch)."""
    times = len(cells)
    columns = repeat(base.readout, "batch -> (cell batch)", cell=times)
    put = partial(_put, cells=cells, source=source)
    with model.hooks([(cells[0].name, put)], n_loops=n_loops):
        if start is None:
            tokens, mask = (repeat(x, "batch pos -> (cell batch) pos", cell=times) for x in (base.tokens, base.mask))
            state = model.begin(tokens, mask, n_loops=n_loops)
        else:
            state = start.map(lambda x: repeat(x, "batch ... -> (cell batch) ...", cell=times))
        state = model.advance(state)
        return at_columns(model.readout(state), columns)


def _put(value: Tensor, hook: HookPoint, cells: list[Cell], source: Tensor) -> Tensor:
    """The value with each cell's part taken from the source run."""
    site = site_of(cells[0].name)
    head_axis = _HEAD_AXIS.get(site)
    position_first = head_axis is None or head_axis == 2
    patched = rearrange(value.clone(), "(cell batch) ... -> cell batch ...", cell=len(cells))
    for row, cell in zip(patched, cells, strict=True):
        index: tuple[slice | int, ...] = (slice(None), cell.position)
        if cell.head is not None or not position_first:
            head = slice(None) if cell.head is None else cell.head
            index = (slice(None), cell.position, head) if position_first else (slice(None), head, cell.position)
        row[index] = source[index]
    flat: Tensor = rearrange(patched, "cell batch ... -> (cell batch) ...")
    return flat
