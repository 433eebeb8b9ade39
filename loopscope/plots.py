"""Every figure of the command line as a function of a model, such as `plots.lens(model, text=...)`.

from loopscope import load, plots
figure = plots.lens(load("mini/smiles"), text="CC(=O)N")
figure.write_html("lens.html")

Each function takes a loaded model, a checkpoint's name, or the path of a file or folder, then the
settings of the command of its name (hyphens become underscores), and returns a
`plotly.graph_objects.Figure` with a title. A figure of several checkpoints takes a list of them.
`help(plots.lens)` lists the settings and shows an example. `attention_view` is no figure of the
command line: it shows attention patterns in CircuitsVis's view.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopscope.analyses.common.configs import (
    ComparisonConfig,
    LoadedModel,
    LogsConfig,
    is_setting,
)
from loopscope.analyses.common.figures import FIGURES, FigureFile

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from loopscope.models.core.base import LoopedModel

    Source = LoopedModel | str | Path

__all__ = sorted(file.stem for file in FIGURES.values())


def __getattr__(name: str) -> Callable[..., go.Figure]:
    """The function of a figure, made when it is first asked for."""
    file = FIGURES.get(name.replace("_", "-"))
    if file is None:
        raise AttributeError(f"loopscope.plots has no {name!r}; it has {', '.join(__all__)}")
    made = globals()[name] = _function(file)
    return made


def __dir__() -> list[str]:
    return [*__all__, "attention_view"]


def attention_view(
    model: LoopedModel, inputs: Any, n_loops: int | None = None, *, layer: int = 0
) -> Any:
    """The attention patterns of one input in CircuitsVis's view: every head of a layer, iteration
    by iteration (needs the extra `loopscope[circuitsvis]`).

    Args:
        model: A loaded model.
        inputs: One text, the tokens of one input, or a `Batch` of one.
        n_loops: Iterations; None means what the checkpoint records.
        layer: The layer inside an iteration, from 0.

    Returns:
        A page that a notebook shows; `str` of it is HTML.

    Raises:
        ImportError: CircuitsVis is not installed.
        KeyError: No such layer, or one without attention patterns.
        ValueError: Several inputs.
    """
    from loopscope.analyses.common.subject import words
    from loopscope.interp.drawing.labels import spoken
    from loopscope.models.core.state import checked_tokens

    try:
        from circuitsvis.attention import attention_heads
    except ImportError:
        raise ImportError(
            "attention_view needs CircuitsVis; install loopscope[circuitsvis]"
        ) from None
    tokens = checked_tokens(model.texts.given(inputs, None, {}, None).tokens, model.cfg.d_vocab)
    if len(tokens) != 1:
        raise ValueError(f"attention_view shows one input, got {len(tokens)}")
    wanted = f"loops.**.blocks.{layer}.attn.hook_pattern"
    _, cache = model.run_with_cache(inputs, n_loops=n_loops, names_filter=wanted)
    heads = [
        (f"{spoken(name)} · head {head}", pattern.float().tolist())
        for name, patterns in cache.items()
        for head, pattern in enumerate(patterns[0])
    ]
    names, attention = map(list, zip(*heads, strict=True))
    shown = list(words(model, tokens[0]))
    return attention_heads(attention, shown, names, mask_upper_tri=model.causal)


def _function(file: FigureFile) -> Callable[..., go.Figure]:
    kind = file.config()

    def draw(source: Any = None, /, **settings: Any) -> go.Figure:
        from loopscope.analyses.standalone import make

        figure: go.Figure = make(file, _config(kind, source, settings)).figure
        return figure

    draw.__name__ = draw.__qualname__ = file.stem
    draw.__doc__ = _doc(file, kind)
    parameters = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default)
        for each in _settings(kind)
    ]
    first = inspect.Parameter("source", inspect.Parameter.POSITIONAL_ONLY, default=None)
    draw.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    return draw


def _settings(kind: type) -> list[Any]:
    """The fields of a config that a caller sets by name."""
    named = ("checkpoint", "checkpoints", "runs", "threads")
    return [each for each in fields(kind) if is_setting(each.name) and each.name not in named]


def _doc(file: FigureFile, kind: type) -> str:
    example = getattr(file.module(), "EXAMPLE", "")
    names = ", ".join(each.name for each in _settings(kind))
    told = f"\n\nExample:\n    {example}" if example else ""
    return (
        f"{file.about()}\n\nSettings: {names}; `loopscope {file.name} --help` explains them.{told}"
    )


def _config(kind: type, source: Any, settings: dict[str, Any]) -> Any:
    """The config of a figure for one or several sources.

    Raises:
        TypeError: A setting that the figure does not have.
    """
    unknown = sorted(set(settings) - {each.name for each in _settings(kind)})
    if unknown:
        known = ", ".join(each.name for each in _settings(kind))
        raise TypeError(f"this figure has no setting {unknown[0]!r}; its settings are {known}")
    settings = {name: _frozen(kind, name, value) for name, value in settings.items()}
    return kind(**settings, **({} if source is None else _sources(kind, source)))


def _sources(kind: type, source: Any) -> dict[str, Any]:
    """The settings of a config that name its sources, with the models that are in memory."""
    many = list(source) if isinstance(source, list | tuple) else [source]
    if issubclass(kind, LogsConfig):
        return {"runs": tuple(map(str, many))}
    held = dict(zip(_names(many), many, strict=True))
    models = {
        name: LoadedModel(model, alone=True)
        for name, model in held.items()
        if not isinstance(model, str | Path)
    }
    if issubclass(kind, ComparisonConfig):
        return {"checkpoints": _names(many), "loaded": models}
    if len(many) != 1:
        raise TypeError(f"this figure is of one checkpoint, got {len(many)}")
    return {"checkpoint": _names(many)[0], "loaded": models}


def _frozen(kind: type, name: str, value: Any) -> Any:
    """A list as a tuple, and one text where several are taken as a tuple of it."""
    hint = next(str(each.type) for each in fields(kind) if each.name == name)
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str) and hint.startswith("tuple") else value


def _names(sources: Sequence[Source]) -> tuple[str, ...]:
    """A name for each source: its own, or the class of a model, numbered where there are more."""
    kinds = [type(each).__name__ for each in sources if not isinstance(each, str | Path)]
    names: list[str] = []
    for each in sources:
        if isinstance(each, str | Path):
            names.append(str(each))
            continue
        kind = type(each).__name__
        count = sum(name.startswith(f"{kind} model") for name in names)
        names.append(f"{kind} model" + f" {count}" * (kinds.count(kind) > 1))
    return tuple(names)
