"""The facts of every family, and the methods that run on a tiny random model of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import loopscope
from loopscope.analyses.common.records import markdown_table, write_text
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables import TABLES
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.circuits.scores import circuit_scores
from loopscope.interp.circuits.selection import select_circuit
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.trainer import DictionaryTraining
from loopscope.interp.dictionaries.training import train_dictionary
from loopscope.interp.edit.ablation import Component
from loopscope.interp.exits.exits import TopStable
from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import site_of
from loopscope.models.core.registry import FAMILIES, build

FACTS = ("causal", "prefix_readout", "additive_residual", "batch_independent")
_LOOPS = 2
_TRAINING = DictionaryTraining(n_features=7, k=2, steps=2, batch_size=5)

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
    """The arguments of all methods: two inputs of three rows, answers, and a metric."""

    model: LoopedModel
    clean: Batch
    corrupted: Batch
    answers: Tensor

    @property
    def vector(self) -> Tensor:
        """A vector for the stream."""
        return torch.ones(self.model.cfg.d_model, dtype=self.model.W_E.dtype, device="cpu")

    @property
    def layer(self) -> int:
        """The first layer that an iteration visits."""
        return min(visit.layer for visit in self.model.schedule(1) if visit.loop is not None)

    @property
    def visit(self) -> str:
        """The first visit of iteration 1."""
        return next(visit.name for visit in self.model.schedule(_LOOPS) if visit.loop == 1)

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


def _arguments(x: _Inputs) -> dict[str, Any]:
    """A value for each argument that a method may have, by the name that all methods give it."""
    model = x.model
    return {
        "model": model, "inputs": x.clean, "clean": x.clean, "corrupted": x.corrupted,
        "other": x.corrupted, "positive": x.clean, "negative": x.corrupted, "n_loops": _LOOPS,
        "metric": x.metric, "answers": x.answers, "targets": x.answers[:, None], "names": "**",
        "positions": [2], "position": 2, "sites": _patched(model), "site": "attn_out",
        "loop": 1, "visit": x.visit, "loops": [1], "layer": x.layer, "layers": [x.layer],
        "sender": Sender("attn", visit=x.visit), "receivers": Receiver("readout"),
        "vectors": x.vector, "factor": 0.5, "steps": 2,
        "what": Component("attn", loops=(1,)), "criterion": TopStable(hits=2),
        "threshold": 0.5, "max_new_tokens": 2, "kind": "V", "k": 2, "n_starts": 2,
        "order": ["loops.0", "loops.0"],
        "first": x.clean, "at": 0, "second": x.corrupted,
        "preferred": x.answers > 3, "features": [0],
        "training": _TRAINING, "wanted": -1e6, "krylov": 5,
    }  # fmt: skip


def methods() -> dict[str, Callable[..., Any]]:
    """The public calls that take a model first and ask it something."""
    asking = {
        name: getattr(loopscope, name)
        for name, home in loopscope._HOME.items()
        if home.startswith(("loopscope.interp.", "loopscope.models."))
    }
    return {
        name: call
        for name, call in asking.items()
        if inspect.isfunction(call) and next(iter(inspect.signature(call).parameters)) == "model"
    }


def ask(method: Callable[..., Any], x: _Inputs) -> Any:
    """Call a method with the arguments that it has. A context is entered around one run, and a
    copy of the model is run.
    """
    with TemporaryDirectory() as folder:
        made = method(**_fitting(_arguments(x) | {"to": folder}, method, x))
        if isinstance(made, AbstractContextManager):
            with made as model:
                return model(x.clean.tokens, n_loops=_LOOPS)
        return made(x.clean.tokens) if isinstance(made, nn.Module) else made


def _fitting(known: dict[str, Any], method: Callable[..., Any], x: _Inputs) -> dict[str, Any]:
    """The arguments that a method has."""
    parameters = inspect.signature(method).parameters
    if "kind" in parameters and parameters["kind"].default is not inspect.Parameter.empty:
        del known["kind"]  # of a probe
    if "visit" in parameters:  # which names a place in place of loop and layer
        known = {name: value for name, value in known.items() if name not in ("loop", "layer")}
    known |= {name: make(x) for name, make in _COMPUTED.items() if name in parameters}
    return {name: known[name] for name in parameters if name in known}


def _circuit(x: _Inputs) -> Circuit:
    """A few edges."""
    pair = (x.clean, x.corrupted, x.metric, _LOOPS)
    scores = circuit_scores(x.model, *pair, method="eap", heads=False)
    return select_circuit(scores, 3, prune=False)


def _dictionary(x: _Inputs) -> Dictionary:
    """A dictionary of the residual."""
    return train_dictionary(x.model, x.clean, n_loops=_LOOPS, training=_TRAINING)


_COMPUTED = {"circuits": _circuit, "scores": _circuit, "dictionary": _dictionary}


def _patched(model: LoopedModel) -> list[str]:
    return (
        ["resid_pre"]
        if any(name.endswith("hook_resid_pre") for name in model.hook_names(1))
        else ["attn_out"]
    )


@dataclass(frozen=True)
class Support:
    """The methods that run on each family.

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
        refused = refusals(family)
        table[family] = ["no" if why else "yes" for why in refused.values()]
        reasons |= {(name, family): why for name, why in refused.items() if why}
    rows = pd.DataFrame(table, index=list(methods())).rename_axis("method").reset_index()
    return Support(facts(), rows, reasons)


