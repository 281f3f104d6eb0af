"""ORPOTrainer: its arguments, its errors before training, its hooks."""

import copy
import inspect
import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import (
    LlamaForSequenceClassification,
    LlamaModel,
    TrainerCallback,
    TrainingArguments,
)

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.integrations.dropout import NoDropout
from oddsmith.training.models import load_model
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs

# PEFT reads an older name of transformers'.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model("mistral", tokenizer)


@pytest.fixture
def make(model, tokenizer, tmp_path):
    """A trainer; keyword arguments replace the defaults, `config` those of ORPOConfig."""

    def make(kind=ORPOTrainer, config=None, **changed):
        given = {
            "model": model,
            "args": ORPOConfig(**arguments(tmp_path, **(config or {}))),
            "train_dataset": pairs(6),
            "processing_class": tokenizer,
        }
        return kind(**{**given, **changed})

    return make


def batch_of(trainer, size=3):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(size)])


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
    with pytest.raises(ValueError, match="two names of one argument"):
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
    ids=str,
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
    with pytest.raises(ValueError, match="no token of a completion left within max_length 1"):
        make(config={"max_length": 1})


def test_model_without_a_head(make, model):
    for kind in (LlamaModel, LlamaForSequenceClassification):
        from transformers import LlamaConfig

        config = LlamaConfig(
            vocab_size=900, hidden_size=8, intermediate_size=8, num_attention_heads=2
        )
        config.num_hidden_layers, config.pad_token_id = 1, 0
        with pytest.raises(ValueError, match=f"{kind.__name__}, which has no output head"):
            make(model=kind(config))


def test_labels_outside_the_vocabulary(make, model):
    model.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="token id .*the model's vocabulary has 300"):
        make()


