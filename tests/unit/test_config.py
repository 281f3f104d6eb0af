"""ORPOConfig: defaults, older names, validation, schedules, round trips."""

import dataclasses
import json
import math
import pickle
import re
import warnings

import pytest
from transformers import HfArgumentParser, TrainingArguments

from oddsmith import config as config_module
from oddsmith.config import ORPOConfig
from oddsmith.legacy_arguments import LEGACY_NAMES


def said(log, *words):
    return [r.getMessage() for r in log.records if all(word in r.getMessage() for word in words)]


# Defaults


def test_defaults_of_every_field():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ORPOConfig()
    expected = {
        "max_length": 1024,
        "max_prompt_length": None,
        "truncation_mode": "keep_end",
        "max_completion_length": None,
        "beta": 0.1,
        "disable_dropout": True,
        "label_pad_token_id": -100,
        "padding_value": None,
        "generate_during_eval": False,
        "is_encoder_decoder": None,
        "model_init_kwargs": None,
        "trust_remote_code": False,
        "dataset_num_proc": None,
        "beta_schedule": "constant",
        "beta_end": None,
        "beta_anneal_start": 0.0,
        "nll_scope": "full",
        "odds_ratio_link": "logsigmoid",
        "overlength": "truncate",
        "logits_budget": None,
        "use_fused_head": True,
        "learning_rate": 1e-6,
        "logging_steps": 10,
        "gradient_checkpointing": True,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert all(getattr(config, name) is None for name in LEGACY_NAMES)


def test_no_field_of_training_arguments_is_lost():
    ours = {field.name for field in dataclasses.fields(ORPOConfig)}
    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= ours
    assert not LEGACY_NAMES & {field.name for field in dataclasses.fields(TrainingArguments)}


def test_output_dir_is_the_first_positional_argument():
    assert ORPOConfig("somewhere").output_dir == "somewhere"


@pytest.mark.parametrize("given", [True, False])
def test_gradient_checkpointing_under_both_names_without_a_warning(given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old = ORPOConfig(
            gradient_checkpointing=given, gradient_checkpointing_kwargs={"use_reentrant": given}
        )
        assert old.gradient_checkpointing is given
        assert old.gradient_checkpointing_kwargs == {"use_reentrant": given}
        if hasattr(TrainingArguments, "activation_checkpointing"):
            assert ORPOConfig(activation_checkpointing=given).gradient_checkpointing is given


# Precision


@pytest.mark.parametrize(
    "given, gpu, cpu, bf16, lines",
    [
        ({}, True, False, True, 0),
        ({}, False, True, False, 1),
        ({"bf16": True}, False, True, False, 1),
        ({"bf16": True}, True, False, True, 0),
        ({"bf16": False}, True, True, False, 0),
        ({"fp16": True}, False, False, False, 0),
        ({"bf16": False, "bf16_full_eval": True}, False, True, False, 1),
        ({"use_cpu": True}, False, True, True, 0),
        ({"use_cpu": True}, False, False, False, 1),
        ({"use_cpu": True, "bf16": True}, False, False, True, 0),
        ({"use_cpu": True, "bf16": False}, False, True, False, 0),
    ],
)
def test_bf16_follows_the_hardware(monkeypatch, log, given, gpu, cpu, bf16, lines):
    monkeypatch.setattr(config_module, "is_torch_bf16_gpu_available", lambda: gpu)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: gpu)
    monkeypatch.setattr(config_module, "cpu_has_bf16", lambda: cpu)
    config = ORPOConfig(**given)
    ORPOConfig(**given)  # the second time logs nothing
    assert config.bf16 is bf16
    assert config.bf16_full_eval is False
    assert len(said(log, "bfloat16", "fp32")) == lines


def test_bf16_of_this_cpu_is_a_plain_answer():
    assert config_module.cpu_has_bf16() in (True, False)


def test_fp16_and_bf16_exclude_each_other():
    with pytest.raises(ValueError, match="fp16 and bf16"):
        ORPOConfig(fp16=True, bf16=True)


def test_the_articles_arguments():
    config = ORPOConfig(
        output_dir="out",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=8e-6,
        lr_scheduler_type="linear",
        max_steps=500,
        beta=0.1,
        max_length=1024,
        max_prompt_length=512,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=50,
        save_strategy="steps",
        save_steps=100,
        optim="paged_adamw_8bit",
        warmup_ratio=0.1,
        report_to="tensorboard",
        remove_unused_columns=False,
    )
    assert config.get_warmup_steps(500) == 50
    assert config.optim == "paged_adamw_8bit"


# Numbers, choices, schedule


@pytest.mark.parametrize(
    "given, words",
    [
        ({"beta": -1e-9}, "beta is -1e-09; must be at least 0 and finite"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": math.nan}, "beta is nan"),
        ({"beta": math.inf}, "beta is inf"),
        ({"beta": None}, "beta is None; must be a number"),
        ({"beta": True}, "beta is True; must be a number"),
        ({"beta": "much"}, "beta is 'much'; must be a number"),
        ({"beta_schedule": "linear", "beta_end": -0.1}, "beta_end is -0.1"),
        ({"beta_schedule": "linear", "beta_end": math.inf}, "beta_end is inf"),
        ({"beta_schedule": "cosine"}, "needs beta_end"),
        ({"beta_end": 0.05}, "set beta_schedule"),
        ({"beta_schedule": "sawtooth", "beta_end": 0.05}, "'constant', 'linear', 'cosine'"),
        ({"beta_anneal_start": 1.0}, r"beta_anneal_start is 1.0; must be in \[0, 1\)"),
        ({"beta_anneal_start": -0.1}, "beta_anneal_start is -0.1"),
        ({"nll_scope": "prompt"}, "nll_scope is 'prompt'; must be one of 'full', 'completion'"),
        ({"odds_ratio_link": "log"}, "odds_ratio_link is 'log'"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode is 'keep_middle'"),
        ({"overlength": "keep"}, "overlength is 'keep'"),
        ({"max_length": 0}, "max_length is 0; must be positive"),
        ({"max_prompt_length": -1}, "max_prompt_length is -1"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"logits_budget": 0}, "logits_budget is 0"),
        ({"dataset_num_proc": 0}, "dataset_num_proc is 0"),
        ({"max_length": 512, "max_prompt_length": 513}, "must be at most max_length 512"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1; must be 0"),
        ({"label_pad_token_id": 0}, "label_pad_token_id is 0; must be negative"),
        ({"model_init_kwargs": "bfloat16"}, "model_init_kwargs is 'bfloat16'; must be a dict"),
    ],
)
def test_bad_values(given, words):
    with pytest.raises(ValueError, match=words):
        ORPOConfig(**given)


def test_numbers_given_as_strings():
    """YAML reads 8e-6, which has no dot, as a string."""
    config = ORPOConfig(learning_rate="8e-6", beta="2e-1", max_grad_norm="1")
    assert (config.learning_rate, config.beta, config.max_grad_norm) == (8e-6, 0.2, 1.0)


def test_max_length_none_means_512(log):
    assert ORPOConfig(max_length=None).max_length == 512
    assert len(said(log, "max_length", "512")) == 1


def test_beta_schedules():
    constant = ORPOConfig(beta=0.3)
    assert [constant.beta_at(step, 0) for step in (0, 9)] == [0.3, 0.3]

    # 0.3 until step 60 of 100, then down 0.2 over 40 steps: 0.005 a step.
    linear = ORPOConfig(beta=0.3, beta_end=0.1, beta_schedule="linear", beta_anneal_start=0.6)
    got = [linear.beta_at(step, 100) for step in (0, 60, 70, 80, 100, 120)]
    assert got == pytest.approx([0.3, 0.3, 0.25, 0.2, 0.1, 0.1], rel=1e-12)

    # Half a cosine: a quarter of the way down (1 - cos(pi/4)) / 2 of 0.2, half way exactly half.
    cosine = ORPOConfig(beta=0.3, beta_end=0.1, beta_schedule="cosine")
    got = [cosine.beta_at(step, 80) for step in (0, 20, 40, 80)]
    quarter = 0.3 - 0.2 * (1 - math.sqrt(0.5)) / 2
    assert got == pytest.approx([0.3, quarter, 0.2, 0.1], rel=1e-12)

    with pytest.raises(ValueError, match="max_steps is -1"):
        linear.beta_at(0, -1)


# Conversions


def busy_config():
    return ORPOConfig(
        output_dir="out",
        beta=0.25,
        beta_end=0.05,
        beta_schedule="cosine",
        beta_anneal_start=0.5,
        max_prompt_length=300,
        model_init_kwargs={"torch_dtype": "bfloat16", "revision": "main"},
        warmup_ratio=0.1,
        evaluation_strategy="steps",
        eval_steps=25,
        push_to_hub_token="secret",
        optim="adamw_hf",
        gradient_checkpointing=False,
    )


def test_round_trips(log):
    config = busy_config()
    before = config.to_dict()
    log.clear()
    copies = [
        ORPOConfig(**json.loads(config.to_json_string())),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config),
    ]
    hidden = {"hub_token": None}  # written as a placeholder, as TrainingArguments does
    for copy in copies:
        assert {**copy.to_dict(), **hidden} == {**before, **hidden}
    assert not said(log, "older name") and not said(log, "no effect")
    assert dataclasses.replace(config, beta=0.5, warmup_steps=3).warmup_steps == 3
    assert not LEGACY_NAMES & set(before)
    assert config.to_sanitized_dict()["beta"] == 0.25


def test_to_dict_leaves_the_config_as_it_is():
    import torch

    config = ORPOConfig(model_init_kwargs={"torch_dtype": torch.bfloat16})
    assert json.loads(config.to_json_string())["model_init_kwargs"] == {"dtype": "bfloat16"}
    assert config.model_init_kwargs == {"dtype": torch.bfloat16}


def test_dtype_wins_over_its_older_name_and_the_users_dict_stays():
    given = {"torch_dtype": "float16", "dtype": "float32"}
    assert ORPOConfig(model_init_kwargs=given).model_init_kwargs == {"dtype": "float32"}
    assert given == {"torch_dtype": "float16", "dtype": "float32"}


def test_command_line():
    parser = HfArgumentParser(ORPOConfig)
    assert "--max_prompt_length" in parser.format_help()  # an unescaped % would raise
    flags = (
        "--output_dir out --beta 0.2 --beta_schedule linear --beta_end 0.05 --bf16 False "
        "--evaluation_strategy steps --eval_steps 5 --overwrite_output_dir --no_cuda "
        "--warmup_ratio 0.1 --no_use_fused_head --overlength drop --max_prompt_length 64 "
        "--gradient_checkpointing False --logging_dir logs --is_encoder_decoder"
    )
    arguments = flags.split() + ["--model_init_kwargs", '{"dtype": "float32"}']
    (config,) = parser.parse_args_into_dataclasses(arguments)
    assert (config.beta, config.beta_schedule, config.beta_end) == (0.2, "linear", 0.05)
    assert (config.bf16, config.use_cpu, config.use_fused_head) == (False, True, False)
    assert (config.eval_strategy, config.warmup_steps) == ("steps", 0.1)
    assert (config.overlength, config.max_prompt_length) == ("drop", 64)
    assert (config.gradient_checkpointing, config.is_encoder_decoder) == (False, True)
    assert config.model_init_kwargs == {"dtype": "float32"}


def test_command_line_refuses_an_unknown_choice(capsys):
    parser = HfArgumentParser(ORPOConfig)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--nll_scope", "prompt"])
    assert "nll_scope" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("true", True), ("True", True), ("false", False), ("False", False)],
)
def test_share_prompt_from_a_flag_and_from_yaml(text, value, tmp_path):
    parser = HfArgumentParser(ORPOConfig)
    (config,) = parser.parse_args_into_dataclasses(["--share_prompt", text, "--use_cpu"])
    assert config.share_prompt is value or (config.share_prompt == value == "auto")
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: out\nuse_cpu: true\nshare_prompt: {text}\n")
    (config,) = parser.parse_yaml_file(str(file))
    assert config.share_prompt is value or (config.share_prompt == value == "auto")
    assert ORPOConfig(share_prompt=config.share_prompt, use_cpu=True).share_prompt == value


@pytest.mark.parametrize("value", ["yes", "", 0, 1, None, 0.5, ["auto"]])
def test_share_prompt_is_nothing_else(value):
    reason = re.escape(f"share_prompt is {value!r}; must be True, False or 'auto'")
    with pytest.raises(ValueError, match=reason):
        ORPOConfig(share_prompt=value, use_cpu=True)


def test_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: out\nlearning_rate: 8e-6\nbeta: 0.2\nwarmup_ratio: 0.1\n"
        "evaluation_strategy: epoch\nmodel_init_kwargs: {dtype: float32}\n"
    )
    (config,) = HfArgumentParser(ORPOConfig).parse_yaml_file(str(file))
    assert (config.learning_rate, config.beta, config.warmup_steps) == (8e-6, 0.2, 0.1)
    assert config.eval_strategy == "epoch"
    assert config.model_init_kwargs == {"dtype": "float32"}
