"""The compiled core. Use [`oddsmith.functional`], which adds autograd and torch.compile."""

from collections.abc import Callable
from os import PathLike

from torch import Tensor

from .checkpoint_plan import Rule

__version__: str

class RowEncoder:
    """A tokenizer's JSON together with the rules for rows; see [`oddsmith.fast_rows.FastRows`]."""

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
        Buffers of the token columns of a batch; texts come as data and 64-bit offsets.

        `{prompt,chosen,rejected}_{input_ids,offsets}` and `{chosen,rejected}_labels` are int32,
        `overlength` and `empty` a byte for each row.
        """

def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    expectation: bool,
) -> list[Tensor]: ...
def linear_logps_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    lse: Tensor,
    upstream: Tensor,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]: ...
def linear_orpo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    sequence: Tensor,
    completion: Tensor,
    num_pairs: int | None,
    num_scored: int | None,
    beta: float,
    nll_scope: str,
    odds_ratio_link: str,
    logits_budget: int | None,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]: ...
def scale_gradient(gradient: Tensor, factor: Tensor) -> bool: ...
def use_tensor_ops(on: bool) -> None:
    """Make CPU tensors take the path of other devices, for tests."""

def install_pool() -> bool: ...
def uninstall_pool() -> None: ...
def kernel_sources() -> list[str]:
    """Names of the files in kernels/."""

def compile_kernels(source: str, architecture: str) -> tuple[bytes, str]:
    """The binary for an architecture such as sm_90, and the assembler's report."""

def emulate_cuda(on: bool) -> None:
    """Make CPU tensors take the path of CUDA tensors, through the driver ODDSMITH_CUDA_DRIVER names."""

_Nested = tuple[Tensor, Tensor, Tensor, int]  # absmax, map, offset and block size of the scales

def nf4_code() -> Tensor: ...
def quantize_nf4(tensor: Tensor, blocksize: int) -> tuple[Tensor, Tensor]: ...
def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested: _Nested | None,
    blocksize: int,
    shape: list[int],
    dtype: str,
) -> Tensor: ...
def linear_nf4(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: _Nested | None,
    blocksize: int,
    shape: tuple[int, int],
    bias: Tensor | None,
) -> Tensor: ...
def linear_nf4_input_gradient(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: _Nested | None,
    blocksize: int,
    shape: tuple[int, int],
    weight_dtype: str,
) -> Tensor: ...
def quantize_blockwise(
    tensor: Tensor, code: Tensor, blocksize: int, stepped: bool
) -> tuple[Tensor, Tensor]: ...
def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: str
) -> Tensor: ...

# Value, gradient, both moments, scales of 8-bit moments, place of the first element; then
# beta1, beta2, eps, step size and what decay leaves, and the seed of stochastic rounding.
_Item = tuple[
    tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None, int],
    tuple[tuple[float, float, float, float, float], int | None],
]

def adamw_step(items: list[_Item], bad: Tensor) -> None: ...
def moment_maps() -> tuple[Tensor, Tensor]: ...

_Path = str | PathLike[str]

def checkpoint_tensors(path: _Path) -> list[tuple[str, str, list[int]]]: ...
def checkpoint_states(
    base: list[_Path], names: list[str]
) -> list[tuple[list[int], str, int, bool] | None]: ...
def converted_size(base: list[_Path], adapter: _Path | None, rules: list[Rule]) -> int: ...
def convert_checkpoint(
    base: list[_Path],
    adapter: _Path | None,
    rules: list[Rule],
    outputs: list[_Path],
    code: Tensor,
    stepped: bool,
    progress: Callable[[int], object],
) -> list[tuple[list[str], int]]: ...
