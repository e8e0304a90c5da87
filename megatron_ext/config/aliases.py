"""What other frameworks call our keys: used only to say what to write when an unknown key is found.

Names come from Megatron-LM and Megatron-DeepSpeed arguments, DeepSpeed's JSON, nanoGPT, GPT-NeoX and transformers.
"""

from typing import Final

_BY_KEY: Final[dict[str, tuple[str, ...]]] = {
    "model.num_layers": ("n_layer", "n_layers", "layers", "num_hidden_layers", "depth"),
    "model.hidden_size": ("n_embd", "d_model", "embed_dim", "width", "hidden_dim", "hidden"),
    "model.num_attention_heads": ("n_head", "n_heads", "num_heads", "heads"),
    "model.ffn_hidden_size": ("n_inner", "d_ff", "intermediate_size", "ffn_dim"),
    "model.vocab_size": ("padded_vocab_size", "n_vocab"),
    "model.vocab_multiple": ("make_vocab_size_divisible_by",),
    "model.max_position_embeddings": ("n_positions", "max_positions"),
    "model.activation": ("activation_function", "hidden_act"),
    "model.hidden_dropout": ("dropout", "resid_pdrop", "embd_pdrop", "resid_dropout"),
    "model.attention_dropout": ("attn_pdrop", "attn_dropout"),
    "model.layernorm_epsilon": ("layer_norm_epsilon", "norm_epsilon", "layer_norm_eps"),
    "model.init_std": ("init_method_std", "initializer_range", "initializer_std"),
    "model.attention": ("attention_backend", "attn_implementation", "flash_attn", "use_flash_attn", "flash_attention"),
    "model.tie_embeddings": ("tie_word_embeddings", "share_embeddings_and_output_weights"),
    "training.seq_len": (
        "seq_length",
        "sequence_length",
        "seqlen",
        "block_size",
        "context_length",
        "max_seq_len",
        "n_ctx",
    ),
    "training.batch_size": ("global_batch_size", "train_batch_size", "batch"),
    "training.duration": (
        "train_tokens",
        "max_tokens",
        "total_tokens",
        "train_iters",
        "max_steps",
        "max_iters",
        "total_steps",
        "num_train_steps",
        "train_samples",
        "max_duration",
    ),
    "training.stop_after": ("exit_interval", "exit_after", "stop_at"),
    "training.batch_size_warmup": ("rampup_batch_size", "batch_warmup"),
    "training.precision": ("fp16", "bf16", "dtype", "mixed_precision", "params_dtype"),
    "curriculum": (
        "curriculum_learning",
        "slw",
        "sequence_length_warmup",
        "seq_len_warmup",
        "seqlen_warmup",
        "data_efficiency",
    ),
    "curriculum.pacing": ("schedule_type", "curriculum_type"),
    "curriculum.start": ("min_difficulty", "seqlen_start", "start_seq_len", "start_length", "min_seq_len"),
    "curriculum.end": ("max_difficulty", "seqlen_end", "end_seq_len", "end_length"),
    "curriculum.multiple": ("difficulty_step", "seqlen_step", "step_size"),
    "curriculum.duration": ("total_curriculum_step", "curriculum_steps"),
    "curriculum.degree": ("root_degree",),
    "optimizer.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2"),
    "optimizer.eps": ("adam_eps", "adam_epsilon", "epsilon"),
    "optimizer.weight_decay": ("wd",),
    "optimizer.clip_grad": ("gradient_clipping", "grad_clip", "max_grad_norm", "clip_grad_norm"),
    "optimizer.implementation": ("optimizer_type", "fused_adam", "use_cpu_adam"),
    "learning_rate.peak": ("lr", "max_lr", "peak_lr", "base_lr"),
    "learning_rate.min": ("min_lr", "lr_min", "end_lr"),
    "learning_rate.warmup": (
        "lr_warmup_iters",
        "lr_warmup_tokens",
        "lr_warmup_steps",
        "lr_warmup_samples",
        "warmup_steps",
        "warmup_iters",
        "warmup_tokens",
        "warmup_num_steps",
    ),
    "learning_rate.decay": ("lr_decay_style", "lr_scheduler_type", "scheduler", "lr_schedule"),
    "learning_rate.decay_duration": (
        "lr_decay_tokens",
        "lr_decay_iters",
        "lr_decay_steps",
        "lr_decay_samples",
        "decay_tokens",
        "decay_steps",
    ),
    "parallel.tensor": (
        "tensor_model_parallel_size",
        "model_parallel_size",
        "tensor_parallel",
        "tensor_parallel_size",
        "tp",
        "tp_size",
    ),
    "parallel.zero_stage": ("zero_optimization", "zero", "stage"),
    "parallel.offload_optimizer": ("cpu_offload", "offload"),
    "parallel.offload_params": ("offload_param",),
    "parallel.micro_batch_tokens": (
        "micro_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "per_device_train_batch_size",
        "device_batch_size",
    ),
    "parallel.activation_checkpointing": (
        "checkpoint_activations",
        "recompute_activations",
        "gradient_checkpointing",
        "recompute_granularity",
    ),
    "parallel.timeout_minutes": ("distributed_timeout_minutes",),
    "data.sources": ("data_path", "data_paths", "dataset", "train_data"),
    "data.train": ("train_data_path", "train_data_paths"),
    "data.valid": ("valid_data_path", "valid_data_paths", "val_data"),
    "data.tokenizer": ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_name"),
    "validation.every": ("eval_interval", "eval_every", "eval_steps"),
    "validation.samples": ("eval_iters", "eval_samples", "eval_tokens"),
    "checkpoint.every": ("save_interval", "save_every", "save_steps"),
    "checkpoint.keep_last": ("keep", "save_total_limit", "keep_last_n_checkpoints"),
    "checkpoint.resume": ("load", "auto_resume", "resume_from_checkpoint"),
    "metrics.log_every": ("log_interval", "logging_steps", "steps_per_print"),
    "metrics.tensorboard": ("tensorboard_dir", "tensorboard_log_dir"),
    "output_dir": ("out_dir", "save", "run_dir", "save_dir"),
    "name": ("run_name", "experiment_name", "job_name"),
    "seed": ("random_seed", "manual_seed"),
}

