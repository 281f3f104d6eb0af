"""The path of a model, from its folder."""

import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, VeraConfig
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, T5Config

from oddsmith import ORPOConfig, ORPOTrainer, cli
from oddsmith.inspection.path import find_path
from oddsmith.integrations.packed_trial import OWN_CODE, UNSEEN
from support.trainer_runs import arguments, make_tokenizer, pairs

SIZES = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROW = {"prompt": "a b c ", "chosen": "f g", "rejected": "h i"}


def test_of_a_folder_with_a_configuration(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "llama")
    T5Config().save_pretrained(tmp_path / "t5")
    assert find_path(str(tmp_path / "llama"), None, False).batches == "packed"
    assert find_path(str(tmp_path / "t5"), None, False).head == "plain"


def test_of_a_folder_with_a_tokenizer_only(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert find_path(str(tmp_path), None, False) is None


def test_inspect_shows_it(tmp_path, tokenizer, capsys):
    folder, source = tmp_path / "model", tmp_path / "rows.jsonl"
    tokenizer.save_pretrained(folder)
    FalconConfig(**SIZES).save_pretrained(folder)
    source.write_text(json.dumps(ROW) + "\n")
    argv = ["inspect", str(source), "--model", str(folder)]
    assert cli.main(argv) == 0
    reason = f"{UNSEEN}: {OWN_CODE}"
    assert f"  model: Batches keep their padding: {reason}.\n" in capsys.readouterr().out
    assert cli.main([*argv, "--json"]) == 0
    path = json.loads(capsys.readouterr().out)["path"]
    assert path == {"batches": "padded", "head": "fused", "reasons": [reason]}


@pytest.mark.filterwarnings("ignore")  # of peft
def test_inspect_takes_the_options_of_a_run(tmp_path, tokenizer, capsys):
    folder, source = tmp_path / "model", tmp_path / "rows.jsonl"
    settings = tmp_path / "train.yaml"
    tokenizer.save_pretrained(folder)
    LlamaConfig(**SIZES).save_pretrained(folder)
    source.write_text(json.dumps(ROW) + "\n")
    argv = ["inspect", str(source), "--model", str(folder), "--json", "--settings", str(settings)]
    for line, reason in (
        ("neftune_noise_alpha: 5.0", "neftune_noise_alpha scales its noise by the length of a row"),
        ("padding_free: false", "padding_free is False"),
        ("use_fused_head: false", "use_fused_head is False"),
        ("{use_peft: true, lora_target_modules: [q_proj]}", None),
        (
            "{use_peft: true, lora_target_modules: [lm_head]}",
            "its output head is a peft.tuners.lora.layer.Linear, not a torch.nn.Linear",
        ),
    ):
        settings.write_text(f"{line}\n")
        assert cli.main(argv) == 0
        reasons = json.loads(capsys.readouterr().out)["path"]["reasons"]
        assert reasons == ([] if reason is None else [reason])


ADAPTERS = {
    "LoRA": LoraConfig(target_modules=["q_proj"]),
    "activated": LoraConfig(
        target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM"
    ),
    "head": LoraConfig(target_modules=["q_proj", "lm_head"]),
    "whole head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "VeRA": VeraConfig(target_modules=["q_proj"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}
OPTIONS = {
    "defaults": {},
    "neftune": {"neftune_noise_alpha": 5.0},
    "eager": {"model_init_kwargs": {"attn_implementation": "eager"}},
}


@pytest.mark.parametrize(
    ("adapter", "options"),
    [*((each, {}) for each in ADAPTERS.values()), *((None, each) for each in OPTIONS.values())],
    ids=[*ADAPTERS, *OPTIONS],
)
@pytest.mark.filterwarnings("ignore")
def test_it_is_that_of_the_trainer(tmp_path, adapter, options):
    tokenizer = make_tokenizer()
    config = LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    args = ORPOConfig(**arguments(tmp_path / "run", **options))
    trainer = ORPOTrainer(
        name, args, train_dataset=pairs(4), processing_class=tokenizer, peft_config=adapter
    )
    assert find_path(name, None, False, args=args, peft_config=adapter) == trainer.path
