"""The compiled core. Use [`oddsmith.functional`], which adds autograd and torch.compile."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import TypedDict, final

from torch import Tensor

from .checkpoint.rules import TensorRule
from .head.arguments import HeadArguments, Needs, ObjectiveArguments, PairArguments
from .optim.adamw.arguments import Item
from .quant.arguments import PackedWeight

__version__: str

@final
class RowEncoder:
    """A tokenizer's JSON together with the rules for rows; see [`oddsmith.data.rust_rows.FastRows`]."""

    def __new__(
        cls,
        json: str,
        *,
        split_special_tokens: bool,
        bos: int | None,
        eos: int | None,
        label_pad: int,
        max_length: int,
        max_prompt_length: int | None,
        truncation_mode: str,
    ) -> RowEncoder: ...
    def columns(
        self,
        prompts: tuple[bytes, bytes],
        chosen: tuple[bytes, bytes],
        rejected: tuple[bytes, bytes],
        *,
        name: str,
        first_row: int,
        parallel: bool,
    ) -> dict[str, bytes]:
        """
        Buffers of the token columns of a batch; texts are given as data and 64-bit offsets.

        `{prompt,chosen,rejected}_{input_ids,offsets}` and `{chosen,rejected}_labels` are int32,
        `overlength` and `empty` are one byte per row.
        """

class _Gradients(TypedDict):
    """Empty if not needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

class _Logps(TypedDict):
    logps: Tensor
    lse: Tensor
    expectation: Tensor

class _Report(TypedDict):
    """The fields of [`oddsmith.functional.LinearORPOOutput`], and the gradients."""

    loss: Tensor
    nll_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds_chosen: Tensor
    log_odds_ratio: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor
    empty_completions: Tensor
    gradients: _Gradients

def linear_logps(head: HeadArguments, expectation: bool) -> _Logps: ...
def linear_logps_backward(
    head: HeadArguments, lse: Tensor, upstream: Tensor, needs: Needs
) -> _Gradients: ...
def linear_orpo(
    head: HeadArguments, pairs: PairArguments, objective: ObjectiveArguments, needs: Needs
) -> _Report: ...
def scale_gradient(gradient: Tensor, factor: Tensor) -> bool: ...
def install_pool() -> bool: ...
def uninstall_pool() -> None: ...
def nf4_code() -> Tensor: ...
def quantize_nf4(tensor: Tensor, blocksize: int) -> tuple[Tensor, Tensor]: ...
def dequantize_nf4(weight: PackedWeight, shape: list[int], dtype: str) -> Tensor: ...
def linear_nf4(
    x: Tensor, weight: PackedWeight, shape: tuple[int, int], bias: Tensor | None
) -> Tensor: ...
def linear_nf4_input_gradient(
    grad: Tensor, weight: PackedWeight, shape: tuple[int, int], weight_dtype: str
) -> Tensor: ...
def quantize_blockwise(tensor: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]: ...
def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: str
) -> Tensor: ...
def adamw_step(items: list[Item], bad: Tensor) -> None: ...
def adamw_serves(value: Tensor, eight_bits: bool) -> bool:
    """Whether `adamw_step` serves values on the device of this one, with moments of 8 or of 32 bits."""

def moment_maps() -> tuple[Tensor, Tensor]: ...
def kernel_families() -> list[tuple[str, list[str]]]:
    """Names of the families of CUDA kernels, each with its files in kernels/."""

def kernel_folder_fault(path: str | PathLike[str]) -> tuple[str, str] | None:
    """Why files of a folder are not used, and what to do; None if they are, or the folder is not there yet."""

def read_private(path: str | PathLike[str], most: int) -> bytes | None:
    """The content of a file that nobody but this user can change; None if there is none."""

def kernel_identity(gpu: int) -> str:
    """A digest of the sources, the compiler, the driver's interface and the architecture of a GPU."""

def load_kernels(gpu: int, source: str) -> None:
    """Compile a file of kernels/ for a GPU and load it."""

def trust_kernels(gpu: int, families: list[str] | None) -> None:
    """Use these families on a GPU and no others; with None, the next call tries the GPU's kernels."""

def trusted_kernels(gpu: int) -> list[str] | None:
    """The families that are used on a GPU; None before its self-test."""

def emulates_cuda() -> bool:
    """Whether CPU tensors take the path of a GPU."""

_Path = str | PathLike[str]

class _TensorParts(TypedDict):
    name: str
    kind: str  # as safetensors calls its dtype
    shape: list[int]

class _StateParts(TypedDict):
    shape: list[int]
    dtype: str
    blocksize: int
    double_quant: bool

class _WrittenParts(TypedDict):
    names: list[str]
    len: int  # bytes of its tensors, at most

def checkpoint_tensors(path: _Path) -> list[_TensorParts]: ...
def checkpoint_states(base: Sequence[_Path], names: list[str]) -> list[_StateParts | None]: ...
def converted_size(
    base: Sequence[_Path], adapter: _Path | None, rules: list[TensorRule]
) -> int: ...
def convert_checkpoint(
    base: Sequence[_Path],
    adapter: _Path | None,
    rules: list[TensorRule],
    outputs: Sequence[_Path],
    code: Tensor,
    progress: Callable[[int], object],
) -> list[_WrittenParts]: ...

# In builds with the cargo feature `testing` only.

def use_tensor_ops(on: bool) -> None:
    """Make CPU tensors take the path of other devices."""

def emulate_cuda(on: bool) -> None:
    """Make CPU tensors take the path of CUDA tensors, with the driver in ODDSMITH_CUDA_DRIVER."""

def emulate_gpu(gpu: int) -> None:
    """Have CPU tensors on the emulated GPU of this index from now on."""

def host_waits() -> dict[str, int]:
    """How often the core made the host wait for a GPU or copied between the two since the last call, by what."""

def emulate_streams(address: int) -> None:
    """Ask the C function at `address` for the current stream of the emulated GPU; 0 for the default one."""

def kernel_sources() -> list[str]:
    """Names of the files in kernels/."""

def compile_kernels(
    source: str, architecture: str, small_arguments: bool = False
) -> tuple[bytes, str]:
    """The binary for an architecture such as sm_90, and the assembler's report; for a driver before CUDA 12.1."""
