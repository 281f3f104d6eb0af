"""Training on rows with images is what a naive computation gives: one sequence at a time, with
logits."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("PIL", reason="rows with images need Pillow")

from oddsmith import ORPOConfig, ORPOTrainer, cli
from oddsmith.data.image_rows import ImageRows
from oddsmith.data.rows import RowBuilder
from support.image_models import IMAGE_MODELS, image_model, image_pairs
from support.processes import end, two_processes
from support.trainer_runs import arguments, train

# PEFT reads a deprecated name of transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
BETA = 0.3


def sequence(processor, row, side):
    """Inputs of a model for one sequence, and which tokens are answer and which are images."""
    messages = [
        {
            "role": "user",
            "content": [
                *({"type": "image"} for _ in row["images"]),
                {"type": "text", "text": row["prompt"][0]["content"]},
            ],
        }
    ]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer = row[side][0]["content"]
    made = processor(
        images=[row["images"]] if row["images"] else None,
        text=[prompt + answer],
        add_special_tokens=False,
        return_tensors="pt",
    )
    bos, eos = ([[getattr(processor.tokenizer, f"{name}_token_id")]] for name in ("bos", "eos"))
    for name, value in made.items():
        if name == "attention_mask":
            made[name] = F.pad(value, (1, 1), value=1)
        elif name.endswith("token_type_ids"):
            made[name] = F.pad(value, (1, 1))
    made["input_ids"] = torch.cat([torch.tensor(bos), made["input_ids"], torch.tensor(eos)], dim=1)
    images = torch.isin(made["input_ids"][0], torch.tensor(processor.image_token_ids))
    return made, len(answer) + 1, images


def naive_loss(model, processor, rows):
    """The loss of a batch by its definition, TRL's with image tokens left out of the likelihood."""
    nll, logps = [], {"chosen": [], "rejected": []}
    for row in rows:
        for side, scores in logps.items():
            inputs, answer, images = sequence(processor, row, side)
            logits = model(**inputs).logits[0, :-1]
            targets = inputs["input_ids"][0, 1:]
            token = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            scores.append(token[-answer:].mean())
            if side == "chosen":
                nll.append(-token[~images[1:]])
    chosen, rejected = (torch.stack(scores) for scores in logps.values())
    odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return torch.cat(nll).mean() - BETA * F.logsigmoid(odds).mean()


def make(model, processor, rows, folder, **changed):
    kwargs = {key: changed.pop(key) for key in ("eval_dataset", "peft_config") if key in changed}
    return ORPOTrainer(
        model=copy.deepcopy(model),
        args=ORPOConfig(**arguments(folder, beta=BETA, **changed)),
        train_dataset=rows,
        processing_class=processor,
        **kwargs,
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        # The bias of keys shifts all scores of a query equally: its gradient is zero up to rounding.
        if parameter.grad is not None and not name.endswith("k_proj.bias")
    }


@pytest.mark.parametrize(
    ("name", "changed", "dtype"),
    [
        *((name, {}, torch.float32) for name in IMAGE_MODELS),
        ("qwen2_5_vl", {}, torch.float64),
        ("gemma3", {"use_fused_head": False}, torch.float32),
        ("llava", {"gradient_checkpointing": True}, torch.float32),
    ],
)
def test_loss_and_gradients_are_those_of_the_definition(tmp_path, name, changed, dtype):
    model, processor = image_model(name)
    rows = image_pairs(4)
    model.to(dtype)
    trainer = make(model, processor, rows, tmp_path, **changed)
    expected = naive_loss(model, processor, rows)
    want = gradients(model, expected)
    batch = trainer.data_collator(list(rows))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    got = gradients(trainer.model, loss)
    room = 1e-5 if dtype == torch.float32 else 1e-9
    assert loss.item() == pytest.approx(expected.item(), rel=room)
    assert set(got) == set(want)
    assert any("vision" in key or "visual" in key for key in got)
    for key, gradient in want.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(got[key], gradient, rtol=0, atol=10 * room * scale, msg=key)


def test_a_picture_changes_the_answer(tmp_path):
    model, processor = image_model("gemma3")
    rows = list(image_pairs(2))
    other = [{**row, "images": row["images"][::-1]} for row in rows]
    trainer = make(model, processor, image_pairs(2), tmp_path)
    first, second = (
        trainer.compute_loss(trainer.model, trainer.data_collator(each)).item()
        for each in (rows, other)
    )
    assert first != pytest.approx(second, rel=1e-6)


def test_bf16_is_as_near_to_the_truth_as_logits_are(tmp_path):
    model, processor = image_model("qwen2_5_vl")
    rows = image_pairs(4)
    truth = naive_loss(copy.deepcopy(model).double(), processor, rows).item()
    losses = {}
    for fused in (True, False):
        trainer = make(model.bfloat16(), processor, rows, tmp_path, use_fused_head=fused)
        batch = trainer.data_collator(list(rows))
        losses[fused] = abs(trainer.compute_loss(trainer.model, batch).item() - truth)
    assert losses[True] <= 2 * losses[False] + 0.02


