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
_QKV = "self_attention.linear_qkv"
_LINEARS = {
    _QKV: "attn.c_attn",
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
                tensor = state[f"{ours}.{mine}.{part}"]
                result[f"{theirs}.{name}.{part}"] = (_swap_leading(tensor, heads, 3) if mine == _QKV else tensor).t()
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in result.items()}


def gpt2_state_from_hf(state: State, model: ModelConfig) -> dict[str, torch.Tensor]:
    """``state`` of a GPT2LMHeadModel (or GPT2Model) in our names and layouts, for one tensor rank.

    Padding rows of the vocabulary are zero. Buffers of old checkpoints (causal masks) are ignored.

    Raises:
        UserError: a tensor is missing or has another shape than ``model`` says.
    """
    source = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    heads, width, ffn = model.num_attention_heads, model.hidden_size, model.ffn_size
    result = {
        _WORDS: _pad(_take(source, "wte.weight", (model.vocab_size, width)), model.padded_vocab_size),
        _POSITIONS: _take(source, "wpe.weight", (None, width)),
    }
    if not model.tie_embeddings:
        result[_OUTPUT] = _pad(_take(source, _HF_OUTPUT, (model.vocab_size, width)), model.padded_vocab_size)
    sizes = {
        _QKV: (width, 3 * width),
        "self_attention.linear_proj": (width, width),
        "mlp.linear_fc1": (width, ffn),
        "mlp.linear_fc2": (ffn, width),
    }
    for part in ("weight", "bias"):
        result[f"decoder.final_layernorm.{part}"] = _take(source, f"ln_f.{part}", (width,))
        for layer in range(model.num_layers):
            ours, theirs = f"decoder.layers.{layer}", f"h.{layer}"
            for mine, name in _NORMS.items():
                result[f"{ours}.{mine}.{part}"] = _take(source, f"{theirs}.{name}.{part}", (width,))
            for mine, name in _LINEARS.items():
                shape = sizes[mine] if part == "weight" else sizes[mine][1:]
                tensor = _take(source, f"{theirs}.{name}.{part}", shape).t()
                result[f"{ours}.{mine}.{part}"] = _swap_leading(tensor, 3, heads) if mine == _QKV else tensor
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in result.items()}


def _take(source: State, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
    """The tensor of that name and shape (None: any size)."""
    tensor = source.get(name)
    if tensor is None:
        raise UserError(
            f"the weights have no tensor {name}; they are not a GPT-2's or have fewer layers than the config"
        )
    if len(shape) != tensor.dim() or any(
        want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    ):
        wanted = "x".join("any" if size is None else str(size) for size in shape)
        found = "x".join(map(str, tensor.shape))
        raise UserError(f"tensor {name} is {found}, the model section asks for {wanted}; change the model section")
    return tensor


def _swap_leading(tensor: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Rows laid out as [outer, inner, head] (and [in] behind, for a matrix), laid out as [inner, outer, head]."""
    return tensor.reshape(outer, inner, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)


def _pad(rows: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(size - rows.shape[0], rows.shape[1])])
