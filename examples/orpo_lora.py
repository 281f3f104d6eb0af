"""ORPO with a LoRA adapter on UltraFeedback, from rows to adapter.

    python examples/orpo_lora.py --max-steps 20
    python examples/orpo_lora.py --model mistralai/Mistral-7B-v0.1
    python examples/orpo_lora.py --model path/to/model --dataset path/to/data

Written as for TRL's ORPOTrainer: only the import of ORPOConfig and ORPOTrainer differs. No GPU is
needed for small models. orpo_qlora.py keeps the base in 4 bits.
"""

import torch

from common import (
    choose_dtype,
    load_model,
    load_pairs,
    load_tokenizer,
    lora_config,
    make_parser,
    run_settings,
)
from oddsmith import ORPOConfig, ORPOTrainer


def main():
    options = make_parser(__doc__, output_dir="./orpo_lora", optim="paged_adamw_8bit").parse_args()
    tokenizer = load_tokenizer(options.model)
    train_dataset, eval_dataset = load_pairs(options, tokenizer)
    model = load_model(
        options,
        tokenizer,
        dtype=choose_dtype(torch.float32),
        device_map="auto" if torch.cuda.is_available() else None,
    )
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(**run_settings(options)),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        tokenizer=tokenizer,
        peft_config=lora_config(),
    )
    trainer.train()
    trainer.save_model()
    print(f"Saved the adapter to {options.output_dir}")


# The guard is for `num_proc`: where processes are spawned, each reads this file again.
if __name__ == "__main__":
    main()
