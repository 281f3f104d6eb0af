"""`oddsmith quantize` and `oddsmith merge` of a generated bf16 checkpoint: speed and resident memory of the whole process.

    python benches/bench_checkpoint.py [--folder DIR] [--repeats 3] [--layers 22] [--peer]

The model has TinyLlama's shape, 1.1 billion parameters in two files; the adapter is of rank 16 on every
linear layer. The command runs in a process of
its own; its time is that of the conversion, from checking the files to the last rename, without starting
Python. Floors in the same rounds: writing as many bytes as the result has, with fsync, and reading the
files (cold: after dropping them from the page cache; warm otherwise). "extra MB" is the process's largest
resident set, of which importing torch and transformers is the row "import". With --peer transformers and
bitsandbytes load and save the same model in a process of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

from side_by_side import report, versions

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32_000

PEER = """
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
model.save_pretrained(sys.argv[2])
"""


def generate(folder: Path, layers: int) -> int:
    """Writes the model and returns its bytes."""
    folder.mkdir(parents=True)
    config = MistralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
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
    pool = (torch.randn(VOCABULARY * HIDDEN + 999_983) * 0.02).bfloat16()
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where there are 5 GB of disk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--peer", action="store_true")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        folder = Path(name)
        model, out = folder / "model", folder / "out"
        total = generate(model, flags.layers)
        adapter, four_bit = folder / "adapter", folder / "four_bit"
        generate_adapter(adapter, model)
        command("quantize", model, four_bit)
        seconds: dict[str, list[float]] = {}
        memory: dict[str, int] = {}

        def add(name: str, value: float, peak: int | None = None) -> None:
            seconds.setdefault(name, []).append(value)
            if peak is not None:
                memory[name] = max(peak, memory.get(name, 0))

        for _ in range(flags.repeats):
            for cache in ("cold", "warm"):
                for flag in ((), ("--double_quant",)):
                    if cache == "cold":
                        drop_cache(model)
                    add(
                        f"{cache} {' '.join(flag)}".strip(), *command("quantize", model, out, *flag)
                    )
                    result = sum(file.stat().st_size for file in out.glob("*.safetensors"))
                    shutil.rmtree(out)
            for base, flag in ((model, ()), (four_bit, ()), (four_bit, ("--quantize",))):
                found = command("merge", base, adapter, out, *flag)
                add(f"merge into {base.name} {' '.join(flag)}".strip(), *found)
                shutil.rmtree(out)
            drop_cache(model)
            add("read, cold", read(model))
            add("read, warm", read(model))
            add("write and fsync", write(folder / "floor", result))
            imports = "import oddsmith.checkpoint.quantize, oddsmith.integrations.model_weights"
            add("import", *process(imports)[:2])
        used = versions("oddsmith", "torch", "transformers")
        if flags.peer:
            add("transformers + bnb", *process(PEER, model, out)[:2])
            used += " " + versions("bitsandbytes")
        case = f"quantize {total / 1e9:.2f} GB of bf16 ({total / 2e9:.2f} billion parameters)"
        report("checkpoint", case, seconds, memory, "warm", torch.get_num_threads(), used)
        for name in ("cold", "warm", "cold --double_quant", "warm --double_quant"):
            best = sorted(seconds[name])[len(seconds[name]) // 2]
            print(f"  {name}: {total / best / 1e6:.0f} MB/s of weights read")


if __name__ == "__main__":
    main()
