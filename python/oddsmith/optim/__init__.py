"""Optimisers with small states: 8-bit and paged AdamW, GaLore and APOLLO.

```python
from oddsmith.optim import AdamW8bit, GaLoreAdamW

optimizer = AdamW8bit([{"params": matrices}, {"params": embeddings, "optim_bits": 32}], lr=1e-4)

low_rank = {"rank": 128, "update_proj_gap": 200, "scale": 0.25}
optimizer = GaLoreAdamW([{"params": vectors}, {"params": matrices, **low_rank}], lr=1e-4)
```
"""

from .adamw.adamw_8bit import AdamW8bit
from .adamw.paged import PagedAdamW8bit, PagedAdamW32bit
from .low_rank.apollo import APOLLOAdamW
from .low_rank.galore import GaLoreAdafactor, GaLoreAdamW, optimizer_bytes
from .low_rank.galore_8bit import GaLoreAdamW8bit

__all__ = [
    "AdamW8bit",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "APOLLOAdamW",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "optimizer_bytes",
]
