"""What the example scripts share: their flags, tokenizer and pairs, model, adapter and settings.

Python puts the folder of a script on its search path, so `python examples/orpo_lora.py` finds it.
"""

import argparse
import multiprocessing as mp
from pathlib import Path

import torch
from datasets import load_dataset, load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

# The layout of Mistral's instruct models.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<s>[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>' }}"
    "{% endif %}{% endfor %}"
)


def make_parser(description, **defaults):
    """The flags of all three scripts; `defaults` are those of one script."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    add(
        "--dataset",
        default="HuggingFaceH4/ultrafeedback_binarized",
        help="hub id, folder of a dataset's files, or folder of DatasetDict.save_to_disk",
    )
    add("--train-split", default="train_prefs")
    add("--eval-split", default="test_prefs")
    add("--output-dir")
    add("--optim", help="any optim of transformers")
    add("--max-steps", type=int, default=500)
    add("--eval-steps", type=int, default=50)
    add("--save-steps", type=int, default=100)
    add("--logging-steps", type=int, default=10)
    add("--learning-rate", type=float, default=8e-6)
    add("--max-length", type=int, default=1024)
    add("--max-prompt-length", type=int, default=512)
    add("--report-to", default="none", help="tensorboard, wandb, ... (default: none)")
    parser.set_defaults(**defaults)
    return parser


def load_tokenizer(name):
    tokenizer = AutoTokenizer.from_pretrained(name)
    # Base models have neither a chat template nor a padding token; instruct models have both.
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pairs(options, tokenizer):
    """Training and evaluation pairs, whose conversations have become text."""
    if (Path(options.dataset) / "dataset_dict.json").is_file():
        splits = load_from_disk(options.dataset)
    else:
        splits = load_dataset(options.dataset)

    def format_chat_template(row):
        row["chosen"] = tokenizer.apply_chat_template(row["chosen"], tokenize=False)
        row["rejected"] = tokenizer.apply_chat_template(row["rejected"], tokenize=False)
        return row

    # Both texts begin with the question now, and the trainer takes what they share as the prompt.
    # The `prompt` column has to go: with it the model would read the question twice.
    return tuple(
        splits[name].map(format_chat_template, num_proc=mp.cpu_count(), remove_columns=["prompt"])
        for name in (options.train_split, options.eval_split)
    )


def choose_dtype(otherwise):
    """bfloat16 on a GPU that has it, `otherwise` elsewhere."""
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bf16 else otherwise


def load_model(options, tokenizer, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(
        options.model, attn_implementation="sdpa", **kwargs
    )
    model.config.use_cache = False  # the cache is for generation; checkpointing cannot use it
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def lora_config():
    projections = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    return LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=projections.split(),
    )


def run_settings(options):
    """Arguments of `ORPOConfig`, as an article about TRL's trainer has them."""
    return {
        "output_dir": options.output_dir,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.1,
        "max_steps": options.max_steps,
        "beta": 0.1,  # lambda in the paper
        "max_length": options.max_length,
        "max_prompt_length": options.max_prompt_length,
        "logging_steps": options.logging_steps,
        "eval_strategy": "steps",
        "eval_steps": options.eval_steps,
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "optim": options.optim,
        "report_to": options.report_to,
        "remove_unused_columns": False,
    }
