"""The command line: commands, exit codes, and what becomes of flags and settings files."""

import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from oddsmith import cli
from oddsmith.cli import commands
from oddsmith.cli.train_flags import TrainParser, parse_train_arguments
from oddsmith.errors import UserError

REQUIRED = ["--model", "some/model", "--dataset", "some/data", "--use_cpu"]


def parse(*flags):
    return parse_train_arguments([*REQUIRED, *flags])


def rejects(capsys, argv):
    """The one line that a wrong command line gets."""
    with pytest.raises(SystemExit) as exit_:
        parse_train_arguments(argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.endswith("See oddsmith train --help\n")
    return next(line for line in error.splitlines() if line.startswith("oddsmith train: error: "))


# --- commands and exit codes ---


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_the_commands(flag, capsys):
    assert cli.main([flag]) == 0
    shown = capsys.readouterr().out
    for command in commands.COMMANDS:
        assert f"oddsmith {command}" in shown


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"oddsmith {version('oddsmith')}\n"


@pytest.mark.parametrize("argv", [[], ["trian"], ["--steps", "3"]])
def test_no_or_an_unknown_command(argv, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "oddsmith demo" in captured.err
    assert not argv or f"no command {argv[0]!r}" in captured.err


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["--version"], [], ["trian"]]
    + [[command, "--help"] for command in commands.COMMANDS]
    + [[command] for command in commands.COMMANDS if command != "demo"]  # which needs no argument
    + [[command, "--no-such-flag"] for command in commands.COMMANDS if command != "train"],
    ids=" ".join,
)
def test_help_and_typing_errors_answer_at_once(argv):
    """These libraries take seconds to import; help must not wait for them."""
    program = (
        "import sys\nfrom oddsmith.cli import main\n"
        f"code = main({argv!r})\n"
        "slow = {'torch', 'transformers', 'datasets', 'peft', 'numpy', 'pyarrow'} & sys.modules.keys()\n"
        "sys.exit(f'imports {slow}' if slow else code)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    asked = bool({"--help", "--version"} & set(argv))
    assert run.returncode == (0 if asked else 2), run.stderr
    assert (run.stdout if asked else run.stderr).strip()


def test_python_m_oddsmith_is_the_console_script():
    def answer(*argv):
        command = [sys.executable, "-m", "oddsmith", *argv]
        return subprocess.run(command, capture_output=True, text=True)

    shown = answer("--version")
    assert (shown.returncode, shown.stdout) == (0, f"oddsmith {version('oddsmith')}\n")
    assert answer("trian").returncode == 2


def test_user_errors_are_one_line_and_exit_code_1(monkeypatch, capsys):
    def fail(argv):
        raise UserError("dataset x.jsonl: no such file or folder")

    monkeypatch.setitem(commands.COMMANDS, "train", fail)
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == (
        "oddsmith train: error: dataset x.jsonl: no such file or folder\n"
    )
    monkeypatch.setenv("ODDSMITH_TRACEBACK", "1")
    with pytest.raises(UserError):
        cli.main(["train"])


def test_bugs_keep_their_traceback(monkeypatch):
    def fail(argv):
        raise ZeroDivisionError

    monkeypatch.setitem(commands.COMMANDS, "demo", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


def test_an_interrupt_is_exit_code_130(monkeypatch, capsys):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(commands.COMMANDS, "demo", stop)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\noddsmith demo: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--steps", "0"], "'0' is no whole number above 0"),
        (["--steps", "many"], "'many' is no whole number above 0"),
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--stps", "3"], "unrecognized arguments: --stps"),
    ],
)
def test_the_demo_refuses_wrong_flags(argv, reason, capsys):
    assert cli.main(["demo", *argv]) == 2
    assert reason in capsys.readouterr().err


def test_the_demo_says_which_folder_it_cannot_write(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["demo", "--output-dir", str(blocked / "demo"), "--steps", "1"]) == 1
    assert f"--output-dir {blocked / 'demo'}" in capsys.readouterr().err


def test_train_without_arguments_shows_its_flags(capsys):
    assert cli.main(["train"]) == 2
    assert "--dataset" in capsys.readouterr().err
    assert cli.main(["train", "--help"]) == 0
    assert "--dataset" in capsys.readouterr().out


def test_every_flag_in_the_short_help_exists():
    known = TrainParser()._option_string_actions
    named = set(re.findall(r"--\w+", commands.TRAIN_USAGE)) - {"--flag", "--help"}
    assert len(named) > 40
    assert named <= set(known)


def test_help_all_lists_training_arguments(capsys):
    assert cli.main(["train", "--help_all"]) == 0
    shown = capsys.readouterr().out
    for flag in ("--lora_r", "--beta_schedule", "--evaluation_strategy", "--learning_rate"):
        assert flag in shown


# --- flags ---


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


def test_lora_flags_without_an_adapter_are_said(capsys):
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
        (["--beta", "0"], "beta is 0.0; must be positive and finite"),
        (["--beta", "nan"], "beta is nan; must be positive and finite"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--share_prompt", "maybe"], "share_prompt is 'maybe'; must be True, False or 'auto'"),
        (["--beta_schedule", "linear"], "beta_schedule is 'linear'; needs beta_end"),
        (["--max_length", "8", "--max_prompt_length", "8"], "max_prompt_length is 8"),
    ],
)
def test_wrong_flags(flags, reason, capsys):
    assert reason in rejects(capsys, [*REQUIRED, *flags])


def test_model_and_dataset_are_required(capsys):
    assert "--model is missing" in rejects(capsys, ["--dataset", "d", "--use_cpu"])
    assert "--dataset is missing" in rejects(capsys, ["--model", "m", "--use_cpu"])


# --- settings files ---

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
        ("a.yaml", "- beta", "must hold a mapping"),
        ("a.yaml", "", "must hold a mapping"),
        ("a.toml", "beta = 1", "neither a flag nor a settings file"),
        ("a.yaml", None, "no such file"),
    ],
)
def test_wrong_settings_files(name, text, reason, tmp_path, capsys):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert reason in rejects(capsys, [str(path), *REQUIRED])
