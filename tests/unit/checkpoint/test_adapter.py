"""LoRA adapters on disk: their parts, scales and updates, and what is refused."""

import json
import math

import pytest
import torch
from peft.utils.other import get_pattern_key

from oddsmith.checkpoint.adapter import Adapter
from oddsmith.checkpoint.merge import merge_adapter
from oddsmith.checkpoint.rules import Factor, MergeUpdate
from oddsmith.errors import UserError
from support.checkpoint_models import make_adapter


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "has no lora_magnitude_vector; use_dora is True"),
        (
            {"layer_replication": [[0, 1]]},
            r"uses layer_replication, which cannot be merged here \(it makes a model with more layers",
        ),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            r"uses target_parameters, which cannot be merged here \(it changes parameters that",
        ),
        (
            {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"},
            "uses alora_invocation_tokens",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "which changed the base weights"),
        ({"init_lora_weights": "olora"}, "which changed the base weights"),
    ],
)
def test_kinds_of_adapters_that_are_refused(options, words, base, tmp_path):
    with pytest.raises(UserError, match=words):
        merge_adapter(base, make_adapter(tmp_path, **options), tmp_path / "out")


def test_other_methods_are_refused_by_name(base, tmp_path):
    adapter = make_adapter(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match="is a IA3 adapter; only LORA"):
        merge_adapter(base, adapter, tmp_path / "out")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is not a safetensors file"):
        merge_adapter(base, adapter, tmp_path / "out")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="has no adapter_config.json"):
        merge_adapter(base, adapter, tmp_path / "out")


def parts(module, rank=2, **extra):
    """Tensors of an adapter for a module of 3 outputs and 4 inputs."""
    stem = f"base_model.model.{module}"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(rank, 4),
        f"{stem}.lora_B.weight": torch.ones(3, rank),
    }
    return {**tensors, **{f"{stem}.{name}": tensor for name, tensor in extra.items()}}


def test_names_are_sorted_into_modules_and_replacements(tmp_path):
    tensors = parts("layers.0.q_proj", **{"lora_B.bias": torch.ones(3)})
    tensors["base_model.model.layers.0.k_proj.base_layer.bias"] = torch.ones(3)
    tensors["base_model.model.lm_head.modules_to_save.weight"] = torch.ones(3, 4)
    adapter = Adapter(make_adapter(tmp_path, tensors, lora_bias=True))
    stem = "base_model.model.layers.0.q_proj"
    assert adapter.modules == {
        "layers.0.q_proj": {
            "lora_A": f"{stem}.lora_A.weight", "lora_B": f"{stem}.lora_B.weight",
            "lora_B.bias": f"{stem}.lora_B.bias",
        }
    }  # fmt: skip
    assert adapter.replacements == {
        "layers.0.k_proj.bias": "base_model.model.layers.0.k_proj.base_layer.bias",
        "lm_head.weight": "base_model.model.lm_head.modules_to_save.weight",
    }
    weight, bias = adapter.updates("layers.0.q_proj", "linear", "linear")
    scale = 8 / 2  # peft's lora_alpha, and the rank of the file
    left, right = Factor(f"{stem}.lora_B.weight"), Factor(f"{stem}.lora_A.weight")
    assert weight == ("layers.0.q_proj.weight", MergeUpdate(left, right, scale, None))
    assert bias == ("layers.0.q_proj.bias", MergeUpdate(Factor(f"{stem}.lora_B.bias"), None, scale))


def test_transposed_weights_get_transposed_updates(tmp_path):
    adapter = Adapter(make_adapter(tmp_path, parts("c_fc"), lora_alpha=3))
    ((name, update),) = adapter.updates("c_fc", "conv1d", "conv1d")
    a, b = (f"base_model.model.c_fc.lora_{side}.weight" for side in "AB")
    assert (name, update) == ("c_fc.weight", MergeUpdate(Factor(a, True), Factor(b, True), 1.5))
    # A quantised one is already transposed.
    ((_, update),) = adapter.updates("c_fc", "conv1d", "linear")
    assert update == MergeUpdate(Factor(b), Factor(a), 1.5)


