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
from loopscope.analyses.pages.dictionary_text import TEXT
from loopscope.interp.dictionaries.controls import pca_dictionary, random_dictionary
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.examples import top_examples
from loopscope.interp.dictionaries.labels import FeatureLabels
from loopscope.interp.dictionaries.quality import DictionaryQuality, dictionary_quality
from loopscope.interp.dictionaries.reading import Reading
from loopscope.interp.dictionaries.trainer import DictionaryTraining
from loopscope.interp.dictionaries.training import fit_dictionary, train_dictionary

TRAINING = DictionaryTraining()
SETTINGS = {
    "shared": TRAINING,
    "per_iteration": replace(TRAINING, steps=600),
    "crosscoder": replace(TRAINING, steps=600, batch_size=512),
    "shared, 2 on": replace(TRAINING, k=2),
}
"""The settings of each dictionary of the residual; its name begins with its kind."""
_ENTITIES = (0, 1, 2)  # whose features are shown
_UNTRAINED = "shared, model with random weights"


class MeasuredDictionaries:
    """Everything that the page shows, each part worked out when it is first asked for."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @cached_property
    def trained(self) -> dict[str, Dictionary]:
        """The dictionaries of the residual by their name."""
        states, reading = self.study.train.states, self.study.reading
        kinds = {name: name.partition(",")[0] for name in SETTINGS}
        return {
            name: fit_dictionary(states, reading, kinds[name], settings)  # type: ignore[arg-type]
            for name, settings in SETTINGS.items()
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
        return study.named(fit_dictionary(states[0], reading, "shared", TRAINING), states)

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
            int(each.live().sum()) + each.dead(),
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


def _unless_all_at_once(name: str, value: float) -> float:
    """Not a number for a crosscoder, whose one code is read at every iteration."""
    return float("nan") if name == "crosscoder" else value


def shows(measured: MeasuredDictionaries) -> pd.DataFrame:
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
        ("entity F1 at the worst loop", ""): [
            _unless_all_at_once(name, float(means[name].min())) for name in names
        ],
        ("live features on at several iterations", ""): [quality[name].shared() for name in names],
        (f"entities with one feature at loops {middle} and {last}", ""): [
            _unless_all_at_once(name, labels[name].kept(middle, last)) for name in names
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


def trained() -> str:
    """How long each dictionary is trained, in words."""
    each = {**SETTINGS, "transcoder": TRAINING, _UNTRAINED: TRAINING}
    rows = [f"`{name}` {how.steps} x {how.batch_size}" for name, how in each.items()]
    return f"Length of training, as steps x tokens of a step: {', '.join(rows)}."


def page(checkpoint: str = DEFAULT_CHECKPOINT) -> str:
    """Everything, as Markdown."""
    study = Study.of(checkpoint)
    measured = MeasuredDictionaries(study)
    tables = {
        "SHOWS": shows(measured),
        "OVERVIEW": overview(measured.quality),
        "ITERATIONS": measured.quality["shared"].frame(),
        "LABELS": by_loop(measured.labels),
        "CAUSES": measured.causes,
        "EXAMPLES": measured.examples(),
    }
    text = TEXT.format(
        checkpoint=checkpoint,
        hook=study.reading.hook,
        loops=study.n_loops,
        hops=study.hops,
        train=len(study.train.batch),
        held=len(study.held.batch),
        reads=len(study.train.states),
        trained=trained(),
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
