"""What all patches share; see test_patches.py for each of them."""

import torch
from torch import nn

from oddsmith.integrations.module_forward import ModuleForward


def test_an_undo_in_the_middle_of_an_apply():
    class Undone(ModuleForward):
        def is_applied(self):
            found = super().is_applied()
            if found and self.collects:
                self.collects = False
                self.undo()  # as the garbage collector does for a user that is gone
            return found

    layer = nn.Linear(2, 2)
    patch = Undone(layer, lambda x: x + 1)
    patch.collects = False
    assert patch.apply()
    patch.collects = True
    assert patch.apply() and not patch.collects
    assert torch.equal(layer(torch.zeros(2)), torch.ones(2))
    patch.undo()
    assert "forward" not in vars(layer) and not patch.is_applied()
