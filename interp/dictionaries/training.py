"""Training of dictionaries: on states in memory, or on batches of states from anywhere.

Axes: read (a token of an example), loop, d_in, feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import Inputs, ReadoutColumn
from loopscope.interp.common.places import Picked
from loopscope.interp.common.precision import widened
from loopscope.interp.dictionaries.coder import Coder
from loopscope.interp.dictionaries.dictionary import KINDS, Dictionary, Kind
from loopscope.interp.dictionaries.reading import Reading, loop_states
from loopscope.models.core.base import LoopedModel

Activation = Literal["topk", "batch_topk", "jumprelu"]
Batches = Float[Tensor, "read loop d_in"] | Iterable[Tensor]
_FALLS = 0.5  # the share of the steps, the last ones, over which the learning rate falls to zero
_REST = 1e-3  # of a threshold's step towards the last batch's smallest kept entry


@dataclass(frozen=True)
class DictionaryTraining:
    """How a dictionary is trained.

    Attributes:
        n_features: Features of each coder.
        k: Features of a code: exactly so many ("topk"), or so many on average ("batch_topk",
            "jumprelu").
        activation: "topk"; "batch_topk", whose threshold after training is the mean of the
            smallest entries that were kept; or "jumprelu", whose thresholds are trained by
            straight-through gradients, with a penalty on the distance of the mean number of
            features from k.
        steps: Updates.
        batch_size: Reads in each update, each with the states of all its iterations.
        lr: The learning rate of Adam, which falls linearly to zero over the last half.
        sparsity: Weight of the penalty of "jumprelu", against the share of variance unexplained.
        bandwidth: Of the straight-through gradients of "jumprelu", in units of the states' size.
        seed: Of the first features and of the draws.
    """

    n_features: int = 512
    k: int = 8
    activation: Activation = "topk"
    steps: int = 1000
    batch_size: int = 128
    lr: float = 3e-3
    sparsity: float = 1.0
    bandwidth: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ("topk", "batch_topk", "jumprelu"):
            raise ValueError(
                f"activation must be 'topk', 'batch_topk' or 'jumprelu', got {self.activation!r}"
            )
        if min(self.steps, self.batch_size) < 1 or not 0 < self.lr < math.inf:
            raise ValueError(
                f"steps and batch_size must be at least 1 and lr positive, got steps={self.steps},"
                f" batch_size={self.batch_size}, lr={self.lr}"
            )
        if not 1 <= self.k <= self.n_features:
            raise ValueError(f"k must be in 1..n_features={self.n_features}, got {self.k}")


def train_dictionary(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    kind: Kind = "shared",
    hook: str | None = None,
    target: str | None = None,
    positions: Picked | int | None = "all",
    readout: ReadoutColumn = None,
    training: DictionaryTraining | None = None,
) -> Dictionary:
    """Train a sparse dictionary of the states at one hook over the iterations; the model itself
    stays as it is.

    Args:
        inputs: A batch, texts, or tokens with `readout`.
        n_loops: Iterations; None means what the checkpoint records.
        kind: "per_iteration", "shared", "crosscoder" or "transcoder", as `Dictionary` says.
        hook: The hook that is read, within an iteration; None means the residual after the last
            block.
        target: The hook that is written, for a transcoder only.
        positions: "all" tokens that are not padding, columns, or None for the readout.
        training: The settings; None means their defaults.

    Raises:
        KeyError: A hook that an iteration does not have.
        ValueError: A target without a transcoder or the reverse, or states that are not finite.

    Source:
        TopK: Gao et al. 2024 (arXiv 2406.04093). BatchTopK: Bussmann et al. 2024 (arXiv
        2412.06410). JumpReLU: Rajamanoharan et al. 2024 (arXiv 2407.14435). Crosscoders: Lindsey et
        al. 2024 (Anthropic). Transcoders: Dunefsky et al. 2024 (arXiv 2406.11944).
    """
    if (target is None) == (kind == "transcoder"):
        raise ValueError(
            "target= (what is written) must be given for a transcoder and only then, got"
            f" kind={kind!r}, target={target!r}"
        )
    reading = Reading.of(model, n_loops, hook, target)

    def states(hook: str) -> Tensor:
        return loop_states(
            model, inputs, reading.n_loops, hook=hook, positions=positions, readout=readout
        )

    targets = None if target is None else states(target)
    return fit_dictionary(states(reading.hook), reading, kind, training, targets)


def fit_dictionary(
    states: Batches,
    reading: Reading,
    kind: Kind = "shared",
    training: DictionaryTraining | None = None,
    targets: Batches | None = None,
) -> Dictionary:
    """Train a dictionary on states that were collected before.

    Args:
        states: Float[Tensor, "read loop d_in"], from which batches are drawn at random; or an
            iterable of such batches in random order, which is gone through as often as needed.
        reading: Where the states come from.
        targets: What a transcoder writes, for the same reads.

    Raises:
        ValueError: States that are not finite or of another number of iterations, or an iterable
            that cannot be gone through again.
    """
    training = training or DictionaryTraining()
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    trainers: list[_Trainer] = []
    even: Tensor | None = None
    batches = _batches(states, targets, training)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in tqdm(range(training.steps), desc=kind, leave=False, disable=training.steps < 100):
            x, y = (_checked(part, reading.n_loops) for part in next(batches))
            even = _evenly(y) if even is None else even
            parts = [_by_coder(part, kind) for part in (x, y, even.expand_as(y))]
            trainers = trainers or [
                _Trainer(a, b, targets is None, training) for a, b, _ in zip(*parts, strict=True)
            ]
            for trainer, *own in zip(trainers, *parts, strict=True):
                trainer.step(*own)
    losses = torch.stack([torch.stack(trainer.losses) for trainer in trainers])
    shares = losses / reading.n_loops if kind == "crosscoder" else losses
    return Dictionary(kind, tuple(trainer.coder() for trainer in trainers), reading, shares)


def _checked(states: Tensor, n_loops: int) -> Float[Tensor, "read loop d"]:
    """A batch of states in float32 or wider."""
    if states.ndim != 3 or states.shape[1] != n_loops:
        raise ValueError(
            f"batches of states must be [read, {n_loops} iterations, width], got the shape"
            f" {list(states.shape)}"
        )
    refuse_nonfinite("the states to train a dictionary on", states)
    return widened(states)


def _evenly(states: Float[Tensor, "read loop d"]) -> Float[Tensor, "1 loop 1"]:
    """The weight of each iteration, by which all count alike: 1 over the variance of its states."""
    spread = (states - states.mean(0)).square().sum(2).mean(0)
    return 1 / spread.clamp(min=max(1e-6 * float(spread.max()), 1e-30))[None, :, None]


def _by_coder(
    values: Float[Tensor, "read loop d"], kind: Kind
) -> tuple[Float[Tensor, "vector _width"], ...]:
    """The vectors that each coder is trained on."""
    if kind == "per_iteration":
        return values.unbind(1)
    return (values.flatten(1) if kind == "crosscoder" else values.flatten(0, 1),)


def _batches(
    states: Batches, targets: Batches | None, training: DictionaryTraining
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of what is read and of what is written, without end."""
    if isinstance(states, Tensor):
        written = states if targets is None else targets
        if not isinstance(written, Tensor) or len(states) != len(written):
            raise ValueError(
                "targets must be a tensor with one row for each of the"
                f" {len(states)} reads of the states"
            )
        generator = torch.Generator().manual_seed(training.seed)
        while True:
            drawn = torch.randint(len(states), (training.batch_size,), generator=generator)
            yield states[drawn.to(states.device)], written[drawn.to(written.device)]
    while True:
        found = False
        for pair in zip(states, *([] if targets is None else [targets]), strict=True):
            found = True
            yield pair[0], pair[-1]
        if not found:
            raise ValueError(
                "the batches of states came to an end before the steps did; pass an iterable that"
                " can be gone through again (a list or a store), no generator"
            )


