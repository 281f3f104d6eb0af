"""Token ids compared with the size of the vocabulary."""

import pytest
from datasets import Dataset

from oddsmith.data.dataset import prepare_dataset
from oddsmith.data.rows import RowBuilder
from oddsmith.data.vocabulary import check_vocabulary

# Lengths with BOS and EOS, prompt + longer answer: 2+2, 5+3, 3+4.
ROWS = [
    {"prompt": "a ", "chosen": "b", "rejected": "c", "score": 1},
    {"prompt": "a b c d ", "chosen": "e f", "rejected": "g", "score": 2},
    {"prompt": "a b ", "chosen": "c d e", "rejected": "f g h", "score": 3},
]


def prepare(rows, tokenizer, max_length=20, **kwargs):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    builder = RowBuilder(tokenizer, max_length)
    return prepare_dataset(dataset, tokenizer, builder.tokenize_row, **kwargs)


@pytest.mark.parametrize("kind", ["dataset", "selected", "stream", "list"])
def test_vocabulary(tokenizer, kind):
    prepared = prepare(ROWS, tokenizer)
    rows = {
        "dataset": prepared,
        "selected": prepared.select([2, 0]),
        "stream": prepared.to_iterable_dataset(),
        "list": list(prepared),
    }[kind]
    check_vocabulary(rows, 11)
    # "h" is token 10; only row 2 has it, which `selected` puts first.
    row = 0 if kind == "selected" else 2
    words = rf"mine row {row}: rejected_\w+ has token id 10; .*has 10 \(0 to 9\)"
    with pytest.raises(ValueError, match=words):
        check_vocabulary(rows, 10, name="mine")


def test_vocabulary_beyond_the_first_batch_and_below_zero(tokenizer):
    ids = [[3]] * 2500
    ids[2345] = [3, 99]
    with pytest.raises(ValueError, match="row 2345: chosen_labels has token id 99"):
        check_vocabulary(Dataset.from_dict({"chosen_labels": ids}), 50)
    masked = Dataset.from_dict({"chosen_labels": [[-100, 4]], "chosen_input_ids": [[3, 4]]})
    check_vocabulary(masked, 5)
    with pytest.raises(ValueError, match="chosen_input_ids has token id -1"):
        check_vocabulary(Dataset.from_dict({"chosen_input_ids": [[3, -1]]}), 5)
    check_vocabulary(Dataset.from_dict({"text": ["a"]}), 5)


def test_columns_of_the_user_are_not_ids(tokenizer):
    rows = [{**row, "human_labels": "good", "other_labels": [99]} for row in ROWS]
    check_vocabulary(prepare(rows, tokenizer), 12)
