"""Whether a model draws random numbers for its tokens in training, beside dropout.

The routers of Phi-3.5-MoE draw the experts of a token, and others add noise to what they get. A packed
row has other tokens in other places than a padded batch, and would get other numbers.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from .dropout import NoDropout
from .model_core import observed

__all__ = ["draws_for_tokens"]

# Two lengths of a row.
_LENGTHS = (5, 12)


def draws_for_tokens(core: Any) -> bool:
    """
    Whether a model in training mode, without dropout, draws more random numbers for more tokens. What
    it draws for each layer, as to skip some, is the same for any row. Nothing is changed.

    Args:
        core (`PreTrainedModel`): The model, without wrappers, on a CPU.
    """
    ids = torch.arange(3, 3 + max(_LENGTHS))[None] % core.get_input_embeddings().weight.shape[0]
    states = []
    without = NoDropout(core)
    with ExitStack() as stack:
        stack.enter_context(observed(core))
        stack.callback(without.undo)
        without.apply()
        for module in core.modules():
            module.training = True
        for length in _LENGTHS:
            torch.manual_seed(1)
            row = ids[:, :length]
            try:
                core(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
            except Exception:  # whatever a model's own code may raise; the run itself will show it
                return False
            states.append(torch.get_rng_state())
    return not torch.equal(*states)
