"""yes, no, on and off in settings files."""

import pytest

from oddsmith.cli.train_flags import TrainParser, parse_train_arguments
from oddsmith.cli.yaml_switches import load_yaml, meant

# By flag: `--no_disable_dropout` has the dest of `--disable_dropout`.
ACTIONS = {flag[2:]: action for flag, action in TrainParser()._option_string_actions.items()}


def parse(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\ndataset: d\nuse_cpu: yes\noutput_dir: {tmp_path}\n{text}\n")
    return parse_train_arguments([str(path)])


@pytest.mark.parametrize("word", ["no", "No", "NO", "off", "Off", "false"])
def test_no_turns_a_strategy_off(word, tmp_path):
    _, _, config = parse(tmp_path, f"eval_strategy: {word}\nsave_strategy: {word}\nbf16: {word}")
    assert (config.eval_strategy, config.save_strategy, config.bf16) == ("no", "no", False)


def test_on_and_off_are_bools_where_the_field_is_one(tmp_path):
    _, adapter, config = parse(
        tmp_path, "use_peft: on\ndisable_dropout: off\ngradient_checkpointing: No"
    )
    assert (adapter.use_peft, config.disable_dropout, config.gradient_checkpointing) == (
        True,
        False,
        False,
    )
    assert config.use_cpu is True


def test_every_bool_field_takes_the_four_words():
    bools = [
        each for each in ACTIONS.values() if getattr(each.type, "__name__", "") == "string_to_bool"
    ]
    assert len(bools) > 50
    for action in bools:
        read = [meant(action, load_yaml(f"x: {word}")["x"]) for word in ("yes", "On", "no", "OFF")]
        assert read == [True, True, False, False], action.dest


def test_every_strategy_takes_no():
    strategies = [each for each in ACTIONS.values() if "no" in map(str, each.choices or ())]
    assert {"eval_strategy", "save_strategy", "logging_strategy"} <= {a.dest for a in strategies}
    for action in strategies:
        assert meant(action, load_yaml("x: no")["x"]) == "no"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("report_to", "no", "none"),
        ("report_to", "off", "none"),
        ("share_prompt", "off", "false"),
        ("activation_budget", "no", "none"),
        ("resume_from_checkpoint", "yes", "true"),
        ("resume_from_checkpoint", "true", "true"),
        ("run_name", "no", "no"),
        ("run_name", "Off", "Off"),
        ("lora_target_modules", "[on, q_proj]", ["on", "q_proj"]),
        (
            "model_init_kwargs",
            "{use_cache: no, a: [off, 1]}",
            {"use_cache": False, "a": [False, 1]},
        ),
        ("column_mapping", "{no: rejected, yes: chosen}", {"no": "rejected", "yes": "chosen"}),
        ("bf16", "'no'", "no"),  # a quoted word goes to argparse, which knows it
        ("max_steps", "3", 3),
    ],
)
def test_a_word_is_read_by_its_field(name, text, value):
    read = meant(ACTIONS[name], load_yaml(f"x: {text}")["x"])
    assert read == value
    assert type(read) is type(value)


def test_a_number_that_is_a_word_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "max_steps: off")
    assert "invalid int value: 'off'" in capsys.readouterr().err
