"""What autograd saves, counted."""

import torch
from torch.autograd.graph import saved_tensors_hooks

from oddsmith.integrations.saved_bytes import SavedBytes


def test_each_storage_counts_once():
    weight = torch.randn(8, 8, requires_grad=True)
    given = torch.randn(3, 8, requires_grad=True)
    with SavedBytes([weight, given]) as saved:
        product = given @ weight  # saves both factors, which are there anyway
        root = product.exp()  # saves its result
        (root * root.view(8, 3).t().contiguous()).sum()  # saves it again, and a copy
    assert saved.total == 2 * 3 * 8 * 4
    product.sum().backward()


def test_a_view_counts_as_its_storage():
    given = torch.randn(4, 8, requires_grad=True)
    with SavedBytes([given]) as saved:
        given[1:3].sin()  # saves a view of what is given
        wide = given * 2.0
        wide[0].sin()  # saves a view of eight numbers, and so keeps all
    assert saved.total == 4 * 8 * 4


def test_what_autograd_does_is_the_same():
    given = torch.randn(5, 6, requires_grad=True)
    (expected,) = torch.autograd.grad((given.exp() * given.tanh()).sum(), given)
    with SavedBytes([]):
        out = (given.exp() * given.tanh()).sum()
    (grad,) = torch.autograd.grad(out, given)
    assert torch.equal(grad, expected)


def test_hooks_around_it_go_on_afterwards():
    seen = []
    given = torch.randn(3, requires_grad=True)
    with saved_tensors_hooks(lambda each: (seen.append(1), each)[1], lambda each: each):
        with SavedBytes([]):
            given.exp()
        assert not seen
        given.exp()
        assert seen


def test_sparse_tensors_have_a_size():
    with SavedBytes([]) as saved:
        dense = torch.randn(3, 2, requires_grad=True)
        torch.sparse.mm(torch.eye(3).to_sparse(), dense).sum()
    assert saved.total > 0
