"""What the command of each figure can be told, and where its code is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from loopscope.analyses.common.configs import (
    ComparisonConfig,
    InputsConfig,
    LogsConfig,
    SourceConfig,
)


@dataclass(frozen=True, kw_only=True)
class OverthinkingConfig(SourceConfig):
    """Mean logit margin of the answer after each iteration, one curve per hop count (figure 8 of
    arXiv 2604.07822).
    """

    n_loops: int = 24
    """Iterations to run."""


@dataclass(frozen=True, kw_only=True)
class RecurrenceConfig(SourceConfig):
    """Accuracy for each hop count and each number of iterations (figures 5, 7 and 12 to 18)."""

    n_loops: int = 24
    """Iterations to run; one run gives the accuracy after each of them."""
    kl: float = 0.01
    """Row r*: halt when KL(p_t || p_t-1) is below this ..."""
    entropy: float = 3.0
    """... and the entropy is below this, both in nats."""
    trained_hops: int | None = None
    """Deepest hop count seen in training, to mark in the figure; by default what card.json says."""


@dataclass(frozen=True, kw_only=True)
class HaltingConfig(SourceConfig):
    """Iterations used and accuracy per hop count, for several halting rules (figures 9 and 10)."""

    n_loops: int = 16
    """The cap: an example that never halts uses the last iteration."""
    kl: float = 0.01
    """Threshold of KL(p_t || p_t-1), in nats."""
    entropy: float = 3.0
    """Threshold of the entropy, in nats."""


@dataclass(frozen=True, kw_only=True)
class LensConfig(SourceConfig):
    """Logit lens of one question: every token position, after every block of every iteration
    (figure 4 for one example).
    """

    text: str | None = None
    """The question; by default the first one of the data with the most hops that were trained."""
    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    track: tuple[str, ...] = ()
    """Tokens whose rank to show; by default the entities that the question passes, where the graph
    is known, or its answer.
    """


@dataclass(frozen=True, kw_only=True)
class PatchConfig(SourceConfig):
    """Effect of restoring one clean activation in a corrupted run, for each iteration and layer and
    position (figures 11 and 21).
    """

    clean: str | None = None
    """The clean question; by default the mean over all questions of one hop count is shown."""
    corrupted: str | None = None
    """The corrupted question, of the same length; by default the clean one with another head
    entity.
    """
    hops: int | None = None
    """Hop count of the questions to average over; by default about half of what was trained."""
    site: str = "resid_post"
    """What is patched: resid_pre, resid_mid, resid_post, attn_out, mlp_out, ..."""
    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    direction: Literal["denoise", "noise"] = "denoise"
    """denoise: clean into corrupted; noise: corrupted into clean."""


@dataclass(frozen=True, kw_only=True)
class GrokkingConfig(LogsConfig):
    """Accuracy on two-hop facts along training, one curve per number of iterations, and the stages
    of a run (figure 3).
    """

    stages_of: str | None = None
    """The run whose stages to show, such as r4_l2; by default the one that ends with the best OOD
    accuracy.
    """


@dataclass(frozen=True, kw_only=True)
class HopUpdatesConfig(LogsConfig):
    """Updates needed until each hop count was first learned, one curve per run (figure 6)."""

    gate: float | None = None
    """A hop count is learned once its accuracy exceeds this; by default the gate of the run's own
    curriculum.
    """


@dataclass(frozen=True, kw_only=True)
class GeneralisationConfig(ComparisonConfig):
    """Deepest hop count answered over the deepest one trained, along training (figure 19); by
    default all shipped multi-hop models.
    """

    n_loops: int = 24
    """Iterations to run; a hop count is answered if it is at any of them."""
    threshold: float = 0.6
    """Accuracy from which a hop count counts as answered."""


@dataclass(frozen=True, kw_only=True)
class TwoHopConfig(ComparisonConfig):
    """Checkpoints that answer two-hop questions."""

    per_hop: tyro.conf.Suppress[int | None] = None
    per_group: int | None = None
    """Use at most this many questions of each group."""
    n_loops: int | None = None
    """Iterations; by default what each checkpoint records."""


@dataclass(frozen=True, kw_only=True)
class StagesConfig(TwoHopConfig):
    """Where in depth the bridge and the target are decodable, stage by stage (figure 4)."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = (
        "mini/systematicity/r4_l2/train",
        "mini/systematicity/r4_l2/id",
        "mini/systematicity/r4_l2/ood",
        "mini/systematicity/r1_l8/train",
        "mini/systematicity/r1_l8/id",
    )
    """Names from `loopscope list`, checkpoint files, or folders."""


