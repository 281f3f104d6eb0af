"""MetricStore: averages over micro-batches, read back once per log."""

from collections.abc import Mapping
from typing import Any

import torch


class MetricStore:
    """
    Collects metrics as they come and averages them when they are logged.

    Values stay on their device until then: reading one back would make the host wait for the
    device once per micro-batch and metric.
    """

    def __init__(self):
        self._sums: dict[str, dict[str, Any]] = {}
        self._counts: dict[str, dict[str, int]] = {}

    def add(self, split: str, metrics: Mapping[str, Any]) -> None:
        """
        Add the metrics of a micro-batch.

        Args:
            split (`str`): What they belong to: `"train"` or `"eval"`.
            metrics (`Mapping[str, float | Tensor]`): 0-dim values by name.
        """
        sums, counts = self._sums.setdefault(split, {}), self._counts.setdefault(split, {})
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                value = value.detach().double() if value.device.type != "mps" else value.detach()
            sums[name] = sums[name] + value if name in sums else value
            counts[name] = counts.get(name, 0) + 1

    def pop(self, split: str, accelerator: Any = None) -> dict[str, float]:
        """
        Averages since the last call, over all processes if there is an `accelerator`.

        Every process has to call it, with the same names.

        Args:
            split (`str`): What they belong to.
            accelerator (`Accelerator`, *optional*): Connects the processes.

        Returns:
            `dict[str, float]`: Averages by name, in the order they were first added.
        """
        sums, counts = self._sums.pop(split, {}), self._counts.pop(split, {})
        if not sums:
            return {}
        device = next((x.device for x in sums.values() if isinstance(x, torch.Tensor)), "cpu")
        values = torch.stack([torch.as_tensor(x, device=device).float() for x in sums.values()])
        averages = values / torch.tensor(list(counts.values()), device=device)
        if accelerator is not None and accelerator.num_processes > 1:
            averages = accelerator.reduce(averages.to(accelerator.device), reduction="mean")
        return dict(zip(sums, averages.tolist(), strict=True))
