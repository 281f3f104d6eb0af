"""docs/metrics.md has the metrics that a run logs, by their names."""

import re

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.training.metrics import EMPTY_COMPLETIONS
from support.paths import ROOT
from support.ultrafeedback import ultrafeedback_rows

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
# Of transformers: named below the table.
OTHERS = {"learning_rate", "grad_norm", "epoch", "step"}


def documented() -> set[str]:
    cells = re.findall(r"^\| (`[^|]+`) \|", PAGE, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_names(instruct_folder, tmp_path):
    config = ORPOConfig(
        str(tmp_path),
        beta_schedule="linear",
        beta_end=0.05,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(instruct_folder),
        args=config,
        train_dataset=Dataset.from_list(ultrafeedback_rows(4, seed=4)),
        processing_class=AutoTokenizer.from_pretrained(instruct_folder),
    )
    trainer.train()
    logged = set(trainer.state.log_history[0]) - OTHERS
    # Logged if there are any, and by mixtures of experts.
    assert logged | {EMPTY_COMPLETIONS, "aux_loss"} == documented()
    assert all(f"`{name}`" in PAGE for name in OTHERS - {"step"})
