"""The public functions: the ORPO head without logits, and NF4 tensors.

```python
from oddsmith.functional import linear_orpo, quantize_nf4
```
"""

from .head.ops import LinearORPOOutput, linear_logps, linear_orpo
from .quant.linear import linear_nf4
from .quant.nf4 import dequantize_nf4, quantize_nf4
from .quant.state import QuantState

__all__ = [
    "LinearORPOOutput",
    "QuantState",
    "dequantize_nf4",
    "linear_logps",
    "linear_nf4",
    "linear_orpo",
    "quantize_nf4",
]
