"""The norm of a step's gradients, and a first step without any."""

import pytest
import torch
from peft import LoraConfig

from oddsmith import ORPOConfig, ORPOTrainer
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def trainer_for(tmp_path, model=None, kind=ORPOTrainer, peft_config=None, **changed):
    return kind(
        make_model("mistral", make_tokenizer()) if model is None else model,
        ORPOConfig(**arguments(tmp_path, **changed)),
        train_dataset=pairs(6),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def test_a_run_without_gradients_ends_in_its_first_step(tmp_path):
    model = make_model("mistral", make_tokenizer())
    model.model.register_forward_hook(
        lambda module, args, out: setattr(out, "last_hidden_state", out[0].detach() + 0.0 * out[0])
    )
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trainer_for(tmp_path, model, peft_config=adapter, gradient_checkpointing=False)
    with pytest.raises(RuntimeError, match="gradients of the first step are all zero"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_run_with_gradients_is_asked_once(tmp_path, max_grad_norm):
    trainer, asked = trainer_for(tmp_path, max_grad_norm=max_grad_norm), []
    check = trainer._check_gradients
    trainer._check_gradients = lambda norm: (asked.append(float(norm)), check(norm))
    trainer.train()
    assert len(asked) == 1 and asked[0] > 0


def test_a_batch_without_a_loss_proves_nothing(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer._last_loss = torch.tensor(0.0)
    trainer._check_gradients(torch.tensor(0.0))
    assert not trainer._has_trained
    trainer._last_loss = torch.tensor(2.0)
    trainer._check_gradients(torch.tensor(float("nan")))
    assert trainer._has_trained
