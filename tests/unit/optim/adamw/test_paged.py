"""Paged AdamW: bit-identical to the plain one, saved states, and a full disk."""

import copy
import errno
import gc
import io
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from oddsmith.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from oddsmith.optim.adamw.saved_state import unwrap
from support.gradients import given, randn, weights_of

RULE = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}


SHAPES = [(67, 71), (9, 13), (), (0, 3), (64, 65)]


KINDS = {
    "8bit": (PagedAdamW8bit, AdamW8bit, {}),
    "32bit": (PagedAdamW32bit, AdamW8bit, {"optim_bits": 32}),
}


def grads_of(step):
    return [randn(*shape, seed=10 * step + i) for i, shape in enumerate(SHAPES)]


def same_states(one, other):
    one, other = one.state_dict()["state"], other.state_dict()["state"]
    assert one.keys() == other.keys()
    for key in one:
        mine, theirs = unwrap(one[key]), unwrap(other[key])
        assert mine.keys() == theirs.keys() and mine["step"] == theirs["step"]
        assert all(torch.equal(mine[name], theirs[name]) for name in mine.keys() - {"step"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(KINDS))
def test_pages_change_no_bit(name, dtype, tmp_path):
    paged, plain, extra = KINDS[name]
    options = {**RULE, "seed": 3, "stochastic_rounding": dtype == torch.bfloat16}
    ours, theirs = weights_of(SHAPES, dtype), weights_of(SHAPES, dtype)
    optimizer = paged(ours, **options, page_dir=tmp_path)
    peer = plain(theirs, **options, **extra)
    for step in range(5):
        given(optimizer, grads_of(step))
        given(peer, grads_of(step))
    assert all(map(torch.equal, ours, theirs))
    same_states(optimizer, peer)


def test_a_saved_state_outlives_its_pages(tmp_path):
    optimizer, peer = (
        PagedAdamW8bit(weights_of(SHAPES), page_dir=tmp_path),
        AdamW8bit(weights_of(SHAPES)),
    )
    given(optimizer, grads_of(0))
    given(peer, grads_of(0))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    copied = copy.deepcopy(optimizer.state_dict())
    given(optimizer, grads_of(1))
    del optimizer
    gc.collect()
    file.seek(0)
    for saved in (copied, torch.load(file, weights_only=True)):
        again = AdamW8bit(weights_of(SHAPES))
        again.load_state_dict(saved)
        same_states(again, peer)


@pytest.mark.parametrize("name", list(KINDS))
def test_an_invalid_page_dir_is_refused(name, tmp_path):
    kind = KINDS[name][0]
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(
            ValueError, match=f"page_dir is '{folder}'; must be a folder that can be"
        ):
            kind(weights_of(SHAPES), page_dir=folder)


@pytest.fixture
def full_disk(monkeypatch):
    """A disk with `free` bytes left."""

    def fill(left=0, code=errno.ENOSPC):
        real, room = os.posix_fallocate, [left]

        def reserve(handle, start, size):
            if size > room[0]:
                raise OSError(code, os.strerror(code))
            room[0] -= size
            real(handle, start, size)

        monkeypatch.setattr(os, "posix_fallocate", reserve)

    return fill


@pytest.mark.parametrize("left", [0, 18_432])  # not even codes, or codes but no scales
def test_a_full_disk_is_an_error_before_the_first_change(left, full_disk, tmp_path, monkeypatch):
    weights = weights_of(SHAPES)
    optimizer = PagedAdamW8bit(weights, **RULE, page_dir=tmp_path)
    given(optimizer, [None, torch.ones(9, 13), None, None, None])
    before = [each.detach().clone() for each in weights]
    full_disk(left)
    with pytest.raises(
        OSError, match="state takes [0-9,]+ bytes, and [0-9,]+ are free in"
    ) as caught:
        given(optimizer, grads_of(0))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)
    assert all(map(torch.equal, weights, before))
    assert set(optimizer.state) == {weights[1]} and optimizer.state[weights[1]]["step"] == 1
    assert os.listdir(tmp_path) == []
    # With free space it continues.
    monkeypatch.undo()
    given(optimizer, grads_of(0))
    assert [optimizer.state[each]["step"] for each in weights] == [1, 2, 1, 1, 1]


def test_a_full_disk_leaves_what_was_before_loading(full_disk, tmp_path):
    donor, optimizer = (
        AdamW8bit(weights_of(SHAPES)),
        PagedAdamW8bit(weights_of(SHAPES), page_dir=tmp_path),
    )
    for step in range(3):
        given(donor, grads_of(step))
    given(optimizer, grads_of(5))
    before = copy.deepcopy(optimizer)
    full_disk()
    with pytest.raises(OSError, match="has room"):
        optimizer.load_state_dict(donor.state_dict())
    same_states(optimizer, before)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    given(optimizer, grads_of(6))  # its pages are still there


def test_other_errors_of_the_disk_keep_their_names(full_disk, tmp_path):
    optimizer = PagedAdamW8bit(weights_of(SHAPES), page_dir=tmp_path)
    full_disk(code=errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        given(optimizer, grads_of(0))


def test_a_system_that_cannot_reserve_space(tmp_path, monkeypatch):
    """macOS and Windows: the free space is asked for."""
    weights, peer = weights_of(SHAPES), weights_of(SHAPES)
    monkeypatch.delattr(os, "posix_fallocate")
    optimizer, reserved = PagedAdamW8bit(weights, page_dir=tmp_path), AdamW8bit(peer)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3))
        with pytest.raises(OSError, match="state takes [0-9,]+ bytes, and 3 are free in"):
            given(optimizer, grads_of(0))
    for step in range(2):
        given(optimizer, grads_of(step))
        given(reserved, grads_of(step))
    same_states(optimizer, reserved)
