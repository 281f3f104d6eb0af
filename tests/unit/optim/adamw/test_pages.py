"""Paged AdamW: the state in a mapped file, a disk that is full, and the way through a device's memory."""

import copy
import errno
import gc
import io
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from oddsmith.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from oddsmith.optim.adamw.moments import blocks_of, layout, maps
from oddsmith.optim.adamw.pages import FilePages, PinnedPages
from oddsmith.optim.adamw.saved_state import unwrap
from oddsmith.optim.adamw.staging import Staged, batches, bytes_of
from oddsmith.optim.adamw.step import AdamUpdate, NonFinite, adamw_step, rule_of
from support.gradients import given, randn, train, weights_of

RULE = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
SHAPES = [(67, 71), (9, 13), (), (0, 3), (64, 65)]
LEAST_BUDGET = 3 * (4 * 256 + 8 * 256)
KINDS = {
    "8bit": (PagedAdamW8bit, AdamW8bit, {}),
    "32bit": (PagedAdamW32bit, AdamW8bit, {"optim_bits": 32}),
}


def grads_of(step):
    return [randn(*shape, seed=10 * step + i) for i, shape in enumerate(SHAPES)]


def mapped(folder):
    """Lines of the process's memory map that are files of a folder, with or without a name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if f"{folder}/oddsmith-" in line]


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
    # Loading makes pages anew and frees the old ones.
    optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    assert len(mapped(tmp_path)) == 2
    del optimizer
    gc.collect()
    assert not mapped(tmp_path)
    assert weight.isfinite().all()


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


# ---- No room ----


@pytest.mark.parametrize("name", list(KINDS))
def test_a_page_dir_that_is_none_is_refused(name, tmp_path):
    kind = KINDS[name][0]
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(
            ValueError, match=f"page_dir is '{folder}'; must be a folder that can be"
        ):
            kind(weights_of(SHAPES), page_dir=folder)


@pytest.fixture
def full_disk(monkeypatch):
    """A disk with room for so many bytes from now on."""

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
    # With room again it goes on.
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


# ---- Through a device's memory ----


def update_of(shape, bits, step, dtype, seed=None):
    value = randn(*shape, seed=len(shape) + bits).to(dtype)
    state = {name: torch.zeros(size, dtype=kind) for name, (size, kind) in
             layout(value.shape, bits).items()}  # fmt: skip
    if bits == 8:
        state |= dict(zip(("qmap1", "qmap2"), maps(value.device)))
    rule = rule_of(RULE, step)
    return AdamUpdate(value, randn(*shape, seed=step).to(dtype), state, rule, seed)


def updates_of(step=1, dtype=torch.float32, seed=None):
    kinds = [((67, 71), 8), ((9, 13), 32), ((0, 3), 32), ((64, 65), 32), ((300,), 8), ((), 32)]
    return [update_of(shape, bits, step, dtype, seed) for shape, bits in kinds]


@pytest.mark.parametrize("budget", [LEAST_BUDGET, 20_000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_change_no_bit(budget, dtype):
    """Stochastic rounding draws for an element by its place in the parameter, not in the piece."""
    whole, parts = updates_of(dtype=dtype, seed=7), updates_of(dtype=dtype, seed=7)
    staged, bad = Staged(torch.device("cpu"), budget), NonFinite()
    for step in range(1, 5):
        for update in (*whole, *parts):
            update.rule, update.grad = rule_of(RULE, step), update.grad.roll(1)
        adamw_step(whole, bad)
        staged.step(parts, bad)
    staged.synchronize()
    for mine, theirs in zip(parts, whole):
        assert torch.equal(mine.value, theirs.value)
        assert all(torch.equal(mine.state[key], theirs.state[key]) for key in theirs.state)
    assert bad.total() == 0


@pytest.mark.parametrize("capacity", [LEAST_BUDGET // 3, 5_120, 12_544, 1 << 20])
def test_batches_have_every_element_once_and_fit(capacity):
    updates, found = updates_of(), []
    for batch in batches(updates, capacity):
        room = 0
        for piece in batch:
            host = piece.host()
            assert piece.start % 256 == 0 and piece.stop > piece.start
            assert host["state1"].numel() == piece.stop - piece.start
            if "absmax1" in host:
                assert host["absmax1"].numel() == blocks_of(piece.stop - piece.start)
            room += sum(-(-part.nbytes // 256) * 256 for part in host.values())
            found.append((id(piece.update), piece.start, piece.stop))
        assert 0 < room <= capacity
        assert room == sum(bytes_of(p.update.state, p.stop - p.start) for p in batch)
    for update in updates:
        ends = [(start, stop) for owner, start, stop in found if owner == id(update)]
        joints = [0, *(stop for _, stop in ends)]
        assert [start for start, _ in ends] == joints[:-1] and joints[-1] == update.value.numel()
    owners = [owner for owner, _, _ in found]
    assert owners == sorted(owners, key=[id(update) for update in updates].index)
    cut = len(found) > sum(update.value.numel() > 0 for update in updates)
    assert cut == (capacity < 20_000)


def test_a_budget_without_room_for_a_block_is_refused():
    with pytest.raises(ValueError, match=f"device_budget is {LEAST_BUDGET - 1}; must be at least"):
        Staged(torch.device("cpu"), LEAST_BUDGET - 1)
    assert Staged(torch.device("cpu"), LEAST_BUDGET).capacity == LEAST_BUDGET // 3


def test_a_step_goes_through_the_budget(monkeypatch):
    """As on a GPU, but for the copies: they stay in the same memory."""
    ours, theirs = weights_of(SHAPES), weights_of(SHAPES)
    optimizer = PagedAdamW8bit(ours, **RULE, device_budget=LEAST_BUDGET)
    peer = AdamW8bit(theirs, **RULE)
    monkeypatch.setattr(optimizer, "_run", lambda updates: through(optimizer, updates))
    for step in range(3):
        given(optimizer, grads_of(step))
        given(peer, grads_of(step))
    assert all(map(torch.equal, ours, theirs))
    same_states(optimizer, peer)


def through(optimizer, updates):
    staged = Staged(torch.device("cpu"), optimizer._device_budget)
    optimizer._staged[torch.device("cpu")] = staged
    staged.step(updates, optimizer._bad)


def test_a_budget_without_room_for_a_block_is_refused_before_any_step():
    with pytest.raises(ValueError, match="device_budget is 5000; must be at least 9216 bytes"):
        PagedAdamW8bit([torch.nn.Parameter(torch.ones(3))], device_budget=5000)
