"""The arguments of the trainer, before anything is loaded."""

import pytest
from datasets import Dataset, DatasetDict
from transformers import TrainingArguments

from oddsmith import ORPOConfig
from oddsmith.training.arguments import check_arguments, check_single, own_config


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_arguments_of_trl_are_converted(tmp_path, log):
    trl = pytest.importorskip("trl.experimental.orpo")

    class Mine(trl.ORPOConfig):
        pass

    for kind in (trl.ORPOConfig, Mine):
        given = kind(
            str(tmp_path),
            beta=0.3,
            max_length=77,
            learning_rate=3e-4,
            lr_scheduler_type="cosine",
            optim="adamw_torch",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            accelerator_config={"split_batches": True},
        )
        made = own_config(given)
        assert type(made) is ORPOConfig
        for name in ("beta", "max_length", "learning_rate", "lr_scheduler_type", "optim", "bf16"):
            assert getattr(made, name) == getattr(given, name), name
        assert made.gradient_checkpointing is False and made.report_to == []
        assert made.accelerator_config.split_batches is True
    assert log.text.count("args is TRL's ORPOConfig: converted") == 2


def test_other_arguments(tmp_path):
    config = ORPOConfig(str(tmp_path))
    assert own_config(config) is config
    with pytest.raises(TypeError, match="args is a TrainingArguments; must be an oddsmith"):
        own_config(TrainingArguments(str(tmp_path)))


def test_inputs_for_metrics_are_refused(tmp_path):
    config = ORPOConfig(str(tmp_path), include_for_metrics=["loss", "inputs"])
    with pytest.raises(ValueError, match="include_for_metrics has 'inputs'; must be only 'loss'"):
        check_arguments(object(), config, Dataset.from_list([]), None, None, None)


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_datasets(kind):
    parts = kind({name: Dataset.from_list([{"chosen": "a"}]) for name in ("train", "test")})
    with pytest.raises(TypeError, match=r"splits train, test; pass one .* dataset\['train'\]"):
        check_single(parts, "train_dataset")