@pytest.mark.parametrize(
    ("options", "rank", "scale"),
    [
        ({"r": 2, "lora_alpha": 3}, 2, 1.5),
        ({"r": 4, "lora_alpha": 3, "use_rslora": True}, 4, 1.5),
        ({"r": 8, "rank_pattern": {"q_proj": 4}, "lora_alpha": 6}, 4, 1.5),
        ({"r": 4, "alpha_pattern": {"0.q_proj": 10}, "lora_alpha": 6}, 4, 2.5),
        ({"r": 4, "alpha_pattern": {"k_proj": 10}, "lora_alpha": 6}, 4, 1.5),
    ],
)
def test_scales(options, rank, scale, tmp_path):
    adapter = Adapter(make_adapter(tmp_path, parts("layers.0.q_proj", rank), **options))
    assert adapter.scale("layers.0.q_proj") == scale


def test_dora_needs_linear_layers(tmp_path):
    tensors = parts("q_proj", lora_magnitude_vector=torch.ones(3))
    adapter = Adapter(make_adapter(tmp_path, tensors, use_dora=True))
    ((_, update),) = adapter.updates("q_proj", "linear", "linear")
    assert update.magnitude == "base_model.model.q_proj.lora_magnitude_vector"
    with pytest.raises(UserError, match="is of kind conv1d; DoRA is merged in linear layers"):
        list(adapter.updates("q_proj", "conv1d", "conv1d"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_alpha": "16"}, "lora_alpha is '16'; must be a finite number"),
        ({"lora_alpha": None}, "lora_alpha is None; must be"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf; must be"),
        ({"r": 0}, "r is 0; must be a whole number above 0"),
        ({"r": 1.5}, "r is 1.5; must be"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern, q_proj is nan; must be"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern, q_proj is True; must be"),
        ({"rank_pattern": [2]}, r"rank_pattern is \[2\]; must be a JSON object"),
        pytest.param(
            {"lora_alpha": 10**400}, r"lora_alpha is 10+\.\. \(401 characters\)", id="long"
        ),
        pytest.param({"r": 10**400}, r"r is 10+\.\. \(401 characters\)", id="long rank"),
        ({"rank_pattern": {"(?=q)q_proj": 4}}, "is no pattern that can be used here"),
    ],
)
def test_numbers_that_are_none(options, words, base, tmp_path):
    adapter = make_adapter(tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    with pytest.raises(UserError, match=words):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_an_adapter_stay_in_its_folder(base, tmp_path):
    """A file of the tokenizer is copied to the merged model, which others get."""
    adapter = make_adapter(tmp_path)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (adapter / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"tokenizer_config.json: is a link to .*secret.json"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["12", 3, [None], [1.5], [True], [[1]], {"embed_tokens": 3}])
def test_tokens_that_are_no_numbers(given, tmp_path):
    adapter = Adapter(make_adapter(tmp_path))
    adapter.config.trainable_token_indices = given
    with pytest.raises(UserError, match="must be a list of numbers of tokens"):
        adapter.token_indices("model.embed_tokens")


def test_a_pattern_takes_no_time_whatever_it_is(tmp_path):
    """Python's engine would need longer than there is for this one."""
    module = "a" * 64 + ".q_proj"
    pattern = r"((a+)+\.)*b"
    adapter = Adapter(make_adapter(tmp_path, parts(module), rank_pattern={pattern: 7}))
    assert adapter.scale(module) == adapter.config.lora_alpha / 2


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("q_proj", True), ("layers.0.q_proj", True), (r"layers\.\d\.q_proj", True), ("proj", False),
        ("q_proj|k_proj", True), ("model", False), ("q_pro", False), (r".*\.0\..*", True),
    ],
)  # fmt: skip
def test_patterns_are_found_as_peft_finds_them(pattern, found, tmp_path):
    module = "model.layers.0.q_proj"
    assert (get_pattern_key([pattern], module) == pattern) == found
    adapter = Adapter(make_adapter(tmp_path, parts(module), alpha_pattern={pattern: 10}, r=2))
    assert adapter.scale(module) == (5.0 if found else adapter.config.lora_alpha / 2)
