"""A whole training step beside TRL's: time and memory of real trainer runs.

    python benches/bench_training.py [--repeats 5] [--steps 4] [--no-checkpointing] [--lora | --qlora]
                                     [--data FILE.jsonl.gz | --long-prompts] [--default-precision] [--record]

Each run is a new process that trains a Mistral-shaped model (8 layers, hidden 512, vocabulary 32,000, 56 M parameters,
`float32`) for a few optimiser steps of two accumulated micro-batches of two pairs, `max_length` 1,024. Runs of the two
trainers alternate; `recomputed` is oddsmith with activation_budget="none", which
recomputes every layer. The time of a step is the median over the steps after the first. Memory is the peak of resident
memory above what the process held before training began (model and data), less the gradients and the optimiser's
state, which every trainer needs. With --data the rows are real pairs in the UltraFeedback form and the tokenizer is
Mistral's, from mistral-common. Without, they are random words of the same lengths, or with --long-prompts prompts of
about 600 tokens and answers of about 150. With --qlora the base is in NF4, of bitsandbytes for TRL (which must be
installed then) and of oddsmith for oddsmith. One more run of oddsmith is profiled at the end: the share of its step that
is matrix products, and what the rest is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from results import installed, slug
from side_by_side import Report, flags

# Of a real run, and with --tiny: no prompt may fill it, for TRL's loss is NaN then.
MAX_LENGTH = (1024, 256)

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)


def mistral_tokenizer(folder: Path):
    """The Mistral-7B-v0.1 tokenizer out of the mistral-common package."""
    import shutil

    import mistral_common
    from transformers import LlamaTokenizer

    source = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    shutil.copy(source, folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, TEMPLATE
    return tokenizer


def real_rows(path: Path, count: int) -> list[dict]:
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count))]
    # The conversation's own first turn is the prompt; the prompt column would repeat it.
    return [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]


def generated_rows(count: int, words: list[str], long_prompts: bool) -> list[dict]:
    """
    Random words, most of them one token; lengths as in the AlpacaEval pairs (40 tokens of prompt,
    300 and 260 of answers), or long prompts (600, and 150 of each answer).
    """
    import random

    draw = random.Random(5)
    prompt, chosen, rejected, spread = (32, 250, 215, 0.55)
    if long_prompts:
        prompt, chosen, rejected, spread = (520, 130, 130, 0.1)

    def text(mean: int) -> str:
        return " ".join(draw.choices(words, k=max(3, int(draw.lognormvariate(0, spread) * mean))))

    def row() -> dict:
        user = {"role": "user", "content": text(prompt)}
        sides = {"chosen": text(chosen), "rejected": text(rejected)}
        return {k: [user, {"role": "assistant", "content": v}] for k, v in sides.items()}

    return [row() for _ in range(count)]


def in_four_bits(model, folder: Path, trainer: str):
    """The model with NF4 weights, of bitsandbytes or of oddsmith."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if trainer != "trl":
        from oddsmith import use_for_bitsandbytes

        use_for_bitsandbytes()
    model.save_pretrained(folder / "full")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(folder / "full", quantization_config=config)


def child(args: argparse.Namespace) -> None:
    """One run of one trainer; prints a JSON object."""
    import time

    import torch
    from datasets import Dataset
    from transformers import MistralConfig, MistralForCausalLM, TrainerCallback
    from transformers.utils import logging

    from side_by_side import status

    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    if args.child == "trl":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    else:
        from oddsmith import ORPOConfig, ORPOTrainer
    folder = Path(tempfile.mkdtemp())
    tokenizer = mistral_tokenizer(folder)
    count = 4 * args.steps
    if args.data:
        rows = real_rows(args.data, count)
    else:
        # The vocabulary comes in another order in every process.
        words = [w for w in sorted(tokenizer.get_vocab()) if w.isascii() and w.isalpha()][:4000]
        rows = generated_rows(count, words, args.long_prompts)
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1_792, "num_hidden_layers": 8}
    if args.tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = MistralForCausalLM(MistralConfig(vocab_size=32_000, **sizes, **heads))
    if args.qlora:
        model = in_four_bits(model, folder, args.child)
    adapter = None
    if args.lora or args.qlora:
        from peft import LoraConfig

        adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")

    class Clock(TrainerCallback):
        def __init__(self):
            self.starts, self.seconds = 0.0, []

        def on_step_begin(self, *_, **__):
            self.starts = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.starts)

    clock = Clock()
    # By default both take bfloat16 where the processor has it.
    precision: dict = {} if args.default_precision else {"bf16": False}
    budget = {"activation_budget": "none"} if args.child == "recomputed" else {}
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=args.steps,
            max_length=MAX_LENGTH[args.tiny],
            learning_rate=1e-5,
            logging_steps=1,
            **precision,
            **budget,
            use_cpu=True,
            gradient_checkpointing=args.checkpointing,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[clock],
    )
    if args.profile:
        print(json.dumps({"shares": shares_of(trainer)}))
        return
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    trainer.train()
    peak = status("VmHWM") - before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = 3 * trained  # gradient and AdamW's two moments
    result = {
        "seconds": statistics.median(clock.seconds[1:]),
        "extra_mb": (peak - state) / 1e6,
        "peak_mb": peak / 1e6,
        "losses": losses,
    }
    print(json.dumps(result))


