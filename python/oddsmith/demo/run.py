"""`oddsmith demo`: trains a model with ORPO from scratch, offline, in about two minutes.

Generates preference pairs with checkable answers, trains a byte-level BPE tokenizer and a small
Mistral-shaped model on them, and writes model, pairs, metrics and curves to a folder.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerState, set_seed

from ..config import ORPOConfig
from ..integrations.progress_bars import NoProgressBars
from ..stage import staged_file
from ..trainer import ORPOTrainer
from ..training.curves import save_curves
from .model import build_model, train_tokenizer
from .score import answer, score
from .tasks import TASKS, make_splits

STEPS = 900
TRAIN_ROWS = 12_000
TEST_ROWS = 480
COLUMNS = ("prompt", "chosen", "rejected")


class CompactProgress(TrainerCallback):
    """A progress bar that shows only loss, reward margin and accuracy."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # A file or a pipe gets a line from time to time instead of ten per second.
        interval = 0.2 if sys.stderr.isatty() else 15.0
        self.bar = tqdm(
            total=state.max_steps,
            desc="training",
            unit="step",
            mininterval=interval,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}{postfix}]",
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or logs is None or "rewards/margins" not in logs:
            return
        shown = {
            "loss": f"{float(logs['loss']):.3f}",
            "margin": f"{float(logs['rewards/margins']):+.3f}",
            "accuracy": f"{float(logs['rewards/accuracies']):.0%}",
        }
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def make_config(output_dir: Path, steps: int, seed: int) -> ORPOConfig:
    return ORPOConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=120,
        learning_rate=1.5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        adam_beta2=0.98,
        beta=0.25,
        # Half of a sequence is a prompt of random letters, which is not predictable.
        nll_scope="completion",
        max_length=64,
        # Both save memory at the cost of time, which this small model does not need.
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=seed,
        logging_steps=max(1, steps // 50),
        eval_strategy="steps",
        eval_steps=max(1, steps // 5),
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def write_rows(rows: list[dict], path: Path) -> None:
    with staged_file(path) as file:
        for row in rows:
            file.write((json.dumps({name: row[name] for name in COLUMNS}) + "\n").encode())


def format_table(before: dict[str, dict], after: dict[str, dict]) -> str:
    """Formats the scores before and after training side by side, one line per task."""
    lines = [
        f"{'held-out pairs':<16}{'accuracy':^18}{'reward margin':^20}{'exact answers':^18}",
        f"{'':<16}" + f"{'before':>8} {'after':>7}  " * 3,
    ]
    for name in [*(task.name for task in TASKS), "all"]:
        if name not in before:
            continue
        old, new = before[name], after[name]
        lines.append(
            f"{name:<16}{old['accuracy']:>8.1%} {new['accuracy']:>7.1%}  "
            f"{old['margin']:>+8.3f} {new['margin']:>+7.3f}  "
            f"{old['exact']:>8.1%} {new['exact']:>7.1%}"
        )
    return "\n".join(line.rstrip() for line in lines)


def format_samples(model: Any, tokenizer: Any, rows: list[dict]) -> str:
    """Shows what the model writes for the first held-out row of each task."""
    firsts = list({row["task"]: row for row in reversed(rows)}.values())[::-1]
    lines = []
    for row, text in zip(firsts, answer(model, tokenizer, firsts), strict=True):
        right = row["chosen"][0]["content"]
        verdict = "right" if text.strip() == right else f"wrong: {right}"
        lines.append(f"  {row['prompt'][0]['content']:<38} {text.strip():<12} {verdict}")
    return "\n".join(lines)


def run_demo(output_dir: str | Path, steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """Runs the demo and writes its results.

    Args:
        output_dir (`str` or `Path`):
            Folder for `model/` (loadable with `from_pretrained`, tokenizer included), `data/`
            (`train.jsonl`, `test.jsonl`), `metrics.json` and `curves.png`.
        steps (`int`, *optional*): Optimizer steps, at least 1.
        seed (`int`, *optional*, defaults to 0): Seed of the pairs, the weights and the data order.

    Returns:
        `dict[str, Any]`: Contents of `metrics.json`: `before` and `after` (see
            [`~oddsmith.demo.score.score`]), `steps`, `seed`, `seconds` and the trainer's `history`.

    Raises:
        ValueError: If `steps` is below 1.
        OSError: If the folder cannot be written.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; must be at least 1")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    set_seed(seed)

    train_rows, test_rows = make_splits(TRAIN_ROWS, TEST_ROWS, seed)
    write_rows(train_rows, output_dir / "data" / "train.jsonl")
    write_rows(test_rows, output_dir / "data" / "test.jsonl")
    print(f"pairs      {len(train_rows)} for training, {len(test_rows)} held out", flush=True)

    tokenizer = train_tokenizer(
        message["content"] for row in train_rows for name in COLUMNS for message in row[name]
    )
    model = build_model(tokenizer)
    print(
        f"tokenizer  byte-level BPE, {len(tokenizer)} tokens\n"
        f"model      Mistral shape, {model.num_parameters() / 1e6:.2f} M parameters, "
        "random weights",
        flush=True,
    )

    config = make_config(output_dir / "model", steps, seed)
    before = score(model, tokenizer, test_rows, config.beta)
    with NoProgressBars():
        trainer = ORPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([{k: row[k] for k in COLUMNS} for row in train_rows]),
            eval_dataset=Dataset.from_list([{k: row[k] for k in COLUMNS} for row in test_rows]),
            processing_class=tokenizer,
            callbacks=[CompactProgress()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
    after = score(model, tokenizer, test_rows, config.beta)

    results = {
        "before": before,
        "after": after,
        "steps": steps,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "history": trainer.state.log_history,
    }
    with staged_file(output_dir / "metrics.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    save_curves(trainer.state.log_history, output_dir / "curves.png", "oddsmith demo")
    print(f"\n{format_table(before, after)}\n")
    print(f"sample answers\n{format_samples(model, tokenizer, test_rows)}\n")
    print(
        f"{results['seconds']:.0f} s. Written to {output_dir}: "
        "model/  data/  metrics.json  curves.png\n"
        "Next, continue training with your flags:\n"
        f"  oddsmith train --model {output_dir / 'model'} --dataset {output_dir / 'data'} "
        f"--output_dir {output_dir / 'more'} --max_steps 100 --learning_rate 5e-4"
    )
    return results
