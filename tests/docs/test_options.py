"""Options, names and variables in the tables of docs/ are those of the code, and none is left out."""

import re
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from oddsmith import ORPOConfig, optim
from oddsmith.cli.data_flags import FORMATS
from oddsmith.legacy_arguments import LEGACY_NAMES
from oddsmith.training.adamw_names import ADAMW_NAMES
from oddsmith.training.low_rank_names import LOW_RANK_NAMES
from support.markdown import PAGES
from support.paths import ROOT


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def names(text, heading):
    """Code in the first cells of the table below a heading cell."""
    (table,) = re.findall(
        rf"^\| {re.escape(heading)} \|.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE
    )
    cells = re.findall(r"^\| (`[^|]+`) \|", table.partition("\n")[2], re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_option_of_ours_is_in_a_guide():
    trl = {
        "max_length", "max_prompt_length", "max_completion_length", "truncation_mode", "beta",
        "label_pad_token_id", "padding_value", "disable_dropout", "generate_during_eval",
        "is_encoder_decoder", "model_init_kwargs", "trust_remote_code", "dataset_num_proc",
    }  # fmt: skip
    inherited = {each.name for each in fields(TrainingArguments)} | LEGACY_NAMES
    ours = {each.name for each in fields(ORPOConfig)} - inherited - trl
    text = page("training.md") + page("data.md")
    assert len(ours) >= 10
    assert {name for name in ours if not re.search(rf"\b{name}\b", text)} == set()


def test_options_of_the_training_guide():
    config = {each.name for each in fields(ORPOConfig)}
    assert names(page("training.md"), "Option") <= config


def test_names_of_optimizers():
    text = page("optimizers.md")
    assert names(text, "`optim`") == ADAMW_NAMES
    for name in LOW_RANK_NAMES - {"galore_adamw_8bit_bnb"}:
        assert f"`{name.removesuffix('_layerwise')}`" in text


@pytest.mark.parametrize(
    "arguments",
    ["stochastic_rounding=true,min_8bit_size=64", "page_dir=/tmp,device_budget=67108864"],
)
def test_options_of_paged_adamw(arguments, instruct_folder):
    options = {part.partition("=")[0] for part in arguments.split(",")}
    assert options <= names(page("optimizers.md"), "Option")
    check_optim("paged_adamw_8bit", arguments, instruct_folder)


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_options_of_low_rank(name, instruct_folder):
    kind = {"galore_adamw": optim.GaLoreAdamW, "apollo_adamw": optim.APOLLOAdamW}[name]
    documented = names(page("optimizers.md"), "Option in `optim_args`")
    assert {each for each in documented if each in kind.group_options} >= {"rank", "scale"}
    others = optim.APOLLOAdamW if name == "galore_adamw" else optim.GaLoreAdamW
    assert documented <= set(kind.group_options) | set(others.group_options)


def check_optim(name, arguments, folder):
    from transformers import AutoModelForCausalLM

    from oddsmith.training.adamw_names import adamw_optimizer

    config = ORPOConfig("out", optim=name, optim_args=arguments, use_cpu=True, report_to="none")
    kind, options = adamw_optimizer(config, AutoModelForCausalLM.from_pretrained(folder))
    assert kind(**options)


def test_formats_of_prepare():
    assert names(page("data.md"), "`--format`") == set(FORMATS) - {"auto"}


# Of the feature `testing`, which is not installed.
FOR_TESTS = {"ODDSMITH_HIDE_TORCH_FUNCTIONS"}


def test_variables_of_the_environment():
    sources = [*(ROOT / "python").rglob("*.py"), *(ROOT / "src").rglob("*.rs")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    named = {
        name for each in PAGES for name in re.findall(r"`(ODDSMITH_\w+)`", each.read_text("utf-8"))
    }
    assert named
    assert {name for name in named if f'"{name}"' not in code} == set()
    assert set(re.findall(r'"(ODDSMITH_\w+)"', code)) - named == FOR_TESTS
