"""ORPOTrainer: its arguments, its errors before training, the signatures of its hooks."""

import copy
import inspect
import json

import peft
import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from oddsmith import ORPOConfig, ORPOTrainer
from support.trainer_runs import arguments, batch_of, make_model, pairs

# PEFT reads a deprecated name of transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


# ---- Signatures that other code relies on ----


def test_positional_order():
    names = list(inspect.signature(ORPOTrainer.__init__).parameters)
    assert names == [
        "self",
        "model",
        "args",
        "data_collator",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "model_init",
        "callbacks",
        "optimizers",
        "preprocess_logits_for_metrics",
        "peft_config",
        "compute_metrics",
        "tokenizer",
    ]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("build_tokenized_answer", "prompt answer"),
        ("tokenize_row", "feature model"),
        ("concatenated_inputs", "batch is_encoder_decoder padding_value device"),
        ("odds_ratio_loss", "policy_chosen_logps policy_rejected_logps"),
        ("get_batch_logps", "logits labels average_log_prob is_encoder_decoder"),
        ("concatenated_forward", "model batch"),
        ("get_batch_loss_metrics", "model batch train_eval"),
        ("compute_loss", "model inputs return_outputs num_items_in_batch"),
        ("generate_from_model", "model batch"),
        ("prediction_step", "model inputs prediction_loss_only ignore_keys"),
        ("store_metrics", "metrics train_eval"),
        (
            "evaluation_loop",
            "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
        ),
        ("log", "logs start_time"),
        ("create_model_card", "model_name dataset_name tags"),
        ("_save_checkpoint", "model trial"),
    ],
)
def test_hook_signatures(name, parameters):
    found = [p for p in inspect.signature(getattr(ORPOTrainer, name)).parameters if p != "self"]
    assert found == parameters.split()


def test_attributes(make):
    trainer = make(config={"max_prompt_length": 40, "truncation_mode": "keep_start"})
    expected = {
        "beta": 0.3,
        "max_length": 96,
        "max_prompt_length": 40,
        "truncation_mode": "keep_start",
        "label_pad_token_id": -100,
        "padding_value": trainer.processing_class.pad_token_id,
        "is_encoder_decoder": False,
        "aux_loss_enabled": False,
        "aux_loss_coef": 0.0,
        "use_dpo_data_collator": True,
    }
    assert {name: getattr(trainer, name) for name in expected} == expected
    assert trainer.tokenizer is trainer.processing_class
    assert "orpo" in trainer.model.model_tags


# ---- Arguments ----


def test_tokenizer_is_the_older_name(make, tokenizer):
    trainer = make(processing_class=None, tokenizer=tokenizer)
    assert trainer.processing_class is tokenizer
    with pytest.raises(ValueError, match="names of the same argument"):
        make(tokenizer=tokenizer)


def test_pad_token_falls_back_to_eos(make, tokenizer, caplog):
    tokenizer.pad_token = None
    from oddsmith.data import dataset

    dataset.logger.warning_once.cache_clear()
    trainer = make()
    assert trainer.padding_value == tokenizer.eos_token_id
    assert "no pad token: padding with its EOS token" in caplog.text


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"train_dataset": None}, ValueError, "train_dataset is None"),
        ({"args": TrainingArguments(use_cpu=True)}, TypeError, "must be an oddsmith.ORPOConfig"),
        ({"model": None}, ValueError, "one of model and model_init"),
        ({"model_init": lambda: None}, ValueError, "one of model and model_init"),
        ({"peft_config": {"r": 8}}, TypeError, "peft_config is a dict; must be a peft.PeftConfig"),
        ({"train_dataset": [1, 2]}, TypeError, "train_dataset is a list"),
        (
            {"train_dataset": Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]})},
            ValueError,
            "train_dataset has no column rejected",
        ),
        (
            {"eval_dataset": {"x": Dataset.from_dict({"chosen": ["b"]})}},
            ValueError,
            r"eval_dataset\['x'\] has no column rejected",
        ),
        (
            {
                "train_dataset": Dataset.from_dict(
                    {"prompt": [3], "chosen": ["b"], "rejected": ["c"]}
                )
            },
            ValueError,
            "row 0: prompt",
        ),
        ({"processing_class": None}, ValueError, "processing_class is None"),
    ],
    ids=lambda given: ",".join(given) if isinstance(given, dict) else None,
)
def test_bad_arguments(make, changed, error, message):
    with pytest.raises(error, match=message):
        make(**changed)


