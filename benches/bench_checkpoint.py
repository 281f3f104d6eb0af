"""`oddsmith quantize` and `oddsmith merge` of a generated bf16 checkpoint: time and resident memory of the process.

    python benches/bench_checkpoint.py [--folder DIR] [--repeats 3] [--layers 22] [--peer] [--record]

The model has TinyLlama's shape: 1.1 billion parameters in two files. The adapter has rank 16 on every linear layer.
Each command runs in a new process. Its time is that of the conversion, from checking the files to the last rename,
without starting Python. The lower bounds are timed in the same rounds: writing as many bytes as the result has, with
fsync, and reading the files (cold: not in the page cache; warm otherwise). MB is the largest resident set of the
process; the row "import" is the part that importing torch and transformers takes. With --peer transformers and
bitsandbytes load and save the same model in a new process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

from side_by_side import Report, flags

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32_000
TINY = 128, 256, 512

IMPORT = "import oddsmith.checkpoint.quantize, oddsmith.integrations.model_weights"

PEER = """
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
model.save_pretrained(sys.argv[2])
"""


def generate(folder: Path, layers: int, sizes: tuple[int, int, int]) -> int:
    """Writes the model and returns its bytes."""
    folder.mkdir(parents=True)
    hidden, intermediate, vocabulary = sizes
    config = MistralConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        dtype="bfloat16",
        architectures=["MistralForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in MistralForCausalLM(config).named_parameters()
        }
    names, total, places = list(shapes), 0, {}
    torch.manual_seed(0)
    pool = (torch.randn(max(vocabulary, 2 * intermediate) * hidden + 999_983) * 0.02).bfloat16()
    for part, group in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{part:05}-of-00002.safetensors"
        tensors = {}
        for index, name in enumerate(group):
            start = index * 7919 % 999_983  # other values in every tensor
            tensors[name] = pool[start : start + shapes[name].numel()].view(shapes[name]).clone()
            places[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    return total


def generate_adapter(folder: Path, model: Path) -> None:
    """Writes an adapter of every linear layer."""
    with torch.device("meta"):
        shapes = MistralForCausalLM(MistralConfig.from_pretrained(model)).named_parameters()
    tensors = {}
    for name, value in shapes:
        if "_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(16, value.shape[1]) * 0.02
            tensors[f"{stem}.lora_B.weight"] = torch.randn(value.shape[0], 16) * 0.02
    LoraConfig(r=16, lora_alpha=32, target_modules="all-linear").save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")


def drop_cache(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# The high-water mark of the new program: what the system reports of a child includes its parent.
RUN = """
import sys
{run}
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print("peak", int(line.split()[1]) * 1024)
"""


def process(run: str, *arguments: object) -> tuple[float, int, str]:
    """Seconds, largest resident set in bytes and output of a Python process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-c", RUN.format(run=run), *map(str, arguments)]
    child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.perf_counter() - start
    if child.returncode:
        sys.exit(child.stdout)
    return seconds, int(re.search(r"^peak (\d+)$", child.stdout, re.MULTILINE)[1]), child.stdout


def command(*arguments: object) -> tuple[float, int]:
    """Seconds and largest resident set of an `oddsmith` command."""
    run = "from oddsmith import cli; assert cli.main(sys.argv[1:]) == 0"
    _, memory, text = process(run, *arguments)
    return float(re.search(r"in ([\d.]+) s", text)[1]), memory


def read(model: Path) -> float:
    buffer, start = bytearray(8 << 20), time.perf_counter()
    for file in model.glob("*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - start


def write(path: Path, count: int) -> float:
    block, start = os.urandom(8 << 20), time.perf_counter()
    with path.open("wb", buffering=0) as handle:
        while count > 0:
            count -= handle.write(block[: min(count, len(block))])
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


class Rounds:
    """Seconds of each run, and the largest resident set."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, int] = {}

    def add(self, name: str, value: float, peak: int | None = None) -> None:
        self.seconds.setdefault(name, []).append(value)
        if peak is not None:
            self.memory[name] = max(peak, self.memory.get(name, 0))


def one_round(rounds: Rounds, folder: Path, tiny: bool) -> None:
    """Everything once; a tiny round has one command of each kind."""
    model, adapter, out = folder / "model", folder / "adapter", folder / "out"
    four_bit = folder / "four_bit"
    quantize = {"quantize_cold": (), "quantize_warm": ()}
    quantize |= {f"{name}_double_quant": ("--double_quant",) for name in quantize}
    merge = {"merge": (model,), "merge_nf4": (four_bit,), "merge_to_nf4": (four_bit, "--quantize")}
    for name, flag in list(quantize.items())[: 1 if tiny else None]:
        if "cold" in name:
            drop_cache(model)
        rounds.add(name, *command("quantize", model, out, *flag))
        result = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
    for name, (base, *flag) in list(merge.items())[: 1 if tiny else None]:
        rounds.add(name, *command("merge", base, adapter, out, *flag))
        shutil.rmtree(out)
    drop_cache(model)
    rounds.add("read_cold", read(model))
    rounds.add("read_warm", read(model))
    rounds.add("write_and_fsync", write(folder / "floor", result))
    rounds.add("import", *process(IMPORT)[:2])


def main() -> None:
    parser = flags(__doc__, repeats=3)
    parser.add_argument("--folder", type=Path, help="where there are 5 GB of disk")
    parser.add_argument("--layers", type=int, help="of the model (default 22)")
    parser.add_argument("--peer", action="store_true", help="beside transformers and bitsandbytes")
    args = parser.parse_args()
    layers = args.layers or (1 if args.tiny else 22)
    report = Report("bench_checkpoint", args, ("transformers", "bitsandbytes"))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        sizes = TINY if args.tiny else (HIDDEN, INTERMEDIATE, VOCABULARY)
        total = generate(folder / "model", layers, sizes)
        generate_adapter(folder / "adapter", folder / "model")
        if not args.tiny:
            command("quantize", folder / "model", folder / "four_bit")
        rounds = Rounds()
        for _ in range(args.repeats):
            one_round(rounds, folder, args.tiny)
        if args.peer:
            rounds.add("transformers_bnb", *process(PEER, folder / "model", folder / "out")[:2])
    parameters = f"{total / 2e9:.1f}"
    case = f"quantize {total / 1e9:.2f} GB of bf16 ({parameters} billion parameters)"
    report.case(f"checkpoint_{parameters}b", case, rounds.seconds, "quantize_cold", rounds.memory)
    for name, seconds in rounds.seconds.items():
        if name.startswith("quantize"):
            print(
                f"  {name}: {total / max(statistics.median(seconds), 1e-9) / 1e6:.0f} MB/s of weights read"
            )


if __name__ == "__main__":
    main()
