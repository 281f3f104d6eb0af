"""ORPO of all weights with GaLore on UltraFeedback.

    python examples/orpo_galore.py --max-steps 20
    python examples/orpo_galore.py --model mistralai/Mistral-7B-v0.1
    python examples/orpo_galore.py --model path/to/model --dataset path/to/data

No adapter: every weight is trained, and the optimizer's moments are those of gradients projected to
a rank of 128. Written as for TRL's ORPOTrainer; neither galore-torch nor bitsandbytes is needed,
and no GPU for small models.
"""

import torch

from common import (
    choose_dtype,
    load_model,
    load_pairs,
    load_tokenizer,
    make_parser,
    run_settings,
)
from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.optim import optimizer_bytes


def main():
    parser = make_parser(
        __doc__,
        output_dir="./orpo_galore",
        optim="galore_adamw_8bit",  # or another name that begins with galore_ or apollo_
        learning_rate=5e-5,  # GaLore may need another rate than LoRA
        max_steps=2000,
        eval_steps=250,
        save_steps=500,
        logging_steps=25,
    )
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--update-proj-gap", type=int, default=200)
    options = parser.parse_args()

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
        args=ORPOConfig(
            **run_settings(options),
            optim_target_modules=[r".*attn.*", r".*mlp.*"],
            optim_args=f"rank={options.rank},update_proj_gap={options.update_proj_gap},scale=0.25",
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        tokenizer=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    megabytes = optimizer_bytes(trainer.optimizer) / 1e6
    print(f"Saved the model to {options.output_dir}; the optimizer's state took {megabytes:.1f} MB")


# The guard is for `num_proc`: where processes are spawned, each reads this file again.
if __name__ == "__main__":
    main()
