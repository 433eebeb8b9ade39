"""Whether a family is as its class declares: each declaration tried on a few random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.models.basis.draws import seeded
from loopscope.models.core.attention import KeyValueStore
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import existing_modules
from loopscope.models.core.state import State, checked_loops

_ROWS, _WIDTH, _LOOPS = 3, 5, 2
Tokens = Int[Tensor, "batch pos"]
Probe = Callable[[LoopedModel, Tokens, int], Iterator[str]]


@torch.no_grad()
def check_family(model: LoopedModel, n_loops: int | None = None) -> None:
    """Test the facts that a model's class declares, in a few short calls on random tokens.

    A fact that fails here is wrong. A fact that holds on these tokens may still fail on others.

    Args:
        model: A model of the class.
        n_loops: The number of iterations of the calls; None means the number that the model
            records, or two.

    Raises:
        ValueError: A declared fact does not hold; the message has one sentence for each.
    """
    n_loops = checked_loops(n_loops, model.cfg.n_loops or _LOOPS)
    longest = model.cfg.n_ctx or _WIDTH
    width = longest if model.fixed_length else min(_WIDTH, longest)
    size = (_ROWS, width)
    tokens = torch.randint(1, model.cfg.d_vocab, size, generator=seeded(0), device="cpu").to(
        model.device
    )
    modes = [(module, module.training) for module in existing_modules(model)]
    model.eval()
    try:
        broken = list(_schedule(model, n_loops))
        for probe in () if broken else PROBES:
            broken += probe(model, tokens, n_loops)
    finally:
        for module, training in modes:
            module.training = training
    if broken:
        raise ValueError(f"{type(model).__name__} is not what it declares: " + "; ".join(broken))


def check_attends(model: LoopedModel, store: KeyValueStore, n_loops: int) -> None:
    """Raise for a model that declares `rowwise` though a block's attention is its own.

    Args:
        store: The keys and values that a whole run has left.
    """
    silent = [visit.name for visit in model.schedule(n_loops) if visit.name not in store]
    if model.rowwise and silent:
        raise ValueError(_own_attention(model, silent[0]))


def _own_attention(model: LoopedModel, visit: str) -> str:
    return (
        f"{type(model).__name__} declares rowwise, but the block at {visit!r} does not call"
        " rows.attend, so its rows cannot be run side by side; write `rowwise = False` in the class"
    )


def _schedule(model: LoopedModel, n_loops: int) -> Iterator[str]:
    """Iterations without a visit, and names that two places share."""
    slots = model.plan(n_loops)
    seen = {slot.loop for slot in slots}
    for loop in range(n_loops):
        if loop not in seen:
            yield f"`plan` visits no block in iteration {loop} of {n_loops}; give slots that loop"
    before, after = model.edge_sites()
    names = [*before, *(name for slot in slots for name in slot.hook_names()), *after]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"the hook name {name!r} stands for two places; give each slot a name of its own"


def _sites(model: LoopedModel, tokens: Tokens, n_loops: int) -> Iterator[str]:
    """Sites through which no value passes."""
    _, cache = model.run_with_cache(tokens, n_loops=n_loops, names_filter="**")
    for name in model.hook_names(n_loops):
        if name not in cache:
            yield (
                f"nothing passes through the declared site {name!r}; call `tap` there, or take it"
                " out of the sites"
            )
    named = [f"{visit.name}.{model.lens_site}" for visit in model.schedule(n_loops)]
    absent = [name for name in named if name not in cache]
    if absent:
        yield f"lens_site names {absent[0]!r}, which is no hook point; name a site of every block"


def _causal(model: LoopedModel, tokens: Tokens, n_loops: int) -> Iterator[str]:
    if model.causal and tokens.shape[1] > 1:
        later = tokens.clone()
        later[:, -1] = 1 + later[:, -1] % (model.cfg.d_vocab - 1)
        one, other = (model(x, n_loops=n_loops)[:, :-1] for x in (tokens, later))
        yield from _differs("causal", one, other, "a later token changes earlier logits")


def _batch_independent(model: LoopedModel, tokens: Tokens, n_loops: int) -> Iterator[str]:
    if model.batch_independent:
        one, other = model(tokens, n_loops=n_loops)[:1], model(tokens[:1], n_loops=n_loops)
        why = "a row's logits depend on the other rows"
        yield from _differs("batch_independent", one, other, why)


def _prefix_readout(model: LoopedModel, tokens: Tokens, n_loops: int) -> Iterator[str]:
    if model.prefix_readout and n_loops > 1:
        state = model.begin(tokens, n_loops=n_loops)
        state = model.advance(state, model.iteration_ends(n_loops)[n_loops - 2])
        one = model.readout(model.finish(state))
        why = f"the readout after {n_loops - 1} iterations of {n_loops} is another than that of a"
        other = model(tokens, n_loops=n_loops - 1)
        yield from _differs("prefix_readout", one, other, f"{why} call of {n_loops - 1}")


def _rowwise(model: LoopedModel, tokens: Tokens, n_loops: int) -> Iterator[str]:
    if not model.rowwise:
        return
    store: KeyValueStore = {}
    begun = model.begin(tokens, n_loops=n_loops)
    end = model.advance(begun, store=store)
    silent = [visit.name for visit in model.schedule(n_loops) if visit.name not in store]
    if silent:
        yield _own_attention(model, silent[0])
        return
    wrong = [name for name, part in begun.parts.items() if part.shape[:2] != tokens.shape]
    if wrong:
        yield (
            f"rowwise is declared, but the part {wrong[0]!r} of the state is not [batch, pos, ...];"
            " write `rowwise = False`"
        )
        return
    last = slice(tokens.shape[1] - 1, None)
    row: State = model.advance(begun.rows(pos=last), supplied=store)
    why = "a row that is run on its own, with the keys of the others, has another result"
    yield from _differs("rowwise", row.resid, end.resid[:, last], why)


def _extended(model: LoopedModel, tokens: Tokens, n_loops: int) -> Iterator[str]:
    """Where rows need more than the keys and values of others: that generating keeps the rest."""
    inherited = type(model).extend is LoopedModel.extend and model.runs_visits
    if model.rowwise or not (model.causal and inherited) or tokens.shape[1] < 2:
        return
    begun = model.begin(tokens, n_loops=n_loops)
    _, kept = model.extend(begun.rows(pos=slice(-1)), {})
    if not kept:
        return  # whole texts are run then
    last, _ = model.extend(begun.rows(pos=slice(-1, None)), kept)
    error = _error(last.resid, model.advance(begun).resid[:, -1:])
    if error:
        yield (
            "`extend` is inherited, but a token that is run after the others has another result"
            f" (by {error:.2g}); define `extend`, or generate with use_cache=False"
        )


def _additive(model: LoopedModel, tokens: Tokens, n_loops: int) -> Iterator[str]:
    """Where a block shows its two additions: that they are all that it adds."""
    if not model.additive_residual:
        return
    _, cache = model.run_with_cache(tokens, n_loops=n_loops, names_filter="**")
    sites = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    for visit in model.schedule(n_loops)[:1]:
        if set(sites) <= set(visit.sites):
            pre, attn, mlp, post = (cache[f"{visit.name}.{site}"] for site in sites)
            why = f"the stream after {visit.name!r} is not the one before it plus its two outputs"
            yield from _differs("additive_residual", post, pre + attn + mlp, why)


def _differs(fact: str, one: Tensor, other: Tensor, why: str) -> Iterator[str]:
    """A sentence where two tensors differ by more than the arithmetic's error."""
    error = _error(one, other)
    if error:
        yield f"{fact} is declared, but {why} (by {error:.2g}); write `{fact} = False` in the class"


def _error(one: Tensor, other: Tensor) -> float:
    """By how much two tensors differ; 0 for no more than the arithmetic's error."""
    error = float((one - other).abs().max())
    tolerance = 200 * torch.finfo(one.dtype).eps * (1 + float(other.abs().max()))
    return 0.0 if error <= tolerance else error


PROBES: tuple[Probe, ...] = (
    _sites,
    _causal,
    _batch_independent,
    _prefix_readout,
    _rowwise,
    _extended,
    _additive,
)
