"""The work of training tuned lenses: translators a few at a time, shared among processes.

Axes: visit read d_model; `own` counts the translators that are trained at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.common.columns import Shown, at_positions, shown_columns
from loopscope.interp.common.fingerprint import described, facts_of_inputs, facts_of_model
from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import LOGITS_AT_ONCE, in_chunks, rows_at_once
from loopscope.interp.lens.lens import residuals
from loopscope.interp.lens.tuned_lens import TunedLens, translated
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.run import run_items
from loopscope.interp.shards.share import Shard, checked_shard
from loopscope.interp.shards.work import Results, settings_of
from loopscope.models.basis.draws import seeded
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

_ROWS = 512  # inputs run at a time before training
_TOGETHER = 4  # visits whose translators are trained at once, where each has its own
# nats; a visit that answers as the run does is left alone, else Adam would scale up the rounding of
# its gradient
_ENOUGH = 1e-6


@dataclass(frozen=True)
class TrainingSettings:
    """How translators are trained; the fields are those of `train_tuned_lens`."""

    positions: Shown
    steps: int
    lr: float
    weight_decay: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class TunedJob:
    """A training, in pieces of a few translators.

    Attributes:
        start: The untrained lens.
        owner: Which translator each visit has.
    """

    model: LoopedModel
    batch: Batch
    start: TunedLens
    settings: TrainingSettings
    owner: tuple[int, ...]

    def lens(self, save_to: str | Path | None, shard: Shard | None) -> TunedLens:
        """The trained lens; of a shard, that of its visits."""
        pieces, part = self._pieces(), checked_shard(shard)
        items, _, found = run_items(len(pieces), part, self._train, save_to, self._manifest)
        if not items:
            raise ValueError(
                f"shard {part} of this training is empty: there are {len(pieces)} pieces of"
                " translators; take fewer shards"
            )
        device = self.model.device
        moved = [{name: value.to(device) for name, value in each.items()} for each in found]
        return _joined(self.start, self.owner, [pieces[item] for item in items], moved)

    def _pieces(self) -> list[list[int]]:
        """The visits of the translators that are trained at once: as many translators as have
        `_TOGETHER` visits, but at least one.
        """
        pieces: list[list[int]] = []
        for translator in range(max(self.owner) + 1):
            visits = [visit for visit, own in enumerate(self.owner) if own == translator]
            if pieces and len(pieces[-1]) + len(visits) <= _TOGETHER:
                pieces[-1] += visits
            else:
                pieces.append(visits)
        return pieces

    def _train(self, items: list[int]) -> tuple[Results, Iterator[Results]]:
        if not items:
            return {}, iter(())
        how, every = self.settings, self._pieces()
        pieces = [every[item] for item in items]
        visits = sorted(visit for piece in pieces for visit in piece)
        resids, finals = material(self.model, self.batch, how.positions, self.start.n_loops, visits)
        generator = seeded(how.seed)
        order = (
            torch.randperm(len(finals), generator=generator, device="cpu") for _ in range(how.steps)
        )
        drawn = torch.stack([reads[: how.batch_size].clone() for reads in order]).to(finals.device)
        bar = tqdm(
            total=how.steps * len(pieces),
            desc="training a tuned lens",
            leave=False,
            disable=how.steps < 100,
        )
        own = ([visits.index(visit) for visit in piece] for piece in pieces)
        return {}, (
            self._fit(piece, resids[at], finals, drawn, bar)
            for piece, at in zip(pieces, own, strict=True)
        )

    def _fit(
        self,
        visits: Sequence[int],
        resids: Float[Tensor, "visit read d_model"],
        finals: Float[Tensor, "read d_read"],
        drawn: Int[Tensor, "step drawn"],
        bar: Any,
    ) -> Results:
        """Train the translators of some visits: "weights", Float[Tensor, "own d_model d_model"],
        "biases", Float[Tensor, "own d_model"], and "losses", Float[Tensor, "step visit"].
        """
        own = _numbered([self.owner[visit] for visit in visits])
        owner = torch.tensor(own, device=resids.device)
        start, count = self.start, max(own) + 1
        params = [start.weights[:count].clone(), start.biases[:count].clone()]
        optimizer = torch.optim.AdamW(
            params, lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(drawn))
        losses = []
        for reads in drawn:
            losses.append(
                _set_gradients(self.model, params, owner, resids[:, reads], finals[reads])
            )
            optimizer.step()
            schedule.step()
            bar.update()
        return {"weights": params[0], "biases": params[1], "losses": torch.stack(losses)}

    def _manifest(self) -> Manifest:
        start, pieces = self.start, self._pieces()
        settings = {
            **asdict(self.settings),
            "positions": described(shown_columns(self.batch, self.settings.positions)),
            "owner": self.owner,
            "n_loops": start.n_loops,
        }
        return Manifest(
            method="train_tuned_lens",
            weights=described(facts_of_model(self.model)),
            inputs=described(facts_of_inputs([self.batch])),
            settings=settings_of(settings),
            items=len(pieces),
            about={
                "pieces": pieces,
                "owner": list(self.owner),
                "names": list(start.names),
                "n_loops": start.n_loops,
                "family": start.family,
                "fingerprint": start.fingerprint,
            },
        )


def kept_tuned(manifest: Manifest, found: Sequence[Results]) -> TunedLens:
    """The whole lens from its folder."""
    about = manifest.about
    none = torch.empty(0, 0, device="cpu")
    start = TunedLens(
        weights=torch.empty(0, 0, 0, device="cpu"),
        biases=none,
        names=tuple(about["names"]),
        n_loops=about["n_loops"],
        family=about["family"],
        fingerprint=about["fingerprint"],
        losses=none,
    )
    return _joined(start, about["owner"], about["pieces"], found)


def _numbered(translators: Sequence[int]) -> list[int]:
    """Each translator's number among those that occur."""
    numbers = {each: i for i, each in enumerate(dict.fromkeys(translators))}
    return [numbers[each] for each in translators]


