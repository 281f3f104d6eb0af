"""Pages: a mapped file without a name, or pinned memory; tensors in them."""

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from oddsmith.optim import PagedAdamW8bit
from oddsmith.optim.adamw.pages import FilePages, PinnedPages
from support.gradients import randn, train

RULE = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}


def mapped(folder):
    """Lines of the process's memory map that are files of a folder, with or without a name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if f"{folder}/oddsmith-" in line]


def test_the_state_is_in_a_file_without_a_name(tmp_path):
    weight = nn.Parameter(randn(512, 257))
    optimizer = PagedAdamW8bit([weight], **RULE, page_dir=tmp_path)
    assert not mapped(tmp_path)
    train(optimizer, weight, 2, lambda s: randn(512, 257, seed=s))
    (codes, scales) = mapped(tmp_path)
    for line in (codes, scales):
        assert " rw-s " in line and line.endswith(".pages (deleted)")
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in (codes, scales)]
    assert sum(stop - start for start, stop in ranges) >= 2 * 512 * 257
    for key in ("state1", "state2", "absmax1", "absmax2"):
        place = optimizer.state[weight][key].data_ptr()
        assert any(start <= place < stop for start, stop in ranges), key
    assert os.listdir(tmp_path) == []
    # Loading allocates new pages and frees the old ones.
    optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    assert len(mapped(tmp_path)) == 2
    del optimizer
    gc.collect()
    assert not mapped(tmp_path)
    assert weight.isfinite().all()


def test_tensors_of_pages_are_zeros_that_do_not_meet(tmp_path):
    entries = [((3, 5), torch.uint8), ((), torch.float32), ((0,), torch.uint8), ((300,), torch.uint8),
               ((7,), torch.float32)]  # fmt: skip
    for pages in (FilePages(tmp_path), PinnedPages()):
        tensors = pages.allocate(entries)
        assert [(tuple(each.shape), each.dtype) for each in tensors] == entries
        assert all((each == 0).all() and each.is_contiguous() for each in tensors)
        assert all(each.data_ptr() % 64 == 0 for each in tensors if each.numel())
        for number, each in enumerate(tensors):
            each.fill_(number + 1)
        assert all((each == number + 1).all() for number, each in enumerate(tensors))
        assert pages.allocate([]) == []
        assert pages.allocate([((0, 4), torch.float32)])[0].shape == (0, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_cannot_change_the_state_of_its_parent(tmp_path):
    weight = torch.nn.Parameter(torch.ones(5000))
    optimizer = PagedAdamW8bit([weight], page_dir=tmp_path)
    weight.grad = torch.ones(5000)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[weight])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for call in (optimizer.step, lambda: optimizer.load_state_dict(optimizer.state_dict())):
            try:
                call()
                said.append("went on")
            except RuntimeError as error:
                said.append(str(error))
        os.write(writer, "\n".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 4096).decode().splitlines()
    assert len(said) == 2 and all("was forked from the one that made" in each for each in said)
    assert before.keys() == optimizer.state[weight].keys()
    for name, value in optimizer.state[weight].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[name]))
    optimizer.step()
    copy.deepcopy(optimizer).step()
