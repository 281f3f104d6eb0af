"""QLoRA: ORPO with a LoRA adapter on a base model in 4 bits (NF4), the whole script.

    python examples/orpo_qlora.py --model mistralai/Mistral-7B-v0.1
    python examples/orpo_qlora.py --model path/to/model --dataset path/to/data --max-steps 20

Written as for TRL's ORPOTrainer and bitsandbytes; only the import of ORPOConfig and ORPOTrainer is
another. bitsandbytes need not be installed, and there need not be a GPU.
"""

import argparse
import multiprocessing as mp
from pathlib import Path

import torch
from datasets import load_dataset, load_from_disk
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from oddsmith import ORPOConfig, ORPOTrainer


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
    parser.add_argument("--output-dir", default="./orpo_mistral7b_qlora_results")
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--eval-steps", type=int, default=50)
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=8e-6)
    parser.add_argument("--optim", default="paged_adamw_8bit", help="or any other of the trainer's")
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

    # Both texts begin with the question now, and the trainer takes what they share as the prompt.
    # The raw `prompt` column must go: kept beside them, as one often sees it, the model reads the
    # question twice, once bare and once templated.
    num_proc = mp.cpu_count()
    train_dataset = raw_datasets[options.train_split].map(
        format_chat_template, num_proc=num_proc, remove_columns=["prompt"]
    )
    eval_dataset = raw_datasets[options.eval_split].map(
        format_chat_template, num_proc=num_proc, remove_columns=["prompt"]
    )

    # --- Model and adapter ---

    # float16 on older cards and on the CPU.
    use_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    compute_dtype = torch.bfloat16 if use_bf16 else torch.float16
    bnb_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        quantization_config=bnb_config,
        dtype=compute_dtype,
        device_map="auto",
        attn_implementation="sdpa",
    )
    model = prepare_model_for_kbit_training(model)
    model.config.use_cache = False  # the cache is for generation; checkpointing cannot use it
    model.config.pad_token_id = tokenizer.pad_token_id

    lora_config = LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
    )

    # --- Training ---

    orpo_config = ORPOConfig(
        output_dir=options.output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        max_steps=options.max_steps,
        beta=0.1,  # lambda in the paper
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        logging_steps=options.logging_steps,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        optim=options.optim,
        warmup_ratio=0.1,
        report_to="tensorboard",
        remove_unused_columns=False,
    )

    trainer = ORPOTrainer(
        model=model,
        args=orpo_config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        tokenizer=tokenizer,
        peft_config=lora_config,
    )

    trainer.train()
    trainer.save_model()
    print(f"Saved the adapter to {options.output_dir}")


# The guard is for `num_proc`: where processes are spawned, each reads this file again.
if __name__ == "__main__":
    main()
