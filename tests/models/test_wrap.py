"""Wrapped modules: the classes of transformers give the numbers of this project's families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopscope
from loopscope.models.core.base import LoopedModel
from loopscope.models.wrapped.model import Wrapped

GOLDEN = Path(__file__).parents[1] / "golden"
SITES = ["resid_pre", "resid_post"]


@dataclass(frozen=True)
class Case:
    """A wrapped module beside this project's model of the same weights."""

    wrapped: Wrapped
    family: LoopedModel
    causal: bool = True

    @property
    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, self.family.cfg.d_vocab, (2, 3, 5), generator=generator)

    def metric(self, logits: Tensor) -> Tensor:
        return logits[:, 3] - 0.5 * logits[:, 5]


def drawn(theirs: nn.Module, spread: float) -> nn.Module:
    """The module with random weights, double precision, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            size = 0.02 if "embed_tokens" in name else spread
            around = 1.0 if "orm.weight" in name else 0.0
            parameter.copy_(around + size * torch.randn(parameter.shape, generator=generator))
    return theirs.eval()


def hrm_text(folder: Path, spread: float = 0.15) -> Case:
    """The default spread is small: the class's norms round to float32 in a double-precision model
    too, and large weights magnify that.
    """
    from transformers import HrmTextConfig, HrmTextForCausalLM

    config = HrmTextConfig(
        vocab_size=31, hidden_size=15, intermediate_size=22, num_hidden_layers=2,
        num_attention_heads=5, head_dim=4, max_position_embeddings=16, H_cycles=2, L_cycles=3,
        L_bp_cycles=[3, 3],
    )  # fmt: skip
    theirs = drawn(HrmTextForCausalLM(config), spread)
    theirs.save_pretrained(folder)
    wrapped = loopscope.wrap(
        theirs.double(),
        {"low": ("model.L_module.layers", 3), "high": "model.H_module.layers"},
        n_loops=2,
        norm="model.H_module.final_norm",
        head="lm_head",
    )
    return Case(wrapped, loopscope.load(folder).double())


def albert(folder: Path) -> Case:
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        vocab_size=29, embedding_size=11, hidden_size=15, num_attention_heads=3,
        intermediate_size=22, max_position_embeddings=13, num_hidden_layers=3, inner_group_num=2,
    )  # fmt: skip
    theirs = drawn(AlbertForMaskedLM(config), 0.4)
    theirs.save_pretrained(folder)
    head: Any = theirs.double().predictions
    wrapped = loopscope.wrap(
        theirs,
        "albert.encoder.albert_layer_groups.0.albert_layers",
        n_loops=3,
        norm=lambda x: head.LayerNorm(head.activation(head.dense(x))),
        head="predictions.decoder",
        causal=False,
    )
    return Case(wrapped, loopscope.load(folder).double(), causal=False)


def dory(folder: Path) -> Case:
    from transformers import DoryForCausalLM

    theirs: Any = DoryForCausalLM.from_pretrained(GOLDEN / "dory").eval().double()
    config = theirs.config
    first, last = config.n_input_layers, config.n_input_layers + config.n_recurrent_layers
    wrapped = loopscope.wrap(
        theirs,
        {
            "prelude": f"model.layers[:{first}]",
            "blocks": f"model.layers[{first}:{last}]",
            "coda": f"model.layers[{last}:]",
        },
        n_loops=config.n_recurrent_loops,
        norm="model.norm",
        head="lm_head",
    )
    return Case(wrapped, loopscope.load(GOLDEN / "dory").double())


CASES: dict[str, Callable[[Path], Case]] = {"hrm_text": hrm_text, "albert": albert, "dory": dory}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp(request.param))


def close(one: Tensor, other: Tensor) -> None:
    scale = max(1.0, float(other.detach().abs().max()))
    torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5 * scale, check_dtype=False)


def test_every_iteration_s_streams_are_the_family_s(case: Case) -> None:
    tokens = case.tokens[0]
    with torch.no_grad():
        logits, cache = case.wrapped.run_with_cache(tokens)
        expected, theirs = case.family.run_with_cache(tokens)
    close(logits, expected)
    names = [name for name in cache if name != "hook_embed"]
    assert names == [n for n in theirs if n.endswith(("resid_pre", "resid_post"))]
    for name in names:
        close(cache[name], theirs[name])
    assert not case.wrapped.any_hook()


def test_every_cell_of_a_sweep_is_the_family_s(case: Case) -> None:
    clean, corrupted = case.tokens
    ours, theirs = (
        loopscope.activation_patch(model, clean, corrupted, case.metric, sites=SITES, readout=-1)
        for model in (case.wrapped, case.family)
    )
    assert [cell.name for cell in ours.cells] == [cell.name for cell in theirs.cells]
    assert len(ours.cells) >= 2 * 2 * 6
    close(ours.values, theirs.values)
    assert float(theirs.values.std()) > 1e-3


def test_norms_in_float32_are_all_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.hrm_text.modeling_hrm_text import HrmTextRMSNorm

    monkeypatch.setattr(HrmTextRMSNorm, "forward", HrmTextRMSNorm._norm)
    case = hrm_text(tmp_path, 0.4)
    with torch.no_grad():
        ours, theirs = (model(case.tokens[0]) for model in (case.wrapped, case.family))
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-10, check_dtype=False)


def test_padding_changes_what_it_changes_in_the_family(case: Case) -> None:
    tokens = case.tokens[0]
    mask = torch.ones_like(tokens)
    mask[1, 3:] = 0
    with torch.no_grad():
        ours, theirs = (model(tokens, mask=mask) for model in (case.wrapped, case.family))
    close(ours[mask.bool()], theirs[mask.bool()])


def test_the_lens_is_the_family_s(case: Case) -> None:
    ours, theirs = (
        loopscope.logit_lens(model, case.tokens[0], readout=-1, keep_logits=True)
        for model in (case.wrapped, case.family)
    )
    assert ours.names == theirs.names
    assert ours.logits is not None
    assert theirs.logits is not None
    close(ours.logits, theirs.logits)


def test_gradients_are_the_family_s(case: Case) -> None:
    names = "loops.**.hook_resid_p*"
    (_, ours), (_, theirs) = (
        loopscope.gradients(model, case.tokens[0], case.metric, names, readout=-1)
        for model in (case.wrapped, case.family)
    )
    assert set(ours) == set(theirs)
    for name in ours:
        close(ours[name], theirs[name])
    assert max(float(theirs[name].abs().max()) for name in theirs) > 1e-3


def test_a_wrapped_module_is_what_it_declares(case: Case) -> None:
    loopscope.check_family(case.wrapped)


def test_token_types_reach_the_module(tmp_path: Path) -> None:
    case = hrm_text(tmp_path)
    clean = case.tokens[0]
    types = (torch.arange(5) < torch.tensor([[2], [4], [3]])).long()
    with torch.no_grad():
        plain, ours = case.wrapped(clean), case.wrapped(clean, token_type_ids=types)
        close(ours, case.family(clean, token_types=types))
    assert float((ours - plain).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="an option of a call must be a tensor"):
        case.wrapped(clean, token_type_ids=types[:, 0])