_KEY_OF: Final[dict[str, str]] = {alias: key for key, aliases in _BY_KEY.items() for alias in aliases}

_HINTS: Final[dict[str, str]] = {
    "training.duration": '{"tokens": n} or {"steps": n}',
    "training.stop_after": '{"steps": n} or {"tokens": n}',
    "training.batch_size_warmup": '{"start": sequences, "increment": sequences, "duration": {"tokens": n}}',
    "training.precision": '"fp32", "bf16" or "fp16"',
    "curriculum": '{"pacing": "linear", "start": n, "duration": {"steps": T}}',
    "curriculum.duration": '{"steps": T} or {"tokens": T}',
    "optimizer.betas": "[0.9, 0.95]",
    "learning_rate.warmup": '{"steps": n} or {"tokens": n}',
    "learning_rate.decay": '"cosine", "linear", "constant" or "wsd"',
    "learning_rate.decay_duration": '{"tokens": n} or {"steps": n}',
    "parallel.zero_stage": "0, 1, 2 or 3",
    "parallel.micro_batch_tokens": "tokens one rank may hold at once; micro-batches follow from it",
    "parallel.activation_checkpointing": '"none" or "full"',
    "data.sources": '[{"prefix": "PREFIX"}]',
    "data.train": '[{"prefix": "PREFIX"}]',
    "data.valid": '[{"prefix": "PREFIX"}]',
    "validation.every": '{"steps": n} or {"tokens": n}',
    "validation.samples": "full-length sequences",
    "checkpoint.every": '{"steps": n} or {"tokens": n}',
}


def key_for(name: str) -> str | None:
    """The dotted key of ours for what another framework calls ``name``, or None."""
    return _KEY_OF.get(name.lower().replace("-", "_").lstrip("_"))


def hint_for(key: str) -> str:
    """`` (what a value of this key looks like)``, or nothing where the key says it all."""
    hint = _HINTS.get(key)
    return f" ({hint})" if hint else ""


def all_aliases() -> dict[str, str]:
    """Every known foreign name and the key of ours that it stands for."""
    return dict(_KEY_OF)
