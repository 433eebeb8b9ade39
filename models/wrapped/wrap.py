"""`wrap`: any PyTorch module that calls the same submodules several times as a looped model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from loopscope.models.basis.numbers import checked_integer
from loopscope.models.core.state import Slot, checked_loops
from loopscope.models.wrapped.calls import AFTER, BEFORE
from loopscope.models.wrapped.model import Layout, Wrapped, WrappedConfig, wrapped_kind

Stacks = Mapping[str, str | tuple[str, int]]
Part = str | Callable[[Tensor], Tensor] | None
_OUTSIDE = ("prelude", "coda")


def wrap(
    module: nn.Module,
    blocks: str | Stacks,
    n_loops: int,
    *,
    norm: Part = None,
    head: Part = None,
    embed: str | None = None,
    sites: Mapping[str, str] | None = None,
    causal: bool = True,
    batch_independent: bool = True,
    kwargs: Mapping[str, Any] | None = None,
) -> Wrapped:
    """Make a looped model of any PyTorch module that calls the same submodules several times.

    The calls of the blocks are counted, and become the visits. The module is not changed: hooks of
    PyTorch are on its blocks only during a run, and its own hooks and its mode stay. Each run is a
    whole run of the module, so each cell of `activation_patch` costs a whole run.

    Args:
        module: A language model from tokens to logits. It returns the logits alone, as `.logits`,
            or as the first of several values.
        blocks: The list of blocks that every iteration calls, by its name in the module, such as
            "model.layers" or a part of it, "model.layers[4:10]". Or a dictionary of several lists
            by stage, in the order of their calls: "prelude" before the loop, "coda" after it,
            "blocks" in every iteration. Any other word is a further stack in every iteration
            (`loops.3.high.blocks.0`). A pair (list, k) is a stack that every iteration calls k
            times (`loops.3.low.1.blocks.0`).
        n_loops: The number of iterations that the module runs.
        norm, head: The final norm and the unembedding that follow the last block, by name or as
            functions. Lenses need them.
        embed: The name of the token embedding, for `hook_embed`; None finds it.
        sites: Further hook points of each block: the name of a site, and the submodule of the block
            whose output it is. An example is {"hook_attn_out": "self_attn", "hook_mlp_out": "mlp"}.
        causal: Whether a later token never changes an earlier result.
        batch_independent: Whether the result of a row never depends on the other rows.
        kwargs: Further arguments of every call of the module.

    Returns:
        The looped model.

    Raises:
        TypeError: `module` is not a PyTorch module.
        ValueError: The module does not have a name. The first run raises it if the number or the
            order of the calls differs from what was declared, or if norm and head do not give the
            logits.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"wrap takes a PyTorch module, got a {type(module).__name__}")
    n_loops = checked_loops(n_loops, None)
    stacks = _stacks(module, {"blocks": blocks} if isinstance(blocks, str) else blocks)
    found = {path: inner for _, (path, inner, _) in stacks.items()}
    paths = {
        block: f"{path}.{number}"
        for path, inner in found.items()
        for number, block in enumerate(inner)
    }
    shown = dict(sites or {})
    for block, path in paths.items():
        for name in shown.values():
            _submodule(block, name, f"a block, {path!r},")
    embedding = _embedding(module, embed)
    layout = Layout(
        plan=partial(_plan, stacks, (BEFORE, *shown, AFTER)),
        paths=paths,
        parts=shown,
        embedding=embedding,
        norm=_part(module, norm),
        head=_part(module, head),
        kwargs=dict(kwargs or {}),
    )
    kind = wrapped_kind(type(module).__name__, causal, batch_independent)
    cfg = _config(module, embedding, sum(map(len, found.values())), n_loops)
    return kind(cfg, module, layout)


def _stacks(module: nn.Module, named: Stacks) -> dict[str, tuple[str, list[nn.Module], int]]:
    """Each stage's list of blocks: its name in the module, its modules, its calls per iteration."""
    stacks = {}
    for stage, given in named.items():
        path, calls = (given, 1) if isinstance(given, str) else given
        calls = checked_integer(calls, f"the calls of {stage!r}")
        if calls < 1 or (calls > 1 and stage in _OUTSIDE):
            raise ValueError(
                f"a stack must be called at least once, and outside the loop exactly once, got"
                f" {calls} calls of {stage!r}"
            )
        stacks[stage] = (path, _blocks(module, path), calls)
    if not set(stacks) - set(_OUTSIDE):
        raise ValueError(f"`blocks` must name blocks of the loop, got only {sorted(stacks)}")
    return stacks


