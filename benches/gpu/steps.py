"""Training steps for `python -m benches.gpu`: trainers of one model that share its weights and take turns."""

from __future__ import annotations

import statistics
import tempfile
import time

import torch

from .bench import Bench, importable
from .models import Shape, build, draw_lengths, rows_of, twin, word_tokenizer
from .trainers import BETA, trainer_kinds

MAX_LENGTH = 1024  # the article's, as are LoRA's rank and the batches
# Its table, for 2,000 steps of 8 pairs on an A100 with 40 GB.
ARTICLE_STEPS, ARTICLE_HOURS = 2000, (12, 18)


def resident_bytes(trainer) -> int:
    """Of weights, scales and the optimiser's state, each storage once."""
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    for parameter in trainer.model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        tensors += [part.absmax for part in (state, nested) if part is not None]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if not t.is_cpu
    }
    return sum(storage.nbytes() for storage in storages.values())


def make_clock(bench: Bench):
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds and extra bytes of each step."""

        def __init__(self):
            self.seconds, self.extra = [], []

        def on_step_begin(self, *_, **__):
            bench.sync()
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats()
                self.before = torch.cuda.memory_allocated()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            bench.sync()
            self.seconds.append(time.perf_counter() - self.start)
            if bench.cuda:
                self.extra.append(torch.cuda.max_memory_allocated() - self.before)

    return Clock()


def make_trainer(bench, shape, kind, config, model, dataset, tokenizer, options, clock, steps):
    from peft import LoraConfig
    from transformers import PrinterCallback

    adapter = None
    if shape.nf4:
        names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        adapter = LoraConfig(r=16, lora_dropout=0.05, target_modules=names, task_type="CAUSAL_LM")
    paged = bench.cuda and shape.nf4 and importable("bitsandbytes")
    args = config(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=steps,
        max_length=MAX_LENGTH,
        beta=BETA,
        learning_rate=1e-9,  # the weights are shared: losses stay comparable
        bf16=bench.cuda,
        use_cpu=not bench.cuda,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **{"optim": "paged_adamw_8bit" if paged else "adamw_torch", **options},
    )
    trainer = kind(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def steps(bench: Bench, name: str, shape: Shape, scale: float, rounds: int, each: int) -> None:
    """Optimiser steps of 8 pairs by each trainer, in turns of `each` steps."""
    from datasets import Dataset

    case = f"{name}, {'NF4 + LoRA' if shape.nf4 else 'all weights'}, step of 8 pairs up to 1,024 tokens"
    lengths = draw_lengths(8 * each, scale)
    tokens = sum(min(p + answer, MAX_LENGTH) for p, *both in lengths for answer in both) / each
    tokenizer = word_tokenizer(shape.vocab)
    dataset = Dataset.from_list(rows_of(lengths, shape.vocab))
    torch.manual_seed(0)
    model = build(shape, bench.device)
    trainers, clocks, losses = {}, {}, {}
    for kind, (cls, config), adapt, options in trainer_kinds(shape):
        if bench.out_of_time:
            print(f"  no time left for {kind}")
            continue
        with bench.survives(case, kind):
            clock = make_clock(bench)
            parts = adapt(twin(model)), dataset, tokenizer, options, clock, each
            trainer = make_trainer(bench, shape, cls, config, *parts)
            trainer.train()  # compiles, tunes
            history = trainer.state.log_history
            losses[kind] = next(entry["loss"] for entry in history if "loss" in entry)
            clock.seconds.clear()
            trainers[kind], clocks[kind] = trainer, clock
    for _ in range(rounds):
        for kind, trainer in trainers.items():
            if not bench.out_of_time or not clocks[kind].seconds:
                with bench.survives(case, kind):
                    trainer.train()
    for kind, trainer in trainers.items():
        if not clocks[kind].seconds:
            continue
        seconds, extra = clocks[kind].seconds, clocks[kind].extra
        columns = {"tokens_s": tokens / statistics.median(seconds)}
        if bench.cuda:
            columns["extra_gb"] = max(extra) / 1e9
            columns["peak_gb"] = columns["extra_gb"] + resident_bytes(trainer) / 1e9
        bench.report(f"step_{name}", case, kind, seconds, **columns)
    print("  first losses: " + ", ".join(f"{kind} {loss:.4f}" for kind, loss in losses.items()))
    if name == "mistral-7b":
        measured = {kind: clock.seconds for kind, clock in clocks.items() if clock.seconds}
        restate_the_article(measured, bench)


def restate_the_article(seconds: dict[str, list[float]], bench: Bench) -> None:
    """Its table has hours for 2,000 steps; ours beside them."""
    low, high = ARTICLE_HOURS
    print(f"  {ARTICLE_STEPS:,} steps of 8 pairs, Mistral-7B in NF4 with LoRA:")
    print(f"    {'the article, A100 40 GB':40}{low} to {high} h")
    for kind, values in seconds.items():
        each = statistics.median(values)
        hours = each * ARTICLE_STEPS / 3600
        print(f"    {f'{kind}, {bench.device_name()}':40}{hours:.2f} h, {each:.2f} s a step")
