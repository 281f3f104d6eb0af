"""Refusals before a run starts, and which optimizer DeepSpeed gets."""

from types import SimpleNamespace

import pytest
from transformers import Trainer

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.optim import AdamW8bit
from oddsmith.training import engine_hooks
from oddsmith.training.engine import Engine
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs


@pytest.fixture
def make(tmp_path, monkeypatch):
    def with_engine(engine, optimizers=(None, None), trainer=ORPOTrainer, **config):
        monkeypatch.setattr(engine_hooks, "engine_of", lambda args, model: engine)
        tokenizer = make_tokenizer()
        model = make_model("mistral", tokenizer)
        if optimizers[0] is not None:
            optimizers = (optimizers[0](model.parameters()), None)
        args = ORPOConfig(**arguments(tmp_path, **config))
        rows = pairs(4)
        return trainer(model, args, None, rows, processing_class=tokenizer, optimizers=optimizers)

    return with_engine


class Counting(ORPOTrainer):
    """Counts the rows that are tokenised."""

    rows = 0

    def tokenize_row(self, feature, model=None):
        Counting.rows += 1
        return super().tokenize_row(feature, model)


REFUSED = [
    ("adamw_torch", Engine(context=2), "splits each sequence"),
    ("adamw_8bit", Engine(fsdp=1), "'adamw_8bit' with FSDP1"),
    ("paged_adamw_8bit", Engine(zero=2, optimizer=True), "an optimizer of its own"),
    ("adamw_8bit", Engine(zero=3, offload="nvme"), "DeepSpeed offloads the optimizer to NVMe"),
    ("galore_adamw", Engine(fsdp=2), "'galore_adamw' with FSDP2: a projection"),
    ("apollo_adamw", Engine(zero=3), "'apollo_adamw' with DeepSpeed ZeRO-3"),
    ("galore_adafactor", Engine(tensor=2), "'galore_adafactor' with tensor parallelism"),
]


@pytest.mark.parametrize(
    "optim, engine, message", REFUSED, ids=[f"{optim} {engine}" for optim, engine, _ in REFUSED]
)
def test_a_trainer_is_refused_before_rows_are_made(optim, engine, message, make):
    Counting.rows = 0
    with pytest.raises(ValueError, match=message):
        make(engine, trainer=Counting, optim=optim, optim_target_modules="all-linear")
    assert Counting.rows == 0
    make(Engine(), trainer=Counting)
    assert Counting.rows == 4


def test_codes_are_checked_before_rows_are_made(make, monkeypatch):
    def refuse(model, plugin):
        raise ValueError("4-bit weights")

    def with_plugin(self):
        create(self)
        self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)

    create = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_plugin)
    monkeypatch.setattr(engine_hooks, "check_codes", refuse)
    Counting.rows = 0
    with pytest.raises(ValueError, match="4-bit weights"):
        make(Engine(), trainer=Counting)
    assert Counting.rows == 0


def test_the_settings_of_an_optimizer_are_checked_before_rows_are_made(make):
    Counting.rows = 0
    with pytest.raises(ValueError, match="layer-wise update"):
        make(Engine(), trainer=Counting, optim="galore_adamw_layerwise", fp16=True)
    assert Counting.rows == 0


def test_one_accelerator_is_made(make, monkeypatch):
    made = []
    create = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        Trainer,
        "create_accelerator_and_postprocess",
        lambda self: (made.append(self), create(self)),
    )
    trainer = make(Engine())
    assert made == [trainer]
    trainer.create_accelerator_and_postprocess()  # as a hyperparameter search does
    assert made == [trainer] * 2


def test_a_given_optimizer_is_used_instead_of_the_name(make):
    trainer = make(Engine(zero=2), (AdamW8bit, None), optim="galore_adamw")
    assert isinstance(trainer.create_optimizer(), AdamW8bit)


def under_deepspeed(trainer, config):
    plugin = SimpleNamespace(deepspeed_config=config)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    trainer.accelerator = SimpleNamespace(state=state)
    return trainer


@pytest.mark.parametrize("given", [AdamW8bit, None])
def test_our_moments_are_offloaded(given, make):
    config = {}
    trainer = make(Engine(zero=2, offload="cpu"), (given, None), optim="adamw_8bit")
    assert isinstance(under_deepspeed(trainer, config).create_optimizer(), AdamW8bit)
    assert config == {"zero_force_ds_cpu_optimizer": False}


def test_other_optimizers_are_left_to_accelerate(make):
    config = {}
    trainer = make(Engine(zero=2, offload="cpu"), optim="adamw_torch")
    under_deepspeed(trainer, config).create_optimizer()
    assert config == {}


def test_two_wishes_for_one_optimizer(make):
    trainer = make(Engine(zero=2, offload="cpu"), optim="adamw_8bit")
    under_deepspeed(trainer, {"zero_force_ds_cpu_optimizer": True})
    with pytest.raises(ValueError, match="zero_force_ds_cpu_optimizer is true"):
        trainer.create_optimizer()


def test_nvme_is_refused_for_a_given_optimizer(make):
    trainer = make(Engine(zero=3, offload="nvme"), (AdamW8bit, None))
    with pytest.raises(ValueError, match="'AdamW8bit', but DeepSpeed offloads .* to NVMe"):
        under_deepspeed(trainer, {}).create_optimizer()


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_an_evaluation_before_the_model_is_split(method, make):
    trainer = make(Engine())
    trainer.accelerator = SimpleNamespace(is_fsdp2=True, _models=[])
    with pytest.raises(ValueError, match=f"{method} before train under FSDP2.*eval_on_start=True"):
        getattr(trainer, method)(pairs(3))
    assert trainer._last_given is None  # no row was made
