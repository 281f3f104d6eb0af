"""A sequence with an image for a batch of text; `tests/e2e/test_image_engines.py` trains with it."""

import pytest
import torch
from torch import distributed

from oddsmith.data.image_rows import ImageBatch
from oddsmith.training.image_filler import SEARCHED_ROWS, ImageFiller, row_with_image


def filler(ids=(7, 8, 9), counted=False):
    row = {"prompt_input_ids": list(ids), "prompt_token_type_ids": [0, 1, 1][: len(ids)]}
    return ImageFiller(ImageBatch([row], [False], {"pixel_values": torch.ones(1, 3)}), counted)


@pytest.fixture
def others(monkeypatch):
    """What the other process says of its batch: whether it has images."""
    said = []

    def all_reduce(found, operation):
        assert operation == distributed.ReduceOp.MAX
        other = torch.tensor([float(said[0]), float(not said[0])])
        found.copy_(torch.maximum(found, other))

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    return said


INPUTS = {
    "concatenated_input_ids": torch.tensor([[1, 2], [3, 0]]),
    "concatenated_attention_mask": torch.tensor([[1, 1], [1, 0]]),
    "concatenated_labels": torch.tensor([[-100, 2], [-100, -100]]),
}


def test_a_batch_of_text_beside_one_with_images(others):
    others.append(True)
    inputs, extra = filler().fill(INPUTS, {}, padding_value=5)
    assert inputs["concatenated_input_ids"].tolist() == [[1, 2, 5], [3, 0, 5], [7, 8, 9]]
    assert inputs["concatenated_attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert inputs["concatenated_labels"].tolist() == [[-100, 2, -100], *[[-100] * 3] * 2]
    assert extra["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert extra["pixel_values"].tolist() == [[1, 1, 1]]


def test_a_batch_that_is_longer_than_the_sequence(others):
    others.append(True)
    inputs, extra = filler(ids=[7]).fill(INPUTS, {"token_type_ids": torch.zeros(2, 2)}, 5)
    assert inputs["concatenated_input_ids"].tolist() == [[1, 2], [3, 0], [7, 5]]
    assert extra["token_type_ids"].tolist() == [[0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("own, other", [(True, False), (True, True), (False, False)])
def test_batches_that_stay_as_they_are(own, other, others):
    others.append(other)
    extra = {"pixel_values": torch.zeros(1)} if own else {}
    inputs, kept = filler(counted=own == other).fill(INPUTS, extra, 5)
    assert inputs == INPUTS and kept == extra


@pytest.mark.parametrize("own", [True, False])
def test_a_loss_that_would_count_it_ends_all_processes(own, others):
    others.append(not own)
    extra = {"pixel_values": torch.zeros(1)} if own else {}
    with pytest.raises(ValueError, match="set output_router_logits=False, use DDP"):
        filler(counted=True).fill(INPUTS, extra, 5)


def test_the_first_row_with_an_image():
    rows = [{"images": []}, {"images": None}, {"image": None}, {"images": ["a.png"]}, {"image": 1}]
    assert row_with_image(rows) is rows[3]
    assert row_with_image(rows[4:]) is rows[4]
    late = [{"images": []}] * SEARCHED_ROWS + [{"images": ["a.png"]}]
    assert row_with_image(late) is None
