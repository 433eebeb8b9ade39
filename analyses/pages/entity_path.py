"""The path of the entities through a miniature: where each appears, what moves it, what breaks the
answer and what restores it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.common.subject import Subject
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.common.metrics import logit_margin
from loopscope.interp.common.ranking import top_token
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.edit.substitutes import How
from loopscope.interp.lens.decoding import decodability
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.state import checked_loops

HOPS, CLEAR = 5, 0.9


@dataclass(frozen=True)
class Pairs:
    """Questions of one hop count, each with the same relations asked of another entity, so that all
    that lies on the way differs.

    Attributes:
        clean, corrupted: The inputs.
        answers: Int[Tensor, " batch"], of the clean ones.
        entities: Int[Tensor, "batch target"], the clean ones' entities after 1, 2, ... hops; the
            last is the answer.
        n_loops: Iterations of every run.
    """

    subject: Subject
    clean: Batch
    corrupted: Batch
    answers: Tensor
    entities: Tensor
    n_loops: int

    @classmethod
    def of(cls, subject: Subject, hops: int) -> Pairs:
        """All questions of a hop count; the other entity is the next one of the graph."""
        assert subject.graph is not None, "the shipped miniatures have their graphs"
        questions, model = subject.of_hops(hops), subject.model
        clean, answers = subject.encode(questions)
        corrupted = clean.tokens.clone()
        first = model.to_single_token("<e_0>")
        corrupted[:, 0] = (corrupted[:, 0] - first + 1) % subject.graph.n_entities + first
        walks = [
            [model.to_single_token(entity) for entity in subject.graph.walk(question.text)[1:]]
            for question in questions
        ]
        n_loops = checked_loops(None, model.cfg.n_loops)
        return cls(
            subject, clean, replace(clean, tokens=corrupted), answers, torch.tensor(walks), n_loops
        )

    def sweep(self, site: str, heads: Literal["all"] | None = None) -> Sweep:
        """The clean activation put into the corrupted run, one place at a time."""
        model, metric, also = self.subject.model, logit_margin(self.answers), {"right": self.right}
        return activation_patch(
            model,
            self.clean,
            self.corrupted,
            metric,
            self.n_loops,
            sites=site,
            heads=heads,
            also=also,
        )

    @cached_property
    def residual(self) -> Sweep:
        """The state after every block."""
        return self.sweep("resid_post")

    @cached_property
    def heads(self) -> Sweep:
        """Every head's output, one head at a time."""
        return self.sweep("z", heads="all")

    def right(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """1 where the clean answer is on top."""
        return (top_token(logits) == self.answers).to(logits)

    def accuracy(self) -> float:
        """The share of right answers."""
        return float(
            readout_lens(self.subject.model, self.clean, self.n_loops)
            .correct(self.answers)[-1]
            .float()
            .mean()
        )

    def accuracy_without(self, component: Component, how: How = "mean") -> float:
        """The share of right answers with a component replaced by its mean, or with "zero" with an
        iteration left out.
        """
        reference = None if how == "zero" else self.clean
        with ablate(
            self.subject.model, component, how=how, n_loops=self.n_loops, reference=reference
        ):
            return self.accuracy()


@dataclass(frozen=True)
class Step:
    """Where the entity after some hops first stands on top at its own relation.

    Attributes:
        hop: Which entity, from 1; its relation stands at this position.
        loop, layer: The block after which the logit lens reads it for at least 0.9 of the
            questions.
        share: For how many there.
        before: For how many one block earlier.
    """

    hop: int
    loop: int
    layer: int
    share: float
    before: float


def steps(pairs: Pairs) -> list[Step]:
    """The front along which the answer is worked out."""
    model = pairs.subject.model
    read = decodability(
        model, pairs.clean, pairs.entities, list(range(1, HOPS + 1)), pairs.n_loops
    ).accuracy
    schedule, found = model.schedule(pairs.n_loops), []
    for target, shares in enumerate(read.T):
        clear = [i for i, share in enumerate(shares.tolist()) if share >= CLEAR]
        if not clear:
            raise ValueError(
                f"the entity after {target + 1} hops is never on top for {CLEAR:g} of the questions"
                " at its relation"
            )
        visit = schedule[clear[0]]
        assert visit.loop is not None, "every block of this family is in an iteration"
        earlier = float(shares[clear[0] - 1]) if clear[0] else 0.0
        found.append(Step(target + 1, visit.loop, visit.layer, float(shares[clear[0]]), earlier))
    return found


def restored(pairs: Pairs, front: list[Step]) -> pd.DataFrame:
    """For each block of the first loops, the position at which the clean state restores most,
    and how much.
    """
    effect, right = pairs.residual.grid(), pairs.residual.also["right"].grid(normalized=False)
    rows = []
    for loop in range(front[-1].loop + 2):
        for layer in range(len(effect.layers)):
            shares = effect.values[loop, layer, :, 0]
            best = int(shares.argmax())
            answered = float(right.values[loop, layer, best, 0])
            elsewhere = float(torch.cat([shares[:best], shares[best + 1 :]]).abs().max())
            rows.append((loop, layer, best, float(shares[best]), answered, elsewhere))
    return pd.DataFrame(
        rows,
        columns=[
            "loop",
            "block",
            "position",
            "margin restored",
            "answered right",
            "largest elsewhere",
        ],
    )


def writers(pairs: Pairs, front: list[Step]) -> pd.DataFrame:
    """The writers of each entity at the front: effects of the clean output of attention and of
    the MLP, and accuracy without them.
    """
    attention, mlp = pairs.sweep("attn_out").grid(), pairs.sweep("mlp_out").grid()
    rows = []
    for step in front:
        at = (step.loop, step.layer, step.hop, 0)
        without = [
            pairs.accuracy_without(Component(kind, (step.loop,), (step.layer,)))
            for kind in ("attn", "mlp")
        ]
        rows.append(
            (
                step.hop,
                step.loop,
                step.layer,
                float(attention.values[at]),
                float(mlp.values[at]),
                *without,
            )
        )
    columns = [
        "hop",
        "loop",
        "block",
        "attention restores",
        "MLP restores",
        "accuracy without attention",
        "without MLP",
    ]
    return pd.DataFrame(rows, columns=columns)


def movers(pairs: Pairs, front: list[Step]) -> pd.DataFrame:
    """Each head at the front: how much it attends one position back, what its clean output
    restores, accuracy without it.
    """
    model, n_loops = pairs.subject.model, pairs.n_loops
    heads = pairs.heads.grid()
    _, cache = model.run_with_cache(
        pairs.clean.tokens,
        n_loops=n_loops,
        mask=pairs.clean.mask,
        names_filter="**.attn.hook_pattern",
    )
    rows = []
    for step in front:
        pattern = cache["pattern", step.loop, step.layer].mean(0)
        for head in range(model.cfg.n_heads):
            itself = Component("head", loops=(step.loop,), layers=(step.layer,), heads=(head,))
            back = float(pattern[head, step.hop, step.hop - 1])
            effect = float(heads.values[step.loop, step.layer, step.hop, head])
            without = [pairs.accuracy_without(itself, how) for how in ("mean", "mean_per_position")]
            rows.append((step.hop, step.loop, step.layer, head, back, effect, *without))
    columns = [
        "hop",
        "loop",
        "block",
        "head",
        "attention one back",
        "restores",
        "accuracy with its mean",
        "with its mean per position",
    ]
    return pd.DataFrame(rows, columns=columns)


def estimates(pairs: Pairs) -> pd.DataFrame:
    """How well attribution patching ranks the cells of two sweeps: Spearman's correlation with the
    exact patches.
    """
    model, metric, rows = pairs.subject.model, logit_margin(pairs.answers), []
    swept: list[tuple[str, Literal["all"] | None, Sweep]] = [
        ("resid_post", None, pairs.residual),
        ("z", "all", pairs.heads),
    ]
    for site, heads, sweep in swept:
        exact = sweep.values.mean(1)
        for steps in (0, 8):
            found = attribution_patch(
                model,
                pairs.clean,
                pairs.corrupted,
                metric,
                pairs.n_loops,
                sites=site,
                heads=heads,
                steps=steps,
            )
            both = pd.DataFrame(
                {"exact": exact.cpu().numpy(), "estimate": found.values.mean(1).cpu().numpy()}
            )
            rows.append((site, len(both), steps, float(both.rank().corr().to_numpy()[0, 1])))
    return pd.DataFrame(rows, columns=["site", "cells", "steps", "rank correlation"])
