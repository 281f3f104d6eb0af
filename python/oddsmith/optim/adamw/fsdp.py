"""Parameters that FSDP2 or tensor parallelism has split over processes, and their moments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .moments import decode


def local(tensor: Any) -> Tensor:
    """The local part of a tensor that is split, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_grad(parameter: Any) -> Tensor:
    """
    The part of a gradient that belongs to the local part of its parameter.

    Tensor parallelism leaves some gradients split in another way, or summed over processes only in
    part: an embedding's over the vocabulary, a norm's that each process has of its own activations.
    """
    grad = parameter.grad
    if hasattr(grad, "placements") and hasattr(parameter, "placements"):
        if grad.placements != parameter.placements:
            grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    return local(grad)


def gathered(parameter: Any, state: dict[str, Any]) -> dict[str, Any] | None:
    """The state of a split parameter with moments split in the same way, `fp32`; `None` for
    others.
    """
    if not hasattr(parameter, "device_mesh"):
        return None
    from torch.distributed.tensor import DTensor

    moments = {
        key: DTensor.from_local(
            moment,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        for key, moment in zip(("state1", "state2"), decode(state))
    }
    return {"step": state["step"], **moments}


def split(parameter: Any, value: Any) -> Any:
    """The local part of a saved moment."""
    if not isinstance(value, Tensor):
        return value
    own = local(value)
    if own is not value:
        return own
    if hasattr(parameter, "device_mesh") and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        mesh = parameter.device_mesh
        return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements).to_local()
    return value
