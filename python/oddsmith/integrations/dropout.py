"""No dropout in a model while it is trained (`disable_dropout`)."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from .patch import Patch

__all__ = ["NoDropout"]

_LAYERS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)

# For each module: how many runs have disabled its dropout, and its original rates.
_off: WeakKeyDictionary[nn.Module, tuple[int, dict[str, float]]] = WeakKeyDictionary()


class NoDropout(Patch):
    """
    Sets every dropout rate of a model to 0: those of dropout layers, and the numbers that attention
    layers pass to functional dropout.

    Args:
        model (`nn.Module`): The model.
    """

    target = "dropout rates of a model"
    purpose = "`disable_dropout` of ORPOConfig; the rates are restored when a run ends."
    tested = "torch 2.11, transformers 5.17 and 5.24"
    fallback = "its dropout stays on"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._modules: list[nn.Module] = []

    def _change(self) -> None:
        for module in self._model.modules():
            count, rates = _off.get(module, (0, {}))
            rates = rates | {name: rate for name, rate in _rates(module).items() if rate}
            if rates:
                for name in rates:
                    setattr(module, name, 0.0)
                _off[module] = (count + 1, rates)
                self._modules.append(module)

    def _restore(self) -> None:
        for module in self._modules:
            count, rates = _off.pop(module)
            if count > 1:  # another run of the same model is active
                _off[module] = (count - 1, rates)
                continue
            for name, rate in rates.items():
                if getattr(module, name, None) == 0.0:  # not set to something else since
                    setattr(module, name, rate)
        self._modules.clear()


def _rates(module: nn.Module) -> dict[str, float]:
    if isinstance(module, _LAYERS):
        return {"p": module.p}
    return {
        name: value
        for name, value in vars(module).items()
        if name.endswith("dropout") and isinstance(value, float)
    }
