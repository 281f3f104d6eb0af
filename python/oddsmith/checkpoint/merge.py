"""`oddsmith merge`: merges a LoRA adapter into its base, tensor by tensor, without a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import _core
from ..errors import UserError
from ..integrations.model_weights import Names, empty_model
from .adapter import Adapter
from .folder import Checkpoint, file_errors, local_folder
from .quantize import check_blocksize, method_of, quantization_config
from .rules import FLOATS, MergeUpdate, TensorRule
from .token_rows import rows_name, write_with_rows
from .write import Summary, casts, check_dtype, with_dtype, write_checkpoint

# The tokenizer in the adapter's folder is the one that it was trained with.
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template\..*|vocab\..*|"
    r"merges\.txt|spiece\.model|sentencepiece.*\.model"
)


@dataclasses.dataclass(frozen=True)
class State:
    """The state of a 4-bit weight: sizes, dtype, block size, double quantisation."""

    shape: list[int]
    dtype: str
    blocksize: int
    double_quant: bool


def states_of(source: Checkpoint) -> dict[str, State]:
    """
    The 4-bit weights of a checkpoint.

    Raises:
        UserError: If it has another quantisation, or a state does not fit its weight.
    """
    found = source.config.get("quantization_config")
    if found and method_of(found) != "nf4 of bitsandbytes":
        raise UserError(
            f"{source.path}: is quantised with {method_of(found)}; only nf4 can be read"
        )
    names = []
    for name, tensor in source.tensors.items():
        weight, mark, _ = name.rpartition(".quant_state.bitsandbytes__")
        if mark:
            names.append(weight)
        elif tensor.kind == "I8" and f"{name.removesuffix('.weight')}.SCB" in source.tensors:
            raise UserError(f"{source.path}: {name} is int8 (LLM.int8()); only nf4 can be read")
    with file_errors():
        states = _core.checkpoint_states(source.shards, names)
    return {name: State(**state) for name, state in zip(names, states) if state is not None}


def _kind(module: nn.Module, name: str) -> str:
    for kind, names in ((nn.Linear, "linear"), (Conv1D, "conv1d"), (nn.Embedding, "embedding")):
        if isinstance(module, kind):
            return names
    raise UserError(
        f"{name} is a {type(module).__name__}; adapters are merged in Linear, Conv1D and Embedding"
    )


class Merge:
    """
    The rules that merge an adapter into a checkpoint.

    Args:
        source ([`Checkpoint`]): The base.
        adapter ([`Adapter`]): The adapter.
        names ([`Names`]): The names of the base.
        dtype (`str`, *optional*): Dtype of the result; as stored if not given.
    """

    def __init__(self, source: Checkpoint, adapter: Adapter, names: Names, dtype: str | None):
        self.source: Checkpoint = source
        self.adapter: Adapter = adapter
        self.names: Names = names
        self.dtype: str | None = dtype
        self.states: dict[str, State] = states_of(source)
        self.tied: dict[str, str] = names.tied()

    def _key(self, parameter: str, why: str, both: bool = False) -> str:
        """Name of a parameter in the checkpoint; `both`: what it is tied to changes too."""
        if parameter in self.tied and both:
            parameter = min(
                parameter, self.tied[parameter], key=lambda n: self.names.find(n) is None
            )
        elif parameter in self.tied:
            raise UserError(
                f"{self.adapter.file}: {why} {parameter}, which the model ties to "
                f"{self.tied[parameter]}: merged, both would change"
            )
        key = self.names.find(parameter)
        if key is None and parameter in self.names.converted:
            raise UserError(
                f"{self.adapter.file}: {why} {parameter}, which transformers builds from other tensors "
                "than those in the checkpoint; load, merge and save it with peft"
            )
        if key is None:
            raise UserError(
                f"{self.adapter.file}: {why} {parameter}, which {self.source.path} does not have"
            )
        return key

    def _module(self, name: str) -> nn.Module:
        try:
            return self.names.model.get_submodule(name)
        except AttributeError:
            raise UserError(
                f"{self.adapter.file}: is for a module {name}, which the model of "
                f"{self.source.path} does not have"
            ) from None

    def _updates(self) -> Iterator[tuple[str, MergeUpdate]]:
        for module in self.adapter.modules:
            kind = _kind(self._module(module), module)
            key = self._key(f"{module}.weight", "changes")
            stored = "linear" if kind == "conv1d" and key in self.states else kind
            for parameter, update in self.adapter.updates(module, kind, stored):
                yield self._key(parameter, "changes"), update

    def dtype_of(self, key: str) -> str:
        """Dtype that a tensor has in the result, or is quantised from."""
        if self.dtype is not None:
            return self.dtype
        if key in self.states:
            return self.states[key].dtype
        kind = self.source.tensors[key].kind
        if kind not in FLOATS:
            raise UserError(
                f"{self.source.path}: {key} has dtype {kind}; must be {', '.join(FLOATS)}"
            )
        return FLOATS[kind]

    def _turned(self, key: str) -> bool:
        """True for a 4-bit weight that is a `Conv1D` in full precision."""
        module = self.names.parameter[key].removesuffix(".weight")
        return key in self.states and isinstance(self._module(module), Conv1D)

    def changes(self) -> dict[str, TensorRule]:
        """Rules of the tensors that the adapter changes, in full precision."""
        rules: dict[str, TensorRule] = {}
        both = self._replaced_at_both_ends()
        for parameter, name in self.adapter.replacements.items():
            key = self._key(parameter, "replaces", parameter in both)
            self._refuse_4_bit(key, parameter)
            rules[key] = TensorRule(key, self.dtype_of(key), replacement=name)
        for module, key in self.token_keys().items():
            rules[key] = TensorRule(key, self.dtype_of(key), replacement=rows_name(module))
        for key, update in self._updates():
            rule = rules.get(key) or TensorRule(
                key, self.dtype_of(key), transposed=self._turned(key)
            )
            rules[key] = dataclasses.replace(rule, update=update)
        if not rules:
            raise UserError(f"{self.adapter.file}: has no tensors")
        return rules

    def token_keys(self) -> dict[str, str]:
        """Names of the embeddings in which the adapter replaces rows, by module."""
        keys = {}
        for module in self.adapter.token_rows:
            # peft trains the same rows in what is tied to the embedding.
            keys[module] = self._key(f"{module}.weight", "replaces rows of", both=True)
            self._refuse_4_bit(keys[module], f"{module}.weight")
        return keys

    def _refuse_4_bit(self, key: str, parameter: str) -> None:
        if key in self.states:
            raise UserError(
                f"{self.adapter.file}: replaces {parameter}, which is 4-bit in the base"
            )

    def _replaced_at_both_ends(self) -> set[str]:
        """Parameters that are replaced by the same values as what they are tied to."""
        found = self.adapter.replacements
        pairs = [(name, self.tied[name]) for name in found if self.tied.get(name) in found]
        if not pairs:
            return set()
        with file_errors(), safe_open(self.adapter.file, framework="pt") as file:
            return {
                one
                for one, other in pairs
                if torch.equal(file.get_tensor(found[one]), file.get_tensor(found[other]))
            }

    def full(self) -> list[TensorRule]:
        """Rules for a result in full precision."""
        rules = self.changes()
        for key in self.states.keys() - rules.keys():
            rules[key] = TensorRule(key, self.dtype_of(key), transposed=self._turned(key))
        return [*rules.values(), *casts(self.source, self.dtype, rules)]

    def quantized(
        self, weights: dict[str, bool], blocksize: int | None, double_quant: bool | None
    ) -> list[TensorRule]:
        """Rules for a 4-bit result: unchanged 4-bit weights are copied."""
        rules = self.changes()
        for key, transposed in weights.items():
            state = self.states.get(key)
            same = state is not None and (
                blocksize in (None, state.blocksize) and double_quant in (None, state.double_quant)
            )
            if same and key not in rules:
                continue
            rule = rules.get(key) or TensorRule(key, self.dtype_of(key))
            rules[key] = dataclasses.replace(
                rule,
                quantize=True,
                transposed=transposed and state is None,
                blocksize=blocksize or (state.blocksize if state else 64),
                double_quant=bool(state and state.double_quant)
                if double_quant is None
                else double_quant,
            )
        if left := sorted(self.states.keys() - weights.keys()):
            raise UserError(
                f"{self.source.path}: {left[0]} is 4-bit, but transformers would not quantise it"
            )
        return [*rules.values(), *casts(self.source, self.dtype, rules)]


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    quantize: bool = False,
    double_quant: bool | None = None,
    blocksize: int | None = None,
    compute_dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Summary:
    """
    Merges a LoRA adapter into its base.

    Equivalent to this code, if the base fits in memory:

    ```python
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(out)
    ```

    The sums are computed in `float32` and rounded once.

    Args:
        base (`str` or `Path`): Folder or hub id of a model in `float32`, `bfloat16`, `float16` or NF4.
        adapter (`str` or `Path`): Folder or hub id of a LoRA or DoRA adapter.
        out (`str` or `Path`): Output folder.
        dtype (`str`, *optional*): Dtype of the result; if not given, the stored one, or the one
            before quantisation.
        quantize (`bool`, *optional*, defaults to `False`): Write NF4. Weights of a 4-bit base that
            the adapter does not change are copied.
        double_quant (`bool`, *optional*): Quantise the scales; as in a 4-bit base if not given, else
            not.
        blocksize (`int`, *optional*): Values that share a scale; as in a 4-bit base if not given, else
            64.
        compute_dtype (`str`, *optional*): Dtype in which 4-bit layers compute; as in a 4-bit base
            if not given, else that of the weights.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a model in `out`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Allow code from the model's
            repository.

    Raises:
        UserError: For files, tensors or arguments that do not fit, an adapter of another kind, NaN or
            infinity in the result, and a full disk. `out` is unchanged then.
    """
    check_dtype("dtype", dtype)
    check_dtype("compute_dtype", compute_dtype)
    for flag, value in (
        ("double_quant", double_quant), ("blocksize", blocksize), ("compute_dtype", compute_dtype)
    ):  # fmt: skip
        if value is not None and not quantize:
            raise UserError(f"--{flag}: only with --quantize")
    if blocksize is not None:
        check_blocksize(blocksize)
    source, lora = Checkpoint(local_folder(base)), Adapter(local_folder(adapter))
    names = Names(empty_model(source.path, trust_remote_code, len(source.tensors)), source.tensors)
    merge = Merge(source, lora, names, dtype)
    config = with_dtype(source.config, dtype)
    before = config.pop("quantization_config", None) or {}
    if quantize:
        skip = before.get("llm_int8_skip_modules") or ()
        weights, skipped = names.quantized(skip)
        rules = merge.quantized(weights, blocksize, double_quant)
        compute_dtype = compute_dtype or before.get("bnb_4bit_compute_dtype")
        first = next(iter(weights))
        config["quantization_config"] = quantization_config(
            compute_dtype or merge.dtype_of(first),
            before.get("bnb_4bit_use_double_quant", False)
            if double_quant is None
            else double_quant,
            skipped,
        )
    else:
        rules = merge.full()
    tokenizer = sorted(
        file for file in lora.folder.iterdir() if file.is_file() and _TOKENIZER.fullmatch(file.name)
    )
    with ExitStack() as stack:
        file = lora.file
        if lora.token_rows:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            file = write_with_rows(source, lora, merge.token_keys(), folder)
        return write_checkpoint(
            source,
            Path(out),
            rules,
            config,
            adapter=file,
            extra_files=(tokenizer, lora.folder),
            overwrite=overwrite,
        )
