"""Parameters that FSDP2 has split over processes, and their moments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .moments import decode


def local(tensor: Any) -> Tensor:
    """The local part of a tensor that FSDP2 has split, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


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
