"""The model, the vocabulary and the questions of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from models.recurrent_depth import Block, RecurrentDepth, RecurrentDepthConfig
from models.registry import build
from models.tokens import Readout, Vocabulary
from tasks.facts import FactBatch, vocabulary
from tasks.graphs import PermutationGraph
from tasks.multi_hop import sample_facts
from tasks.questions import Question
from tasks.text import to_questions
from training.recipes import Recipe, Stage


@dataclass(frozen=True)
class TrainingBatch:
    """Questions of one hop count, answered at their last token.

    Attributes:
        tokens: Int[Tensor, "batch pos"].
        answers: Int[Tensor, " batch"].
        n_loops: Iterations to train it with.
    """

    tokens: Int[Tensor, "batch pos"]
    answers: Int[Tensor, " batch"]
    n_loops: int


@dataclass(frozen=True)
class Questions:
    """The questions of a recipe: fresh random facts for training, and held-out ones.

    A batch depends on the seed and the update's number alone, so a resumed run sees what it would have seen.
    """

    recipe: Recipe

    @cached_property
    def graph(self) -> PermutationGraph:
        """The recipe's graph."""
        return PermutationGraph.random(self.recipe.n_entities, self.recipe.n_relations, self.recipe.graph_seed)

    def batch(self, stage: Stage, update: int) -> TrainingBatch:
        """The batch of an update, counted over the whole run."""
        rng = np.random.default_rng((self.recipe.seed, update))
        hops = int(rng.choice(stage.hops))
        facts = sample_facts(self.graph, hops, self.recipe.batch_size, rng, held_out=False)
        return TrainingBatch(torch.from_numpy(facts.tokens), torch.from_numpy(facts.answers), self.recipe.loops.draw(rng))

    def held_out(self, hops: int, count: int) -> TrainingBatch:
        """Held-out questions of one hop count, the same at every call; one-hop facts are never held out."""
        facts = self._held_out_facts(hops, count)
        return TrainingBatch(torch.from_numpy(facts.tokens), torch.from_numpy(facts.answers), self.recipe.eval_loops)

    def as_text(self, hops: int, count: int) -> list[Question]:
        """The questions of `held_out`, for test.json."""
        return to_questions(self._held_out_facts(hops, count), self.graph, f"{hops}hop_test" if hops > 1 else "atomic_facts")

    def _held_out_facts(self, hops: int, count: int) -> FactBatch:
        rng = np.random.default_rng((self.recipe.seed, 1 << 40, hops))
        return sample_facts(self.graph, hops, count, rng, held_out=hops > 1)


def fresh_model(recipe: Recipe) -> RecurrentDepth:
    """A model whose loop is the identity: both output projections of every block start at zero (the trainer's c_scale of 0)."""
    words = Vocabulary(vocabulary(recipe.n_entities, recipe.n_relations))
    cfg = RecurrentDepthConfig(
        n_layers=recipe.n_layers,
        n_loops=recipe.eval_loops,
        d_model=recipe.d_model,
        n_heads=recipe.n_heads,
        d_mlp=4 * recipe.d_model,
        d_vocab=len(words),
    )
    torch.manual_seed(recipe.seed)
    model = build(cfg)
    assert isinstance(model, RecurrentDepth), "the config's family is recurrent-depth"
    nn.init.normal_(model.embedding, std=recipe.d_model**-0.5)
    for block in model.blocks:
        assert isinstance(block, Block), "a recurrent-depth model is made of these blocks"
        nn.init.zeros_(block.attn.W_O_flat)
        nn.init.zeros_(block.mlp.W_out)
    model.vocab, model.read_at = words, Readout("last_real")
    return model
