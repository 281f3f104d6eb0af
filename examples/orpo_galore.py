"""Full-parameter ORPO with GaLore on UltraFeedback-shaped data: the whole script.

    python examples/orpo_galore.py --model mistralai/Mistral-7B-v0.1
    python examples/orpo_galore.py --model path/to/model --dataset path/to/data --max-steps 20

No adapter: every weight is trained, but the optimiser's moments are those of a rank of 128. Written
as for TRL's ORPOTrainer; neither galore-torch nor bitsandbytes is needed, nor a GPU.
"""

import argparse
import multiprocessing as mp
from pathlib import Path

import torch
from datasets import load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.optim import optimizer_bytes


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mistralai/Mistral-7B-v0.1", help="hub id or folder")
    parser.add_argument(
        "--dataset",
        default="HuggingFaceH4/ultrafeedback_binarized",
        help="hub id, folder of a dataset's files, or folder of DatasetDict.save_to_disk",
    )
    parser.add_argument("--train-split", default="train_prefs")
    parser.add_argument("--eval-split", default="test_prefs")
    parser.add_argument("--output-dir", default="./orpo_mistral7b_galore_results")
    parser.add_argument("--optim", default="galore_adamw_8bit_bnb", help="or galore_*, apollo_*")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--update-proj-gap", type=int, default=200)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--eval-steps", type=int, default=250)
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--logging-steps", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-prompt-length", type=int, default=512)
    return parser.parse_args()


def main():
    options = parse_options()

    # --- From raw data to chat pairs ---

    tokenizer = AutoTokenizer.from_pretrained(options.model, use_fast=True)

    # Base models come without a chat template; instruct versions bring their own.
    if tokenizer.chat_template is None:
        tokenizer.chat_template = (
            "{% for message in messages %}{% if message['role'] == 'user' %}"
            "{{ '<s>[INST] ' + message['content'] + ' [/INST]' }}"
            "{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>' }}"
            "{% endif %}{% endfor %}"
        )

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    if (Path(options.dataset) / "dataset_dict.json").is_file():
        raw_datasets = load_from_disk(options.dataset)
    else:
        raw_datasets = load_dataset(options.dataset)

    def format_chat_template(row):
        # Lists of messages become text, the question included.
        row["chosen"] = tokenizer.apply_chat_template(row["chosen"], tokenize=False)
        row["rejected"] = tokenizer.apply_chat_template(row["rejected"], tokenize=False)
        return row

    # Both texts begin with the question now; the raw `prompt` column would be read beside it.
    num_proc = mp.cpu_count()
    train_dataset = raw_datasets[options.train_split].map(
        format_chat_template, num_proc=num_proc, remove_columns=["prompt"]
    )
    eval_dataset = raw_datasets[options.eval_split].map(
        format_chat_template, num_proc=num_proc, remove_columns=["prompt"]
    )

    # --- The base model, all of it trained ---

    use_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16 if use_bf16 else torch.float32,
        device_map="auto" if torch.cuda.is_available() else None,
        attn_implementation="sdpa",
    )
    model.config.use_cache = False  # the cache is for generation; checkpointing cannot use it
    model.config.pad_token_id = tokenizer.pad_token_id

    # --- Training ---

    orpo_config_galore = ORPOConfig(
        output_dir=options.output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=options.learning_rate,  # GaLore may need another than LoRA
        max_steps=options.max_steps,
        beta=0.1,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        logging_steps=options.logging_steps,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        optim=options.optim,
        optim_target_modules=[r".*attn.*", r".*mlp.*"],
        optim_args=f"rank={options.rank},update_proj_gap={options.update_proj_gap},scale=0.25",
        warmup_ratio=0.1,
        report_to="tensorboard",
        remove_unused_columns=False,
    )

    trainer_galore = ORPOTrainer(
        model=model,
        args=orpo_config_galore,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        tokenizer=tokenizer,
    )

    trainer_galore.train()
    trainer_galore.save_model()
    megabytes = optimizer_bytes(trainer_galore.optimizer) / 1e6
    print(f"Saved the model to {options.output_dir}; the optimiser's state took {megabytes:.1f} MB")


# The guard is for `num_proc`: where processes are spawned, each reads this file again.
if __name__ == "__main__":
    main()
