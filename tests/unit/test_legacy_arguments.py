"""Names of older releases: their new names, and log messages."""

import ast
import dataclasses
import inspect

import pytest
from transformers import HfArgumentParser

from oddsmith import legacy_arguments
from oddsmith.config import ORPOConfig
from oddsmith.legacy_arguments import IGNORED, LEGACY_NAMES, RENAMED, LegacyArguments


def said(log, *words):
    return [r.getMessage() for r in log.records if all(word in r.getMessage() for word in words)]


def test_the_articles_galore_arguments(log):
    config = ORPOConfig(
        optim="galore_adamw_8bit_bnb",
        optim_target_modules=[r".*attn.*", r".*mlp.*"],
        optim_args="rank=128,update_proj_gap=200,scale=0.25",
    )
    assert config.optim == "galore_adamw_8bit"
    assert len(said(log, "galore_adamw_8bit_bnb")) == 1


@pytest.mark.parametrize(
    "given, name, value",
    [
        ({"evaluation_strategy": "steps", "eval_steps": 7}, "eval_strategy", "steps"),
        ({"no_cuda": True}, "use_cpu", True),
        ({"no_cuda": False, "use_cpu": True}, "use_cpu", True),
        ({"warmup_ratio": 0.25}, "warmup_steps", 0.25),
        ({"warmup_ratio": 0.25, "warmup_steps": 30}, "warmup_steps", 30),
        ({"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
        ({"group_by_length": False}, "train_sampling_strategy", "random"),
        ({"optim": "adamw_hf"}, "optim", "adamw_torch"),
        ({"include_inputs_for_metrics": True}, "include_for_metrics", ["inputs"]),
    ],
)
def test_renamed_arguments(log, given, name, value):
    for _ in range(2):
        config = ORPOConfig(**given)
    assert getattr(config, name) == value
    old = next(iter(given))
    if old in RENAMED:
        assert getattr(config, old) is None
        assert len(said(log, f"`{old}`", f"`{name}`")) == 1
    else:
        assert len(said(log, given[old])) == 1


@pytest.mark.parametrize("ratio, steps", [(0.0, 0), (0.1, 20), (0.999, 200), (1.0, 200)])
def test_warmup_ratio_reaches_the_scheduler_as_a_ratio(ratio, steps):
    assert ORPOConfig(warmup_ratio=ratio).get_warmup_steps(200) == steps


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_warmup_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"warmup_ratio is .* \[0, 1\]"):
        ORPOConfig(warmup_ratio=ratio)


@pytest.mark.parametrize("name", IGNORED)
def test_ignored_arguments_are_logged_once_and_change_nothing(log, name):
    value = {bool: True, int: 3, str: "x"}[IGNORED[name][0]]
    plain = ORPOConfig().to_dict()
    log.clear()
    for _ in range(2):
        config = ORPOConfig(**{name: value})
    assert config.to_dict() == plain
    assert getattr(config, name) is None
    assert len(said(log, f"`{name}`", "no effect")) == 1


def test_a_flag_alone_means_true():
    (no_cuda,) = (each for each in dataclasses.fields(LegacyArguments) if each.name == "no_cuda")
    assert no_cuda.default is None and no_cuda.metadata["const"] is True
    (arguments,) = HfArgumentParser(LegacyArguments).parse_args_into_dataclasses(
        ["--no_cuda", "--fp16_backend", "auto"]
    )
    assert (arguments.no_cuda, arguments.fp16_backend, arguments.group_by_length) == (
        True, "auto", None
    )  # fmt: skip


def test_every_name_has_a_field_that_says_what_becomes_of_it():
    fields = {each.name: each.metadata["help"] for each in dataclasses.fields(LegacyArguments)}
    assert fields.keys() == LEGACY_NAMES
    assert fields["no_cuda"] == "Older name; sets `use_cpu`."
    assert fields["use_ipex"] == "Older name; accepted without effect."
    assert fields["push_to_hub_token"] == "Older name; accepted without effect: use hub_token."


def test_the_type_checker_sees_every_older_name():
    tree = ast.parse(inspect.getsource(legacy_arguments))
    (shown,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == "LegacyArguments"
    ]
    fields = [node for node in shown.body if isinstance(node, ast.AnnAssign)]
    assert {node.target.id: ast.unparse(node.annotation) for node in fields} == {
        name: f"{kind.__name__} | None" for name, (kind, _) in (RENAMED | IGNORED).items()
    }
    assert {ast.unparse(node.value) for node in fields} == {"None"}
