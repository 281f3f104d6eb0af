"""The commands of README.md and docs/ run, in order and page by page, on small local models and data."""

import gzip
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from oddsmith.cli import commands as cli
from oddsmith.demo.tasks import make_pairs
from support.markdown import PAGES, commands, page_id
from support.paths import EXAMPLES, ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
]

# What a test adds to a command, so that it takes seconds. The last of two values counts.
SHORT = {
    "demo": ["--steps", "2"],
    "train": ["--max_steps", "2", "--save_steps", "2", "--logging_steps", "1", "--max_length", "96",
              "--max_prompt_length", "64", "--use_cpu", "--disable_tqdm", "true"],
}  # fmt: skip
RESUMED = ["--max_steps", "3"]


def ids(pages):
    return [pytest.param(page, id=page_id(page)) for page in pages]


def of_tool(page, *tools):
    return [words for words in commands(page) if words[0] in tools]


def tree(row, index):
    """A conversation in the shape of OpenAssistant's ready trees."""
    replies = [
        {"message_id": f"{side}{index}", "role": "assistant", "text": row[side][0]["content"],
         "lang": "en", "rank": rank, "replies": []}
        for rank, side in enumerate(("chosen", "rejected"))
    ]  # fmt: skip
    prompt = {"message_id": f"q{index}", "role": "prompter", "text": row["prompt"][0]["content"],
              "lang": "en", "replies": replies}  # fmt: skip
    return {"message_tree_id": f"q{index}", "tree_state": "ready_for_export", "prompt": prompt}


def rated(row):
    """A prompt in the shape of UltraFeedback, with the ratings of two completions."""
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    completions = [
        {"response": row[side][0]["content"],
         "annotations": {aspect: {"Rating": str(rating)} for aspect in aspects}}
        for side, rating in (("chosen", 5), ("rejected", 2))
    ]  # fmt: skip
    return {"instruction": row["prompt"][0]["content"], "completions": completions}


def scored(row):
    answers = [row[side][0]["content"] for side in ("chosen", "rejected")]
    return {"question": row["prompt"][0]["content"], "answers": answers, "ratings": [4.0, 1.0]}


def write_lines(path, rows):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def workplace(tmp_path, monkeypatch, instruct_folder, localized):
    """A folder with everything that the pages name by a path."""
    rows = make_pairs(48, seed=11)
    write_lines(tmp_path / "oasst_ready.trees.jsonl.gz", map(tree, rows, range(len(rows))))
    write_lines(tmp_path / "ultrafeedback.jsonl", map(rated, rows))
    Dataset.from_list([scored(row) for row in rows]).to_parquet(tmp_path / "answers.parquet")
    write_lines(tmp_path / "pairs.jsonl.gz", rows)
    for name in ("path/to/model", "mistral-7b"):
        shutil.copytree(instruct_folder, tmp_path / name)
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(instruct_folder), adapter)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "orpo" / "adapter")
    (tmp_path / "examples").mkdir()
    settings = localized((EXAMPLES / "train.yaml").read_text())
    (tmp_path / "examples" / "train.yaml").write_text(settings)
    monkeypatch.setattr("oddsmith.demo.run.TRAIN_ROWS", 120)  # as in tests/e2e/test_demo.py
    monkeypatch.setattr("oddsmith.demo.run.TEST_ROWS", 12)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ids(page for page in PAGES if of_tool(page, "oddsmith")))
def test_oddsmith(page, workplace, localized, capsys):
    for words in of_tool(page, "oddsmith"):
        _, name, *arguments = map(localized, words)
        if name == "prepare":
            (workplace / arguments[arguments.index("--output") + 1]).unlink(missing_ok=True)
        short = SHORT.get(name, [])
        if "--resume_from_checkpoint" in arguments:
            short = short + RESUMED
        code = cli.main([name, *arguments, *short])
        shown = capsys.readouterr()
        assert code == 0, f"{' '.join(words)}\n{shown.err[-3000:]}"
        check_result(name, arguments, workplace, shown.out)


def check_result(name, arguments, folder, shown):
    def value(flag):
        return folder / arguments[arguments.index(flag) + 1]

    if name == "train" and "--output_dir" in arguments:
        kind = "adapter_model" if "--use_peft" in arguments else "model"
        found = {path.stem for path in value("--output_dir").glob("*.safetensors")}
        assert found & {kind, "adapter_model"}
        assert (value("--output_dir") / "curves.png").is_file()
    if "tensorboard" in arguments:
        assert list(folder.rglob("events.out.tfevents.*"))
    if name == "prepare":
        assert re.search(r"pairs +\d+ +written", shown)
    if "--histogram" in arguments:
        assert value("--histogram").stat().st_size > 0
    if name in ("quantize", "merge"):
        (out,) = (word for word in arguments[1:] if word in shown)
        quantized = "quantization_config" in json.loads((folder / out / "config.json").read_text())
        assert quantized == (name == "quantize" or "--quantize" in arguments)
    if name == "demo":
        assert (folder / "oddsmith-demo" / "curves.png").is_file()


@pytest.mark.parametrize("page", ids(page for page in PAGES if of_tool(page, "torchrun")))
def test_torchrun(page, workplace, localized):
    for words in of_tool(page, "torchrun"):
        run = subprocess.run(
            [*map(localized, words), *SHORT["train"], "--ddp_backend", "gloo"],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr[-3000:]
        assert "Saved the model and its tokenizer to orpo" in run.stdout


def test_every_command_is_tested():
    used = {words[0] for page in PAGES for words in commands(page)}
    assert used <= {"oddsmith", "torchrun", "make", "pip", "cargo"}
    named = {words[1] for page in PAGES for words in of_tool(page, "oddsmith")}
    assert named == set(cli.COMMANDS)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {words[1] for page in PAGES for words in of_tool(page, "make")}
    targets |= {name for page in PAGES for name in re.findall(r"`make ([\w-]+)`", page.read_text())}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def read_toml(name):
    tomllib = pytest.importorskip("tomllib", reason="Python has it from 3.11 on")
    return tomllib.loads((ROOT / name).read_text())


def test_what_pip_installs_is_in_pyproject():
    project = read_toml("pyproject.toml")
    requirements = project["build-system"]["requires"]
    for page in PAGES:
        for words in of_tool(page, "pip"):
            assert words[1] == "install"
            for word in words[2:]:
                if word.startswith("."):
                    extras = re.findall(r"\[(\w+)\]", word)
                    assert set(extras) <= set(project["project"]["optional-dependencies"])
                elif not word.startswith(("--", "dist/")):  # the wheels of `make`
                    assert word in requirements


def test_the_versions_of_the_readme():
    project = read_toml("pyproject.toml")["project"]
    crate = read_toml("Cargo.toml")["package"]
    readme = PAGES[0].read_text(encoding="utf-8")
    assert f"Rust {crate['rust-version']} or newer" in readme
    assert f"Python {project['requires-python'].removeprefix('>=')} to" in readme
    (torch_version,) = re.findall(r"torch>=([\d.]+)", " ".join(project["dependencies"]))
    assert f"torch {torch_version} or newer" in readme
