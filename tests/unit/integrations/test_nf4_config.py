"""4-bit models are computed by oddsmith if selected, and by bitsandbytes otherwise."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, MistralForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

import oddsmith
from oddsmith import NF4Config
from oddsmith.integrations import quantizer_table
from oddsmith.integrations.quantizer_table import MERGE, TABLE, NF4ByOddsmith
from oddsmith.integrations.transformers_quantizer import NF4Quantizer
from oddsmith.nn import Linear4bit

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(autouse=True)
def as_imported():
    yield
    oddsmith.use_for_bitsandbytes(False)


@pytest.fixture
def folder(tmp_path):
    # Rows of whole blocks: bitsandbytes 0.50 reads others wrongly on processors with AVX-512.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(vocab_size=61, **sizes, **heads)).save_pretrained(
        tmp_path / "full"
    )
    return tmp_path / "full"


def layer_of(folder, config=None):
    given = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(folder, **given)
    return type(model.model.layers[0].mlp.up_proj), model


def test_bitsandbytes_loads_what_it_loaded_before(folder):
    """Building an NF4Config does not affect other types or plain configurations."""
    NF4Config()
    for settings in (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_8bit": True},
    ):
        kind, model = layer_of(folder, BitsAndBytesConfig(**settings))
        assert kind.__module__.startswith("bitsandbytes."), settings
        assert model(torch.arange(4)[None]).logits.isfinite().all()
    kind, _ = layer_of(folder, NF4Config())
    assert kind is Linear4bit


def test_the_switch_is_for_nf4_alone(folder):
    oddsmith.use_for_bitsandbytes()
    kind, _ = layer_of(folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"))
    assert kind.__module__.startswith("bitsandbytes.")
    plain = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert layer_of(folder, plain)[0] is Linear4bit
    oddsmith.use_for_bitsandbytes(False)
    assert layer_of(folder, plain)[0].__module__.startswith("bitsandbytes.")
    assert layer_of(folder, NF4Config())[0] is Linear4bit


def copies(config):
    yield copy.copy(config)
    yield copy.deepcopy(config)
    yield pickle.loads(pickle.dumps(config))
    yield BitsAndBytesConfig.from_dict(config.to_dict())
    yield BitsAndBytesConfig(**config.to_diff_dict())
    yield AutoQuantizationConfig.from_dict(config.to_dict())


def test_copies_ask_for_the_same():
    for each in copies(NF4Config(double_quant=True)):
        assert type(each.bnb_4bit_quant_type) is NF4ByOddsmith
        assert each.bnb_4bit_use_double_quant is True
        assert isinstance(AutoHfQuantizer.from_config(each), NF4Quantizer)
    plain = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for each in copies(plain):
        assert not isinstance(AutoHfQuantizer.from_config(each), NF4Quantizer)


def test_a_checkpoint_does_not_name_the_library_that_wrote_it(folder, tmp_path):
    _, model = layer_of(folder, NF4Config())
    model.save_pretrained(tmp_path / "nf4")
    said = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    plain = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert said == json.loads(json.dumps(plain.to_dict()))
    assert layer_of(tmp_path / "nf4")[0].__module__.startswith("bitsandbytes.")


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_a_quantised_checkpoint_is_loaded_by_the_selected_library(folder, tmp_path):
    _, model = layer_of(folder, NF4Config())
    model.save_pretrained(tmp_path / "nf4")
    kind, again = layer_of(tmp_path / "nf4", NF4Config())
    assert kind is Linear4bit
    tokens = torch.arange(12)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    plain = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert layer_of(tmp_path / "nf4", plain)[0].__module__.startswith("bitsandbytes.")
    _, other = layer_of(folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"))
    other.save_pretrained(tmp_path / "fp4")
    # The checkpoint decides what it holds.
    assert layer_of(tmp_path / "fp4", NF4Config())[0].__module__.startswith("bitsandbytes.")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4'"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "load_in_8bit=True"),
    ],
)
def test_another_type_is_refused_by_name(settings, found):
    with pytest.raises(ValueError, match=f"NF4Config: got {found}; must be .*BitsAndBytesConfig"):
        NF4Config(**settings)


@pytest.mark.parametrize(
    "missing",
    [
        "transformers.core_model_loading:WeightConverter",
        "transformers.core_model_loading:ConversionOps",
        "transformers.quantizers.quantizers_utils:should_convert_module",
        "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer.param_needs_quantization",
        "transformers.quantizers.base:HfQuantizer._process_model_before_weight_loading",
    ],
)
def test_without_a_name_of_transformers_bitsandbytes_loads(missing, monkeypatch, caplog):
    module, _, path = missing.partition(":")
    owner = quantizer_table.find(f"{module}:{path.rpartition('.')[0] or '__name__'}")
    owner = sys.modules[module] if isinstance(owner, str) else owner
    name = path.rpartition(".")[2]
    for each in getattr(owner, "__mro__", [owner]):
        if name in vars(each):
            monkeypatch.delattr(each, name)
    if "_process_model" in name:
        from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

        monkeypatch.delattr(Bnb4BitHfQuantizer, name)
    monkeypatch.delitem(sys.modules, "oddsmith.integrations.transformers_quantizer")
    monkeypatch.setattr(quantizer_table, "_reported", set())
    for _ in range(2):
        quantizer = AutoHfQuantizer.from_config(NF4Config())
        assert type(quantizer).__name__ == "Bnb4BitHfQuantizer"
    (line,) = caplog.messages
    assert name in line and "loaded by bitsandbytes" in line


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None  # as if it were not installed
import oddsmith
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, MistralForCausalLM
for settings in ({"load_in_4bit": True}, {"load_in_8bit": True}):
    try:
        AutoModelForCausalLM.from_pretrained(
            sys.argv[1], quantization_config=BitsAndBytesConfig(**settings)
        )
    except ImportError as error:
        assert "requires bitsandbytes" in str(error), error
    else:
        sys.exit(1)
"""


def test_without_bitsandbytes_other_types_end_in_transformers_own_error(folder):
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, folder], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_patches_are_there_only_when_asked_for():
    while TABLE.is_applied():
        TABLE.undo()
    while MERGE.is_applied():
        MERGE.undo()
    config = NF4Config()
    assert TABLE.is_applied() and MERGE.is_applied()
    TABLE.undo()
    # As a process that was started afresh gets it.
    pickle.loads(pickle.dumps(config))
    assert TABLE.is_applied()