@dataclass(frozen=True, kw_only=True)
class CausalGraphConfig(TwoHopConfig):
    """Where in depth entities of two-hop questions are decodable, and which single states bring
    back the answer (figure 11).
    """

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = (
        "mini/systematicity/r4_l2/ood",
        "mini/systematicity/r1_l8/id",
    )
    """Names from `loopscope list`, checkpoint files, or folders."""


@dataclass(frozen=True, kw_only=True)
class PanelsConfig(ComparisonConfig):
    """Several checkpoints that answer multi-hop questions, one panel each."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(
        f"mini/multi_hop/{run}" for run in ("r2", "r4", "r6", "r_dyn")
    )
    """Names from `loopscope list`, checkpoint files, or folders."""


@dataclass(frozen=True, kw_only=True)
class RecurrenceGridsConfig(PanelsConfig):
    """Accuracy for each hop count and each number of iterations, several checkpoints side by side
    (figures 5, 7 and 12 to 18).
    """

    n_loops: int = 24
    """Iterations to run; one run gives the accuracy after each of them."""
    kl: float = 0.01
    """Row r*: halt when KL(p_t || p_t-1) is below this ..."""
    entropy: float = 3.0
    """... and the entropy is below this, both in nats."""


@dataclass(frozen=True, kw_only=True)
class MarginsConfig(PanelsConfig):
    """Mean logit margin after each iteration, one curve per hop count and one panel per checkpoint
    (figure 8).
    """

    n_loops: int = 24
    """Iterations to run."""


@dataclass(frozen=True, kw_only=True)
class HaltingCompareConfig(PanelsConfig):
    """Iterations used and accuracy per hop count with halting on KL and entropy and on KL alone,
    per checkpoint (figures 9 and 10).
    """

    n_loops: int = 24
    """The cap: an example that never halts uses the last iteration."""
    kl: float = 0.01
    """Threshold of KL(p_t || p_t-1), in nats."""
    entropy: float = 3.0
    """Threshold of the entropy, in nats."""


@dataclass(frozen=True, kw_only=True)
class FlipsConfig(PanelsConfig):
    """How often the top answer changes at each iteration: to right, from right, and between wrong
    answers.
    """

    n_loops: int = 24
    """Iterations to run."""


@dataclass(frozen=True, kw_only=True)
class ShortcutConfig(PanelsConfig):
    """Where the answer depends on the question: states of random runs put into the clean run, every
    position and block (figure 21).
    """

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = (
        "mini/shortcut",
        "mini/multi_hop/r4",
    )
    """Names from `loopscope list`, checkpoint files, or folders."""
    hops: int | None = None
    """Hop count of the questions; by default the deepest that each checkpoint was trained on."""
    average: bool = False
    """Show the mean over all questions of the hop count instead of one question."""
    n_loops: int | None = None
    """Iterations; by default what each checkpoint records."""
    draws: int = 1
    """Random runs for each question, each with other tokens at all positions; the effect is their
    mean.
    """
    seed: int = 0
    """Seed of the random runs."""


@dataclass(frozen=True, kw_only=True)
class RanksConfig(InputsConfig):
    """Rank of the entities on the way, of the answer and of a control after every block: the logit
    lens over effective depth.
    """

    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    at: Literal["own", "readout"] = "own"
    """own: each entity at the relation that leads to it; readout: all of them where the answer is
    read.
    """
    track: tuple[str, ...] = ()
    """Tokens to follow at the readout instead (ids, without a vocabulary); needed where no graph
    and no answer is known.
    """


@dataclass(frozen=True, kw_only=True)
class OrbitsConfig(InputsConfig):
    """Paths of the state on its principal components: fixed points, orbits and sliders (after
    figures of arXiv 2502.05171).
    """

    n_loops: int = 32
    """Iterations to run."""
    positions: Literal["readout", "tokens"] = "readout"
    """readout: one path per input, where its answer is read; tokens: one path per token of one
    input.
    """
    paths: int = 8
    """At most this many paths; without --hops, questions of as many hop counts as that."""
    components: Literal[2, 3] = 2
    """Principal components to draw."""
    tol: float = 0.01
    """A period p is found where ||h_t+p - h_t|| / ||h_t|| stays below this over the last
    iterations.
    """


@dataclass(frozen=True, kw_only=True)
class StepsConfig(InputsConfig):
    """Size and direction of the steps that the state takes, over iterations, one curve per hop
    count (after arXiv 2509.23314).
    """

    n_loops: int = 32
    """Iterations to run."""
    positions: Literal["readout", "real"] = "readout"
    """readout: the state where the answer is read; real: mean over all tokens."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(InputsConfig):
    """Change of every head's attention pattern from one iteration to the next, and its entropy
    (after arXiv 2604.11791).
    """

    n_loops: int = 16
    """Iterations to run."""
    positions: Literal["readout", "real"] = "real"
    """Queries: where the answer is read, or all tokens."""


