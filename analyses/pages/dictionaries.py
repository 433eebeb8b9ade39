"""The page of sparse dictionaries of a multi-hop checkpoint: trained, measured and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from loopscope.analyses.common.configs import DEFAULT_CHECKPOINT
from loopscope.analyses.common.records import markdown_table, write_text
from loopscope.analyses.pages.dictionary_study import ALL, HELD, SWAPS, TRAIN, Study, causal
from loopscope.interp.dictionaries.controls import pca_dictionary, random_dictionary
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.examples import top_examples
from loopscope.interp.dictionaries.labels import FeatureLabels
from loopscope.interp.dictionaries.quality import DictionaryQuality, dictionary_quality
from loopscope.interp.dictionaries.reading import Reading
from loopscope.interp.dictionaries.training import (
    DictionaryTraining,
    fit_dictionary,
    train_dictionary,
)

TRAINING = DictionaryTraining()
SETTINGS = {
    "shared": TRAINING,
    "per_iteration": replace(TRAINING, steps=600),
    "crosscoder": replace(TRAINING, steps=600, batch_size=512),
}
_SHORTER = replace(TRAINING, steps=500)
_ENTITIES = (0, 1, 2)  # whose features are shown
_UNTRAINED = "shared, model with random weights"


class Measured:
    """Everything that the page shows, each part worked out when it is first asked for."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @cached_property
    def trained(self) -> dict[str, Dictionary]:
        """The dictionaries of the residual by their kind."""
        states, reading = self.study.train.states, self.study.reading
        return {
            kind: fit_dictionary(states, reading, kind, settings)  # type: ignore[arg-type]
            for kind, settings in SETTINGS.items()
        }

    @cached_property
    def controls(self) -> dict[str, Dictionary]:
        """Principal components and random directions."""
        states, reading, k = self.study.train.states, self.study.reading, TRAINING.k
        return {
            "principal components": pca_dictionary(states, reading, k),
            "random directions": random_dictionary(states, reading, TRAINING.n_features, k),
        }

    @cached_property
    def transcoder(self) -> Dictionary:
        """From what the last block's MLP reads to what it adds, one coder for all iterations."""
        block = self.study.reading.hook.rpartition(".")[0]
        return train_dictionary(
            self.study.model,
            self.study.train.batch,
            self.study.n_loops,
            kind="transcoder",
            hook=f"{block}.hook_resid_mid",
            target=f"{block}.hook_mlp_out",
            training=replace(TRAINING, activation="batch_topk"),
        )

    @cached_property
    def quality(self) -> dict[str, DictionaryQuality]:
        """Each dictionary on the held-out facts."""
        model, batch = self.study.model, self.study.held.batch
        every = {**self.trained, "transcoder": self.transcoder, **self.controls}
        return {name: dictionary_quality(model, each, batch) for name, each in every.items()}

    @cached_property
    def labels(self) -> dict[str, FeatureLabels]:
        """The entities' features in each dictionary of the residual, and in one of a model with
        random weights.
        """
        states = self.study.train.states, self.study.held.states
        every = {**self.trained, **self.controls}
        found = {name: self.study.named(each, states) for name, each in every.items()}
        return {**found, _UNTRAINED: self._of_random_weights()}

    def _of_random_weights(self) -> FeatureLabels:
        study, model = self.study, self.study.untrained()
        states: tuple[Tensor, Tensor] = (
            study.asked(model, TRAIN, held_out=False, seed=0).states,
            study.asked(model, HELD, held_out=True, seed=11).states,
        )
        reading = Reading.of(model, study.n_loops, study.reading.hook)
        return study.named(fit_dictionary(states[0], reading, "shared", _SHORTER), states)

    @cached_property
    def causes(self) -> pd.DataFrame:
        """The swaps, by the features of each dictionary of the residual."""
        every = {**self.trained, **self.controls}
        return causal(self.study, {name: (each, self.labels[name]) for name, each in every.items()})

    def examples(self) -> pd.DataFrame:
        """Where some entities' features of the shared dictionary are strongest, and which answers
        they raise most.
        """
        study, shared, labels = self.study, self.trained["shared"], self.labels["shared"]
        features = labels.feature[-1][list(_ENTITIES)].tolist()
        top = top_examples(study.model, shared, study.held.batch, list(dict.fromkeys(features)), 3)
        rows = []
        for entity, feature in zip(_ENTITIES, features, strict=True):
            found = top.frame()[lambda frame, feature=feature: frame["feature"] == feature]
            places = [
                f"`{row.text}` at {row.position}, loop {row.loop}"
                for row in found.itertuples(index=False)
            ]
            direction = shared.directions(study.n_loops - 1)[feature]
            with torch.no_grad():
                raised = (study.model.W_U.T.float() @ direction).topk(2).indices
            words = ", ".join(f"`{word}`" for word in study.model.to_str_tokens(raised))
            rows.append((f"`<e_{entity}>`", feature, "; ".join(places), words))
        columns = ["entity", "feature", "strongest at", "logits raised most, by its direction"]
        return pd.DataFrame(rows, columns=columns)


