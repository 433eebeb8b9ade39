"""Changes of the state that are followed through iterations, orthonormal again after each of them.

Axes: batch; `k` counts the changes of one example, `n` the numbers of one change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import rows_apart
from loopscope.interp.dynamics.changes import (
    Space,
    Varying,
    carried,
    carries,
    check_map,
    floating,
    forward_mode,
)
from loopscope.interp.dynamics.states import iteration_start
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import reads_only
from loopscope.models.core.state import State, Visit

BOUNDARY = "boundary"
Marks = list[tuple[str, Tensor]]  # what ran since the mark before, and the changes there


@dataclass(frozen=True)
class Followed:
    """Changes of some examples' states that are followed through iterations."""

    model: LoopedModel
    free: Varying
    space: Space
    n_loops: int

    def run(
        self, state: State, start: int, k: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The triangle of each iteration, "batch k k", and the share of each of its sublayers."""
        model, n_loops = self.model, self.n_loops
        with torch.no_grad():
            state = model.advance(state, iteration_start(model, start, n_loops))
        vectors = self._first(state, k, generator)
        for end in model.iteration_ends(n_loops)[start:]:
            marks, pushed = self._through(state, vectors, end)
            vectors, triangle = _orthonormal(pushed, marks[-1][1])
            yield triangle, _shares(marks)
            with torch.no_grad():
                state = model.advance(state, end)

    def _first(
        self, state: State, k: int, generator: torch.Generator
    ) -> Float[Tensor, "batch k n"]:
        """Random changes that are orthonormal as they are measured."""
        values, columns = self.free.values(self.model, state), self.free.free
        most = int(columns.sum(1).min()) * (self.free.size(values) // columns.shape[1])
        if not 1 <= k <= most:
            raise ValueError(
                f"k must be in 1..{most}, the dimensions of the shortest example's state, got {k}"
            )
        drawn = self.free.draw(values, k, generator)
        with forward_mode():
            rows = self.free.beside(state, values, drawn, carried)
            made = list(self.free.values(self.model, rows).values())
            return _orthonormal(drawn, self.free.carried_by(made, k, self.space))[0]

    def _through(
        self, state: State, vectors: Float[Tensor, "batch k n"], end: int
    ) -> tuple[Marks, Float[Tensor, "batch k n"]]:
        """The changes at each mark of an iteration as they are measured, and those at its end; they
        are pushed one by one where rows may depend on each other.
        """
        size = vectors.shape[1] if rows_apart(self.model) else 1
        pushed = [self._pushed(state, part, end) for part in vectors.split(size, dim=1)]
        marks = [
            (several[0][0], torch.cat([changes for _, changes in several], dim=1))
            for several in zip(*(marks for marks, _ in pushed), strict=True)
        ]
        return marks, torch.cat([changes for _, changes in pushed], dim=1)

    def _pushed(
        self, state: State, vectors: Float[Tensor, "batch k n"], end: int
    ) -> tuple[Marks, Float[Tensor, "batch k n"]]:
        """The marks and the end of changes that are run beside each other."""
        model, k, marks = self.model, vectors.shape[1], Marks()
        values = self.free.values(model, state)
        visits = model.schedule(self.n_loops)[state.visit : end]
        with forward_mode():
            rows = self.free.beside(state, values, vectors, carried)
            if self.free.names == ("resid",):
                with self._watching(visits, marks, k):
                    rows = model.advance(rows, end)
            else:
                for visit in visits[:-1]:
                    rows = model.advance(rows, visit.index + 1)
                    here = [part for part in floating(rows).values() if carries(part)]
                    marks.append((_block(visit), self.free.carried_by(here, k, self.space)))
                rows = model.advance(rows, end)
            made = self.free.values(model, rows)
            check_map(model, values, made)
            last = BOUNDARY if self.free.names == ("resid",) else _block(visits[-1])
            marks.append((last, self.free.carried_by(list(made.values()), k, self.space)))
            return marks, self.free.carried_by(list(made.values()), k)

    def _watching(
        self, visits: Sequence[Visit], marks: Marks, k: int
    ) -> AbstractContextManager[LoopedModel]:
        """Inside the `with` block a run marks the stream before, between and after the sublayers
        of each block.
        """
        labels = {
            f"{visit.name}.{site}": label
            for visit in visits
            for site, label in _labels(visit).items()
        }

        @reads_only
        def mark(value: Tensor, hook: HookPoint) -> None:
            marks.append((labels[str(hook.name)], self.free.carried_by([value], k, self.space)))

        return self.model.hooks([(list(labels), mark)] if labels else [], n_loops=self.n_loops)


def _block(visit: Visit) -> str:
    """The name of a visit's block within an iteration."""
    return visit.name.removeprefix(f"loops.{visit.loop}.")


def _labels(visit: Visit) -> dict[str, str]:
    """The sites of a block at which its stream is marked, each with what has run since the mark
    before.
    """
    name = _block(visit)
    parted = "hook_resid_mid" in visit.sites
    named = {
        "hook_resid_pre": BOUNDARY,
        "hook_resid_mid": f"{name}.attn",
        "hook_resid_post": f"{name}.mlp" if parted else name,
    }
    return {site: label for site, label in named.items() if site in visit.sites}


def _triangle(measured: Float[Tensor, "batch k n"]) -> tuple[Tensor, Tensor]:
    """Q "batch n k" and R "batch k k" of changes as columns, the diagonal of R being at least 0."""
    refuse_nonfinite("the changes of the state", measured)
    q, r = torch.linalg.qr(measured.transpose(1, 2))
    signs = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(r)
    return q * signs[:, None, :], r * signs[:, :, None]


def _orthonormal(
    vectors: Float[Tensor, "batch k n"], measured: Float[Tensor, "batch k n"]
) -> tuple[Float[Tensor, "batch k n"], Float[Tensor, "batch k k"]]:
    """Combinations of the changes that are orthonormal as they are measured, and the triangle that
    was divided by.
    """
    q, r = _triangle(measured)
    if vectors is measured or torch.equal(vectors, measured):
        return q.transpose(1, 2), r
    divided = torch.linalg.solve_triangular(
        r, vectors.transpose(1, 2), upper=True, left=False
    ).transpose(1, 2)
    if not bool(divided.isfinite().all()):
        raise ValueError(
            f"an iteration maps the k={vectors.shape[1]} followed directions onto fewer, so their"
            " exponents cannot be followed; pass a smaller k or another space"
        )
    return divided, r


def _shares(marks: Marks) -> dict[str, Float[Tensor, "batch k"]]:
    """The share of each sublayer in the logarithms of the triangle's diagonal."""
    shares: dict[str, Tensor] = {}
    before: Tensor | float = 0.0
    for name, measured in marks:
        here = _triangle(measured)[1].diagonal(dim1=1, dim2=2).log()
        shares[name] = shares.get(name, 0.0) + here - before
        before = here
    return shares