def test_peft_model_with_a_peft_config(make, model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    with pytest.raises(ValueError, match="merge_and_unload"):
        make(model=wrapped, peft_config=config)
    assert make(model=wrapped)._plain_because is None


def test_model_init_kwargs_with_a_model(make):
    with pytest.raises(ValueError, match="the model has been made already"):
        make(config={"model_init_kwargs": {"dtype": "float32"}})


def test_mixture_without_a_coefficient_is_told(make, tokenizer, caplog):
    model = make_model("mixtral", tokenizer)
    assert make(model=copy.deepcopy(model)).aux_loss_coef == 0.05
    model.config.router_aux_loss_coef = 0.0
    make(model=model)
    assert "the auxiliary loss has no effect" in caplog.text


# ---- Models ----


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_model_by_name(make, model, tokenizer, tmp_path, name):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make(
        model=str(tmp_path / "base"),
        processing_class=None,
        config={"model_init_kwargs": {name: "bfloat16"}},
    )
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.processing_class.vocab_size == tokenizer.vocab_size
    assert getattr(trainer.model, "hf_device_map", None) is None


def test_unknown_dtype(tmp_path, model):
    model.save_pretrained(tmp_path / "base")
    config = ORPOConfig(**arguments(tmp_path), model_init_kwargs={"dtype": "float33"})
    with pytest.raises(ValueError, match="'float33'; must be 'auto' or a torch dtype"):
        load_model(str(tmp_path / "base"), config)


def test_encoder_decoder_by_name(make, tmp_path):
    tokenizer = make_tokenizer("t5")
    make_model("t5", tokenizer).save_pretrained(tmp_path / "base")
    trainer = make(model=str(tmp_path / "base"), processing_class=tokenizer)
    assert trainer.is_encoder_decoder and trainer.max_completion_length == 128
    assert trainer._plain_because == "it is an encoder-decoder model"


class NotesDropout(TrainerCallback):
    """The rates of dropout within a run."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}


@pytest.mark.parametrize(("off", "within"), [(True, {0.0}), (False, {0.3})])
def test_dropout_is_off_in_the_adapter_too(make, off, within):
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    notes = NotesDropout()
    trainer = make(peft_config=config, config={"disable_dropout": off}, callbacks=[notes])
    trainer.train()
    assert notes.rates == within
    assert {m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_disable_dropout_reaches_functional_ones():
    layer = nn.Module()
    layer.attention_dropout, layer.scale, layer.inner = 0.1, 0.5, nn.Dropout1d(0.2)
    with NoDropout(layer):
        assert (layer.attention_dropout, layer.scale, layer.inner.p) == (0.0, 0.5, 0.0)
    assert (layer.attention_dropout, layer.scale, layer.inner.p) == (0.1, 0.5, 0.2)


def test_gradients_reach_an_adapter_under_checkpointing(make):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    # The reentrant kind passes no gradient on if no input of a layer requires one.
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    trainer = make(peft_config=config, config=checkpointing)
    trainer.train()
    moved = [p.abs().max() for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert moved and min(moved) > 0


# ---- Rows ----


def test_rows_go_through_an_overridden_hook(make):
    class Marked(ORPOTrainer):
        def build_tokenized_answer(self, prompt, answer):
            side = super().build_tokenized_answer(prompt, answer)
            return {**side, "input_ids": [17, *side["input_ids"][1:]]}

    trainer = make(kind=Marked)
    for row in trainer.train_dataset:
        first = next(label for label in row["chosen_labels"] if label >= 0)
        assert first == 17


def test_tokenize_row_is_what_the_dataset_holds(make):
    trainer = make()
    row = trainer.train_dataset[2]
    made = trainer.tokenize_row({key: row[key] for key in ("prompt", "chosen", "rejected")})
    assert made == {key: row[key] for key in made}


def test_lints_are_logged(make, caplog):
    row = {"prompt": "What is it?", "chosen": "The same.", "rejected": "The same."}
    make(train_dataset=Dataset.from_list([row, row]))
    assert "2 of 2 rows have the same chosen and rejected completion" in caplog.text


def test_dataset_dicts(make):
    parts = {"a": pairs(3, seed=5), "b": pairs(4, seed=6)}
    for given in (parts, DatasetDict(parts)):
        trainer = make(eval_dataset=given)
        assert isinstance(trainer.eval_dataset, dict)
        assert {k: len(v) for k, v in trainer.eval_dataset.items()} == {"a": 3, "b": 4}
        assert "chosen_labels" in trainer.eval_dataset["b"].column_names


# ---- The loss ----


def test_compute_loss_returns_outputs(make):
    trainer = make()
    loss, metrics = trainer.compute_loss(trainer.model, batch_of(trainer), return_outputs=True)
    assert loss.requires_grad and loss.dim() == 0
    assert all(torch.is_tensor(value) and value.dim() == 0 for value in metrics.values())
    expected = metrics["nll_loss"] - 0.3 * metrics["log_odds_ratio"]
    torch.testing.assert_close(loss.detach().double(), expected.double(), rtol=1e-5, atol=1e-5)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.3 * metrics["logps/chosen"].item())


def test_prediction_step(make):
    trainer = make()
    inputs = batch_of(trainer)
    loss, logits, labels = trainer.prediction_step(trainer.model, inputs, False)
    assert logits.shape == labels.shape == (2,) and not loss.requires_grad
    assert trainer.prediction_step(trainer.model, inputs, True)[1:] == (None, None)
    _, kept, _ = trainer.prediction_step(
        trainer.model, inputs, False, ignore_keys=["eval_logits/chosen"]
    )
    assert kept.tolist() == logits[1:].tolist()


def test_concatenated_forward_arities(make, model, tokenizer):
    trainer = make()
    out = trainer.concatenated_forward(trainer.model, batch_of(trainer))
    assert len(out) == 5 and out[0].shape == (3,) and out[2].shape[2] == len(tokenizer)
    trainer = make(model=make_model("mixtral", tokenizer))
    out = trainer.concatenated_forward(trainer.model, batch_of(trainer))
    assert len(out) == 6 and out[5] > 0


@pytest.mark.parametrize("hook", ["concatenated_forward", "get_batch_logps", "odds_ratio_loss"])
def test_overridden_hooks_are_called(make, model, hook, caplog):
    calls = []

    def counted(original):
        def call(*args, **kwargs):
            calls.append(hook)
            return original(*args, **kwargs)

        return staticmethod(call) if hook == "get_batch_logps" else call

    plain = make(model=copy.deepcopy(model))
    kind = type("Own", (ORPOTrainer,), {hook: counted(getattr(ORPOTrainer, hook))})
    own = make(kind=kind, model=model)
    assert f"Own has its own {hook}" in caplog.text
    loss, _ = own.get_batch_loss_metrics(own.model, batch_of(own))
    assert calls == [hook]
    expected, _ = plain.get_batch_loss_metrics(plain.model, batch_of(plain))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_an_own_odds_ratio_decides_the_loss(make):
    class Own(ORPOTrainer):
        def odds_ratio_loss(self, policy_chosen_logps, policy_rejected_logps):
            term = policy_chosen_logps - policy_rejected_logps
            zero = torch.zeros(())
            return term, term.detach(), term.detach(), zero, zero

    trainer = make(kind=Own)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
    expected = metrics["nll_loss"] - (metrics["logps/chosen"] - metrics["logps/rejected"])
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-5)
    assert metrics["rewards/margins"] == 0.0


def test_beta_may_be_changed_between_steps(make):
    trainer = make()
    inputs = batch_of(trainer)
    one, metrics = trainer.get_batch_loss_metrics(trainer.model, inputs)
    trainer.beta = 1.3
    other, _ = trainer.get_batch_loss_metrics(trainer.model, inputs)
    difference = -(1.3 - 0.3) * metrics["log_odds_ratio"]
    torch.testing.assert_close((other - one).double(), difference.double(), rtol=1e-4, atol=1e-5)


def test_model_card(make, tmp_path):
    trainer = make()
    trainer.create_model_card(model_name="mine", dataset_name="org/pairs", tags="extra")
    text = (tmp_path / "README.md").read_text()
    assert "2403.07691" in text and "| beta | 0.3 |" in text and "datasets: org/pairs" in text
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- extra",
        "- oddsmith",
        "- orpo",
    ]


def test_default_arguments(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make(args=None)
    assert isinstance(trainer.args, ORPOConfig) and trainer.args.output_dir == "tmp_trainer"
    assert json.dumps(trainer.args.to_dict())
