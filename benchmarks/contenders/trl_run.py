"""TRL's DPOTrainer. `python trl_run.py JOB RESULT` in an environment with trl, which need not have upo."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stopwatch import Stopwatch, contend, read_rows


def run(job: dict[str, Any]) -> Stopwatch:
    import datasets
    import peft
    import torch
    import trl
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer import dpo_trainer

    cuda = torch.cuda.is_available()
    watch = Stopwatch(torch.cuda.synchronize if cuda else lambda: None)

    class Listener(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.training()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                watch.losses.append(logs["loss"])
                watch.grad_norms.append(float(logs["grad_norm"]))

    _time_reference(dpo_trainer, watch)
    at_once = job["settings"].get("pairs_at_once", job["batch_size"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    args = trl.DPOConfig(
        output_dir=job["out"],
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=job["batch_size"] // at_once,
        max_length=job["max_length"],
        beta=job["beta"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=job["clip"],
        max_steps=job["steps"],
        train_sampling_strategy="sequential",  # the rows lie in the order in which upo takes them
        use_cpu=not cuda,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **job["settings"]["config"],
    )
    trainer = trl.DPOTrainer(
        model=job["model"],
        args=args,
        train_dataset=datasets.Dataset.from_list([_as_text(row, tokenizer) for row in read_rows(job["ordered"])]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Listener()],
    )
    loaded = peft.set_peft_model_state_dict(trainer.model, load_file(str(Path(job["adapter"]) / "adapter_model.safetensors")))
    absent = [name for name in loaded.missing_keys if "lora_" in name]
    if absent or loaded.unexpected_keys:
        raise SystemExit(f"trl: another adapter than ours: {absent[:3]} missing, {loaded.unexpected_keys[:3]} unexpected")
    trainer.train()
    watch.rows([(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset])
    watch.found["setup"] = {
        "weights": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "autocast": "bfloat16" if args.bf16 else "off",
        "gradient_checkpointing": args.gradient_checkpointing,
        "reference": "precomputed" if args.precompute_ref_log_probs else "in every step",
        "pairs_at_once": at_once,
    }
    if cuda:
        watch.found["device_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return watch


def _as_text(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """A row as plain strings, to which TRL adds the end of text: of a conversation it would also score the line break after the end of turn."""
    if isinstance(row["prompt"], str):
        return {name: row[name] for name in ("prompt", "chosen", "rejected")}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    return {"prompt": prompt, "chosen": row["chosen"][0]["content"], "rejected": row["rejected"][0]["content"]}


def _time_reference(dpo_trainer: Any, watch: Stopwatch) -> None:
    """The reference is what TRL computes inside `use_adapter`, before the first step or in each."""
    original = dpo_trainer.use_adapter

    @contextmanager
    def timed(*args: Any, **kwargs: Any):
        with watch.reference(), original(*args, **kwargs):
            yield

    dpo_trainer.use_adapter = timed


if __name__ == "__main__":
    contend(run)
