"""What is taken for tokens, masks and ids: everything unambiguous, else a sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from family_toys import TOYS
from toy import D_VOCAB, Bidirectional, odd_one, random_tokens, toy, with_words

TOKENS = random_tokens()


@pytest.mark.parametrize(
    "tokens",
    [TOKENS.tolist(), TOKENS.numpy(), TOKENS.to(torch.uint8), TOKENS.int(), TOKENS.short()],
    ids=["list", "array", "uint8", "int32", "int16"],
)
def test_ids_of_any_integer_kind_are_tokens(tokens: object) -> None:
    model = toy()
    assert torch.equal(model(tokens), model(TOKENS))
    assert model.run_with_cache(tokens)[1]["hook_embed"].shape == (*TOKENS.shape, 35)


@pytest.mark.parametrize("tokens", [[[1, 2], [3]], [[1.5, 2]], TOKENS.float(), None])
def test_what_holds_no_ids_is_refused(tokens: object) -> None:
    with pytest.raises(TypeError, match=r"tokens must be an integer tensor \[batch, pos\], got"):
        toy()(tokens)


def test_masks_may_be_lists_and_arrays() -> None:
    model, mask = toy(), [[1, 1, 0], [1, 1, 1]]
    tokens = random_tokens(batch=2, pos=3)
    expected = model(tokens, mask=torch.tensor(mask))
    assert torch.equal(model(tokens, mask=mask), expected)
    assert torch.equal(model(tokens, mask=np.array(mask)), expected)
    with pytest.raises(ValueError, match="the mask must be a tensor like the tokens, got list"):
        model(tokens, mask=[[1, 1], [1]])


def test_ids_outside_the_vocabulary_have_no_words() -> None:
    model = with_words(toy())
    assert model.to_str_tokens([1, 2]) == model.to_str_tokens(torch.tensor([1, 2]))
    assert model.to_str_tokens(np.array([[3, 28]])) == ["<t_3>", "<t_28>"]
    for wrong in (-1, D_VOCAB, 99):
        with pytest.raises(ValueError, match=rf"ids must be in 0\.\.{D_VOCAB - 1}, got {wrong}"):
            model.to_str_tokens([1, wrong])
    for tokens in ([1.5], [[1, 2], [3, 4]], None):
        with pytest.raises(ValueError, match="tokens must be a text or one row of integer ids"):
            model.to_str_tokens(tokens)


def test_padding_without_its_mask_is_refused_where_real_tokens_would_see_it() -> None:
    model = with_words(odd_one(Bidirectional))
    texts = ["<t_3><t_4>", "<t_5><t_6><t_7>"]
    tokens, batch = model.to_tokens(texts), model.encode(texts)
    with pytest.raises(ValueError, match=r"row 0 ends with padding \(id 0\).*pass mask="):
        model(tokens)
    with pytest.raises(ValueError, match="row 0 ends with padding"):
        model.begin(tokens)
    padded = model(batch.tokens, mask=batch.mask)
    torch.testing.assert_close(padded[0, :2], model(tokens[:1, :2])[0])
    albert = TOYS["albert"].make()
    with pytest.raises(ValueError, match="row 1 ends with padding"):
        albert(torch.tensor([[5, 6, 7], [5, 6, 0]]))
    causal = with_words(toy())
    assert causal(causal.to_tokens(texts)).isfinite().all()
