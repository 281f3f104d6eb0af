"""Models that take images: their class, checks, and text rows on them."""

import pytest

pytest.importorskip("PIL", reason="rows with images need Pillow")

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.training.image_models import (
    allow_unused_parameters,
    check_image_model,
)
from oddsmith.training.models import vocabulary_size
from support.image_models import IMAGE_MODELS, image_model, image_pairs
from support.models import make_model
from support.trainer_runs import arguments
from support.word_tokenizer import word_tokenizer

# PEFT reads a deprecated name of transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def test_models_that_cannot_take_images(tmp_path):
    args = ORPOConfig(**arguments(tmp_path))
    check_image_model(image_model("llava")[0], args)
    with pytest.raises(ValueError, match="LlamaForCausalLM, which takes none.*ImageTextToText"):
        check_image_model(make_model("llama", word_tokenizer()), args)


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    args = ORPOConfig(**arguments(tmp_path))
    monkeypatch.setattr(type(args), "n_gpu", 2)
    with pytest.raises(ValueError, match="start one process per GPU"):
        check_image_model(image_model("llava")[0], args)


def test_virtual_tokens_are_refused(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = image_model("llava")[0]
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=48, num_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="virtual tokens"):
        check_image_model(get_peft_model(model, config), ORPOConfig(**arguments(tmp_path)))


def test_unused_parameters_are_allowed(tmp_path):
    def after(model, **changed):
        args = ORPOConfig(**arguments(tmp_path, **changed))
        allow_unused_parameters(model, args)
        return args.ddp_find_unused_parameters

    model = image_model("llava")[0]
    assert after(model) is True
    assert after(model, ddp_find_unused_parameters=False) is False
    assert after(model, gradient_checkpointing_kwargs={"use_reentrant": True}) is None
    assert after(make_model("llama", word_tokenizer())) is None


def make(model, processor, rows, folder, **kwargs):
    return ORPOTrainer(
        model=model,
        args=ORPOConfig(**arguments(folder, **kwargs.pop("config", {}))),
        train_dataset=rows,
        processing_class=processor,
        **kwargs,
    )


def test_images_and_a_tokenizer(tmp_path):
    model, processor = image_model("llava")
    with pytest.raises(ValueError, match="pass AutoProcessor.from_pretrained"):
        make(model, processor.tokenizer, image_pairs(2), tmp_path)
    text = make_model("llama", processor.tokenizer)
    with pytest.raises(ValueError, match="LlamaForCausalLM, which takes none"):
        make(text, processor.tokenizer, image_pairs(2), tmp_path)


def test_images_are_never_packed(tmp_path, caplog):
    model, processor = image_model("llava")
    trainer = make(model, processor, image_pairs(4), tmp_path)
    assert trainer._plain_because is None and not trainer._packs()
    assert "Batches keep their padding: its rows have images" in caplog.text
    assert trainer.processing_class is processor and trainer.tokenizer is processor.tokenizer


def test_images_in_the_evaluation_rows_alone(tmp_path):
    model, processor = image_model("llava")
    rows = image_pairs(4, images=False)
    trainer = make(model, processor, rows, tmp_path, eval_dataset=image_pairs(3))
    assert not trainer._packs()
    assert trainer.evaluate()["eval_loss"] > 0


def test_batches_by_tokens_are_refused(tmp_path):
    model, processor = image_model("llava")
    for config in (
        {"max_tokens_per_batch": 200},
        {"train_sampling_strategy": "group_by_length"},
    ):
        with pytest.raises(ValueError, match="rows have images, whose lengths are not known"):
            make(model, processor, image_pairs(4), tmp_path, config=config)


def test_row_hooks_are_refused(tmp_path):
    class Own(ORPOTrainer):
        def tokenize_row(self, feature, model=None):
            return super().tokenize_row(feature, model)

    model, processor = image_model("llava")
    args = ORPOConfig(**arguments(tmp_path))
    with pytest.raises(ValueError, match="Own overrides .*not called for rows with images"):
        Own(model=model, args=args, train_dataset=image_pairs(2), processing_class=processor)


def test_the_vocabulary_is_that_of_the_text_part():
    for name in IMAGE_MODELS:
        model, processor = image_model(name)
        assert vocabulary_size(model) == len(processor.tokenizer)


@pytest.mark.parametrize(
    ("name", "lora"), [*((name, False) for name in IMAGE_MODELS), ("gemma3", True)]
)
def test_rows_of_text_pack(tmp_path, name, lora):
    """Packed, padded and plain give the same numbers, on the whole model by its processor."""
    model, processor = image_model(name)
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    rows = image_pairs(4, images=False)
    found = {}
    for kind, config in {
        "packed": {},
        "padded": {"padding_free": False},
        "plain": {"use_fused_head": False},
    }.items():
        trainer = make(model, processor, rows, tmp_path, config=config)
        assert trainer._packs() == (kind == "packed")
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[kind] = (loss.item(), grads)
    for kind in ("packed", "padded"):
        assert found[kind][0] == pytest.approx(found["plain"][0], rel=1e-5)
        for key, gradient in found["plain"][1].items():
            room = 1e-4 * gradient.abs().max() + 1e-8
            assert (found[kind][1][key] - gradient).abs().max() <= room, (kind, key)
