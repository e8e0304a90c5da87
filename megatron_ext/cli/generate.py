"""``generate``: text from a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A run directory, or one of its checkpoints/step_N.")],
    *,
    prompt: Annotated[str, typer.Option(help="Text to continue; empty: a new document.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the most probable token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the tokens that hold this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws: the same seed gives the same text.")] = 1234,
) -> None:
    """Continue a prompt with a trained model.

    Example: megatron-ext generate runs/demo/shakespeare --prompt "ROMEO" --max-new-tokens 60
    """
    # Imports DeepSpeed (to read its files), which asks for the accelerator at once.
    from megatron_ext.runtime.device import select_device
    from megatron_ext.runtime.environment import prepare_libraries, rank_info
    from megatron_ext.runtime.log import configure_logging

    configure_logging(0)
    device = select_device(0)
    prepare_libraries(rank_info(), device.accelerator)

    import torch

    from megatron_ext.checkpoint.weights import load_model
    from megatron_ext.data.tokenizers import load_tokenizer
    from megatron_ext.model.generation import Sampling, generate

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    with load_model(checkpoint, device) as loaded:
        tokenizer = load_tokenizer(loaded.config.data.tokenizer)
        ids = tokenizer.encode(prompt) or [tokenizer.eod]
        tokens = generate(
            loaded.model,
            torch.tensor([ids], device=device.torch_device),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            generator=torch.Generator(device.torch_device).manual_seed(seed),
            stop_token=tokenizer.eod,
        )
    new = [int(token) for token in tokens[0, len(ids) :] if int(token) != tokenizer.eod]
    typer.echo(prompt + tokenizer.decode(new))