def run(folder, name, rows, held_out=None, **changed):
    model, processor = image_model(name)
    peft_config = changed.pop("peft_config", None)
    kwargs = {"eval_dataset": held_out, "peft_config": peft_config}
    args = arguments(folder, **changed)
    return train(ORPOTrainer, ORPOConfig, model, processor, rows, args, **kwargs)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_evaluate_predict_and_save(tmp_path):
    held_out = image_pairs(5, seed=8)
    trainer = run(
        tmp_path, "llava", image_pairs(6), held_out, generate_during_eval=True, max_length=64
    )
    metrics = trainer.evaluate()
    model, processor = trainer.model, trainer.processing_class
    rows = list(held_out)
    # That of all pairs in one batch, not a mean over two batches.
    assert metrics["eval_loss"] == pytest.approx(
        naive_loss(model, processor, rows).item(), rel=1e-4
    )
    assert trainer.predict(held_out).metrics["test_loss"] == pytest.approx(metrics["eval_loss"])
    texts = (tmp_path / "completions").glob("*.jsonl")
    lines = [json.loads(line) for file in texts for line in file.read_text().splitlines()]
    assert lines and all("<image>" in line["Prompt"] for line in lines if "<image>" in str(line))
    trainer.save_model(str(tmp_path / "saved"))
    again = ORPOTrainer(
        model=str(tmp_path / "saved"),
        args=ORPOConfig(**arguments(tmp_path, per_device_eval_batch_size=3)),
        train_dataset=image_pairs(4),
        eval_dataset=held_out,
    )
    assert type(again.processing_class) is type(processor)
    assert type(again.model) is type(model)
    assert again.evaluate()["eval_loss"] == pytest.approx(
        metrics["eval_loss"], rel=0.3
    )  # of another beta


def test_lora_trains_the_language_model(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", task_type="CAUSAL_LM")
    trainer = run(tmp_path, "gemma3", image_pairs(6), peft_config=config)
    assert trainer._plain_because is None
    moved = [
        name for name, parameter in trainer.model.named_parameters()
        if "lora_B" in name and parameter.any()
    ]  # fmt: skip
    assert moved and all("language_model" in name for name in moved)
    trainer.save_model()
    assert (tmp_path / "adapter_config.json").is_file()
    assert (tmp_path / "processor_config.json").is_file()


def test_a_stream_gives_the_batches_of_its_rows(tmp_path):
    rows = image_pairs(12)
    stream = run(tmp_path, "gemma3", rows.to_iterable_dataset())
    direct = run(tmp_path, "gemma3", rows, train_sampling_strategy="sequential")
    assert losses(stream) == pytest.approx(losses(direct), rel=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava"])
def test_mixed_precision(tmp_path, name):
    first = losses(run(tmp_path, name, image_pairs(4), bf16=True, max_steps=1))
    exact = losses(run(tmp_path, name, image_pairs(4), max_steps=1))
    assert first == pytest.approx(exact, rel=0.03)


def test_the_commands(tmp_path, capsys):
    """`inspect` and `train` on a file with paths of pictures."""
    model, processor = image_model("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    lines = []
    for index, row in enumerate(image_pairs(8)):
        paths = [tmp_path / f"{index}_{number}.png" for number in range(len(row["images"]))]
        for path, image in zip(paths, row["images"], strict=True):
            image.save(path)
        lines.append(json.dumps({**row, "images": [str(path) for path in paths]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    base = str(tmp_path / "model")
    assert cli.main(["inspect", str(tmp_path / "rows.jsonl"), "--model", base, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["path"]["batches"] == "padded" and "images" in figures["path"]["reasons"][0]
    assert figures["images"] == {"rows": 6, "images": 8}
    builder = RowBuilder(processor.tokenizer)
    made = ImageRows(processor, builder).build(list(image_pairs(8)), ["row"] * 8)
    tokens = sum(
        len(row[f"{side}_input_ids"]) for row in made.rows for side in ("chosen", "rejected")
    )
    assert figures["positions"]["packed"] == tokens
    argv = ["train", "--model", base, "--dataset_name", str(tmp_path / "rows.jsonl")]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "true"]
    argv += ["--report_to", "none", "--bf16", "false", "--per_device_train_batch_size", "2"]
    assert cli.main(argv) == 0
    assert (tmp_path / "out" / "processor_config.json").is_file()


CASE = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}


def main(output_dir):
    """One of two processes; batches of text alone leave the vision part without a gradient."""
    for checkpointing in (False, True):
        trainer = run(
            Path(output_dir), "qwen2_5_vl", image_pairs(12), image_pairs(5, seed=8),
            gradient_checkpointing=checkpointing, **CASE,
        )  # fmt: skip
        assert trainer.accelerator.num_processes == 2
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            result = {"losses": losses(trainer), "eval": metrics["eval_logps/chosen"]}
            (Path(output_dir) / f"{checkpointing}.json").write_text(json.dumps(result))


def test_two_processes_are_one(tmp_path):
    two_processes(__file__, tmp_path)
    case = {**CASE, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 2}
    alone = run(tmp_path, "qwen2_5_vl", image_pairs(12), image_pairs(5, seed=8), **case)
    metrics = alone.evaluate()
    for checkpointing in (False, True):
        both = json.loads((tmp_path / f"{checkpointing}.json").read_text())
        assert both["losses"] == pytest.approx(losses(alone), rel=1e-4)
        assert both["eval"] == pytest.approx(metrics["eval_logps/chosen"], rel=1e-4)


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
    end()
