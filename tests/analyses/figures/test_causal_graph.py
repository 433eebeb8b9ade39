"""Decodability and patching of two-hop questions, against single patched runs of the shipped
checkpoints.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.analyses.cli import main
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.common.two_hop import GROUPS, ask, with_other_start
from loopscope.analyses.figures.circuit.causal_graph import (
    CausalGraph,
    CausalGraphConfig,
    TwoHopPanel,
    figure,
    measure,
    run,
)
from loopscope.interp.common.metrics import margin

LOOPED, VANILLA = "mini/systematicity/r4_l2/ood", "mini/systematicity/r1_l8/id"


@pytest.fixture(scope="module")
def shipped() -> CausalGraph:
    return run(CausalGraphConfig())


def panel(
    group: str = GROUPS[1], shape: tuple[int, int] = (3, 1), name: str = "mine"
) -> TwoHopPanel:
    depths = shape[0] * shape[1]
    generator = torch.Generator().manual_seed(depths)
    return TwoHopPanel(
        checkpoint=name,
        shape=shape,
        group=group,
        questions=11,
        decoded=torch.tensor(
            [[0.2, 0.0], [0.9, 0.1], [1.0, 0.7]] + [[1.0, 0.9]] * (depths - 3), dtype=torch.float64
        ),
        answered=torch.rand(depths + 1, 3, generator=generator, dtype=torch.float64),
        margin=torch.rand(depths + 1, 3, generator=generator, dtype=torch.float64),
        clean_answered=0.95,
        corrupted_answered=0.05,
        clean_margin=4.0,
        corrupted_margin=-3.0,
    )


# The numbers


def test_a_cell_is_one_run_of_corrupted_questions_with_one_clean_state_in_it() -> None:
    subject = open_subject(SourceConfig(checkpoint=LOOPED))
    subject.model.double()
    found = measure(subject, GROUPS[2], 23)
    asked = ask(subject, GROUPS[2], 23)
    corrupted = subject.model.encode(with_other_start(subject, asked.questions))
    answers = asked.targets[:, 1]
    with torch.no_grad():
        logits, cache = subject.model.run_with_cache(asked.batch.tokens, mask=asked.batch.mask)
    clean = margin(logits[:, 2], answers).mean()

    def margins(*hooks: tuple[str, object]) -> Tensor:
        with torch.no_grad():
            logits = subject.model.run_with_hooks(
                corrupted.tokens, mask=corrupted.mask, fwd_hooks=list(hooks)
            )
        return margin(logits[:, 2], answers)

    bare = margins().mean()
    for depth, position in ((0, 0), (2, 1), (3, 1), (6, 2)):
        name = (
            f"loops.{(depth - 1) // 2}.blocks.{(depth - 1) % 2}.hook_resid_post"
            if depth
            else "hook_embed"
        )

        def restore(
            state: Tensor, hook: HookPoint, name: str = name, position: int = position
        ) -> Tensor:
            kept = torch.arange(state.shape[1])[:, None] != position
            return torch.where(kept, state, cache[name])

        patched = margins((name, restore))
        assert float(found.answered[depth, position]) == pytest.approx(
            float((patched > 0).double().mean()), abs=1e-9
        )
        assert float(found.margin[depth, position]) == pytest.approx(
            float((patched.mean() - bare) / (clean - bare)), abs=1e-9
        )
    assert found.clean_margin == pytest.approx(float(clean), abs=1e-9)
    assert found.corrupted_margin == pytest.approx(float(bare), abs=1e-9)


@pytest.mark.slow
def test_the_last_state_of_r2_brings_back_what_the_clean_run_answers(shipped: CausalGraph) -> None:
    for each in shipped.panels:
        assert float(each.answered[-1, 2]) == pytest.approx(each.clean_answered)
        assert float(each.margin[-1, 2]) == pytest.approx(1.0, abs=1e-5)
        assert float(each.answered[-1, 1]) == pytest.approx(each.corrupted_answered)
        assert float(each.margin[0, 2]) == pytest.approx(0.0, abs=1e-5)


def test_the_shipped_models_differ_on_ood_facts(shipped: CausalGraph) -> None:
    assert [(each.checkpoint, each.group) for each in shipped.panels] == [
        (LOOPED, GROUPS[1]), (LOOPED, GROUPS[2]), (VANILLA, GROUPS[1]), (VANILLA, GROUPS[2]),
    ]  # fmt: skip
    looped, looped_ood, vanilla, vanilla_ood = shipped.panels
    assert looped.sites(1) == looped_ood.sites(1) == [2, 3, 4]
    assert looped.first_decoded(0) == 2
    assert looped.first_decoded(1) == 6
    assert vanilla.clean_answered > 0.95
    assert vanilla.sites(1) == [2, 3, 4, 5, 6]
    assert vanilla_ood.clean_answered < 0.05
    assert float(vanilla_ood.decoded[:, 0].max()) == 1.0
    assert vanilla_ood.first_decoded(1) is None
    assert vanilla_ood.sites(1) == []
    assert shipped.summary()["causal depths of r1"].tolist() == [
        "2, 3, 4",
        "2, 3, 4",
        "2, 3, 4, 5, 6",
        "none",
    ]


def test_the_frame_has_a_row_for_every_state(shipped: CausalGraph) -> None:
    frame = shipped.frame()
    assert len(frame) == 4 * 9 * 3
    first = frame.iloc[0]
    assert (first.hook, first.depth, first.position) == ("hook_embed", 0, "h")
    assert first[["loop", "layer"]].isna().all()
    assert math.isnan(first.decoded)
    row = frame[
        (frame.checkpoint == LOOPED)
        & (frame.group == GROUPS[2])
        & (frame.depth == 6)
        & (frame.position == "r2")
    ].iloc[0]
    assert (row.hook, row.loop, row.layer) == ("loops.2.blocks.1.hook_resid_post", 2, 1)
    assert row.decoded == float(shipped.panels[1].decoded[5, 1])
    assert row.answered == float(shipped.panels[1].answered[6, 2])


# The figure


def lines(plot: go.Figure, width: int) -> list[tuple[list[float], list[float]]]:
    return [
        (list(trace.x), list(trace.y))
        for trace in plot.data
        if trace.mode == "lines" and trace.line.width == width
    ]


def test_the_figure_has_two_graphs_per_panel_with_a_line_into_each_decodable_hop() -> None:
    record = CausalGraph(
        (
            panel(),
            panel(GROUPS[2]),
            panel(shape=(1, 5), name="other"),
            panel(GROUPS[2], (1, 5), "other"),
        )
    )
    plot = figure(record)
    nodes = [trace for trace in plot.data if trace.mode == "markers+text"]
    assert [len(trace.x) for trace in nodes] == [12, 12, 12, 12, 18, 18, 18, 18]
    assert lines(plot, 3) == [([0, 1], [1, 2]), ([1, 2], [2, 3])] * 4
    read, restored = nodes[:2]
    assert list(read.text) == ["", "", "", "", ".20", ".00", "", ".90", ".10", "", "1.00", ".70"]
    assert list(restored.text) == [
        f"{share:.2f}".removeprefix("0") for share in record.panels[0].answered.flatten().tolist()
    ]
    assert (list(read.x[:3]), list(read.y[:4])) == ([0, 1, 2], [0, 0, 0, 1])
    domains = [plot.layout[f"xaxis{i}" if i > 1 else "xaxis"].domain for i in range(1, 5)]
    assert all(a[1] < b[0] for a, b in pairwise(domains))
    assert domains[0][0] == 0
    assert domains[-1][1] == pytest.approx(1)
    assert "loop 1 · block 0, depth 2, position r1<br>bridge on top for 0.90" in read.customdata[7]
    texts = [note.text for note in plot.layout.annotations]
    assert texts.count("<b>R = 3, L = 1</b> answers 0.95 of 11") == 2


def test_sites_are_counted_from_what_the_corrupted_run_answers() -> None:
    answered = torch.tensor(
        [[0.05, 0.49, 0.0], [0.05, 0.51, 0.0], [0.0, 0.95, 0.0], [0.0, 0.1, 0.95]],
        dtype=torch.float64,
    )
    measured = panel()
    assert TwoHopPanel(**{**vars(measured), "answered": answered}).sites(1) == [1, 2]
    assert (
        TwoHopPanel(**{**vars(measured), "answered": answered, "corrupted_answered": 0.9}).sites(1)
        == []
    )


def test_refusals_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="a comparison needs at least one checkpoint, got none"):
        run(CausalGraphConfig(checkpoints=()))
    with pytest.raises(
        ValueError, match="have no two-hop questions of the group 'test_inferred_iid'"
    ):
        run(CausalGraphConfig(checkpoints=("mini/multi_hop/r2",)))
    main(
        [
            "causal-graph",
            LOOPED,
            "--per-group",
            "9",
            "--n-loops",
            "3",
            "--out",
            str(tmp_path),
            "--no-html",
        ]
    )
    assert "bridge from depth" in capsys.readouterr().out
    assert (tmp_path / "causal-graph.csv").exists()