def test_conversations_need_a_chat_template(make, tokenizer):
    tokenizer.chat_template = None
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rude = [said[0], {"role": "assistant", "content": "No"}]
    with pytest.raises(ValueError, match="chat_template"):
        make(train_dataset=Dataset.from_list([{"chosen": said, "rejected": rude}]))


def test_max_length_below_every_completion(make):
    with pytest.raises(ValueError, match="no completion tokens within max_length 1"):
        make(config={"max_length": 1})


def test_mixture_without_a_coefficient_is_logged(make, tokenizer, caplog):
    model = make_model("mixtral", tokenizer)
    assert make(model=copy.deepcopy(model)).aux_loss_coef == 0.05
    model.config.router_aux_loss_coef = 0.0
    make(model=model)
    assert "the auxiliary loss has no effect" in caplog.text


def test_compute_loss_returns_outputs(make):
    trainer = make()
    loss, metrics = trainer.compute_loss(trainer.model, batch_of(trainer), return_outputs=True)
    assert loss.requires_grad and loss.dim() == 0
    assert all(torch.is_tensor(value) and value.dim() == 0 for value in metrics.values())
    expected = metrics["nll_loss"] - 0.3 * metrics["log_odds_ratio"]
    torch.testing.assert_close(loss.detach().double(), expected.double(), rtol=1e-5, atol=1e-5)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.3 * metrics["logps/chosen"].item())


def test_default_arguments(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make(args=None)
    assert isinstance(trainer.args, ORPOConfig) and trainer.args.output_dir == "tmp_trainer"
    assert json.dumps(trainer.args.to_dict())


# The model has no folder to look in.
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_an_adapter_that_is_not_trainable(make, model, tmp_path):
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig()).save_pretrained(
        tmp_path / "adapter"
    )
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    trainer = make(model=model)
    with pytest.raises(ValueError, match="PeftModel.* is trainable; load its adapter with"):
        trainer.train()
    trainer.evaluate(pairs(2))  # needs no gradient


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_arguments_of_trl(make, tmp_path):
    trl = pytest.importorskip("trl.experimental.orpo")
    trainer = make(args=trl.ORPOConfig(**arguments(tmp_path)))
    assert type(trainer.args) is ORPOConfig and trainer.beta == 0.3


def test_several_training_datasets(make):
    with pytest.raises(TypeError, match="train_dataset is a dict with the splits a; pass one"):
        make(train_dataset={"a": pairs(2)})


# ---- The path of its batches ----


def test_the_path_says_what_is_computed_and_why(make, model, tokenizer, caplog):
    said = ("Batches", "The loss")
    trainer = make()
    assert (trainer.path.batches, trainer.path.head, trainer.path.reasons) == (
        "packed",
        "fused",
        (),
    )
    assert not [line for line in caplog.messages if line.startswith(said)]
    trainer = make(config={"padding_free": False})
    assert (trainer.path.batches, trainer.path.head) == ("padded", "fused")
    assert trainer.path.reasons == ("padding_free is False",)
    trainer = make(config={"use_fused_head": False})
    assert (trainer.path.batches, trainer.path.head) == ("padded", "plain")
    assert trainer.path.reasons == ("use_fused_head is False",)
    assert not [line for line in caplog.messages if line.startswith(said)]
    model.config._attn_implementation_internal = "mine"
    trainer = make(model=model)
    assert trainer.path.reasons == ("its attention is 'mine', which transformers does not have",)
    assert caplog.messages.count(str(trainer.path)) == 1

    class Own(ORPOTrainer):
        def odds_ratio_loss(self, *args):
            return super().odds_ratio_loss(*args)

    assert make(kind=Own).path.reasons == ("Own overrides odds_ratio_loss",)