def refusals(family: str) -> dict[str, str]:
    """Why each method refuses a tiny model of a family; empty where the method runs."""
    inputs = _inputs(tiny(family))
    return {name: _outcome(partial(ask, method, inputs)) for name, method in methods().items()}


def _outcome(call: Callable[[], Any]) -> str:
    """Why a call refuses; empty where it runs."""
    try:
        call()
    except (ValueError, TypeError) as refusal:
        return str(refusal)
    return ""


_PAGE = """# Families

Written by `loopscope families`, which runs every method on a tiny random model of every family.
Read this page to see which architectures are supported, and which methods work on yours.

A *family* is one architecture. `load(folder)` takes a release of a family in the form in which it
was published (config.json with safetensors, or its pickle); `loopscope list` names the known
releases.

## What each family is

*Blocks* are the [hook names](hooks.md) of its blocks; `*` stands for a number. *Sites of its own*
are hook points that the main table of hook points does not list.

{families}

## What each family declares

Methods use these facts to decide what they can do:

* `causal`: a later token never changes an earlier result.
* `prefix_readout`: a run that is stopped after t iterations gives the logits of a call with
  `n_loops=t`.
* `additive_residual`: the residual stream is a plain sum of the outputs of its components.
* `batch_independent`: a row of a batch never depends on the other rows.
* *loads*: "own format only" means that nobody has released weights, and the family follows the
  equations of its paper.
* *takes*: inputs besides tokens. Give them to a call by name (`model(tokens, seed=3)`), or to a
  method in the `options` of a `Batch`.

{facts}

Some releases do not contain all that is needed. `load` takes these arguments for them:

{options}

## What runs

On every family: {everywhere}. Of the others:

{methods}

## Why not

Every "no" of the table, with the reason that the error gives:

{reasons}
"""


def page(support: Support) -> str:
    """The page: families, declared facts, methods, and every refusal.

    A sentence of several refusals stands once, with all its families.
    """
    rows = support.methods.set_index("method")
    everywhere = [name for name, row in rows.iterrows() if (row == "yes").all()]
    some = rows.drop(index=everywhere).T.rename_axis("family").reset_index()
    some.columns = [name if name == "family" else f"`{name}`" for name in some.columns]
    grouped: dict[tuple[str, str], list[str]] = {}
    for (method, family), why in support.reasons.items():
        grouped.setdefault((sentence(why, method, family), family), []).append(method)
    shared: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (why, family), methods in grouped.items():
        shared.setdefault((why, tuple(methods)), []).append(family)
    reasons = [
        f"* {_named(methods)} on {', '.join(families)}: {why}"
        for (why, methods), families in shared.items()
    ]
    return _PAGE.format(
        families="\n".join(
            f"* **{name}**: {_about(FAMILIES[name][1])}{_own_points(name)}"
            for name in sorted(FAMILIES)
        ),
        facts=markdown_table(support.facts),
        options="\n".join(sorted(set(map(_options, filter(attrgetter("options"), TABLES))))),
        everywhere=_named(everywhere),
        methods=markdown_table(some),
        reasons="\n".join(reasons),
    )


def sentence(why: str, method: str, family: str) -> str:
    """A refusal as the page says it: for several methods and families alike."""
    return why.replace(f"{method} needs", "it needs").replace(FAMILIES[family][1].__name__, "model")


def _options(table: Table) -> str:
    """The options that `load` takes for a family's releases, as an item of a list."""
    return f"* {table.family}: " + "; ".join(f"`{k}`: {v}" for k, v in table.options.items())


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
