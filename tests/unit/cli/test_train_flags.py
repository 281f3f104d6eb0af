"""Arguments of `oddsmith train`: flags, settings files, and errors."""

import json

import pytest

from oddsmith.cli.train_flags import parse_train_arguments

REQUIRED = ["--model", "some/model", "--dataset", "some/data", "--use_cpu"]


def parse(*flags):
    return parse_train_arguments([*REQUIRED, *flags])


def rejects(capsys, argv):
    """The error line for a wrong command line."""
    with pytest.raises(SystemExit) as exit_:
        parse_train_arguments(argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.endswith("See oddsmith train --help\n")
    return next(line for line in error.splitlines() if line.startswith("oddsmith train: error: "))


def test_flags_reach_their_dataclass():
    run, adapter, config = parse(
        "--dtype", "bfloat16", "--use_peft", "--lora_r", "4", "--lora-alpha", "9",
        "--lora_target_modules", "q_proj", "v_proj", "--beta", "0.3", "--nll_scope", "completion",
        "--learning-rate", "3e-5", "--no_disable_dropout", "--max_steps", "7",
    )  # fmt: skip
    assert (run.model_name_or_path, run.dataset_name, run.dtype) == (
        "some/model",
        "some/data",
        "bfloat16",
    )
    assert adapter.use_peft
    assert (adapter.lora_r, adapter.lora_alpha) == (4, 9)
    assert adapter.lora_target_modules == ["q_proj", "v_proj"]
    assert (config.beta, config.nll_scope, config.learning_rate, config.max_steps) == (
        0.3,
        "completion",
        3e-5,
        7,
    )
    assert config.disable_dropout is False


def test_trl_names_of_model_and_dataset():
    run, _, _ = parse_train_arguments(
        ["--model_name_or_path", "a/b", "--dataset_name", "c/d", "--torch_dtype", "float32"]
    )
    assert (run.model_name_or_path, run.dataset_name, run.dtype) == ("a/b", "c/d", "float32")


def test_lora_flags_without_an_adapter_are_reported(capsys):
    parse("--lora_r", "4")
    assert "lora_r without use_peft" in capsys.readouterr().err
    parse("--lora_r", "4", "--use_peft")
    assert "without use_peft" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--betta", "3"], "unknown argument --betta; did you mean --beta?"),
        (["--lora-rr=3"], "unknown argument --lora-rr; did you mean --lora_r?"),
        (["--lora", "3"], "unknown argument --lora"),
        (["--max_steps", "3", "stray"], "unknown argument stray"),
        (["--max_steps", "abc"], "--max_steps"),
        (["--beta", "-1"], "beta is -1.0; must be at least 0 and finite"),
        (["--beta", "nan"], "beta is nan; must be at least 0 and finite"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--share_prompt", "maybe"], "share_prompt is 'maybe'; must be True, False or 'auto'"),
        (["--beta_schedule", "linear"], "beta_schedule is 'linear'; needs beta_end"),
        (["--max_length", "8", "--max_prompt_length", "9"], "max_prompt_length is 9"),
    ],
)
def test_wrong_flags(flags, reason, capsys):
    assert reason in rejects(capsys, [*REQUIRED, *flags])


def test_model_and_dataset_are_required(capsys):
    assert "--model is missing" in rejects(capsys, ["--dataset", "d", "--use_cpu"])
    assert "--dataset is missing" in rejects(capsys, ["--model", "m", "--use_cpu"])


SETTINGS = """\
model: some/model
dataset: some/data
use_cpu: true
learning_rate: 8e-6          # a string to YAML: it has no dot
beta: 0.2
max-steps: 12
use_peft: true
lora_target_modules: [q_proj, v_proj]
lora_modules_to_save: null
max_length: 640
share_prompt: false
lr_scheduler_kwargs: {num_cycles: 2}
disable_dropout: false
"""


def test_a_yaml_file_and_flags_over_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SETTINGS)
    run, adapter, config = parse_train_arguments([str(path), "--beta", "0.5", "--lora_r=8"])
    assert run.dataset_name == "some/data"
    assert adapter.lora_target_modules == ["q_proj", "v_proj"]
    assert (adapter.use_peft, adapter.lora_modules_to_save, adapter.lora_r) == (True, None, 8)
    assert (config.learning_rate, config.max_steps, config.max_length) == (8e-6, 12, 640)
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    assert config.disable_dropout is False
    assert config.share_prompt is False
    assert config.beta == 0.5


def test_flags_overrule_lists_and_nulls_of_a_file(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text(SETTINGS)
    _, adapter, _ = parse_train_arguments(
        [str(path), "--lora_target_modules", "all-linear", "--lora_modules_to_save", "lm_head"]
    )
    assert adapter.lora_target_modules == ["all-linear"]
    assert adapter.lora_modules_to_save == ["lm_head"]


def test_a_json_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps({"model_name_or_path": "m", "dataset": "d", "beta": 0.7, "use_cpu": True})
    )
    run, _, config = parse_train_arguments([str(path)])
    assert (run.model_name_or_path, run.dataset_name, config.beta) == ("m", "d", 0.7)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.yaml", "betta: 3", "unknown setting 'betta'; did you mean beta?"),
        ("a.yaml", "max_steps: soon", "invalid int value: 'soon'"),
        ("a.yaml", "beta: [1", "cannot be parsed"),
        ("a.json", "{'beta': 1}", "cannot be parsed"),
        pytest.param("a.json", '{"a":' * 10_000, "cannot be parsed", id="deep json"),
        pytest.param("a.yaml", "a: " + "[" * 10_000, "cannot be parsed", id="deep yaml"),
        pytest.param("a.json", '{"a": ' + "1" * 5000 + "}", "cannot be parsed", id="digits"),
        ("a.yaml", "- beta", "must be a mapping"),
        ("a.yaml", "", "must be a mapping"),
        ("a.toml", "beta = 1", "neither a flag nor a settings file"),
        ("a.yaml", None, "no such file"),
    ],
)
def test_wrong_settings_files(name, text, reason, tmp_path, capsys):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert reason in rejects(capsys, [str(path), *REQUIRED])


@pytest.mark.parametrize(
    ("given", "found"),
    [(["all-linear"], "all-linear"), (["attn", "mlp"], ["attn", "mlp"]), (["attn"], "attn")],
)
def test_modules_of_an_optimizer_are_one_or_several(given, found):
    _, _, config = parse_train_arguments([*REQUIRED, "--use_cpu", "--optim_target_modules", *given])
    assert config.optim_target_modules == found
