"""The public modules: linear layers with 4-bit weights.

```python
from oddsmith.nn import Linear4bit
```
"""

from .quant.modules import Linear4bit, Params4bit

__all__ = ["Linear4bit", "Params4bit"]
