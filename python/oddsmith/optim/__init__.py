"""Optimisers with small states: GaLore and APOLLO.

```python
from oddsmith.optim import GaLoreAdamW

low_rank = {"rank": 128, "update_proj_gap": 200, "scale": 0.25}
optimizer = GaLoreAdamW([{"params": vectors}, {"params": matrices, **low_rank}], lr=1e-4)
```
"""

from .apollo import APOLLOAdamW
from .galore import GaLoreAdafactor, GaLoreAdamW, optimizer_bytes
from .galore8bit import GaLoreAdamW8bit

__all__ = [
    "APOLLOAdamW",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "optimizer_bytes",
]
