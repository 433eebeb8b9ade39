"""Ablation: take a head, an attention or MLP output, a whole visit or a whole iteration out of the
run, at chosen iterations.

Axes: batch pos d_model head d_head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.columns import at_columns_of, checked_columns
from loopscope.interp.common.inputs import Inputs
from loopscope.interp.common.places import (
    Picked,
    Place,
    VisitNames,
    Where,
    chosen_visits,
    heads_at,
    in_range,
    places_of,
)
from loopscope.interp.edit.substitutes import How, substitute_of, zeros
from loopscope.models.basis.draws import checked_seed
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import by_rows
from loopscope.models.core.state import Visit, checked_loops

Kind = Literal["head", "attn", "mlp", "visit", "iteration"]
_SITES = {"head": "attn.hook_z", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}


@dataclass(frozen=True)
class Component:
    """A component to be given to `ablate`, and the places at which it is ablated.

    Attributes:
        kind: "head" (the head's weighted sum of values, attn.hook_z), "attn" or "mlp" (the output
            that is added to the residual stream), "visit" (a block at one iteration is skipped: its
            resid_post becomes its resid_pre) or "iteration" (a whole iteration is skipped: its
            state_out becomes its state_in).
        loops: The iterations, from 0; "all" for every one.
        layers: The blocks within an iteration; "all" for every one. The kind "iteration" takes all
            of them.
        heads: The heads, "all" for every one; for the kind "head" only.
        visits: The visits by name or pattern, such as "loops.0.low.1.blocks.0"; for the kind
            "iteration" runs of blocks, such as "loops.0.low.1". None means every visit at `loops`
            and `layers`, also if several visits share both.
    """

    kind: Kind
    loops: Picked | int = "all"
    layers: Picked | int = "all"
    heads: Picked | int = "all"
    visits: VisitNames | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("head", "attn", "mlp", "visit", "iteration"):
            raise ValueError(
                f"kind must be 'head', 'attn', 'mlp', 'visit' or 'iteration', got {self.kind!r}"
            )
        if not _is_all(self.heads) and self.kind != "head":
            raise ValueError(f"heads= goes with kind 'head' only, got kind {self.kind!r}")
        if not _is_all(self.layers) and self.kind == "iteration":
            raise ValueError(
                "an iteration is skipped with all its layers; kind 'visit' takes layers="
            )

    @property
    def where(self) -> Where:
        """The visits at which the component is ablated."""
        named = self.visits is not None  # then a visit outside the loop may be meant
        free = named or self.kind == "iteration"  # whose states have no layer
        loops: Picked | int | None = self.loops
        layers: Picked | int | None = self.layers
        if named and _is_all(self.loops):
            loops = None
        if free and _is_all(self.layers):
            layers = None
        return Where(loops, layers, self.visits)


def _is_all(picked: Picked | int) -> bool:
    return isinstance(picked, str) and picked == "all"


@contextmanager
def ablate(
    model: LoopedModel,
    what: Component | Sequence[Component],
    *,
    how: How = "zero",
    n_loops: int | None = None,
    reference: Inputs | None = None,
    seed: int = 0,
    positions: Picked = "all",
) -> Iterator[LoopedModel]:
    """Ablate components: inside the `with` block each run replaces their outputs at the chosen
    iterations.

    After the block, also after an error, the model is as before. Runs inside must have `n_loops`
    iterations. A skipped visit or iteration passes on the state that entered it, after all other
    hooks at that point.

    Args:
        what: One component or a list of components.
        how: The values that replace the output. "zero": zeros. "mean": the mean over the reference
            at the same iteration, over rows and over all positions that hold a token or are read.
            "mean_per_position": the mean over the rows of the reference at each position.
            "resample": for row i the values of the reference row p(i mod N) at the same positions,
            where p is a random permutation of its N rows that leaves no row in place. Visits and
            iterations take "zero" only, which skips them.
        n_loops: The number of iterations of the runs inside; None means the number that the
            checkpoint records.
        reference: A `Batch`, texts or token ids, for every `how` except "zero". They are run once
            at the start of the block, with the hooks that the model has then. For
            "mean_per_position" and "resample" all rows must have one length, and the runs inside
            must be as wide.
        seed: The seed of the permutation.
        positions: The columns of the text to ablate; "all" for every one. During generation columns
            still count from the beginning of the text.

    Yields:
        The model.

    Raises:
        ValueError: The model does not have a component, a place is out of range, or `reference` is
            missing, not needed or of unequal lengths. Runs inside raise it for another `n_loops` or
            width, and if they start inside a skipped iteration.
    """
    n_loops, columns = checked_loops(n_loops, model.cfg.n_loops), checked_columns(positions)
    seed = checked_seed(seed)
    components = [what] if isinstance(what, Component) else list(what)
    _check(components, how, reference)
    written, skipped = _written(model, components, n_loops), _skipped(model, components, n_loops)
    substitute = (
        zeros
        if reference is None
        else substitute_of(model, how, reference, sorted(written), n_loops, seed)
    )
    with ExitStack() as stack:
        entering = {
            leaving: stack.enter_context(_Entering(model.hook_point(before)))
            for leaving, before in skipped.items()
        }

        def act(value: Tensor, hook: HookPoint) -> Tensor:
            name = str(hook.name)
            if name in entering:
                return at_columns_of(value, entering[name].take(value), columns)
            ablated = substitute(value, name)
            heads = written[name]
            if heads is not None:
                others = torch.tensor(
                    [head not in heads for head in range(value.shape[2])], device=value.device
                )
                ablated = torch.where(others[:, None], value, ablated)
            return at_columns_of(value, ablated, columns)

        act = act if how == "resample" else by_rows(act)
        names = written.keys() | entering.keys()
        stack.enter_context(
            model.hooks([(names.__contains__, act)], n_loops=n_loops)
        )  # a predicate, so that another n_loops is refused
        yield model


def _check(components: Sequence[Component], how: How, reference: Inputs | None) -> None:
    if not components:
        raise ValueError("at least one component to ablate is needed, got none")
    if how not in ("zero", "mean", "mean_per_position", "resample"):
        raise ValueError(
            f"how must be 'zero', 'mean', 'mean_per_position' or 'resample', got {how!r}"
        )
    whole = [component.kind for component in components if component.kind not in _SITES]
    if whole and how != "zero":
        raise ValueError(
            f"a skipped {whole[0]} contributes nothing, so how must be 'zero', got {how!r}"
        )
    if (reference is None) != (how == "zero"):
        raise ValueError(
            "reference= must be given for how='mean', 'mean_per_position' and 'resample' and only"
            f" then, got how={how!r}"
        )


def _written(
    model: LoopedModel, components: Sequence[Component], n_loops: int
) -> dict[str, set[int] | None]:
    """The points of ablated heads, attentions and MLPs, with the heads to write; None for the whole
    value.
    """
    written: dict[str, set[int] | None] = {}
    for component in components:
        site = _SITES.get(component.kind)
        if site is None:
            continue
        for visit in _visits(model, component, n_loops):
            name = f"{visit.name}.{_required(visit, site, component.kind)}"
            if component.kind != "head":
                written[name] = None
                continue
            heads = set(in_range("heads", component.heads, heads_at(visit)))
            written[name] = heads | (written.get(name) or set())
    return written


def _skipped(model: LoopedModel, components: Sequence[Component], n_loops: int) -> dict[str, str]:
    """For each skipped visit and iteration, the point where it is left and the one where it is
    entered.
    """
    skipped: dict[str, str] = {}
    for component in components:
        if component.kind == "visit":
            for visit in _visits(model, component, n_loops):
                before, after = (
                    _required(visit, site, "visit")
                    for site in ("hook_resid_pre", "hook_resid_post")
                )
                skipped[f"{visit.name}.{after}"] = f"{visit.name}.{before}"
        if component.kind == "iteration":
            skipped |= _ends(model, component, n_loops)
    return skipped


def _visits(model: LoopedModel, component: Component, n_loops: int) -> list[Visit]:
    visits = chosen_visits(model, n_loops, component.where)
    if not visits:
        raise ValueError(f"{component} means no visit of a call with n_loops={n_loops}")
    return visits


def _required(visit: Visit, site: str, kind: str) -> str:
    if site not in visit.sites:
        raise ValueError(
            f"{visit.name} has no {site}, so no {kind} can be ablated there; it has"
            f" {', '.join(visit.sites)}"
        )
    return site


def _ends(model: LoopedModel, component: Component, n_loops: int) -> dict[str, str]:
    """Each part of the state where a chosen iteration is left, and where it is entered."""
    states = [place for place in places_of(model, n_loops) if "hook_state_" in place.site]
    runs: dict[str, list[Place]] = {}
    for place in component.where.among(states, n_loops):
        runs.setdefault(place.visit, []).append(place)
    if not runs:
        raise ValueError(f"{component} means no iteration of a call with n_loops={n_loops}")
    ends: dict[str, str] = {}
    for places in runs.values():
        ends |= _ends_of_run(places)
    return ends


def _ends_of_run(places: list[Place]) -> dict[str, str]:
    names = [place.name for place in places]
    entered = {
        name.replace("_state_in", "_state_out"): name for name in names if "hook_state_in" in name
    }
    left = [name for name in names if "hook_state_out" in name]
    if set(entered) != set(left):
        raise ValueError(
            f"iteration {places[0].loop} cannot be skipped: the state that enters it is at"
            f" {list(entered.values())} and the state that leaves it at {left}, and each part needs"
            " both"
        )
    return entered


class _Entering(AbstractContextManager["_Entering"]):
    """The value that passes a hook point, after all hooks there, whenever they were attached.

    Before each call of the point a hook is registered that is thereby the last one, and that goes
    again once it has run.
    """

    def __init__(self, point: HookPoint) -> None:
        self._point = point
        self._value: Tensor | None = None
        self._once: RemovableHandle | None = None
        self._always = point.register_forward_pre_hook(self._arm)

    def __exit__(self, *error: object) -> None:
        self._disarm()
        self._always.remove()

    @by_rows
    def _arm(self, module: nn.Module, args: object) -> None:
        self._disarm()
        self._once = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._disarm()
        self._value = output

    def _disarm(self) -> None:
        if self._once is not None:
            self._once.remove()
        self._once = None

    def take(self, leaving: Tensor) -> Tensor:
        """Return the value that entered, once; a second reading would belong to another run."""
        value, self._value = self._value, None
        if value is None or value.shape != leaving.shape:
            raise ValueError(
                f"what is skipped from {self._point.name!r} on must be run from there, but this run"
                " was continued inside it; continue from a visit before it, or after it"
            )
        return value
