"""A Hugging Face Trainer run; the lines between the SLW marks add Sequence Length Warmup.

    python examples/hf_trainer.py

Without those lines this is the baseline: the same budget of tokens, every step at the full length. Batches are cut in
``training_step`` and not in a data collator, because the Trainer's loader collates batches ahead of their step.
"""

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

# SLW begin
from megatron_ext.curriculum import Duration, LearningRateConfig, LinearPacing, RunSpec, TrainingPlan

# SLW end

SEQ_LEN, BATCH, STEPS, WARMUP_STEPS = 64, 8, 60, 10
TEXT = "".join(f"{a} plus {b} is {a + b}.\n" for a in range(100) for b in range(100))
CHARS = sorted(set(TEXT))


def samples() -> list[dict[str, torch.Tensor]]:
    """The text in samples of SEQ_LEN characters."""
    rows = torch.tensor([CHARS.index(char) for char in TEXT]).unfold(0, SEQ_LEN, SEQ_LEN)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Train."""
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=len(CHARS), n_positions=SEQ_LEN, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(shape)
    lengths: list[int] = []

    def note(module: torch.nn.Module, _: Any, inputs: dict[str, torch.Tensor]) -> None:
        if module.training:
            lengths.append(inputs["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    arguments = TrainingArguments(
        output_dir="runs/hf_trainer",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP_STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer_class: type[Trainer] = Trainer
    # SLW begin
    rate = LearningRateConfig(peak=1.0, warmup=Duration(steps=WARMUP_STEPS))  # a factor of learning_rate above
    budget = Duration(tokens=STEPS * BATCH * SEQ_LEN)
    run = RunSpec(seq_len=SEQ_LEN, batch_size=BATCH, duration=budget, learning_rate=rate)
    plan = TrainingPlan.build(LinearPacing(start=8, duration=Duration(steps=60)), run)
    arguments.max_steps = plan.steps

    class SlwTrainer(Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *_: Any) -> Any:
            length = plan[self.state.global_step].seq_len
            return super().training_step(model, {name: rows[:, :length] for name, rows in inputs.items()})

        def create_scheduler(self, *_: Any, **__: Any) -> Any:
            self.lr_scheduler = LambdaLR(self.optimizer, lambda step: plan[min(step, plan.steps - 1)].lr)
            return self.lr_scheduler

    trainer_class = SlwTrainer

    # SLW end
    trainer = trainer_class(model=model, args=arguments, train_dataset=samples())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, (length, loss) in enumerate(zip(lengths, losses, strict=True)):
        print(f"step {step} length {length} tokens {BATCH * sum(lengths[: step + 1])} loss {loss}")


if __name__ == "__main__":
    main()
