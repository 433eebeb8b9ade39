"""What every family is and which methods run on it: found by running each method on a tiny random
model of each family.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.records import markdown_table, write_text
from loopscope.checkpoints.tables import TABLES
from loopscope.interp.attribution.direct_logit import direct_logit_attribution
from loopscope.interp.attribution.gradients import gradients
from loopscope.interp.attribution.patching import attribution_patch, edge_attribution
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.dynamics.jacobian import jacobian_spectrum
from loopscope.interp.dynamics.layers import attention_dynamics, layer_dynamics
from loopscope.interp.dynamics.states import dynamics
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.edit.steering import attenuate_input, steer, swap_input
from loopscope.interp.exits.exit_gate import gate_logits, readout_at_threshold, readout_mixture
from loopscope.interp.exits.exits import TopStable, exits
from loopscope.interp.exits.halting import halting
from loopscope.interp.generation import generate
from loopscope.interp.lens.decoding import decodability
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.lens.tuned_lens import train_tuned_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.paths import Receiver, path_patch_sweep
from loopscope.interp.patching.tracing import causal_tracing, denoising_map, noising_map
from loopscope.interp.weights.circuits import (
    composition_scores,
    full_ov,
    full_qk,
    ov_circuit,
    qk_circuit,
)
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import site_of
from loopscope.models.core.registry import FAMILIES, build
from loopscope.models.core.tokens import Batch
from loopscope.models.views import unrolled, untied

FACTS = ("causal", "prefix_readout", "additive_residual", "batch_independent")
_LOOPS = 3

_NORMS = ("ln1", "ln2", "ln1_post", "ln2_post", "ln_final", "ln_boundary")
_LISTED = {
    *(f"{norm}.hook_{what}" for norm in _NORMS for what in ("scale", "normalized")),
    *(
        f"attn.hook_{what}"
        for what in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "out")
    ),
    *(f"mlp.hook_{what}" for what in ("pre", "pre_linear", "post", "out")),
    *(
        f"hook_{what}"
        for what in (
            "embed",
            "pos_embed",
            "state_in",
            "input",
            "injected",
            "state_out",
            "exit_logit",
            "attn_out",
            "mlp_out",
        )
    ),
    *(f"hook_resid_{where}" for where in ("pre", "mid", "post")),
}


def tiny(family: str) -> LoopedModel:
    """A random model of a family, of the sizes that its config calls tiny, in float64."""
    torch.manual_seed(0)
    model = build(FAMILIES[family][0].tiny(n_loops=_LOOPS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.double().requires_grad_(False)


@dataclass(frozen=True)
class _Inputs:
    """What the methods are asked: two inputs of three rows, answers, and a metric."""

    model: LoopedModel
    clean: Batch
    corrupted: Batch
    answers: Tensor

    @property
    def layer(self) -> int:
        """The first layer that an iteration visits."""
        return min(visit.layer for visit in self.model.schedule(1) if visit.loop is not None)

    @property
    def metric(self) -> Callable[[Tensor], Tensor]:
        return logit_diff(self.answers, self.answers.roll(1))


def _inputs(model: LoopedModel) -> _Inputs:
    def batch(seed: int) -> Batch:
        tokens = torch.randint(
            1, model.cfg.d_vocab, (3, 5), generator=torch.Generator().manual_seed(seed)
        )
        return Batch(tokens, torch.ones_like(tokens), torch.full((3,), 4))

    return _Inputs(model, batch(0), batch(1), torch.tensor([3, 5, 7]))


def _inside(make: Callable[[_Inputs], Any]) -> Callable[[_Inputs], None]:
    """A method that is a context: entered around one run."""

    def run(x: _Inputs) -> None:
        with make(x) as model:
            model(x.clean.tokens, n_loops=_LOOPS)

    return run


def _jacobian(x: _Inputs) -> None:
    jacobian_spectrum(x.model, x.clean, 1, _LOOPS)


METHODS: dict[str, Callable[[_Inputs], Any]] = {
    "logit_lens": lambda x: logit_lens(x.model, x.clean, _LOOPS),
    "readout_lens": lambda x: readout_lens(x.model, x.clean, _LOOPS),
    "train_tuned_lens": lambda x: train_tuned_lens(x.model, x.clean, _LOOPS, steps=2),
    "decodability": lambda x: decodability(x.model, x.clean, x.answers[:, None], [2], _LOOPS),
    "halting": lambda x: halting(x.model, x.clean, n_loops=_LOOPS),
    "exits": lambda x: exits(x.model, x.clean, TopStable(hits=2), _LOOPS),
    "gate_logits": lambda x: gate_logits(x.model, x.clean, _LOOPS),
    "readout_at_threshold": lambda x: readout_at_threshold(x.model, x.clean, 0.5, _LOOPS),
    "readout_mixture": lambda x: readout_mixture(x.model, x.clean, _LOOPS),
    "activation_patch": lambda x: activation_patch(
        x.model, x.clean, x.corrupted, x.metric, _LOOPS, sites=_patched(x.model)
    ),
    "causal_tracing": lambda x: causal_tracing(x.model, x.clean, x.corrupted, x.answers, 2, _LOOPS),
    "denoising_map": lambda x: denoising_map(
        x.model, x.clean, x.corrupted, x.answers, n_loops=_LOOPS
    ),
    "noising_map": lambda x: noising_map(x.model, x.clean, x.corrupted, x.answers, n_loops=_LOOPS),
    "path_patch_sweep": lambda x: path_patch_sweep(
        x.model, x.clean, x.corrupted, x.metric, Receiver("readout"), _LOOPS
    ),
    "attribution_patch": lambda x: attribution_patch(
        x.model, x.clean, x.corrupted, x.metric, _LOOPS, sites=_patched(x.model)
    ),
    "edge_attribution": lambda x: edge_attribution(x.model, x.clean, x.corrupted, x.metric, _LOOPS),
    "gradients": lambda x: gradients(x.model, x.clean, x.metric, "**", _LOOPS),
    "direct_logit_attribution": lambda x: direct_logit_attribution(
        x.model, x.clean, x.answers, n_loops=_LOOPS
    ),
    "qk_circuit": lambda x: qk_circuit(x.model, x.layer),
    "ov_circuit": lambda x: ov_circuit(x.model, x.layer),
    "full_qk": lambda x: full_qk(x.model, x.layer),
    "full_ov": lambda x: full_ov(x.model, x.layer),
    "composition_scores": lambda x: composition_scores(x.model, "V"),
    "ablate": _inside(lambda x: ablate(x.model, Component("attn", loops=(1,)), n_loops=_LOOPS)),
    "steer": _inside(
        lambda x: steer(
            x.model,
            torch.ones(x.model.cfg.d_model).double(),
            site="attn_out",
            loops=[1],
            layers=[x.layer],
            n_loops=_LOOPS,
        )
    ),
    "attenuate_input": _inside(lambda x: attenuate_input(x.model, 0.5, loops=[1], n_loops=_LOOPS)),
    "swap_input": _inside(lambda x: swap_input(x.model, x.corrupted, loops=[1], n_loops=_LOOPS)),
    "dynamics": lambda x: dynamics(x.model, x.clean, _LOOPS),
    "layer_dynamics": lambda x: layer_dynamics(x.model, x.clean, _LOOPS),
    "attention_dynamics": lambda x: attention_dynamics(x.model, x.clean, _LOOPS),
    "jacobian_spectrum": _jacobian,
    "generate": lambda x: generate(x.model, x.clean, 2, _LOOPS),
    "untied": lambda x: untied(x.model, _LOOPS)(x.clean.tokens),
    "unrolled": lambda x: unrolled(cast(Any, x.model), _LOOPS)(x.clean.tokens),
}


def _patched(model: LoopedModel) -> list[str]:
    return (
        ["resid_pre"]
        if any(name.endswith("hook_resid_pre") for name in model.hook_names(1))
        else ["attn_out"]
    )


@dataclass(frozen=True)
class Support:
    """What runs.

    Attributes:
        facts: One row per family: the four declared facts, and how its releases are loaded.
        methods: One row per method, one column per family: "yes", or "no" with the reason in
            `reasons`.
        reasons: By method and family, the sentence with which it refuses.
    """

    facts: pd.DataFrame
    methods: pd.DataFrame
    reasons: dict[tuple[str, str], str]


def facts() -> pd.DataFrame:
    """The declared facts of every family, whether it has releases that are loaded, and what its
    runs take besides tokens.
    """
    loaded = {table.family for table in TABLES} | {"recurrent_depth"}
    rows = []
    for family in sorted(FAMILIES):
        model = tiny(family)
        declared = ["yes" if getattr(model, fact) else "no" for fact in FACTS]
        keywords = [
            name
            for name, kind in inspect.signature(model.embed).parameters.items()
            if kind.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        layout = "released layout" if family in loaded else "own format only"
        rows.append((family, *declared, layout, ", ".join(keywords) or "-"))
    return pd.DataFrame(rows, columns=["family", *FACTS, "loads", "takes"])


def run() -> Support:
    """Run every method on every family; anything but a refusal (ValueError, KeyError, TypeError) is
    raised.
    """
    table: dict[str, list[str]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for family in tqdm(sorted(FAMILIES), desc="families"):
        inputs = _inputs(tiny(family))
        outcomes = {name: _outcome(partial(method, inputs)) for name, method in METHODS.items()}
        table[family] = ["no" if why else "yes" for why in outcomes.values()]
        reasons |= {(name, family): why for name, why in outcomes.items() if why}
    methods = pd.DataFrame(table, index=list(METHODS)).rename_axis("method").reset_index()
    return Support(facts(), methods, reasons)


def _outcome(call: Callable[[], Any]) -> str:
    """Why a call refuses; empty where it runs."""
    try:
        call()
    except (ValueError, TypeError) as refusal:
        return str(refusal)
    return ""


_PAGE = """# Families

