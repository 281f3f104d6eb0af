"""Which columns of public datasets are the prompt and the answers."""

import pytest

from oddsmith.data.layouts import (
    Layout,
    as_messages,
    find_layout,
    mapped_layout,
    parse_column_mapping,
)
from support.word_tokenizer import bot, user

ANSWERS = {"chosen": "Four.", "rejected": "Five."}
SAID = {"chosen": [bot("Four.")], "rejected": [bot("Five.")]}
ASKED = "What is 2 + 2?"


def system(text):
    return {"role": "system", "content": text}


# The columns of public datasets, with one row each, and what the trainer should read.
LAYOUTS = {
    "orca_dpo_pairs": (
        {"system": "Be brief.", "question": ASKED, **ANSWERS},
        {"prompt": [system("Be brief."), user(ASKED)], **SAID},
    ),
    "distilabel-intel-orca-dpo-pairs": (
        {"system": "", "input": ASKED, **ANSWERS, "generations": ["Four.", "Five."]},
        {"prompt": [user(ASKED)], **SAID},
    ),
    "question alone": ({"question": ASKED, **ANSWERS}, {"prompt": ASKED, **ANSWERS}),
    "ultrafeedback-binarized-preferences": (
        {"instruction": ASKED, "chosen_response": "Four.", "rejected_response": "Five."},
        {"prompt": ASKED, **ANSWERS},
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "2 + 2", **ANSWERS},
        {"prompt": "Add.\n2 + 2", **ANSWERS},
    ),
    "Alpaca without input": (
        {"instruction": ASKED, "input": "", **ANSWERS},
        {"prompt": ASKED, **ANSWERS},
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": ASKED}],
            "chosen": {"from": "gpt", "value": "Four."},
            "rejected": {"from": "gpt", "value": "Five."},
        },
        {"prompt": [user(ASKED)], **SAID},
    ),
    "history of pairs": (
        {
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
            "question": ASKED,
            "response_chosen": "Four.",
            "response_rejected": "Five.",
        },
        {"prompt": [system("Be brief."), user("Hi"), bot("Hello"), user(ASKED)], **SAID},
    ),
    "stack-exchange-paired": (
        {"question": ASKED, "response_j": "Four.", "response_k": "Five."},
        {"prompt": ASKED, **ANSWERS},
    ),
    "Code-Preference-Pairs": (
        {"input": ASKED, "accepted": "Four.", "rejected": "Five."},
        {"prompt": ASKED, **ANSWERS},
    ),
    "answers as messages": ({"question": ASKED, **SAID}, {"prompt": [user(ASKED)], **SAID}),
    # Whole conversations have the question already.
    "Magpie": (
        {"instruction": ASKED, **{side: [user(ASKED), *SAID[side]] for side in SAID}},
        {side: [user(ASKED), *SAID[side]] for side in SAID},
    ),
    "HH-RLHF": (
        {side: f"\n\nHuman: {ASKED}\n\nAssistant: {ANSWERS[side]}" for side in ANSWERS},
        {side: f"\n\nHuman: {ASKED}\n\nAssistant: {ANSWERS[side]}" for side in ANSWERS},
    ),
    # A column prompt is the prompt, whatever else there is, as in TRL.
    "orpo-dpo-mix-40k": (
        {"prompt": ASKED, "question": ASKED, **ANSWERS},
        {"prompt": ASKED, **ANSWERS},
    ),
    "truthy-dpo": (
        {"system": "Be brief.", "prompt": ASKED, **ANSWERS},
        {"prompt": ASKED, **ANSWERS},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_public_datasets(name):
    row, expected = LAYOUTS[name]
    layout = find_layout([row])
    assert layout is not None and layout.row(row) == expected


def test_what_was_taken_for_what_is_one_line():
    row = {"system": "a", "question": "b", "chosen_response": "c", "rejected_response": "d"}
    assert str(find_layout([row])) == (
        "system and question are the prompt, chosen_response is chosen, rejected_response is rejected"
    )
    assert str(find_layout([{"prompt": "b", **ANSWERS}])) == ""


def test_a_system_message_with_a_prompt_column_if_asked_for():
    row, _ = LAYOUTS["truthy-dpo"]
    layout = find_layout([row], system=True)
    assert layout.row(row) == {"prompt": [system("Be brief."), user(ASKED)], **SAID}


def test_rows_of_a_conversation_lose_their_prompt():
    sides = {side: [user(ASKED), *SAID[side]] for side in SAID}
    layout = Layout(prompt=("question",), system="system")
    row = {"system": "Be brief.", "question": ASKED, **sides}
    assert layout.row(row) == {"prompt": [system("Be brief."), user(ASKED)], **SAID}


def test_two_questions_are_not_guessed():
    with pytest.raises(ValueError, match="question and instruction could each be it; name one"):
        find_layout([{"question": "a b", "instruction": "c d", **ANSWERS}])


def test_most_rows_decide():
    inside = {"question": "Hi", "chosen": "Hi Four.", "rejected": "Hi Five."}
    outside = {"question": "Hi", **ANSWERS}
    assert find_layout([inside, inside, outside]).prompt == ()
    assert find_layout([inside, outside, outside]).prompt == ("question",)


def test_no_answers():
    assert find_layout([{"prompt": "a", "response": "b"}]) is None
    assert find_layout([]) is None


def test_mapping():
    row = {"q": "a", "s": "b", "good": "c", "bad": "d", "prompt": "other"}
    mapping = parse_column_mapping({"good": "chosen", "bad": "rejected", "s": "system"}, "q")
    layout = mapped_layout(mapping, row, "x")
    assert layout.row(row) == {
        "prompt": [system("b"), user("a")],
        "chosen": [bot("c")],
        "rejected": [bot("d")],
    }
    with pytest.raises(
        ValueError, match="x has no column good, which column_mapping names; it has q"
    ):
        mapped_layout(mapping, ["q"], "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("question", "must be a dict"),
        ({"a": "answer"}, "columns can become prompt, chosen, rejected, system"),
        ({"a": "prompt", "b": "prompt"}, "two columns become the same"),
    ],
)
def test_bad_mappings(value, message):
    with pytest.raises(ValueError, match=message):
        parse_column_mapping(value)


def test_messages_of_sharegpt():
    assert as_messages([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]) == [
        user("a"),
        bot("b"),
    ]
    assert as_messages(user("a")) == [user("a")]
    for value in ("a", None, [], ["a"], {"text": "a"}):
        assert as_messages(value) == value