class _Trainer:
    """One coder in training, in units in which its states have the size 1."""

    def __init__(self, x: Tensor, y: Tensor, centred: bool, training: DictionaryTraining) -> None:
        self.training, self.centred = training, centred
        self.spread = (y - y.mean(0)).square().sum(1).mean().sqrt().clamp(min=1e-12)
        self.size = (x - x.mean(0)).square().sum(1).mean().sqrt().clamp(min=1e-12)
        generator = torch.Generator().manual_seed(training.seed)
        drawn = torch.randn(training.n_features, y.shape[1], generator=generator).to(y)
        self.W_dec = F.normalize(drawn, dim=1).requires_grad_()
        if not centred:
            drawn = torch.randn(training.n_features, x.shape[1], generator=generator).to(x)
        self.W_enc = F.normalize(drawn, dim=1).T.contiguous().requires_grad_()
        self.b_enc = x.new_zeros(training.n_features)
        if not centred:
            self.b_enc -= (x.mean(0) / self.size) @ self.W_enc.detach()
        self.b_enc.requires_grad_()
        self.b_dec = (y.mean(0) / self.spread).requires_grad_()
        self.threshold = x.new_full((training.n_features,), 0.1)
        params = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        if training.activation == "jumprelu":
            params.append(self.threshold.requires_grad_())
        self.optimizer = torch.optim.Adam(params, lr=training.lr)
        self.losses: list[Tensor] = []

    def step(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """One update; the error of each entry of y counts with its weight."""
        done = len(self.losses) / self.training.steps
        self.optimizer.param_groups[0]["lr"] = self.training.lr * min(1, (1 - done) / _FALLS)
        x, y = x / self.size, y / self.spread
        before = (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc
        code, penalty = self._code(before)
        left = y - code @ self.W_dec - self.b_dec
        loss = (left.square() * weight * self.spread**2).sum(1).mean()
        self.optimizer.zero_grad()
        (loss + penalty).backward()
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec.copy_(F.normalize(self.W_dec, dim=1))
        self.losses.append(loss.detach())

    def _code(self, before: Float[Tensor, "read feature"]) -> tuple[Tensor, Tensor]:
        """The codes, and the penalty on their density."""
        k, none = self.training.k, before.new_zeros(())
        if self.training.activation == "topk":
            values, features = before.topk(k, dim=-1)
            return torch.zeros_like(before).scatter(-1, features, values.relu()), none
        if self.training.activation == "batch_topk":
            least = before.detach().flatten().topk(k * len(before)).values[-1].clamp(min=0)
            share = max(_REST, 1 / (len(self.losses) + 1))
            self.threshold += share * (least - self.threshold)
            return before.relu() * (before >= least), none
        width = self.training.bandwidth
        code, on = jump_relu(before, self.threshold, width)
        return code, self.training.sparsity * (on.sum(1).mean() / k - 1).relu()

    def coder(self) -> Coder:
        """The coder, in the units of the states."""
        by_k = self.training.activation == "topk"
        with torch.no_grad():
            return Coder(
                W_enc=self.W_enc.detach() / self.size * self.spread,
                b_enc=self.b_enc.detach() * self.spread,
                W_dec=self.W_dec.detach().clone(),
                b_dec=self.b_dec.detach() * self.spread,
                k=self.training.k if by_k else None,
                threshold=None if by_k else self.threshold.detach().clamp(min=0) * self.spread,
                centred=self.centred,
            )


def jump_relu(
    before: Float[Tensor, "read feature"], threshold: Float[Tensor, " feature"], width: float
) -> tuple[Float[Tensor, "read feature"], Float[Tensor, "read feature"]]:
    """The entries above their threshold, and which they are (0 or 1); gradients reach thresholds as
    if each step were `width` wide.

    Source:
        Rajamanoharan et al. 2024 (arXiv 2407.14435), equations 11 and 12.
    """
    away = before - threshold
    near = (away.detach().abs() < width / 2).to(before) / width
    above = (away.detach() > 0).to(before)
    through = near * (threshold.detach() - threshold)  # zero, with the gradient -1/width there
    on = above + through
    return before.relu() * above + before.detach().relu() * through, on
