"""The text of a row: its prompt, and conversations through the chat template."""

import pytest

from oddsmith.data.chat import common_prefix_length, extract_prompt, row_text
from support.word_tokenizer import TEMPLATE, bot, user


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("a b c", "a b d", "a b"),  # the space goes with the answers
        ("a bc", "a bd", "a b"),
        (
            "ab",
            "abcd",
            "a",
        ),  # one is the beginning of the other: the last shared character belongs to the answers
        ("abc", "abc", "ab"),
        ("yes ", "no", ""),
        ("", "no", ""),
        ([user("x"), bot("y")], [user("x"), bot("z")], [user("x")]),
        ([user("x"), bot("y")], [user("x"), bot("y"), user("z")], [user("x")]),
    ],
)
def test_extract_prompt(chosen, rejected, prompt):
    got = extract_prompt(chosen, rejected)
    assert got[0] == prompt
    assert (got[0] + got[1], got[0] + got[2]) == (chosen, rejected)


@pytest.mark.parametrize(
    "a, b, shared",
    [("", "", 0), ("x", "", 0), ("abc", "abd", 2), ("ab", "abc", 2), ("xb", "ab", 0)],
)
def test_common_prefix_length(a, b, shared):
    assert common_prefix_length(a, b) == common_prefix_length(b, a) == shared
    assert common_prefix_length(list(a), list(b)) == shared


def test_every_form_of_a_row(tokenizer):
    tokenizer.chat_template = TEMPLATE
    expected = (" <user> a <bot> ", "b", "c")
    chosen, rejected = [bot("b")], [bot("c")]
    whole = {"chosen": [user("a"), *chosen], "rejected": [user("a"), *rejected]}
    for row in (
        {"prompt": [user("a")], "chosen": chosen, "rejected": rejected},
        whole,
        {**whole, "prompt": "a"},  # UltraFeedback
        {**whole, "prompt": None, "messages": [user("a")], "label": True},
    ):
        assert row_text(row, tokenizer, "row") == expected
    strings = {"prompt": "a ", "chosen": "b", "rejected": "c"}
    assert row_text(strings, tokenizer, "row") == ("a ", "b", "c")
    assert row_text({"chosen": "a b", "rejected": "a c"}, tokenizer, "row") == ("a", " b", " c")


def test_an_unfinished_answer_is_continued(tokenizer):
    tokenizer.chat_template = TEMPLATE
    row = {"prompt": [user("a"), bot("b")], "chosen": [bot("c")], "rejected": [bot("d")]}
    assert row_text(row, tokenizer, "row") == (" <user> a <bot> b", " <bot> c", " <bot> d")


def test_a_template_that_writes_the_prompt_alone_differently(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace(
        "%}{{ ' <bot> ' }}{% endif", "%}{{ ' <bot> <think> ' }}{% endif"
    )
    row = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}
    assert row_text(row, tokenizer, "row") == (" <user> a <bot> ", "b", "c")


def test_tools_and_template_arguments_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ tools[0]['name'] }} {{ tone }}" + TEMPLATE
    row = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}
    for tools in ([{"name": "d"}], '[{"name": "d"}]'):
        given = {**row, "tools": tools, "chat_template_kwargs": {"tone": "e"}}
        assert row_text(given, tokenizer, "row")[0] == "d e <user> a <bot> "


def test_a_prompt_of_messages_before_strings_is_logged(tokenizer, log):
    row = {"prompt": [user("x")], "chosen": "a b", "rejected": "a c"}
    assert row_text(row, tokenizer, "data row 4") == ("a", " b", " c")
    assert "data row 4: prompt is a list of messages" in log.text


GOOD = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, r"data row 1: prompt is 3 \(int\)"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "data row 1: prompt is None"),
        ({"prompt": ["a"], "chosen": "b", "rejected": "c"}, "prompt is .*list of messages"),
        ({**GOOD, "prompt": []}, r"data row 1: prompt is \[\]"),
        ({**GOOD, "prompt": {"role": "user", "content": "a"}}, r"prompt is .* \(dict\)"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "data row 1: chosen is None"),
        ({"prompt": "a", "chosen": "b", "rejected": 1.5}, "data row 1: rejected is 1.5"),
        ({**GOOD, "rejected": "c"}, "both be strings or both be lists"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, "do not begin with the same message"),
        ({**GOOD, "prompt": [{"role": "system", "content": "a"}]}, "role 'system'"),
    ],
)
def test_rows_of_the_wrong_kind(tokenizer, row, words):
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=words):
        row_text(row, tokenizer, "data row 1")


TALK = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}


@pytest.mark.parametrize("tools", ["search, calculator", "5", '{"name": "search"}'])
def test_tools_that_are_something_else_are_named(tokenizer, tools):
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="row 3: tools is .* must be a list of JSON schemas"):
        row_text({**TALK, "tools": tools}, tokenizer, "row 3")
    # Text rows have no template, and their tools are not read.
    row_text({"prompt": "a", "chosen": "b", "rejected": "c", "tools": tools}, tokenizer, "row")


@pytest.mark.parametrize("tools", [None, "", " ", "null", "[]", []])
def test_no_tools(tokenizer, tools):
    tokenizer.chat_template = "{% if tools is not none %}TOOLS{% endif %}" + TEMPLATE
    assert "TOOLS" not in row_text({**TALK, "tools": tools}, tokenizer, "row")[0]


def test_a_message_without_content_is_named(tokenizer):
    tokenizer.chat_template = TEMPLATE
    row = {**TALK, "rejected": [bot("x"), bot(None)]}
    with pytest.raises(ValueError, match=r"row 3: rejected\[1\] is a message of role 'assistant'"):
        row_text(row, tokenizer, "row 3")
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}
    assert row_text({**TALK, "rejected": [calls]}, tokenizer, "row 3")


def test_a_prompt_of_text_before_answers_alone(tokenizer):
    tokenizer.chat_template = TEMPLATE
    assert row_text({**TALK, "prompt": "a"}, tokenizer, "row") == row_text(TALK, tokenizer, "row")


def test_a_tokenizer_that_renders_without_a_template(tokenizer):
    class Own(type(tokenizer)):
        def apply_chat_template(self, *args, **kwargs):
            raise RuntimeError("the last role is wrong")

    tokenizer.__class__ = Own
    with pytest.raises(ValueError, match="cannot render the row: the last role is wrong"):
        row_text(TALK, tokenizer, "row")
