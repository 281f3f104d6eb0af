"""Arguments that change after the trainer was created: a hyperparameter search, a script."""

import copy

import pytest
from transformers.trainer_utils import HPSearchBackend

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.training.current_args import MODEL_ARGUMENTS, ROW_ARGUMENTS
from support.trainer_runs import arguments, long_pairs, make_model, make_tokenizer, train_logs

# Values of a trial, each beside what the trainer was created with.
TRIALS = {
    "beta": {"beta": 0.7},
    "beta_end": {"beta_schedule": "linear", "beta_end": 0.9},
    "nll_scope": {"nll_scope": "completion"},
    "odds_ratio_link": {"odds_ratio_link": "identity"},
    "max_length": {"max_length": 30},
    "max_prompt_length": {"max_length": 30, "max_prompt_length": 2},
    "truncation_mode": {"max_length": 30, "max_prompt_length": 2, "truncation_mode": "keep_start"},
    "label_pad_token_id": {"label_pad_token_id": -7},
    "padding_value": {"padding_value": 4},
    "share_prompt": {"share_prompt": "False"},
    "padding_free": {"padding_free": False},
    "use_fused_head": {"use_fused_head": False},
    "max_tokens_per_batch": {"max_tokens_per_batch": 200},
    "gradient_checkpointing": {"gradient_checkpointing": False},
    "disable_dropout": {"disable_dropout": False},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "seed": {"seed": 11},
    "learning_rate": {"learning_rate": 5e-3},
}


@pytest.fixture(scope="module")
def parts():
    tokenizer = make_tokenizer()
    model = make_model("mistral", tokenizer)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2  # for disable_dropout
    return model, tokenizer, long_pairs(4)


@pytest.fixture
def make(parts, tmp_path, monkeypatch):
    model, tokenizer, rows = parts
    # transformers asks the library of the search, which need not be installed, for these.
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    monkeypatch.setattr(ORPOTrainer, "_get_output_dir", lambda self, trial: str(tmp_path))

    def make(from_model=False, **changed):
        changed = {"max_steps": 1, "warmup_steps": 0, "gradient_accumulation_steps": 1, **changed}
        init = {"model_init": lambda: copy.deepcopy(model)}
        return ORPOTrainer(
            **({"model": copy.deepcopy(model)} if from_model else init),
            args=ORPOConfig(**arguments(tmp_path, **changed)),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
        )

    return make


def results(trainer):
    (log,) = train_logs(trainer)
    names = ("loss", "nll_loss", "rewards/chosen", "logps/rejected", "grad_norm")
    return {name: log[name] for name in names}


@pytest.mark.parametrize("trial", TRIALS.values(), ids=TRIALS)
def test_a_trial_is_trained_with_its_own_values(trial, make):
    trainer = make()
    trainer.hp_search_backend = HPSearchBackend.WANDB  # whose trials are dictionaries
    trainer.train(trial=dict(trial))
    given = {name: False if value == "False" else value for name, value in trial.items()}
    fresh = make(**given)
    fresh.train()
    assert results(trainer) == pytest.approx(results(fresh), rel=1e-6)
    assert trainer._plain_because == fresh._plain_because
    assert trainer._padded_because == fresh._padded_because
    rows, expected = trainer.train_dataset, fresh.train_dataset
    assert rows[:] == expected[:]
    assert trainer.data_collator == fresh.data_collator


def test_every_field_that_something_is_made_from_is_tried():
    untried = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    untried |= {"gradient_checkpointing_kwargs", "torch_compile", "use_liger_kernel"}
    untried |= {"max_completion_length", "overlength", "column_mapping", "prompt_column"}
    assert {*MODEL_ARGUMENTS, *ROW_ARGUMENTS} - untried <= {*TRIALS}


def test_trials_one_after_another(make):
    trainer = make()
    trainer.hp_search_backend = HPSearchBackend.WANDB
    for trial in ({"max_length": 30, "beta": 0.7}, {"max_length": 60, "beta": 0.2}):
        trainer.train(trial=dict(trial))
        fresh = make(**trial)
        fresh.train()
        log = results(fresh)
        # The second run of a trainer logs behind the first.
        assert train_logs(trainer)[-1]["loss"] == pytest.approx(log["loss"], rel=1e-6)
        trainer.state.log_history.clear()


def test_attributes_are_those_of_the_arguments(make):
    trainer = make(from_model=True)
    trainer.args.beta = 0.9
    assert trainer.beta == 0.9
    trainer.max_length = 20
    assert trainer.args.max_length == 20
    trainer.padding_value = 5
    assert trainer.args.padding_value == 5
    trainer.args.padding_value = None
    assert trainer.padding_value == trainer.tokenizer.pad_token_id


def test_arguments_that_a_script_changes_hold_for_the_next_evaluation(make, log):
    trainer = make(from_model=True)
    before = trainer.evaluate()
    trainer.args.max_length = 20
    trainer.args.padding_free = False
    after = trainer.evaluate()
    fresh = make(from_model=True, max_length=20, padding_free=False)
    assert after["eval_loss"] == pytest.approx(fresh.evaluate()["eval_loss"], rel=1e-6)
    assert after["eval_loss"] != before["eval_loss"]
    assert not trainer.data_collator.packing
    assert any("max_length changed: the rows are prepared again." in m for m in log.messages)


def test_rows_of_the_users_are_not_replaced(make):
    trainer = make(from_model=True)
    own = trainer.train_dataset.select([0, 1])
    trainer.train_dataset = own
    trainer.args.max_length = 20
    trainer.evaluate()
    assert trainer.train_dataset is own
    assert max(map(len, trainer.eval_dataset["chosen_input_ids"])) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, "beta is -1.0; must be at least 0 and finite"),
        ({"nll_scope": "all"}, "nll_scope is 'all'"),
        ({"fp16": True}, "fp16 was False when the trainer was created and is True"),
    ],
)
def test_values_that_are_not_allowed(change, message, make):
    trainer = make(from_model=True)
    for name, value in change.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate()
