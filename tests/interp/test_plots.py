"""The pictures of records: what they show, in words, and that nothing imports plotly before."""

from __future__ import annotations

import subprocess
import sys

import plotly.graph_objects as go
import pytest
import torch

from looks.marks import hard_to_see
from loopscope.interp.attribution.direct_logit import direct_logit_attribution
from loopscope.interp.circuits.edge_attribution import edge_attribution
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.drawing.cells import CellMap, cell_maps
from loopscope.interp.drawing.curves import MOST, Curve, CurvePanel, curves
from loopscope.interp.drawing.look import titled
from loopscope.interp.dynamics.attractors import fixed_points
from loopscope.interp.dynamics.basins import basins, restart_vote
from loopscope.interp.dynamics.growth import finite_time_exponent, perturbation_growth
from loopscope.interp.dynamics.jacobian import jacobian_spectrum
from loopscope.interp.dynamics.layers import attention_dynamics, layer_dynamics
from loopscope.interp.dynamics.lyapunov import lyapunov_spectrum
from loopscope.interp.dynamics.path_independence import path_independence
from loopscope.interp.dynamics.states import dynamics
from loopscope.interp.exits.exit_gate import exit_distribution
from loopscope.interp.exits.halting import HaltingRule, halting
from loopscope.interp.lens.decoding import decodability, rank_trajectory
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.tracing import denoising_map
from loopscope.interp.weights.circuits import composition_scores
from loopscope.models.basis.tokens import Vocabulary
from toy import padded, toy

LOOPS = 3
ANSWERS = [5, 3, 2]


