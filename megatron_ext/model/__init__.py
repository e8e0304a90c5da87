"""The GPT: megatron-core's model with our layer spec, its parameters, its costs, and its Hugging Face form."""
