"""The compiled core. Use [`oddsmith.functional`], which adds autograd and torch.compile."""

from torch import Tensor

__version__: str
TORCH_BUILD_VERSION: str

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
    beta: float,
    nll_scope: str,
    odds_ratio_link: str,
    logits_budget: int | None,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]: ...
def use_tensor_ops(on: bool) -> None:
    """Make CPU tensors take the path of other devices, for tests."""

def install_pool() -> bool: ...
def uninstall_pool() -> None: ...