Written by `loopscope families`, which runs every method on a tiny random model of every family. `load(folder)` takes a release of
each family as it is published (config.json with safetensors, or its pickle); `loopscope list` names the known ones.

## What each family is

{families}

## What each family declares

`causal`: a later token never changes an earlier result. `prefix_readout`: stopping after t iterations and reading out equals a call with
n_loops=t. `additive_residual`: the stream is a plain sum of component outputs. `batch_independent`: a row never depends on
the others. "own format only" means that nobody has released weights: the family follows its paper's equations. What a family takes is
given to a call by name (`model(tokens, seed=3)`), and to a method in a `Batch`'s `options`.

{facts}

`load` takes for some releases what they do not say:

{options}

## What runs

On every family: {everywhere}. Of the others:

{methods}

## Why not

{reasons}
"""


def page(support: Support) -> str:
    """What the families are and declare, what runs on which, and every refusal, the same sentence
    once with all its families.
    """
    rows = support.methods.set_index("method")
    everywhere = [name for name, row in rows.iterrows() if (row == "yes").all()]
    some = rows.drop(index=everywhere).T.rename_axis("family").reset_index()
    some.columns = [name if name == "family" else f"`{name}`" for name in some.columns]
    grouped: dict[tuple[str, str], list[str]] = {}
    for (method, family), why in support.reasons.items():
        sentence = why.replace(f"{method} needs", "it needs").replace(
            FAMILIES[family][1].__name__, "model"
        )
        grouped.setdefault((sentence, family), []).append(method)
    shared: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (why, family), methods in grouped.items():
        shared.setdefault((why, tuple(methods)), []).append(family)
    reasons = [
        f"* {', '.join(f'`{name}`' for name in methods)} on {', '.join(families)}: {why}"
        for (why, methods), families in shared.items()
    ]
    return _PAGE.format(
        families="\n".join(
            f"* **{name}**: {_about(FAMILIES[name][1])}{_own_points(name)}"
            for name in sorted(FAMILIES)
        ),
        facts=markdown_table(support.facts),
        options="\n".join(
            sorted(
                {
                    f"* {t.family}: " + "; ".join(f"`{k}`: {v}" for k, v in t.options.items())
                    for t in TABLES
                    if t.options
                }
            )
        ),
        everywhere=_named(everywhere),
        methods=markdown_table(some),
        reasons="\n".join(reasons),
    )


def _named(methods: Iterable[Any]) -> str:
    return ", ".join(f"`{name}`" for name in methods)


def _about(family: type[LoopedModel]) -> str:
    """The first paragraph and the source of a family's docstring."""
    text = inspect.getdoc(family) or ""
    about, _, rest = text.partition("\n\n")
    source = rest.partition("Source:\n")[2].partition("\n\n")[0]
    return " ".join(about.split()) + (f" ({' '.join(source.split())})" if source else "")


def _own_points(family: str) -> str:
    """The stacks of blocks that a call visits, and the sites that docs/hooks.md does not list."""
    names = tiny(family).hook_names(_LOOPS)
    stacks = dict.fromkeys(
        re.sub("[0-9]+", "*", name.removesuffix(".hook_attn_out"))
        for name in names
        if name.endswith(".hook_attn_out")
    )
    own = dict.fromkeys(site for site in map(site_of, names) if site not in _LISTED)
    return f" Blocks: {_named(stacks)}." + (f" Sites of its own: {_named(own)}." if own else "")


def write(path: Path) -> Path:
    """Measure, and write the page."""
    return write_text(path, page(run()))
