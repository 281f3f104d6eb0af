"""QLoRA runs and checkpoints, compared with TRL and bitsandbytes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, MistralForCausalLM

import oddsmith
from oddsmith.nn import Linear4bit
from support.trainer_runs import arguments, make_tokenizer, pairs, train_logs

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
trl = pytest.importorskip("trl.experimental.orpo", reason="trl is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
]


@pytest.fixture
def folder(tmp_path):
    # Rows of full blocks: bitsandbytes 0.50 reads others wrongly on processors with AVX-512.
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "full")
    yield tmp_path / "full"
    oddsmith.use_for_bitsandbytes(False)


def load(folder, ours, dtype=torch.float32, nested=False):
    oddsmith.use_for_bitsandbytes(ours)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=nested,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def run(module, model, out):
    torch.manual_seed(5)
    trainer = module.ORPOTrainer(
        model=model,
        args=module.ORPOConfig(**arguments(out, max_steps=20)),
        train_dataset=pairs(16),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    adapter = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return train_logs(trainer), adapter


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-3)])
def test_twenty_steps(folder, tmp_path, dtype, bound, adopted):
    theirs, weights = run(trl, load(folder, False, dtype), tmp_path / "theirs")
    model = load(folder, not adopted, dtype)
    if adopted:
        model = oddsmith.adopt(model)
    assert any(isinstance(m, Linear4bit) for m in model.modules())
    ours, adapter = run(oddsmith, model, tmp_path / "ours")
    assert len(ours) == len(theirs) == 20
    for mine, their in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(their["loss"], rel=bound)
        assert mine["nll_loss"] == pytest.approx(their["nll_loss"], rel=bound)
    if dtype == torch.float32:
        assert adapter.keys() == weights.keys()
        for name, weight in weights.items():
            assert (adapter[name] - weight).abs().max() <= 1e-4 * weight.abs().max(), name


def test_adopts_after_an_evaluation(folder):
    model = load(folder, False).eval()
    expected = {n: p.data.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model(torch.arange(24).view(2, 12))  # bitsandbytes changes the layout of codes here
    for name, weight in oddsmith.adopt(model).named_parameters():
        assert torch.equal(weight.data.flatten(), expected[name].flatten()), name


def test_the_trainer_takes_their_modules(folder, tmp_path):
    logs, _ = run(oddsmith, load(folder, False), tmp_path / "out")
    mine, _ = run(oddsmith, load(folder, True), tmp_path / "mine")
    assert logs[-1]["loss"] == pytest.approx(mine[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_move_both_ways(folder, tmp_path, nested):
    tokens = torch.arange(24).view(2, 12)
    for ours in (True, False):
        saved = load(folder, ours, nested=nested)
        saved.save_pretrained(tmp_path / str(ours))
        oddsmith.use_for_bitsandbytes(not ours)
        read = AutoModelForCausalLM.from_pretrained(tmp_path / str(ours))
        torch.testing.assert_close(read(tokens).logits, saved(tokens).logits, rtol=1e-4, atol=1e-5)
    if not nested:  # our nested codes are the nearest ones, theirs not always
        files = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("True", "False")]
        assert files[0] == files[1]


def test_adopting_shares_the_codes(folder):
    model = load(folder, False, nested=True)
    tokens = torch.arange(24).view(2, 12)
    expected, count = model(tokens).logits, model.num_parameters()
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight
    places = weight.data_ptr(), weight.quant_state.absmax.data_ptr()
    assert oddsmith.adopt(model) is model
    layer = model.get_submodule(name)
    assert type(layer) is Linear4bit
    assert (layer.weight.data_ptr(), layer.weight.quant_state.absmax.data_ptr()) == places
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert model.num_parameters() == count


def test_layers_that_cannot_be_adopted(folder):
    with pytest.raises(ValueError, match="has no Linear4bit layer of bitsandbytes"):
        oddsmith.adopt(AutoModelForCausalLM.from_pretrained(folder))
    model = load(folder, False)
    last = model.model.layers[-1].mlp.down_proj.weight
    last.quant_state.quant_type = "fp4"
    with pytest.raises(ValueError, match="down_proj has quant_type 'fp4'"):
        oddsmith.adopt(model)
    assert not any(isinstance(m, Linear4bit) for m in model.modules())


def wrapped(folder, kind):
    """As notebooks do: bitsandbytes' layers, with an adapter that the user has added."""
    oddsmith.use_for_bitsandbytes(False)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model = prepare_model_for_kbit_training(model)
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))


def wrapped_trainer(module, model, out):
    args = module.ORPOConfig(**arguments(out))
    rows, tokenizer = pairs(12), make_tokenizer()
    return module.ORPOTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_model_that_the_user_has_wrapped_trains_even_after_an_evaluation(folder, tmp_path, kind):
    theirs = wrapped_trainer(trl, wrapped(folder, kind), tmp_path / "theirs")
    theirs.train()
    ours = wrapped_trainer(oddsmith, wrapped(folder, kind), tmp_path / "ours")
    assert ours.path.batches == "packed"
    layers = [m for m in ours.model.modules() if type(m).__module__.startswith("bitsandbytes.")]
    codes = [layer.weight.data.clone() for layer in layers]
    ours.evaluate()
    ours.train()
    for mine, their in zip(train_logs(ours), train_logs(theirs), strict=True):
        assert mine["loss"] == pytest.approx(their["loss"], rel=1e-4)
        assert (
            mine["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-2) and mine["grad_norm"]
        )
    assert layers == [
        m for m in ours.model.modules() if type(m).__module__.startswith("bitsandbytes.")
    ]
    assert all(torch.equal(layer.weight.data, code) for layer, code in zip(layers, codes))


@pytest.mark.parametrize("served", [True, False])
def test_products_of_16_bits_with_a_head_of_32_are_packed(folder, tmp_path, served):
    """The article's recipe: prepare_model_for_kbit_training leaves the head in float32."""
    losses = []
    for free in (True, False):
        trainer = oddsmith.ORPOTrainer(
            load(folder, served, torch.bfloat16, nested=True),
            oddsmith.ORPOConfig(**arguments(tmp_path, padding_free=free)),
            train_dataset=pairs(8),
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        assert trainer.path.batches == ("packed" if free else "padded")
        trainer.train()
        losses.append([each["loss"] for each in train_logs(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
