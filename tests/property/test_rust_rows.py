"""Rust and the Python path agree for all texts, limits and special tokens."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from oddsmith.data.rows import RowBuilder
from oddsmith.data.rust_rows import EMPTY, OVERLENGTH, FastRows
from support.generated_texts import patiently, texts, tokenizer


@st.composite
def builders(draw):
    max_length, limits = draw(st.integers(2, 40)), {}
    if draw(st.booleans()):
        limits["max_prompt_length"] = draw(st.integers(1, max_length - 1))
        limits["truncation_mode"] = draw(st.sampled_from(["keep_end", "keep_start"]))
    made = tokenizer(draw(st.sampled_from(["<s>", None, "</s>"])))
    return RowBuilder(
        made, max_length, label_pad_token_id=draw(st.sampled_from([-100, -1])), **limits
    )


marked = st.builds(lambda text, mark: text + mark, texts, st.sampled_from(["", "<s>", "</s>"]))


@patiently
@given(builders(), st.lists(st.tuples(marked, marked, marked), min_size=1, max_size=5))
def test_columns_are_the_builder_s_rows(builder, batch):
    parts = list(zip(*batch, strict=True))
    where = [f"mine row {index}" for index in range(7, 7 + len(batch))]
    arrays = [pa.array(part, pa.string()) for part in parts]
    fast = FastRows(builder)
    try:
        rows, overlength = builder.tokenize_batch(*parts, where)
    except ValueError as error:
        expected = str(error)
    else:
        columns = fast.columns(*arrays, name="mine", first_row=7)
        flags = columns.pop(OVERLENGTH).to_pylist(), columns.pop(EMPTY).to_pylist()
        assert pa.table(columns).to_pylist() == rows
        nothing = [max(row["chosen_labels"] + row["rejected_labels"]) < 0 for row in rows]
        assert flags == (overlength, nothing)
        return
    try:
        fast.columns(*arrays, name="mine", first_row=7)
    except ValueError as error:
        assert str(error) == expected
    else:
        raise AssertionError(f"no error: {expected}")


@patiently
@given(builders(), st.lists(st.tuples(texts, texts, texts), min_size=2, max_size=8), st.data())
def test_a_slice_of_a_column_is_its_rows(builder, batch, data):
    """Arrow's slices share their buffers with the rows before and after them."""
    start = data.draw(st.integers(0, len(batch) - 1))
    stop = data.draw(st.integers(start, len(batch)))
    fast = FastRows(builder)

    def columns(arrays):
        try:
            return {key: made.to_pylist() for key, made in fast.columns(*arrays).items()}
        except ValueError as error:
            return str(error)

    arrays = [pa.array(part, pa.string()) for part in zip(*batch, strict=True)]
    sliced = columns([array[start:stop] for array in arrays])
    alone = columns([pa.array(array[start:stop].to_pylist(), pa.string()) for array in arrays])
    chunked = columns([pa.chunked_array([array[start:stop], array[:0]]) for array in arrays])
    assert sliced == alone == chunked
