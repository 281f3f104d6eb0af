"""What the preparation of a dataset finds."""

from oddsmith.data.notes import RowNotes, repeats_messages
from support.word_tokenizer import bot, user

TWICE = {
    "prompt": [user("a b")],
    "chosen": [user("a b"), bot("c")],
    "rejected": [user("a b"), bot("d")],
}
ONCE = {**TWICE, "chosen": [bot("c")], "rejected": [bot("d")]}


def test_a_prompt_that_is_there_twice_as_messages():
    assert repeats_messages(TWICE) and not repeats_messages(ONCE)
    assert not repeats_messages({**TWICE, "prompt": "a b"})
    notes = RowNotes()
    notes.look_for_repeats(enumerate([ONCE, TWICE, TWICE], 5))
    assert (notes.repeated, notes.repeated_of) == ([6, 7], 3)
