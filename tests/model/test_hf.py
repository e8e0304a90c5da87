"""Our model with GPT2LMHeadModel's weights is GPT2LMHeadModel, and the weights come back unchanged."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from megatron_ext.errors import UserError
from megatron_ext.model.gpt import Gpt
from megatron_ext.model.hf import gpt2_state_from_hf, gpt2_state_to_hf
from megatron_ext.parallel.groups import Layout
from tests.model.small import POSITIONS, assert_identical, build_small, gradients_of, random_tokens, shake, small_model

transformers = pytest.importorskip("transformers")


def _pair(layout: Layout, **model: Any) -> tuple[Gpt, torch.nn.Module]:
    shape = small_model(**model)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=POSITIONS,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_attention_heads,
            n_inner=shape.ffn_size,
            activation_function={"gelu_tanh": "gelu_new", "gelu_erf": "gelu"}[shape.activation],
            layer_norm_epsilon=shape.layernorm_epsilon,
            tie_word_embeddings=shape.tie_embeddings,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        )
    )
    shake(theirs)
    ours = build_small(layout, **model)
    ours.load_state_dict(gpt2_state_from_hf(theirs.state_dict(), shape))
    return ours, theirs


_VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention": "reference"},
    {"tie_embeddings": False},
    {"activation": "gelu_erf", "layernorm_epsilon": 1e-3},
    {"ffn_hidden_size": 48, "num_attention_heads": 2, "num_layers": 3},
]


@pytest.mark.parametrize("variant", _VARIANTS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
def test_logits_and_gradients_are_those_of_transformers(
    layout: Layout, variant: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    ours, theirs = (model.to(dtype) for model in _pair(layout, **variant))
    for length in (1, 2, 17, 40):
        tokens, labels = random_tokens(3, length), random_tokens(3, length, seed=1)
        logits = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), logits, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours(tokens, last_only=True), logits[:, -1:], rtol=0, atol=tolerance)
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, length)
        torch.testing.assert_close(ours(tokens, labels), losses, rtol=0, atol=tolerance)
        expected = gpt2_state_from_hf(gradients_of(theirs, losses.mean()), small_model(**variant))
        gradients = gradients_of(ours, ours(tokens, labels).mean())
        torch.testing.assert_close(gradients, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", _VARIANTS, ids=str)
def test_round_trip(layout: Layout, variant: dict[str, Any]) -> None:
    ours, theirs = _pair(layout, **variant)
    back = gpt2_state_to_hf(ours.state_dict(), small_model(**variant))
    expected = theirs.state_dict()
    assert_identical(back, dict(expected))
    assert all(tensor.is_contiguous() for tensor in back.values())
    strict = theirs.load_state_dict(back)
    assert not strict.missing_keys


def test_bare_gpt2_names_and_old_mask_buffers_are_accepted(layout: Layout) -> None:
    ours, theirs = _pair(layout)
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    state.pop("lm_head.weight")
    state["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    converted = gpt2_state_from_hf(state, small_model())
    assert_identical(converted, dict(ours.state_dict()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_layers": 3}, "no tensor h.2.ln_1.weight"),
        ({"hidden_size": 64}, r"wte.weight is 211x32, the model section asks for 211x64"),
        ({"vocab_size": 212}, r"wte.weight is 211x32"),
        ({"ffn_hidden_size": 96}, r"h.0.mlp.c_fc.weight is 32x128, the model section asks for 32x96"),
    ],
)
def test_weights_of_another_model_are_refused(layout: Layout, change: dict[str, Any], match: str) -> None:
    _, theirs = _pair(layout)
    with pytest.raises(UserError, match=match):
        gpt2_state_from_hf(theirs.state_dict(), small_model(**change))
