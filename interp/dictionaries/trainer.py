"""The training of one coder: its settings, and its updates.

Axes: read (a token of an example, or one of its iterations), feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.dictionaries.coder import Coder
from loopscope.models.basis.draws import checked_seed, normal_rows, seeded
from loopscope.models.basis.numbers import checked_count, checked_number

Activation = Literal["topk", "batch_topk", "jumprelu"]
_FALLS = 0.5  # the share of the steps, the last ones, over which the learning rate falls to zero
_SETTLED = 0.1  # the share of the steps, the last ones, that the threshold is a mean over


@dataclass(frozen=True)
class DictionaryTraining:
    """The settings of a dictionary's training.

    Attributes:
        n_features: The number of features of each coder.
        k: How many features are on in a code: exactly so many for "topk", so many on average for
            "batch_topk" and "jumprelu".
        activation: Which features are on. "topk" keeps the k largest. "batch_topk" keeps the
            largest of a whole batch; after training a threshold takes its place, the mean of the
            smallest entries that were kept over the last tenth of the steps. "jumprelu" has a
            trained threshold per feature, learned by straight-through gradients, and a penalty on
            the distance between k and the mean number of features that are on.
        steps: The number of updates.
        batch_size: How many reads (tokens) each update uses, each with the states of all its
            iterations.
        lr: The learning rate of Adam, which falls linearly to zero over the last half of the steps.
        sparsity: The weight of the penalty of "jumprelu", where the share of unexplained variance
            has weight 1.
        bandwidth: The width of the straight-through gradients of "jumprelu", in units of the
            states' size.
        seed: The seed of the first features and of the batches.
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
        for name in ("n_features", "k", "steps", "batch_size"):
            checked_count(getattr(self, name), name)
        checked_seed(self.seed)
        checked_number(self.lr, "lr", above=0)
        checked_number(self.sparsity, "sparsity", least=0)
        checked_number(self.bandwidth, "bandwidth", above=0)
        if not 1 <= self.k <= self.n_features:
            raise ValueError(f"k must be in 1..n_features={self.n_features}, got {self.k}")


class Trainer:
    """One coder in training, in units in which its states have the size 1.

    Args:
        x, y: Some of what is read and written, for the units and the first biases.
    """

    def __init__(self, x: Tensor, y: Tensor, centred: bool, training: DictionaryTraining) -> None:
        self.training, self.centred = training, centred
        self.spread = (y - y.mean(0)).square().sum(1).mean().sqrt().clamp(min=1e-12)
        self.size = (x - x.mean(0)).square().sum(1).mean().sqrt().clamp(min=1e-12)
        generator = seeded(training.seed)
        drawn = normal_rows(training.n_features, y.shape[1], generator).to(y)
        self.W_dec = F.normalize(drawn, dim=1).requires_grad_()
        if not centred:
            drawn = normal_rows(training.n_features, x.shape[1], generator).to(x)
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
            step, start = len(self.losses), int((1 - _SETTLED) * self.training.steps)
            if step >= start:
                self.threshold += (least - self.threshold) / (step - start + 1)
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