def _blocks(module: nn.Module, path: str) -> list[nn.Module]:
    """The blocks of a list, or of a piece of one ("layers[4:10]"); one module is a list of one."""
    parsed = re.fullmatch(r"([\w.]*)(?:\[(-?\d*):(-?\d*)\])?", path)
    if parsed is None:
        raise ValueError(
            f"blocks must be a name like 'model.layers' or 'layers[4:10]', got {path!r}"
        )
    name, first, last = parsed.groups()
    found = _submodule(module, name, "the module")
    lists = isinstance(found, nn.ModuleList | nn.Sequential)
    blocks = list(found.children()) if lists else [found]
    piece = blocks[int(first) if first else None : int(last) if last else None]
    if not piece:
        raise ValueError(f"blocks must name at least one block, got none at {path!r}")
    return piece


def _submodule(module: nn.Module, name: str, what: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = [known for known, _ in module.named_children()]
        raise ValueError(f"{what} has no submodule {name!r}; it has {names}") from None


def _part(module: nn.Module, part: Part) -> Callable[[Tensor], Tensor] | None:
    return _submodule(module, part, "the module") if isinstance(part, str) else part


def _embedding(module: nn.Module, name: str | None) -> nn.Module:
    """The token embedding: by its name, as transformers tells it, or the only one there is."""
    if name is not None:
        return _submodule(module, name, "the module")
    ask = getattr(module, "get_input_embeddings", None)
    known = ask() if callable(ask) else None
    if isinstance(known, nn.Module):
        return known
    found = {n: m for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
    if len(found) != 1:
        raise ValueError(
            f"embed= must name the token embedding, as the module has {len(found)}: {sorted(found)}"
        )
    return next(iter(found.values()))


def _plan(
    stacks: Mapping[str, tuple[str, list[nn.Module], int]], sites: tuple[str, ...], n_loops: int
) -> list[Slot]:
    """The visits of a call: before the loop, in it in the order in which stages were given, after
    it.
    """
    inside = {stage: stack for stage, stack in stacks.items() if stage not in _OUTSIDE}
    slots = _run(stacks, "prelude", "prelude", None, sites)
    for t in range(n_loops):
        for stage, (_, _, calls) in inside.items():
            name = "" if stage == "blocks" else f".{stage}"
            for k in range(calls):
                prefix = f"loops.{t}{name}{f'.{k}' if calls > 1 else ''}.blocks"
                slots += _run(stacks, stage, prefix, t, sites)
    return slots + _run(stacks, "coda", "coda", None, sites)


def _run(
    stacks: Mapping[str, tuple[str, list[nn.Module], int]],
    stage: str,
    prefix: str,
    loop: int | None,
    sites: tuple[str, ...],
) -> list[Slot]:
    """The visits of one run of a stage's blocks; none where there is no such stage."""
    _, blocks, _ = stacks.get(stage, ("", [], 0))
    kind = prefix.partition(".")[0]
    return [
        Slot(f"{prefix}.{layer}", kind, loop, layer, block, sites)
        for layer, block in enumerate(blocks)
    ]


def _config(module: nn.Module, embedding: nn.Module, n_layers: int, n_loops: int) -> WrappedConfig:
    """Sizes, as far as the module's config or its embedding tells them."""
    told = getattr(module, "config", None)
    rows = getattr(embedding, "num_embeddings", None)
    width = getattr(told, "hidden_size", None) or getattr(embedding, "embedding_dim", None)
    if rows is None or width is None:
        raise ValueError(
            "the token embedding must be an nn.Embedding, or have its num_embeddings and"
            f" embedding_dim, got a {type(embedding).__name__}"
        )
    return WrappedConfig(
        n_layers=n_layers,
        n_loops=n_loops,
        d_model=width,
        n_heads=getattr(told, "num_attention_heads", None) or 1,
        d_mlp=getattr(told, "intermediate_size", None) or 4 * width,
        d_vocab=rows,
    )
