"""The README's example runs, and its numbers are what the commands print."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import loopscope
from golden_cases import GOLDEN
from loopscope.analyses.figures.answers import halting, recurrence
from loopscope.analyses.figures.answers.halting import HaltingConfig
from loopscope.analyses.figures.answers.recurrence import RecurrenceConfig
from loopscope.checkpoints.remote import find_release
from paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLES[0], "README.md", "exec"), {})
    assert "loops.7.blocks.1" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_other_families_runs_on_small_stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ouro, qwen = tmp_path / "ouro", tmp_path / "qwen"
    shutil.copytree(GOLDEN / "ouro", ouro)
    words = {word: i for i, word in enumerate(["<unk>", "The", "capital", "of", "France", "is"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(ouro)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
    }
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=28, vocab_size=31)).save_pretrained(
        qwen
    )
    asked: list[str] = []
    monkeypatch.setitem(loopscope.__dict__, "fetch", lambda name: asked.append(name) or ouro)
    scope: dict[str, Any] = {}
    exec(compile(EXAMPLES[1].replace("path/to/Qwen3-1.7B", str(qwen)), "README.md", "exec"), scope)
    assert asked == ["Ouro-1.4B"]
    assert find_release(asked[0]).at == "ByteDance/Ouro-1.4B"
    assert "top_prob" in capsys.readouterr().out
    assert scope["text"].new.shape == (1, 20)
    assert [visit.name for visit in scope["plain"].schedule() if visit.loop == 2] == [
        f"loops.2.blocks.{layer}" for layer in (12, 13, 14, 15)
    ]


def test_the_heat_map_of_ones_own_query_takes_less_than_ten_lines() -> None:
    assert len(EXAMPLES[2].splitlines()) < 10
    scope: dict[str, Any] = {}
    *before, last = EXAMPLES[2].strip().splitlines()
    exec(compile("\n".join(before), "README.md", "exec"), scope)
    figure = eval(compile(last, "README.md", "eval"), scope)
    assert any(trace.type == "heatmap" for trace in figure.data)


@pytest.mark.slow
def test_the_numbers_beyond_the_trained_depth() -> None:
    best = recurrence.run(RecurrenceConfig()).accuracy.max(1).values
    assert f"at least {float(best[:10].min()):.2f} on 1 to 10 trained hops" in README
    assert (
        ", ".join(f"{accuracy:.2f}" for accuracy in best[10:].tolist()) + " on 11 to 16" in README
    )


@pytest.mark.parametrize(("checkpoint", "hops"), [("r2", 4), ("r4", 9)])
@pytest.mark.slow
def test_the_numbers_of_overthinking(checkpoint: str, hops: int) -> None:
    accuracy = recurrence.run(RecurrenceConfig(checkpoint=f"mini/multi_hop/{checkpoint}")).accuracy[
        hops - 1
    ]
    fall = (
        f"from {float(accuracy.max()):.2f} at r = {int(accuracy.argmax()) + 1} to"
        f" {float(accuracy[-1]):.2f} at r = 24"
    )
    assert f"{hops} hops fall {fall}" in README


@pytest.mark.slow
def test_the_numbers_of_halting() -> None:
    stops = halting.run(HaltingConfig())
    (both, alone), (many, few) = (
        stops.accuracy.mean(1)[:2].tolist(),
        stops.iterations.mean(1)[:2].tolist(),
    )
    assert (
        f"KL and entropy: accuracy {both:.2f} in {many:.1f} iterations; KL alone: {alone:.2f} in"
        f" {few:.1f}" in README
    )
