"""megatron-core's view of our model: its TransformerConfig and the modules of a block.

No Transformer Engine, no apex: megatron-core's parallel linear layers, our layer around them, our attention.
"""

import functools

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch.nn import functional

from megatron_ext.config.run import RunConfig
from megatron_ext.model.attention import core_attention
from megatron_ext.model.layer import AddLayerNorm, Layer, LayerNorm, RecomputedLayer
from megatron_ext.ops.kernels import Kernels
from megatron_ext.parallel.rng import RngStreams

_ACTIVATIONS = {"gelu_tanh": functools.partial(functional.gelu, approximate="tanh"), "gelu_erf": functional.gelu}


def transformer_config(config: RunConfig) -> TransformerConfig:
    """``config`` in megatron-core's terms; parameters are made in float32 on the CPU, whatever the precision.

    Initialization is GPT-2's: normal(0, init_std), the projections into the residual stream scaled by
    1/sqrt(2 * layers) (megatron-core's defaults), biases 0, LayerNorm 1.
    """
    model = config.model
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_size,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layernorm_epsilon=model.layernorm_epsilon,
        init_method_std=model.init_std,
        activation_func=_ACTIVATIONS[model.activation],
        tensor_model_parallel_size=config.parallel.tensor,
        fp16=config.training.precision == "fp16",
        bf16=config.training.precision == "bf16",
        params_dtype=torch.float32,
        # On every device: a rank's weights are then a slice of the same matrix whatever the layout.
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # Its default means the same and warns.
        cuda_graph_scope=[],
    )


def block_submodules(config: RunConfig, streams: RngStreams, kernels: Kernels) -> TransformerBlockSubmodules:
    """The modules of the whole stack of layers."""
    norm, add_norm = (ModuleSpec(module=kind, params={"kernels": kernels}) for kind in (LayerNorm, AddLayerNorm))
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention(config.model.attention, streams, kernels),
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=norm, self_attention=attention, pre_mlp_layernorm=add_norm, mlp=mlp
    )
    params = {"kernels": kernels, "exact_gelu": config.model.activation == "gelu_erf"}
    if config.parallel.activation_checkpointing == "full":
        layer = ModuleSpec(module=RecomputedLayer, params=params | {"streams": streams}, submodules=submodules)
    else:
        layer = ModuleSpec(module=Layer, params=params, submodules=submodules)
    return TransformerBlockSubmodules(layer_specs=[layer] * config.model.num_layers, layer_norm=norm)