def overview(quality: Mapping[str, DictionaryQuality]) -> pd.DataFrame:
    """One row per dictionary, all iterations together."""
    rows = [
        (
            name,
            each.on.shape[1],
            float(each.active.mean()),
            each.overall,
            each.recovered_all,
            each.dead(),
            each.shared(),
            each.shared(len(each.on)),
        )
        for name, each in quality.items()
    ]
    columns = ["dictionary", "features", "on per token", "variance explained", "answers recovered"]
    columns += ["dead", "on at several iterations", "on at all"]
    return pd.DataFrame(rows, columns=columns)


def by_loop(labels: Mapping[str, FeatureLabels]) -> pd.DataFrame:
    """The mean F1 over entities, by iteration."""
    found = {name: each.mean().tolist() for name, each in labels.items()}
    frame = pd.DataFrame.from_dict(found, orient="index").rename_axis("dictionary")
    return frame.add_prefix("loop ").reset_index()


def shows(measured: Measured) -> pd.DataFrame:
    """The numbers that were aimed at, for every trained dictionary and for random directions."""
    names = [*SETTINGS, "random directions"]
    quality, labels, causes = measured.quality, measured.labels, measured.causes
    means = {name: labels[name].mean() for name in names}
    middle, last = measured.study.n_loops // 2 - 1, measured.study.n_loops - 1
    answer = causes[(causes["swapped"] == "answer") & (causes["at iterations"] == ALL)]
    answer = answer.set_index("dictionary")
    found: dict[tuple[str, str], list[float]] = {
        ("variance explained", "0.97"): [quality[name].overall for name in names],
        (f"entity F1 at loop {last}", "0.9"): [float(means[name][-1]) for name in names],
        ("entity F1 at the worst loop", ""): [float(means[name].min()) for name in names],
        ("live features on at several iterations", ""): [quality[name].shared() for name in names],
        (f"entities with one feature at loops {middle} and {last}", ""): [
            labels[name].kept(middle, last) for name in names
        ],
        ("causal precision of the answer's feature", "0.8"): [
            float(answer["entity's features"][name]) for name in names
        ],
        ("the same into a random live feature", "at most 0.05"): [
            float(answer["into a random feature"][name]) for name in names
        ],
    }
    rows = [(*key, *values) for key, values in found.items()]
    return pd.DataFrame(rows, columns=["", "aim, at least", *names])


def page(checkpoint: str = DEFAULT_CHECKPOINT) -> str:
    """Everything, as Markdown."""
    study = Study.of(checkpoint)
    measured = Measured(study)
    tables = {
        "SHOWS": shows(measured),
        "OVERVIEW": overview(measured.quality),
        "ITERATIONS": measured.quality["shared"].frame(),
        "LABELS": by_loop(measured.labels),
        "CAUSES": measured.causes,
        "EXAMPLES": measured.examples(),
    }
    text = _TEXT.format(
        checkpoint=checkpoint,
        hook=study.reading.hook,
        loops=study.n_loops,
        hops=study.hops,
        train=len(study.train.batch),
        held=len(study.held.batch),
        reads=len(study.train.states),
        features=TRAINING.n_features,
        k=TRAINING.k,
        swaps=SWAPS,
        entities=study.graph.n_entities,
    )
    for mark, frame in tables.items():
        text = text.replace(mark, markdown_table(frame))
    return text


def write(path: Path, checkpoint: str = DEFAULT_CHECKPOINT) -> Path:
    """Train and measure everything, and write the page, whole or not at all."""
    return write_text(path, page(checkpoint))


