"""A wrapped module of one's own: an Ouro written by hand, what stays as it was, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import loopscope
from loopscope.models.core.hooks import reads_only
from loopscope.models.core.registry import build
from loopscope.models.families.ouro import Ouro, OuroConfig
from loopscope.models.wrapped.model import Wrapped
from toy import assert_close, randomize_

LOOPS, LAYERS, WORDS = 3, 2, 29


class Returned(NamedTuple):
    stream: Tensor
    note: str


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class Attention(nn.Module):
    """Causal attention over positions turned by rotary angles, from an Ouro block's matrices."""

    def __init__(self, theirs: Any, base: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = theirs.q, theirs.k, theirs.v, theirs.o
        self.width, self.base = theirs.d_head, base

    def turned(self, x: Tensor) -> Tensor:
        half = self.width // 2
        rates = 1.0 / self.base ** (torch.arange(half) / half)
        angles = (torch.arange(x.shape[1])[:, None] * rates)[None, :, None]
        a, b = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = (m(x).unflatten(-1, (-1, self.width)) for m in (self.q, self.k, self.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", self.turned(q), self.turned(k))
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        pattern = (scores * self.width**-0.5).masked_fill(later, -torch.inf).softmax(-1)
        return self.o(torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(-2)), None


class MLP(nn.Module):
    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.gate, self.up, self.down = theirs.gate, theirs.up, theirs.down

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


class Layer(nn.Module):
    """A block with a norm before and after attention and MLP; returns a named tuple."""

    def __init__(self, theirs: Any, base: float) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(theirs.attn, base), MLP(theirs.mlp)
        self.scales = nn.ParameterList([norm.w for norm in norms_of(theirs)])

    def forward(self, *, hidden_states: Tensor) -> Returned:
        x = hidden_states
        x = x + rms(self.attention(rms(x, self.scales[0]))[0], self.scales[1])
        return Returned(x + rms(self.mlp(rms(x, self.scales[2])), self.scales[3]), "a note")


class ByHand(nn.Module):
    """An Ouro: a stack applied several times, the final norm at the end of every iteration."""

    def __init__(self, theirs: Ouro, loops: int = LOOPS) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, theirs.cfg.d_model, _weight=theirs.W_E.detach())
        self.layers = nn.ModuleList(Layer(b, theirs.cfg.rope_theta) for b in theirs.blocks)
        self.scale = nn.Parameter(theirs.final_norm.w.detach())
        self.head = nn.Linear(theirs.cfg.d_model, WORDS, bias=False)
        self.head.weight = nn.Parameter(theirs.W_U.T.detach())
        self.loops, self.calls = loops, 0

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        x = self.words(tokens)
        for _ in range(self.loops):
            for layer in self.layers:
                x = layer(hidden_states=x).stream
            x = self.norm(x)
        return {"logits": self.head(x)}

    def norm(self, x: Tensor) -> Tensor:
        return rms(x, self.scale)


def norms_of(block: Any) -> list[Any]:
    """The four norms of an Ouro block, in the order in which they are used."""
    return [block.ln1, block.ln1_post, block.ln2, block.ln2_post]


@pytest.fixture(scope="module")
def ouro() -> Ouro:
    torch.manual_seed(0)
    cfg = OuroConfig.tiny(n_layers=LAYERS, n_loops=LOOPS, d_vocab=WORDS, eps=1e-5)
    model = randomize_(build(cfg)).double()
    assert isinstance(model, Ouro)
    return model


@pytest.fixture
def module(ouro: Ouro) -> ByHand:
    return ByHand(ouro).double().eval()


def wrapped(module: ByHand, **options: Any) -> Wrapped:
    given: dict[str, Any] = {"n_loops": LOOPS, "norm": module.norm, "head": "head", **options}
    return loopscope.wrap(module, "layers", **given)


def pair() -> Tensor:
    return torch.randint(1, WORDS, (2, 3, 5), generator=torch.Generator().manual_seed(0))


def close(one: Tensor | None, other: Tensor | None) -> None:
    """Equal to 1e-5 of the largest number; the family's angles are in float32."""
    assert one is not None
    assert other is not None
    scale = max(1.0, float(other.abs().max()))
    torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5 * scale)


def metric(logits: Tensor) -> Tensor:
    return logits[:, 3] - 0.5 * logits[:, 7]


def test_an_ouro_by_hand_is_the_family(ouro: Ouro, module: ByHand) -> None:
    model, (clean, corrupted) = wrapped(module), pair()
    with torch.no_grad():
        logits, cache = model.run_with_cache(clean)
        expected, theirs = ouro.run_with_cache(clean)
    close(logits, expected)
    for name, value in cache.items():
        close(value, theirs[name])
    sweeps = [
        loopscope.activation_patch(m, clean, corrupted, metric, sites=["embed", "resid_post"],
                                   readout=-1) for m in (model, ouro)
    ]  # fmt: skip
    assert len(sweeps[0].cells) == (1 + LOOPS * LAYERS) * 5
    close(sweeps[0].values, sweeps[1].values)
    lenses = [loopscope.logit_lens(m, clean, readout=-1, keep_logits=True) for m in (model, ouro)]
    close(lenses[0].logits, lenses[1].logits)
    grads = [
        loopscope.gradients(m, clean, metric, ["hook_embed", "**.hook_resid_post"], readout=-1)[1]
        for m in (model, ouro)
    ]
    for name, value in grads[0].items():
        close(value, grads[1][name])


def test_attribution_is_the_family_s(ouro: Ouro, module: ByHand) -> None:
    clean, corrupted = pair()
    ours, theirs = (
        loopscope.attribution_patch(m, clean, corrupted, metric, sites=["resid_pre"], readout=-1)
        for m in (wrapped(module), ouro)
    )
    close(ours.values, theirs.values)


def test_submodules_outputs_have_names_and_are_patched(module: ByHand) -> None:
    model = wrapped(module, sites={"hook_attn_out": "attention", "hook_mlp_out": "mlp"})
    tokens = pair()[0]
    seen: list[str] = []

    def silence(value: Tensor, hook: Any) -> Tensor:
        seen.append(hook.name)
        return torch.zeros_like(value)

    names = ["loops.1.blocks.0.hook_attn_out", "loops.1.blocks.0.hook_mlp_out"]
    with model.hooks([(names, silence)]):
        _, cache = model.run_with_cache(tokens, names_filter="loops.1.blocks.0.hook_resid_*")
    assert seen == names
    assert_close(cache["resid_pre", 1, 0], cache["resid_post", 1, 0])


def test_a_run_stopped_and_resumed_with_hooks_is_the_whole_run(module: ByHand) -> None:
    model, tokens = wrapped(module), pair()[0]

    def double(value: Tensor, hook: Any) -> Tensor:
        return 2 * value

    with torch.no_grad(), model.hooks([("loops.0.blocks.1.hook_resid_post", double)]):
        whole = model(tokens)
        state = model.begin(tokens)
        for visit in model.schedule():
            state = model.advance(state, visit.index)
        assert_close(model.readout(model.advance(state)), whole)


def test_a_state_that_was_changed_goes_on_from_the_change(ouro: Ouro, module: ByHand) -> None:
    model, tokens = wrapped(module), pair()[0]
    with torch.no_grad():
        ours, theirs = (m.advance(m.begin(tokens), "loops.1.blocks.1") for m in (model, ouro))
        close(ours.resid, theirs.resid)
        read = [
            m.readout(m.advance(replace(state, resid=state.resid.flip(0))))
            for m, state in ((model, ours), (ouro, theirs))
        ]
    close(read[0], read[1])


def test_each_hook_fires_once_in_a_run_and_the_module_runs_once_more(module: ByHand) -> None:
    model, fired = wrapped(module), []
    names = model.hook_names()
    with model.hooks([(names, lambda value, hook: fired.append(hook.name))]):
        model(pair()[0])
    assert fired == names
    assert module.calls == 2  # up to the first block, and whole


def test_the_module_stays_as_it_was(module: ByHand) -> None:
    module.train()
    module.layers[1].eval()
    own: list[int] = []
    handle = module.layers[0].register_forward_hook(lambda *given: own.append(1))
    before = [(dict(vars(m)), m.training, len(m._forward_hooks)) for m in module.modules()]
    model = wrapped(module)
    assert model.training
    clean, corrupted = pair()
    loopscope.activation_patch(model, clean, corrupted, metric, readout=-1, positions=[2])

    def broken(value: Tensor, hook: Any) -> Tensor:
        raise RuntimeError("a hook of the user's")

    with pytest.raises(RuntimeError, match="of the user's"):
        model.run_with_hooks(clean, fwd_hooks=[("loops.1.blocks.0.hook_resid_pre", broken)])
    assert len(own) > LOOPS
    after = [(dict(vars(m)), m.training, len(m._forward_hooks)) for m in module.modules()]
    assert [(set(x), *rest) for x, *rest in before] == [(set(x), *rest) for x, *rest in after]
    assert not any(m._forward_pre_hooks for m in module.modules())
    handle.remove()


def test_without_a_head_everything_but_lenses_works(ouro: Ouro, module: ByHand) -> None:
    model, (clean, corrupted) = wrapped(module, norm=None, head=None), pair()
    sweeps = [
        loopscope.activation_patch(m, clean, corrupted, metric, readout=-1, positions=[1])
        for m in (model, ouro)
    ]
    close(sweeps[0].values, sweeps[1].values)
    with pytest.raises(ValueError, match="pass norm= and head= to wrap"):
        loopscope.logit_lens(model, clean, readout=-1)


@pytest.mark.parametrize(
    ("loops", "words"),
    [
        (LOOPS - 1, "must call its blocks 6 times, .* got 4 calls"),
        (LOOPS + 1, "must call its blocks 6 times, .* got more than 6 calls"),
    ],
)
def test_another_number_of_calls_is_an_error_with_both_numbers(
    ouro: Ouro, loops: int, words: str
) -> None:
    model = wrapped(ByHand(ouro, loops).double())
    with pytest.raises(ValueError, match=words):
        model(pair()[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_another_order_of_calls_is_an_error(module: ByHand) -> None:
    blocks = {"first": "layers[1:]", "second": "layers[:1]"}
    model = loopscope.wrap(module, blocks, LOOPS)
    with pytest.raises(ValueError, match=r"call 0 .* must be of 'layers\[1:\]\.0'"):
        model(pair()[0])


def test_what_cannot_be_is_refused_with_the_reason(module: ByHand, tmp_path: Path) -> None:
    model, tokens = wrapped(module), pair()[0]
    with pytest.raises(ValueError, match="needs a registered family, got 'wrapped'"):
        loopscope.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="which a wrapped module cannot make; use logit_lens"):
        loopscope.readout_lens(model, tokens, readout=-1)
    with pytest.raises(ValueError, match="runs n_loops=3, got 2"):
        model(tokens, n_loops=2)
    with pytest.raises(ValueError, match="register a family for `untied`"):
        loopscope.untied(model, LOOPS)(tokens)
    with pytest.raises(ValueError, match="keeps its keys and values to itself"):
        model.advance(model.begin(tokens), store={})
    with pytest.raises(ValueError, match="runs whole sequences, got a state of some columns"):
        model.advance(model.begin(tokens).rows(pos=slice(2, None)))
    with pytest.raises(ValueError, match="norm and head must make the module's logits"):
        wrapped(module, norm=None)(tokens)
    with pytest.raises(ValueError, match="the module has no submodule 'layer'; it has"):
        loopscope.wrap(module, "layer", LOOPS)
    with pytest.raises(ValueError, match=r"a block, 'layers\.0', has no submodule 'attn'"):
        wrapped(module, sites={"hook_attn_out": "attn"})
    with pytest.raises(ValueError, match="at least one block, got none at"):
        loopscope.wrap(module, "layers[5:]", LOOPS)
    with pytest.raises(ValueError, match="exactly once, got 2 calls of 'coda'"):
        loopscope.wrap(module, {"blocks": "layers[:1]", "coda": ("layers[1:]", 2)}, LOOPS)
    with pytest.raises(ValueError, match="must name blocks of the loop, got only"):
        loopscope.wrap(module, {"prelude": "layers"}, LOOPS)


def test_a_module_that_cuts_gradients_says_so(module: ByHand) -> None:
    forward = module.layers[0].forward
    module.layers[0].forward = torch.no_grad()(forward)  # type: ignore[method-assign]
    model = wrapped(module, sites={"hook_attn_out": "attention"})
    with pytest.warns(UserWarning, match=r"switches gradients off at 'loops\.0\.blocks\.0'"):
        loopscope.gradients(model, pair()[0], metric, "**.hook_attn_out", readout=-1)


def test_a_module_without_any_gradient_is_named_as_the_cause(module: ByHand) -> None:
    module.requires_grad_(False)
    for layer in module.layers:
        layer.forward = torch.no_grad()(layer.forward)
    model = wrapped(module)
    with (
        pytest.warns(UserWarning, match=r"switches gradients off at 'loops\.0\.blocks\.0'"),
        pytest.raises(ValueError, match=r"this model computes them under torch\.no_grad\(\)"),
    ):
        loopscope.gradients(model, pair()[0], metric, "hook_embed", readout=-1)


@pytest.mark.parametrize("whole", [True, False])
def test_a_module_that_cuts_gradients_says_so_also_of_its_embedding(
    whole: bool, module: ByHand
) -> None:
    cut: Any = module if whole else module.layers[1]
    cut.forward = torch.no_grad()(cut.forward)
    with pytest.warns(UserWarning, match="zero where nothing else leads on"):
        _, found = loopscope.gradients(wrapped(module), pair()[0], metric, "hook_embed", readout=-1)
    assert not found["hook_embed"].any()


class Clones(TorchFunctionMode):
    """Counts the copies that are made inside."""

    count = 0

    def __torch_function__(
        self, fn: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += fn is Tensor.clone
        return fn(*args, **(kwargs or {}))


def test_a_hook_costs_no_more_copies_than_it_needs(module: ByHand) -> None:
    """One for a hook that only reads, and two for one that may write."""
    model, tokens = wrapped(module), pair()[0]
    model(tokens)  # the first run checks the head

    def copies(*hooks: Callable[..., None]) -> int:
        names = ["loops.1.blocks.0.hook_resid_pre", "loops.1.blocks.1.hook_resid_post"]
        with torch.no_grad(), model.hooks([(names, hook) for hook in hooks]), Clones() as counted:
            model(tokens)
        return counted.count

    def look(value: Tensor, hook: Any) -> None:
        pass

    def write(value: Tensor, hook: Any) -> None:
        value.mul_(2)

    alone = copies()
    assert copies(reads_only(look)) == alone + 2 * 1
    assert copies(write) == alone + 2 * 2


class Writing(nn.Module):
    """A block that adds to its stream in place, and whose activation writes into what it reads."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(15, 22), nn.Linear(22, 15)
        self.activation, self.in_place = nn.ReLU(inplace=in_place), in_place

    def forward(self, x: Tensor) -> Tensor:
        added = self.down(self.activation(self.up(x))).cumsum(1)
        return x.add_(added) if self.in_place else x + added


class Scale(nn.Module):
    """A norm, as far as the wrapper is concerned, that may write into its input."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.weight, self.in_place = nn.Parameter(torch.ones(15)), in_place

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.weight) if self.in_place else x * self.weight


class AllWriting(nn.Module):
    """A looped model in which tokens, positions, norm and head write in place too."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 15), nn.Parameter(torch.zeros(5, 15))
        self.layers = nn.ModuleList(Writing(in_place) for _ in range(LAYERS))
        self.norm, self.in_place = Scale(in_place), in_place
        self.head = nn.Sequential(nn.Hardtanh(-0.5, 0.5, inplace=in_place), nn.Linear(15, WORDS))

    def forward(self, tokens: Tensor, shift: Tensor) -> Tensor:
        moved = tokens.add_(shift) if self.in_place else tokens + shift
        x = self.words(moved.fmod_(WORDS) if self.in_place else moved.fmod(WORDS))
        if self.in_place:
            shift.zero_()
        x = x.add_(self.places) if self.in_place else x + self.places
        for layer in [*self.layers] * LOOPS:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


@torch.no_grad()
def test_a_module_that_writes_into_its_tensors_is_one_that_does_not() -> None:
    modules = [randomize_(AllWriting(flag)).double().eval() for flag in (True, False)]
    (tokens, other), shift = pair(), pair()[1]
    kept = tokens.clone(), shift.clone()
    models = [
        loopscope.wrap(
            each, "layers", n_loops=LOOPS, norm="norm", head="head", sites={"hook_up": "up"}
        )
        for each in modules
    ]
    for model in models:
        close(model(tokens, shift=shift), modules[1](tokens, shift))
    caches = [model.run_with_cache(tokens, names_filter="**", shift=shift)[1] for model in models]
    assert set(caches[0]) == set(caches[1])
    for name, value in caches[0].items():
        close(value, caches[1][name])
    name = "loops.1.blocks.0.hook_resid_pre"
    source = models[1].run_with_cache(other, names_filter=name, shift=shift)[1][name]
    held, ends = source.clone(), []
    for model in models:
        with model.hooks([(name, lambda value, hook: source)], n_loops=LOOPS):
            ends.append(model(tokens, shift=shift))
    close(*ends)
    assert torch.equal(source, held)
    state = models[0].advance(models[0].begin(tokens, shift=shift), "loops.1.blocks.1")
    again = [models[0].advance(state) for _ in range(2)]
    assert torch.equal(*(end.resid for end in again))
    read = [models[0].readout(again[0]) for _ in range(2)]
    assert torch.equal(*read)
    close(read[0], modules[1](tokens, shift))
    stream = models[0].normalize(again[0].resid)
    assert torch.equal(models[0].unembed(stream), models[0].unembed(stream))
    assert all(map(torch.equal, (tokens, shift), kept))
