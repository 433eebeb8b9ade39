"""Coders and dictionaries: worked examples, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dictionary_toys import FEATURES, dictionary, model, states
from loopscope.interp.dictionaries.coder import Coder
from loopscope.interp.dictionaries.controls import pca_dictionary, random_dictionary
from loopscope.interp.dictionaries.dictionary import KINDS, Dictionary, Kind
from loopscope.interp.dictionaries.reading import Reading, loop_states
from toy import D_MODEL, LENGTHS, LOOPS, assert_close, cached, padded, randomize_, toy

pytestmark = pytest.mark.shapes
THREE = (torch.tensor([[1.0, 0, -1], [0, 1, 0]]), torch.tensor([0, 0.5, 0]))
DECODER = (torch.tensor([[1.0, 0], [0, 2], [3, 0]]), torch.tensor([10.0, 20]))


def test_the_largest_positive_entries_are_kept() -> None:
    coder = Coder(*THREE, *DECODER, k=2)
    code = coder.encode(torch.tensor([[12.0, 21], [9, 18], [8, 21]]))
    assert code.tolist() == [[2, 1.5, 0], [0, 0, 1], [0, 1.5, 2]]
    assert coder.decode(code).tolist() == [[12, 23], [13, 20], [16, 23]]


def test_entries_above_their_threshold_are_kept_whole() -> None:
    coder = Coder(*THREE, *DECODER, threshold=torch.tensor([2.0, 1, 0]))
    assert coder.encode(torch.tensor([[12.0, 21], [13, 20.5]])).tolist() == [[0, 1.5, 0], [3, 0, 0]]


def test_a_dictionary_reads_each_iteration_with_its_coder() -> None:
    own = dictionary("per_iteration")
    codes = own.encode(states())
    for loop, coder in enumerate(own.coders):
        assert torch.equal(codes[:, loop], coder.encode(states()[:, loop]))
        assert torch.equal(own.decode(codes)[:, loop], coder.decode(codes[:, loop]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_decoded_is_the_sum_of_the_directions(kind: Kind) -> None:
    own = dictionary(kind)
    codes = own.encode(states()).expand(-1, LOOPS, -1)
    decoded = own.decode(own.encode(states()))
    for loop in range(LOOPS):
        assert_close(decoded[:, loop], codes[:, loop] @ own.directions(loop) + own.bias(loop))
    assert own.d_in == D_MODEL


def test_states_are_those_of_the_tokens_that_are_not_padding() -> None:
    batch = padded()
    cache = cached(model(), batch, "loops.*.blocks.1.hook_resid_post")
    whole = torch.stack(list(cache.values()), dim=2)
    rows = [whole[row, :length] for row, length in enumerate(LENGTHS)]
    assert torch.equal(states(), torch.cat(rows))
    at_end = loop_states(model(), batch, LOOPS, positions=None)
    assert torch.equal(at_end, torch.stack([row[-1] for row in rows]))


def test_all_components_in_both_directions_lose_nothing() -> None:
    whole = pca_dictionary(states(), Reading.of(model(), LOOPS), D_MODEL)
    assert_close(whole.decode(whole.encode(states())), states())
    drawn = random_dictionary(states(), Reading.of(model(), LOOPS), FEATURES, 3, seed=1)
    assert_close(drawn.directions(0).norm(dim=1), torch.ones(FEATURES, dtype=torch.float64))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="k or a threshold, and not both"):
        Coder(*THREE, *DECODER)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3"):
        Coder(*THREE, *DECODER, k=4)
    with pytest.raises(ValueError, match="only where both are as wide, got d_in=2 and d_out=3"):
        Coder(*THREE, torch.zeros(3, 3), torch.zeros(3), k=1)
    with pytest.raises(ValueError, match="reads vectors of width 2, got width 3"):
        Coder(*THREE, *DECODER, k=1).encode(torch.zeros(1, 3))
    shared = dictionary("shared")
    with pytest.raises((ValueError, TypeError), match=r"states"):
        shared.encode(states()[:, 0])
    with pytest.raises(ValueError, match="reads 4 iterations of each token, got 3"):
        shared.encode(states()[:, :3])
    with pytest.raises(ValueError, match="reads states of width 35, got width 34"):
        dictionary("crosscoder").encode(states()[..., :-1])
    with pytest.raises(ValueError, match="per_iteration dictionary of 4 iterations has 4 coders"):
        Dictionary("per_iteration", shared.coders, shared.reading, shared.losses)
    with pytest.raises(ValueError, match="its coder must have centred=False"):
        Dictionary("transcoder", shared.coders, shared.reading, shared.losses)
    with pytest.raises((ValueError, TypeError), match="per_iteration"):
        Dictionary("both", shared.coders, shared.reading, shared.losses)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"blocks\.7\.hook_resid_post"):
        Reading.of(model(), LOOPS, "blocks.7.hook_resid_post")
    with pytest.raises(ValueError, match="with other weights or another configuration"):
        shared.check(randomize_(toy(), seed=1))


def test_a_bfloat16_coder_encodes_in_float32() -> None:
    parts = [part.bfloat16() for part in (*THREE, *DECODER)]
    x = torch.tensor([[12.0, 21.125]], dtype=torch.bfloat16)
    code = Coder(*parts, k=2).encode(x)
    assert code.dtype == torch.float32
    assert torch.equal(code, Coder(*(part.float() for part in parts), k=2).encode(x.float()))


def test_a_dictionary_moves_whole() -> None:
    own = dictionary("per_iteration", None).to("meta")
    parts = [part for each in own.coders for part in vars(each).values()]
    assert {part.device.type for part in parts if isinstance(part, torch.Tensor)} == {"meta"}
    assert own.losses.device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_directions_of_an_iteration_out_of_range_are_refused(kind: Kind) -> None:
    with pytest.raises(ValueError, match=f"loop must be in 0..{LOOPS - 1}, got {LOOPS}"):
        dictionary(kind).directions(LOOPS)