def shares_of(trainer) -> dict[str, float]:
    """Parts of the time that a training run spends, by kind of op, the first the products."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.train()
    kinds = {
        "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
        "attention": ("flash_attention",),
        "head beside its products": ("oddsmith::",),
        "optimiser": ("adam", "clip", "norm"),
    }
    times = dict.fromkeys([*kinds, "everything else"], 0.0)
    for event in profiler.key_averages():
        names = (kind for kind, ops in kinds.items() if any(op in event.key.lower() for op in ops))
        times[next(names, "everything else")] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: time / total for kind, time in times.items()}


def run(trainer: str, argv: list[str]) -> dict:
    command = [sys.executable, __file__, "--child", trainer, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{trainer} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def arguments() -> argparse.Namespace:
    parser = flags(__doc__, repeats=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--data", type=Path, help="gzipped jsonl in the UltraFeedback form")
    parser.add_argument("--long-prompts", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--qlora", action="store_true", help="the base in NF4, and an adapter")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="gradient checkpointing for both, which is the default of both (default: on)",
    )
    parser.add_argument(
        "--default-precision",
        action="store_true",
        help="mixed precision as by default, instead of float32",
    )
    parser.add_argument(
        "--child", choices=("oddsmith", "recomputed", "trl"), help=argparse.SUPPRESS
    )
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def names(args: argparse.Namespace) -> tuple[str, str]:
    """The first part of the ids of a run's rows, and what is measured."""
    kind = "qlora" if args.qlora else "lora" if args.lora else "step"
    rows = "long_prompts" if args.long_prompts else "generated"
    if args.data:  # alpacaeval_mistral_orpo.jsonl.gz is alpacaeval
        rows = slug(args.data.name.split(".")[0].split("_")[0])
    key = f"{kind}_{'tiny' if args.tiny else '56m'}_{rows}"
    key += "" if args.checkpointing else "_no_checkpointing"
    key += "_default_precision" if args.default_precision else ""
    case = f"step, Mistral shape {'tiny' if args.tiny else '56 M'}, 2 x 2 pairs of up to {MAX_LENGTH[args.tiny]:,} tokens"
    precision = "default precision" if args.default_precision else "float32"
    case += (
        f", {precision}, {kind}, {'' if args.checkpointing else 'no '}checkpointing, {rows} pairs"
    )
    return key, case


def main() -> None:
    args = arguments()
    if args.child:
        child(args)
        return
    report = Report("bench_training", args, ("trl", "transformers", "peft", "bitsandbytes"))
    argv = [f"--steps={args.steps}", f"--threads={args.threads}"]
    argv += [f"--data={args.data}"] if args.data else []
    for flag in ("tiny", "long_prompts", "lora", "qlora", "default_precision"):
        argv += [f"--{flag.replace('_', '-')}"] if getattr(args, flag) else []
    argv += ["--checkpointing" if args.checkpointing else "--no-checkpointing"]
    results: dict[str, list[dict]] = {"oddsmith": []}
    results |= {"recomputed": []} if args.checkpointing else {}
    results |= {"trl": []} if installed("trl") else {}
    for index in range(args.repeats):
        for name, runs in results.items():
            runs.append(run(name, argv))
            done = f"  round {index + 1}/{args.repeats}: {name} {runs[-1]['seconds']:.2f} s"
            print(done, flush=True)
    ours = results["oddsmith"][0]["losses"]
    for name, runs in results.items():
        if name != "oddsmith":
            pairs = zip(ours, runs[0]["losses"], strict=True)
            worst = max(abs(a - b) / abs(b) for a, b in pairs)
            print(f"losses of oddsmith and {name} agree to {worst:.1e}")
    key, case = names(args)
    seconds = {name: [r["seconds"] for r in runs] for name, runs in results.items()}
    extra = {
        name: int(statistics.median(r["extra_mb"] for r in runs) * 1e6)
        for name, runs in results.items()
    }
    report.case(key, case, seconds, "oddsmith", extra)
    shares = run("oddsmith", [*argv, "--profile"])["shares"]
    print("of a profiled step: " + ", ".join(f"{share:.1%} {op}" for op, share in shares.items()))
    products = shares["matrix products"] * statistics.median(seconds["oddsmith"])
    report.add(f"{key}_products_time", case, "products", "time", "s", [products])


if __name__ == "__main__":
    main()