@pytest.mark.slow
def test_interp_knows_no_plotly_until_a_plot_is_asked_for() -> None:
    code = (
        "import sys, pkgutil, importlib\n"
        "import loopscope.interp as room\n"
        "for each in pkgutil.walk_packages(room.__path__, 'loopscope.interp.'):\n"
        "    if '.drawing.' not in each.name: importlib.import_module(each.name)\n"
        "assert 'loopscope.interp.patching.sweep' in sys.modules\n"
        "sys.exit('plotly' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0


@pytest.mark.shapes
def test_the_map_of_a_lens_has_a_row_per_visit_and_a_column_per_read() -> None:
    model, batch = toy(), padded()
    lens = logit_lens(model, batch, LOOPS, positions=[1, 4])
    (cells,) = lens.plot(title="a <b> title").data
    assert list(cells.x) == ["0.1", "0.4", "1.1", "1.4", "2.1", "2.4"]
    assert list(cells.y) == [f"{loop}.{layer}" for loop in range(LOOPS) for layer in range(2)]
    top = lens.top(1)
    assert torch.allclose(torch.tensor(cells.z, dtype=torch.float64), top.probs[..., 0].double())
    assert cells.text[4][3] == f"#{int(top.tokens[4, 3, 0])}"
    one = logit_lens(model, batch[:1], LOOPS, positions="all").plot().data[0]
    assert list(one.x) == list(map(str, range(batch.tokens.shape[1])))


def test_a_lens_of_iterations_counts_them_and_writes_words() -> None:
    model = toy()
    model.vocab = Vocabulary([f"<w_{i}>" for i in range(model.cfg.d_vocab - 1)])
    figure = readout_lens(model, padded(), LOOPS).plot()
    assert list(figure.data[0].y) == ["1", "2", "3"]
    assert figure.layout.yaxis.title.text == "iterations"
    assert all(
        word.startswith(("&lt;w_", "&lt;pad")) for row in figure.data[0].text for word in row
    )


def test_curves_of_answers_are_their_margins_and_ranks() -> None:
    lens = readout_lens(toy(), padded(), LOOPS)
    margins, ranks = lens.margin(ANSWERS), lens.rank(ANSWERS)
    drawn = lens.plot(ANSWERS).data
    assert len(drawn) == 6
    for read in range(3):
        assert list(drawn[read].y) == pytest.approx(margins[:, read].tolist())
        assert list(drawn[3 + read].y) == ranks[:, read].tolist()


def test_many_curves_become_their_quartiles() -> None:
    paths = dynamics(toy(), padded(), LOOPS)
    assert int(paths.shown.sum()) > MOST
    figure = paths.plot()
    middle = [trace for trace in figure.data if trace.name.startswith("median of")]
    assert len(middle) == 4
    expected = paths.state_norm()[:, paths.shown].quantile(0.5, dim=1)
    assert list(middle[0].y) == pytest.approx(expected.tolist())
    assert list(middle[0].x) == list(paths.iterations)
    few = dynamics(toy(), padded(), LOOPS, positions="readout").plot()
    assert len(few.data) == 4 * 3


def test_the_maps_of_a_sweep_are_its_grid() -> None:
    metric = logit_diff(ANSWERS, 7)
    sweep = activation_patch(
        toy(), padded(1), padded(2), metric, LOOPS, sites=["resid_pre", "z"], positions=[2, 3],
        heads=[0, 4],
    )  # fmt: skip
    figure = sweep.plot()
    assert [note.text for note in figure.layout.annotations] == ["resid_pre", "z"]
    grid = sweep.grid("z").values
    drawn = torch.tensor(figure.data[1].z, dtype=torch.float64)
    assert torch.allclose(drawn, grid.flatten(2).flatten(0, 1).double())
    assert list(figure.data[1].x) == ["2.0", "2.4", "3.0", "3.4"]
    assert figure.data[0].zmax == figure.data[1].zmax == -figure.data[0].zmin
    assert [trace.showscale for trace in figure.data] == [False, True]
    assert len(sweep.plot("resid_pre").data) == 1
    with pytest.raises(ValueError, match="this sweep has the sites resid_pre, z"):
        sweep.plot("mlp_out")


def test_a_star_stands_where_an_example_stops() -> None:
    stops = halting(toy(), padded(), HaltingRule(10.0, 100.0), LOOPS)
    figure = stops.plot()
    for read in range(3):
        symbols = figure.data[read].marker.symbol
        assert symbols.index("star") == int(stops.iterations[read]) - 1
        assert list(figure.data[read].y) == pytest.approx(stops.lens.entropy()[:, read].tolist())


def test_the_gate_of_an_exit_is_drawn_as_a_mean_over_places() -> None:
    found = exit_distribution(torch.linspace(-2.0, 2.0, 3 * 5 * 2).view(3, 5, 2))
    here, until = found.plot().data
    assert list(here.y) == pytest.approx(found.pdf.mean((1, 2)).tolist())
    assert until.y[-1] == pytest.approx(1.0)


def test_eigenvalues_stand_on_the_complex_plane() -> None:
    found = jacobian_spectrum(toy(), padded(), 1, LOOPS, krylov=3)
    drawn = found.plot().data
    assert len(drawn) == len(found.eigenvalues) == 3
    for trace, values in zip(drawn, found.eigenvalues, strict=True):
        kept = values[~values.real.isnan()]
        assert list(trace.x) == pytest.approx(kept.real.tolist())
        assert list(trace.y) == pytest.approx(kept.imag.tolist())
        assert trace.marker.symbol[0] == "star"
        assert trace.mode == "markers"


def test_every_other_record_is_drawn_with_its_numbers() -> None:
    model, clean, corrupted = toy(), padded(1), padded(2)
    targets = torch.tensor([[5, 2], [3, 4], [2, 6]])
    metric = logit_diff(ANSWERS, 7)
    records = {
        "orbits": dynamics(model, clean, LOOPS).orbits(),
        "layers": layer_dynamics(model, clean, LOOPS),
        "attention": attention_dynamics(model, clean, LOOPS),
        "ranks": rank_trajectory(readout_lens(model, clean, LOOPS), targets),
        "decodability": decodability(model, clean, targets, [2, 3], LOOPS),
        "trace": denoising_map(model, clean, corrupted, torch.tensor(ANSWERS), [1], LOOPS),
        "logits": direct_logit_attribution(model, clean, ANSWERS, n_loops=LOOPS),
        "edges": edge_attribution(model, clean, corrupted, metric, 2),
        "composition": composition_scores(model, "K"),
        "spectrum": lyapunov_spectrum(model, clean, 3, LOOPS),
        "growth": finite_time_exponent(model, clean, LOOPS),
        "distances": perturbation_growth(model, clean, LOOPS),
        "settling": fixed_points(model, clean, LOOPS),
        "basins": basins(model, clean, 4, 0.3, LOOPS),
        "vote": restart_vote(model, clean, 4, 0.3, LOOPS),
        "paths": path_independence(toy(injection=True), padded(lengths=(5, 5, 5)), LOOPS),
    }
    figures = {name: record.plot(title="its title") for name, record in records.items()}
    for name, figure in figures.items():
        assert isinstance(figure, go.Figure), name
        assert figure.layout.title.text == "its title", name
        assert len(figure.data) > 0, name
        assert hard_to_see(figure) == [], name
    accuracy = records["decodability"].accuracy
    assert list(figures["decodability"].data[1].y) == pytest.approx(accuracy[:, 1].tolist())
    terms = [value for row in figures["logits"].data[0].z for value in row if value == value]
    assert sum(terms) == pytest.approx(float(records["logits"].logits.mean()))
    change = records["attention"].change
    assert list(figures["attention"].data[0].z[3])[1:] == pytest.approx(change[1:, 0, 3].tolist())
    exponents = records["spectrum"].spectrum()
    assert list(figures["spectrum"].data[1].y) == pytest.approx(exponents[1].tolist())
    growth = records["growth"].growth.cumsum(0)
    assert list(figures["growth"].data[2].y) == pytest.approx(growth[:, 2].tolist())
    assert list(figures["growth"].data[2].x) == [1, 2, 3]
    assert list(figures["distances"].data[0].x) == [0, 1, 2, 3]
    ends = records["basins"].distance
    assert list(figures["basins"].data[0].z[3]) == pytest.approx(ends[3].tolist())
    assert list(figures["vote"].data[0].y) == records["vote"].share.tolist()
    assert list(figures["paths"].data[0].y) == records["paths"].cosine.tolist()
    effects = [value for row in figures["edges"].data[0].z for value in row if value == value]
    assert sorted(effects) == pytest.approx(sorted(records["edges"].values.mean(1).tolist()))


def test_a_title_makes_room_for_itself() -> None:
    cells = CellMap("", ["a"], ["b"], [[0.5]], "share")
    plain, named = cell_maps([cells]), cell_maps([cells], "one line")
    assert plain.layout.title.text is None
    assert named.layout.height > plain.layout.height
    assert named.layout.margin.t > plain.layout.margin.t
    assert titled(go.Figure(), "a<br>b").layout.margin.t > titled(go.Figure(), "a").layout.margin.t


def test_names_in_figures_stand_letter_by_letter() -> None:
    figure = curves([CurvePanel("<b>", [Curve("</a>", ["<x>"], [1.0]), Curve(" b", [2], [2.0])])])
    assert figure.data[0].name == "&lt;/a&gt;"
    assert list(figure.data[0].x) == ["&lt;x&gt;"]
    cells = CellMap("", ["<c>"], [1, 2], [[0.1], [float("nan")]], "prob", texts=[["<s>"], [" "]])
    (drawn,) = cell_maps([cells]).data
    assert (drawn.x[0], drawn.text[0][0], drawn.text[1][0]) == ("&lt;c&gt;", "&lt;s&gt;", "␣")
