"""PackedBatch: pairs as one row of tokens without padding, each prompt once."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oddsmith.data.collator import PACKED, PreferenceCollator
from oddsmith.packing.batch import PackedBatch


def pair(chosen, rejected, prompt, chosen_prompt=None):
    """Ids of both sides; the first `prompt` are not completion."""
    row = {}
    sides = (("chosen", chosen, chosen_prompt or prompt), ("rejected", rejected, prompt))
    for side, ids, masked in sides:
        row[f"{side}_input_ids"] = ids
        row[f"{side}_attention_mask"] = [1] * len(ids)
        row[f"{side}_labels"] = [-100] * masked + ids[masked:]
    return row


def test_layout_by_hand():
    # Prompt 5 6 7, answers 8 9 and 8 4: the rejected part repeats the prompt's last token.
    batch = PackedBatch.build([pair([5, 6, 7, 8, 9], [5, 6, 7, 8, 4], 3)], share_prompt=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 7, 8, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    assert batch.segments == ((2, 3, 3),)
    assert batch.rows.tolist() == [0, 1, 2, 3, 0, 1, 5, 6]
    assert batch.targets.tolist() == [6, 7, 8, 9, 6, 7, 8, 4]
    assert batch.sequence.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.completion.tolist() == [False, False, True, True, False, False, True, True]
    # 2 chosen prompt tokens have a successor in the prompt, and there are 4 answer tokens.
    assert batch.num_scored == {"full": 2 + 4, "completion": 4}


def test_whole_sequences_by_hand():
    batch = PackedBatch.build([pair([5, 6, 7], [5, 6, 8, 9], 2)], share_prompt=False)
    assert batch.input_ids.tolist() == [[5, 6, 7, 5, 6, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.segments == ((0, 3, 4),)
    assert batch.rows.tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "shared"),
    [
        ([1, 2, 3, 9], [1, 2, 3, 8], 3, 2),
        ([1, 2, 3, 9], [1, 2, 4, 8], 3, 2),  # the last token of the prompt merged
        ([1, 9], [1, 8], 1, 0),  # nothing before the last token
        ([7, 2, 9], [1, 2, 8], 2, 0),  # no common beginning
        ([1, 2], [1, 2, 8, 8], 2, 1),  # an empty chosen answer
        ([1, 2, 8, 8], [1, 2], 2, 1),  # an empty rejected answer keeps one token
        ([1], [1, 2, 3, 8], 3, 1),  # a chosen sequence that is shorter than the prompt
    ],
)
def test_what_is_shared(chosen, rejected, prompt, shared):
    row = pair(chosen, rejected, prompt, chosen_prompt=min(prompt, len(chosen)))
    batch = PackedBatch.build([row], share_prompt=True)
    assert batch.segments == ((shared, len(chosen) - shared, len(rejected) - shared),)


def test_auto_shares_long_prompts():
    long_prompt = pair([*range(20), 90], [*range(20), 91], 20)
    short_prompt = pair([1, 2, *range(30, 70)], [1, 2, *range(40, 80)], 2)
    batch = PackedBatch.build([long_prompt, short_prompt], share_prompt="auto")
    assert [shared for shared, *_ in batch.segments] == [19, 0]


token = st.integers(0, 6)


@given(
    st.lists(
        st.tuples(st.lists(token, min_size=1, max_size=6), *2 * [st.lists(token, max_size=5)]),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([True, False, "auto"]),
)
def test_each_sequence_is_in_its_rows(texts, share):
    pairs = [pair(p + a, p + b, len(p)) for p, a, b in texts]
    batch = PackedBatch.build(pairs, share)
    assert batch.input_ids.numel() == batch.position_ids.numel() == sum(map(sum, batch.segments))
    for index, row in enumerate(pairs):
        for number, side in ((index, "chosen"), (len(pairs) + index, "rejected")):
            mine = batch.sequence == number
            ids = torch.tensor(row[f"{side}_input_ids"])
            labels = torch.tensor(row[f"{side}_labels"])
            rows = batch.rows[mine]
            assert torch.equal(batch.input_ids[0, rows], ids[:-1])
            assert torch.equal(batch.position_ids[0, rows], torch.arange(len(ids) - 1))
            assert torch.equal(batch.targets[mine], ids[1:])
            assert torch.equal(batch.completion[mine], labels[1:] >= 0)
    # A scored row belongs to only one sequence.
    needed = batch.completion | (batch.sequence < len(pairs))
    assert len(batch.rows[needed].unique()) == int(needed.sum())


def test_from_a_padded_batch():
    pairs = [pair([1, 2, 3, 4, 5], [1, 2, 3, 6], 3), pair([9, 8], [9, 7, 7], 1)]
    collate = PreferenceCollator(0, packing=True, share_prompt=True)
    batch = collate(pairs)
    again = PackedBatch.from_padded(batch, share_prompt=True)
    assert_equal(batch.packed(), again)


def assert_equal(one, other):
    for name, value in vars(one).items():
        if torch.is_tensor(value):
            assert torch.equal(value, getattr(other, name)), name
    assert one.segments == other.segments


def test_a_changed_batch_is_detected():
    def collated():
        rows = [pair([1, 2, 3, 4, 5], [1, 2, 3, 6], 3)]
        return PreferenceCollator(0, packing=True)(rows)

    batch = collated()
    assert batch.packed() is batch[PACKED]
    again = pickle.loads(pickle.dumps(batch))  # as from a worker of the DataLoader
    assert_equal(again.packed(), batch[PACKED])
    assert again.to("cpu").packed() is not None
    copied = type(batch)(dict(batch))  # as Trainer does
    assert copied.packed() is not None

    batch["chosen_labels"][0, 3] = -100
    assert batch.packed() is None
    assert batch.to("cpu").packed() is None
    batch = collated()
    batch["rejected_input_ids"] = batch["rejected_input_ids"].clone()
    assert batch.packed() is not None, "the same in other memory"
    batch["rejected_input_ids"] = batch["rejected_input_ids"] + 1
    assert batch.packed() is None
    del batch["rejected_input_ids"]
    assert batch.packed() is None


def test_ids_and_labels_must_match():
    row = pair([1, 2, 3], [1, 2], 1)
    row["rejected_labels"] = [-100]
    with pytest.raises(ValueError, match="pair 0 of the batch: rejected_input_ids has 2 tokens"):
        PackedBatch.build([row], share_prompt=False)


@pytest.mark.parametrize("value", ["yes", "true", 0, 1, None])
def test_share_prompt_is_true_false_or_auto(value):
    reason = f"share_prompt is {value!r}; must be True, False or 'auto'"
    with pytest.raises(ValueError, match=reason):
        PackedBatch.build([pair([1, 2], [1, 3], 1)], value)
    with pytest.raises(ValueError, match=reason):
        PreferenceCollator(0, share_prompt=value)