def _joined(
    start: TunedLens,
    owner: Sequence[int],
    pieces: Sequence[Sequence[int]],
    found: Sequence[Mapping[str, Tensor]],
) -> TunedLens:
    """The lens of the visits of some pieces, in the order of the run."""
    visits: list[int] = []
    weights, biases, losses = [], [], []
    for piece, each in zip(pieces, found, strict=True):
        own = _numbered([owner[visit] for visit in piece])
        visits += piece
        weights.append(each["weights"][own])
        biases.append(each["biases"][own])
        losses.append(each["losses"])
    order = sorted(range(len(visits)), key=visits.__getitem__)
    return replace(
        start,
        weights=torch.cat(weights)[order],
        biases=torch.cat(biases)[order],
        names=tuple(start.names[visits[i]] for i in order),
        losses=torch.cat(losses, dim=1)[:, order],
    )


@torch.no_grad()
def material(
    model: LoopedModel, batch: Batch, positions: Shown, n_loops: int, visits: Sequence[int]
) -> tuple[Float[Tensor, "visit read d_model"], Float[Tensor, "read d_read"]]:
    """The residual after some visits and the head's input at the end, without padding.

    Args:
        visits: By their place in the schedule.

    Raises:
        ValueError: Runs that are not finite.
    """
    columns, shown = shown_columns(batch, positions)
    resids, finals = [], []
    size = rows_at_once(model, batch, _ROWS)
    for part, read in zip(in_chunks(batch, size, "runs"), columns.split(size), strict=True):
        run = residuals(model, part, read, n_loops)
        every = list(run.values.values())
        resids.append(torch.stack([every[visit] for visit in visits]))
        finals.append(at_positions(model.read_state(run.end), read).flatten(0, 1))
    real = shown.flatten()
    whole, ends = torch.cat(resids, dim=1)[:, real], torch.cat(finals)[real]
    schedule = model.schedule(n_loops)
    for visit, found in zip(visits, whole, strict=True):
        refuse_nonfinite(f"the residuals at visit {schedule[visit].name}", found)
    refuse_nonfinite("the answers of the runs", ends)
    return whole, ends


def log_probabilities(
    model: LoopedModel, normalized: Float[Tensor, "visit read d_read"]
) -> Float[Tensor, "visit read d_vocab"]:
    """The logarithms of the answers' probabilities, in float32 or wider."""
    logits = model.unembed(normalized)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _set_gradients(
    model: LoopedModel,
    params: list[Tensor],
    owner: Int[Tensor, " visit"],
    resids: Float[Tensor, "visit read d_model"],
    finals: Float[Tensor, "read d_read"],
) -> Float[Tensor, " visit"]:
    """Set the gradients of every visit's mean KL, a few visits at a time; return the mean KL.

    The model's own parameters get no gradient.
    """
    with torch.no_grad():
        target = log_probabilities(model, finals[None])
    losses = []
    for param in params:
        param.grad = torch.zeros_like(param)
    size = max(1, LOGITS_AT_ONCE // target.numel())
    for visits in (slice(first, first + size) for first in range(0, len(resids), size)):
        own = [param[owner[visits]].requires_grad_() for param in params]
        with torch.enable_grad():
            log_probs = log_probabilities(model, model.normalize(translated(resids[visits], *own)))
            kl = (target.exp() * (target - log_probs)).sum(-1).mean(1)
            grads = torch.autograd.grad(kl.clamp(min=_ENOUGH).sum(), own)
        for param, grad in zip(params, grads, strict=True):
            assert param.grad is not None, "gradients were set to zero"
            param.grad.index_add_(0, owner[visits], grad)
        losses.append(kl.detach())
    return torch.cat(losses)
