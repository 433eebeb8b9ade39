"""Does each iteration pass through the same stages? Entropy of the states, and concentration,
mixing and sinks of the attention, block by block (after arXiv 2604.11791).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.inputs_of import open_inputs
from loopscope.analyses.common.records import Record
from loopscope.interp.dynamics.inference_stages import (
    STATISTICS,
    InferenceStages,
    inference_stages,
)


@dataclass(frozen=True, kw_only=True)
class InferenceStagesConfig(InputsConfig):
    """Entropy of the states, and concentration, mixing and sinks of the attention, for every block
    of every loop (after arXiv 2604.11791). Look for curves of late loops that lie on one another:
    each loop then passes through the same stages. Curves that move from loop to loop mean that the
    loops do different things.
    """

    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""


@dataclass(frozen=True)
class StagesOfInference(Record):
    """The statistics of some inputs.

    Attributes:
        inputs: How many inputs.
        stages: Means over them.
    """

    inputs: int
    stages: InferenceStages

    def frame(self) -> pd.DataFrame:
        """visit, loop, layer, entropy, concentration, mixing, sink."""
        return self.stages.frame()

    def summary(self) -> pd.DataFrame:
        """One row per loop: each statistic as a mean over its blocks, and the mean change of mixing
        from the loop before.
        """
        frame = self.frame()
        table = frame.groupby("loop")[list(STATISTICS)].mean()
        mixing = frame["mixing"].to_numpy().reshape(len(table), -1)
        moved = abs(mixing[1:] - mixing[:-1]).mean(1)
        return table.assign(**{"change of mixing": [float("nan"), *moved]}).reset_index()


def run(config: InferenceStagesConfig) -> StagesOfInference:
    """Measure the questions of one hop count, or what is given."""
    asked = open_inputs(config)
    batch = asked.group(config.hops).batch
    return StagesOfInference(
        len(batch), inference_stages(asked.subject.model, batch, config.n_loops)
    )


def figure(record: StagesOfInference) -> go.Figure:
    """One panel per statistic; blocks of a loop from left to right, one curve per loop."""
    return record.stages.plot()


EXAMPLE = 'plots.inference_stages("mini/smiles", text="CC(=O)N", n_loops=3)'
