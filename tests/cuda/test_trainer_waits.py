"""What a step of the trainer waits for: the loss that transformers reads, and nothing of ours."""

import pytest
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from oddsmith import ORPOConfig, ORPOTrainer, _core
from oddsmith.optim import AdamW8bit
from support.operators import called
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs

# Operators that wait for a GPU: a number, or a shape that depends on values.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal")


class Waits(TorchDispatchMode, TrainerCallback):
    """Counts operators that wait, from the end of the first step to that of the second."""

    def __init__(self):
        super().__init__()
        self.steps, self.found = 0, []

    def on_step_end(self, args, state, control, **rest):
        self.steps += 1
        if self.steps == 1:
            _core.host_waits()
        elif self.steps == 2:
            self.found += _core.host_waits()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if self.steps == 1 and name in WAITING:
            self.found.append(name)
        return called(self, func, args, kwargs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("filters", [False, True])
def test_a_step_of_the_trainer(filters, emulated_driver, tmp_path, monkeypatch):
    """Two micro-batches, after each of which transformers looks for a NaN and for an infinity if it is to filter them."""
    monkeypatch.setattr(AdamW8bit, "report", lambda self: None)  # after a step on a CPU only
    options = {"optim": "adamw_8bit", "gradient_accumulation_steps": 2, "max_steps": 2}
    options |= {"logging_steps": 100, "logging_nan_inf_filter": filters}
    waits = Waits()
    trainer = ORPOTrainer(
        model=make_model("mistral", make_tokenizer()),
        args=ORPOConfig(**arguments(tmp_path, **options)),
        train_dataset=pairs(12),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[waits],
    )
    with waits:
        trainer.train()
    assert waits.steps == 2
    assert waits.found == ["_local_scalar_dense"] * (4 if filters else 0)
    assert any(launch.kernel.startswith("adamw") for launch in emulated_driver.launches())
