"""QLoRA: ORPO with a LoRA adapter on a base model in 4 bits (NF4).

    python examples/orpo_qlora.py --max-steps 20
    python examples/orpo_qlora.py --model mistralai/Mistral-7B-v0.1
    python examples/orpo_qlora.py --model path/to/model --dataset path/to/data

Written as for TRL's ORPOTrainer and bitsandbytes: only the import of ORPOConfig and ORPOTrainer
differs. bitsandbytes need not be installed, and no GPU is needed for small models.
"""

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

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
    options = make_parser(__doc__, output_dir="./orpo_qlora", optim="paged_adamw_8bit").parse_args()
    tokenizer = load_tokenizer(options.model)
    train_dataset, eval_dataset = load_pairs(options, tokenizer)
    dtype = choose_dtype(torch.float16)  # float16 on older GPUs and on the CPU
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
    model = load_model(
        options,
        tokenizer,
        quantization_config=quantization_config,
        dtype=dtype,
        device_map="auto",
    )
    trainer = ORPOTrainer(
        model=prepare_model_for_kbit_training(model),
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
