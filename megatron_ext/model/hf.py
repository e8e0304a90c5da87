"""State dicts of transformers' GPT2LMHeadModel and ours (one tensor rank), each made from the other.

Names and layouts differ in three ways: GPT-2's Conv1D keeps weights as [in, out]; its c_attn lays out all queries, then
all keys, then all values, while megatron-core lays out query, key and value of each head together; and our vocabulary
is padded.
"""

from collections.abc import Mapping

import torch

from megatron_ext.config.model import ModelConfig
from megatron_ext.errors import UserError

State = Mapping[str, torch.Tensor]

_WORDS, _POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
_OUTPUT, _HF_OUTPUT = "output_layer.weight", "lm_head.weight"
_NORMS = {"input_layernorm": "ln_1", "pre_mlp_layernorm": "ln_2"}
_QKV = ("self_attention.linear_qkv", "attn.c_attn")
_LINEARS = {
    "self_attention.linear_proj": "attn.c_proj",
    "mlp.linear_fc1": "mlp.c_fc",
    "mlp.linear_fc2": "mlp.c_proj",
}


def gpt2_state_to_hf(state: State, model: ModelConfig) -> dict[str, torch.Tensor]:
    """``state`` of a model on one tensor rank in GPT2LMHeadModel's names and layouts, without the padded vocabulary."""
    heads, vocab = model.num_attention_heads, model.vocab_size
    words = state[_WORDS][:vocab]
    result = {"transformer.wte.weight": words, "transformer.wpe.weight": state[_POSITIONS]}
    result[_HF_OUTPUT] = words if model.tie_embeddings else state[_OUTPUT][:vocab]
    for part in ("weight", "bias"):
        result[f"transformer.ln_f.{part}"] = state[f"decoder.final_layernorm.{part}"]
        for layer in range(model.num_layers):
            ours, theirs = f"decoder.layers.{layer}", f"transformer.h.{layer}"
            for mine, name in _NORMS.items():
                result[f"{theirs}.{name}.{part}"] = state[f"{ours}.{mine}.{part}"]
            for mine, name in _LINEARS.items():
                result[f"{theirs}.{name}.{part}"] = state[f"{ours}.{mine}.{part}"].t()
            qkv = _swap_leading(state[f"{ours}.{_QKV[0]}.{part}"], heads, 3)
            result[f"{theirs}.{_QKV[1]}.{part}"] = qkv.t()
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in result.items()}


def gpt2_state_from_hf(state: State, model: ModelConfig) -> dict[str, torch.Tensor]:
    """``state`` of a GPT2LMHeadModel (or GPT2Model) in our names and layouts, for one tensor rank.

    Padding rows of the vocabulary are zero. Buffers of old checkpoints (causal masks) are ignored.

    Raises:
        UserError: a tensor is missing or has another shape than ``model`` says.
    """
    source = _Source(state)
    heads, width, ffn = model.num_attention_heads, model.hidden_size, model.ffn_size
    result = {
        _WORDS: _pad(source.take("wte.weight", (model.vocab_size, width)), model.padded_vocab_size),
        _POSITIONS: source.take("wpe.weight", (None, width)),
    }
    if not model.tie_embeddings:
        result[_OUTPUT] = _pad(source.take(_HF_OUTPUT, (model.vocab_size, width)), model.padded_vocab_size)
    sizes = {
        "self_attention.linear_proj": (width, width),
        "mlp.linear_fc1": (width, ffn),
        "mlp.linear_fc2": (ffn, width),
    }
    for part in ("weight", "bias"):
        result[f"decoder.final_layernorm.{part}"] = source.take(f"ln_f.{part}", (width,))
        for layer in range(model.num_layers):
            ours, theirs = f"decoder.layers.{layer}", f"h.{layer}"
            for mine, name in _NORMS.items():
                result[f"{ours}.{mine}.{part}"] = source.take(f"{theirs}.{name}.{part}", (width,))
            for mine, name in _LINEARS.items():
                shape = sizes[mine] if part == "weight" else sizes[mine][1:]
                result[f"{ours}.{mine}.{part}"] = source.take(f"{theirs}.{name}.{part}", shape).t()
            shape = (width, 3 * width) if part == "weight" else (3 * width,)
            qkv = source.take(f"{theirs}.{_QKV[1]}.{part}", shape).t()
            result[f"{ours}.{_QKV[0]}.{part}"] = _swap_leading(qkv, 3, heads)
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in result.items()}


class _Source:
    """A Hugging Face state dict whose tensors are asked for by name, with or without ``transformer.`` in front."""

    def __init__(self, state: State) -> None:
        self._state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}

    def take(self, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        tensor = self._state.get(name)
        if tensor is None:
            raise UserError(
                f"the weights have no tensor {name}; they are not a GPT-2's or have fewer layers than the config"
            )
        fits = tensor.dim() == len(shape) and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = "x".join("any" if size is None else str(size) for size in shape)
            found = "x".join(str(size) for size in tensor.shape)
            raise UserError(f"tensor {name} is {found}, the model section asks for {wanted}; change the model section")
        return tensor


def _swap_leading(tensor: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Rows laid out as [outer, inner, head] (and [in] behind, for a matrix), laid out as [inner, outer, head]."""
    return tensor.reshape(outer, inner, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)


def _pad(rows: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(size - rows.shape[0], rows.shape[1])])