@dataclass(frozen=True, kw_only=True)
class ExitGateConfig(InputsConfig):
    """Where a model's own exit gate stops, token by token, and what an earlier exit costs (after
    Ouro, arXiv 2510.25741).
    """

    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    thresholds: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Thresholds on the cumulative probability of an exit; one run each."""


@dataclass(frozen=True, kw_only=True)
class LayersConfig(InputsConfig):
    """What each block does over iterations: the angle by which it turns the state, its output's
    norm and steps (after arXiv 2604.11791).
    """

    n_loops: int = 16
    """Iterations to run."""
    positions: Literal["readout", "real"] = "real"
    """readout: where the answer is read; real: mean over all tokens."""


ANALYSES: dict[str, tuple[type, str]] = {
    "lens": (LensConfig, "circuit.lens_heatmap"),
    "overthinking": (OverthinkingConfig, "answers.overthinking"),
    "recurrence": (RecurrenceConfig, "answers.recurrence_grid"),
    "halting": (HaltingConfig, "answers.halting_curves"),
    "patch": (PatchConfig, "circuit.patching_map"),
    "recurrence-grids": (RecurrenceGridsConfig, "answers.recurrence_grids"),
    "margins": (MarginsConfig, "answers.margins"),
    "halting-compare": (HaltingCompareConfig, "answers.halting_compare"),
    "flips": (FlipsConfig, "answers.flips"),
    "shortcut": (ShortcutConfig, "circuit.shortcut"),
    "grokking": (GrokkingConfig, "training.grokking"),
    "hop-updates": (HopUpdatesConfig, "training.hop_updates"),
    "generalisation": (GeneralisationConfig, "answers.generalisation"),
    "stages": (StagesConfig, "circuit.stages"),
    "causal-graph": (CausalGraphConfig, "circuit.causal_graph"),
    "ranks": (RanksConfig, "circuit.ranks"),
    "orbits": (OrbitsConfig, "dynamics.orbits"),
    "steps": (StepsConfig, "dynamics.steps"),
    "attention-settling": (AttentionConfig, "dynamics.attention_settling"),
    "exit-gate": (ExitGateConfig, "answers.exit_gate"),
    "layers": (LayersConfig, "dynamics.layers"),
}
"""Each command's settings, and the module with its `run(config)` and `figure(record)`."""
