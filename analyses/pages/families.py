"""The page of families: the facts of each, and the methods that run on it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from loopscope.analyses.common.records import markdown_table, write_text
from loopscope.analyses.trials import LOOPS, methods, refusals, tiny
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables import TABLES
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import site_of
from loopscope.models.core.registry import FAMILIES

FACTS = ("causal", "prefix_readout", "additive_residual", "batch_independent")

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
    for (why, family), names in grouped.items():
        shared.setdefault((why, tuple(names)), []).append(family)
    reasons = [
        f"* {_named(names)} on {', '.join(families)}: {why}"
        for (why, names), families in shared.items()
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
    names = tiny(family).hook_names(LOOPS)
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
