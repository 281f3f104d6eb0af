"""Training on an emulated GPU whose kernels are broken: it goes on, with the losses of a CPU."""

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from oddsmith import NF4Config, ORPOConfig, ORPOTrainer, _core
from oddsmith.check import trial_process
from oddsmith.check.findings import Verdict
from support.broken_kernels import FAMILIES, KERNELS, WAYS, broken, fault
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs, train_logs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("mistral", make_tokenizer()).save_pretrained(folder)
    return folder


def losses(folder, out):
    """Of a QLoRA whose head is trained too: every family takes part, but for some of AdamW and the head."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=NF4Config(torch.float32, double_quant=True)
    )
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(
            **arguments(out, optim="adamw_8bit", optim_args="min_8bit_size=256", max_steps=2)
        ),
        train_dataset=pairs(8),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return [entry["loss"] for entry in train_logs(trainer)]


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """On the CPU, without an emulated GPU."""
    return losses(folder, tmp_path_factory.mktemp("expected"))


def assert_trains(driver, folder, tmp_path, expected, caplog, families):
    with caplog.at_level(logging.WARNING, logger="oddsmith.check"):
        found = losses(folder, tmp_path / "out")
    assert found == pytest.approx(expected, rel=2e-4)
    trusted = _core.trusted_kernels(0)
    assert trusted is not None and not set(families) & set(trusted)
    warnings = [each for each in caplog.records if "failed their self-test" in each.getMessage()]
    assert len(warnings) == 1
    launched = {launch.kernel for launch in driver.launches()}
    assert launched, "the other families are used"
    assert not [name for name in launched for each in families if KERNELS[each][0] in name]


def test_a_run_goes_on_without_broken_kernels(
    expected, untried, folder, tmp_path, monkeypatch, caplog
):
    some = ["head_expectation", "nf4_dequantize", "adamw8"]
    monkeypatch.setenv("EMULATOR_FAULT", fault("wrong", *some))
    # What a process finds is tested in test_self_test.py, and below.
    found = [Verdict("cuda:0", name, 0.1, "float32", float(name in some), 0.1) for name in FAMILIES]
    monkeypatch.setattr(trial_process, "verdicts", lambda *arguments: found)
    assert_trains(untried, folder, tmp_path, expected, caplog, some)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_a_family_that_is_broken(
    expected, untried, folder, tmp_path, monkeypatch, caplog, family, way
):
    for name, value in broken(way, family).items():
        monkeypatch.setenv(name, value)
    assert_trains(untried, folder, tmp_path, expected, caplog, [family])
