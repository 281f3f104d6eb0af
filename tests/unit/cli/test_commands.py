"""The command line: its commands, their help, and exit codes."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from oddsmith import cli
from oddsmith.cli import commands
from oddsmith.cli.train_flags import TrainParser, flag_groups
from oddsmith.errors import UserError


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_the_commands(flag, capsys):
    assert cli.main([flag]) == 0
    shown = capsys.readouterr().out
    for command in commands.COMMANDS:
        assert f"oddsmith {command}" in shown


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag, capsys):
    assert cli.main([flag]) == 0
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
    [["--help"], ["--version"], ["-V"], [], ["trian"]]
    + [[command, "--help"] for command in commands.COMMANDS]
    + [
        [command] for command in commands.COMMANDS if command not in ("demo", "check")
    ]  # which need none
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
    asked = bool({"--help", "--version", "-V"} & set(argv))
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
        (["--steps", "0"], "'0' is not a whole number above 0"),
        (["--steps", "many"], "'many' is not a whole number above 0"),
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


def test_the_short_help_has_every_flag_of_ours():
    """Those of transformers.TrainingArguments are too many for it; the common ones are there."""
    names = TrainParser().names()
    shown = set(re.findall(r"--(\w+)", commands.TRAIN_USAGE))
    shown |= {name.removeprefix("no_") for name in shown}
    shown = {names[name] for name in shown if name in names}
    theirs = ("run (", "of older")
    ours = {name for name, title in flag_groups().items() if not title.startswith(theirs)}
    assert len(ours) > 50
    assert ours <= shown
    assert {"optim", "push_to_hub", "learning_rate", "max_steps", "eval_strategy"} <= shown
    assert max(map(len, commands.TRAIN_USAGE.splitlines())) <= 110


def test_help_all_lists_training_arguments(capsys):
    assert cli.main(["train", "--help_all"]) == 0
    shown = capsys.readouterr().out
    parts = re.split(r"^(\S.*):$", shown, flags=re.MULTILINE)[1:]
    groups = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(groups) == ["options", *dict.fromkeys(flag_groups().values())]
    assert flag_groups()["lora_r"] == "adapter (PEFT)"
    known = TrainParser()._option_string_actions
    for name, title in flag_groups().items():
        if f"--{name}" in known:
            assert re.search(rf"--{name}\b", groups[title]), name
    assert "--" not in groups["options"].replace("--help_all", "").replace("--help-all", "")
    for flag in ("--lora_r", "--beta_schedule", "--evaluation_strategy", "--learning_rate"):
        assert flag in shown
