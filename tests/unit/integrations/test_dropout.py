"""No dropout within a run, and the model's rates restored after it."""

import pytest
from torch import nn
from transformers import TrainerCallback

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.integrations.dropout import NoDropout
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs


class NotesDropout(TrainerCallback):
    """The rates of dropout within a run."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(("off", "within"), [(True, {0.0}), (False, {0.3})])
def test_dropout_of_an_adapter_is_off_too(off, within, tmp_path):
    from peft import LoraConfig

    tokenizer, notes = make_tokenizer(), NotesDropout()
    trainer = ORPOTrainer(
        model=make_model("mistral", tokenizer),
        args=ORPOConfig(**arguments(tmp_path, max_steps=1), disable_dropout=off),
        train_dataset=pairs(6),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=2, lora_dropout=0.3, target_modules=["q_proj"], task_type="CAUSAL_LM"
        ),
        callbacks=[notes],
    )
    trainer.train()
    assert notes.rates == within
    assert {m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_functional_rates_too():
    layer = nn.Module()
    layer.attention_dropout, layer.scale, layer.inner = 0.1, 0.5, nn.Dropout1d(0.2)
    with NoDropout(layer):
        assert (layer.attention_dropout, layer.scale, layer.inner.p) == (0.0, 0.5, 0.0)
    assert (layer.attention_dropout, layer.scale, layer.inner.p) == (0.1, 0.5, 0.2)


def test_a_rate_that_was_set_meanwhile_stays():
    layer = nn.Dropout(0.2)
    with NoDropout(layer):
        layer.p = 0.4
    assert layer.p == 0.4
