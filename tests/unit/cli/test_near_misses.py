"""What is said of a flag, setting or command that does not exist."""

import argparse

import pytest

from oddsmith import cli
from oddsmith.cli.near_misses import ALIASES, Parser, nearest
from oddsmith.cli.train_flags import TrainParser, parse_train_arguments


def test_every_alias_is_for_a_flag_and_is_none():
    names = TrainParser().names()
    assert set(ALIASES.values()) <= set(names)
    assert not set(ALIASES) & set(names)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("--lr", "learning_rate"),
        ("lora_rank", "lora_r"),
        ("--lora-rank", "lora_r"),
        ("--LR", "learning_rate"),
        ("--max-seq-length", "max_length"),
        ("--beta_shedule", "beta_schedule"),
        ("--Beta", "beta"),
        ("--zzzzzz", None),
    ],
)
def test_the_nearest_name(name, found):
    assert nearest(name, TrainParser().names()) == found


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--lr", "3e-5"], "unknown argument --lr; did you mean --learning_rate?"),
        (["--config", "run.yaml"], "unknown argument --config; a settings file comes first"),
        (
            ["--dataset_confg", "x"],
            "unknown argument --dataset_confg; did you mean --dataset_config?",
        ),
    ],
)
def test_train_names_the_flag(flags, line, capsys):
    with pytest.raises(SystemExit):
        parse_train_arguments(["--model", "m", "--dataset", "d", "--use_cpu", *flags])
    assert line in capsys.readouterr().err


def test_a_setting_is_named_without_dashes(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("lora_rank: 4\n")
    with pytest.raises(SystemExit):
        parse_train_arguments([str(tmp_path / "run.yaml")])
    assert "unknown setting 'lora_rank'; did you mean lora_r?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["trian"], "no command 'trian'; did you mean oddsmith train?"),
        (["inspect", "d", "--model", "m", "--max_lenght", "3"], "did you mean --max_length?"),
        (["inspect", "d", "--modle", "m"], "for --modle, did you mean --model?"),
        (
            ["prepare", "d", "--output", "o", "--min-scor=3", "--min_gapp", "3"],
            "--min_gapp, did you",
        ),
        (["merge", "a", "b", "c", "--dtyp2", "x"], "did you mean --dtype?"),
    ],
)
def test_the_other_commands_name_theirs(argv, hint, capsys):
    assert cli.main(argv) == 2
    assert hint in capsys.readouterr().err


def test_errors_of_values_are_those_of_argparse(capsys):
    parser = Parser(prog="p")
    parser.add_argument("--steps", type=int)
    assert isinstance(parser, argparse.ArgumentParser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", "x"])
    assert "did you mean" not in capsys.readouterr().err