_TEXT = """# Sparse dictionaries over the iterations: `{checkpoint}`

Written by `loopscope dictionaries`, which trains every dictionary of this page. The states are
those at `{hook}` after each of {loops} iterations, of {train} questions of 2 to
{hops} hops that the checkpoint was trained on ({reads} tokens). Every number is of {held} other
questions, which were held out when the checkpoint was trained, and on which nothing was chosen.
Each dictionary has {features} features, of which {k} are on for a token. Loops count from 0.

`shared` is one dictionary for all iterations, `per_iteration` one for each, `crosscoder` one that
reads all iterations of a token at once and writes all of them with one code. `transcoder` reads
what the last block's MLP reads and writes what it adds, with one coder for all iterations. In
training, each iteration's error counts in units of that iteration's variance: the states grow, and
the early ones would be neglected otherwise.

SHOWS

Directions drawn at random tell entities apart late in the run too: the states have then settled
into one cluster for each entity, and F1 alone says little there. Early iterations and swaps tell
trained features from random directions.

## How much is kept

Features on per token (L0), the share of the states' variance that is explained, and the share of
the answers that is recovered (1 - KL with the dictionary in place of the states of all tokens at
all iterations, over KL with their means in that place; below 0 it is worse than the means). The
crosscoder's code of a token is made from the clean run's states of all iterations, the last one
included, so that its share is no test of what the early iterations keep. Of the features: how many
are never on, and which share of the others is on at several iterations, and at all of them. Every
iteration of `per_iteration` has features of its own.

OVERVIEW

The shared dictionary by iteration. `recovered` is with the dictionary at this iteration alone;
`live` features are on there in at least one token, `new` ones are on there for the first time in
at least one token.

ITERATIONS

## Which feature is which entity

The token at position h stands for the entity after hop h, as soon as that entity has arrived
there: from the iteration on at which the model's readout at that position gives it for at least
0.9 of the questions. For each of {entities} entities and each iteration, the feature and the
threshold that tell the entity's tokens from the others best are chosen on training questions; F1
is of the held-out ones, as a mean over entities. Principal components are taken in both
directions, {k} of them on; random directions and a shared dictionary of a model with random
weights are the other controls.

LABELS

## Do the features cause the answer

The feature of an entity is taken out of the code at the position of that entity, and the feature
of another entity is given its activation ({swaps} held-out questions of each hop count; what the
dictionary leaves out of the states is kept). The graph says which answer should come: the other
entity itself where the answer's own position is edited, or the end of the walk that goes on from
the other entity. The columns are shares of questions with that predicted answer: for the entity's
features, for the entity's feature handed to a random live feature, and for two random live
features, most of which are off there. The last column is the share of answers that change when
the entity's feature is only taken out. An entity on the way is edited after the last block of an
iteration, where the next block reads it. "All that follow" are the iterations from the one on at
which the entity is there, the last one, which the answer is read from, included; "its first" is
that one alone.

CAUSES

## Features to look at

The features that say an entity best at the last iteration of the shared dictionary: the tokens in
which they are strongest, and the words whose logits their direction raises most (without the
final norm).

EXAMPLES

## In code

```python
from loopscope import DictionaryTraining, FeatureEdit, load
from loopscope import dictionary_quality, splice, train_dictionary

model = load("{checkpoint}")
texts = ["<e_12><r_3><r_7>", "<e_5><r_0><r_1>"]
dictionary = train_dictionary(model, texts, training=DictionaryTraining(steps=20))
dictionary_quality(model, dictionary, texts).frame()
with splice(model, dictionary, FeatureEdit(17, loops=[3, 4], scale=0)):
    logits = model(model.to_tokens(texts[0]), n_loops=dictionary.n_loops)
```

`dictionary.save(folder)` writes SAELens's format (cfg.json and sae_weights.safetensors; one folder
per iteration for `per_iteration`; a crosscoder is an autoencoder of all iterations side by side),
and `Dictionary.load` reads it. Neither SAELens nor dictionary_learning is a dependency: SAELens
6.54 needs transformer-lens below 4 and dictionary_learning 0.1 needs nnsight below 0.4, and this
project needs transformer-lens 4.3 or later; both train on one place of a run, without an axis of
iterations. `SAE_LENS_FOLDER=FOLDER make slow`, with SAELens and its transformer-lens installed in a
folder of their own (`pip install --target`), tests that SAELens opens what is written here.
"""
