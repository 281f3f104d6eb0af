"""The language of a text."""

import pytest

from oddsmith.prepare.language import guess_language, may_be


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("What is the capital of France, and why?", "en"),
        ("Was ist die Hauptstadt von Frankreich?", "de"),
        ("Quelle est la capitale de la France et pourquoi ?", "fr"),
        ("¿Cuál es la capital de Francia y por qué es importante?", "es"),
        ("Qual é a capital da França? Não sei o que você quer.", "pt"),
        ("Qual è la capitale della Francia e perché?", "it"),
        ("Wat is de hoofdstad van Frankrijk en waarom?", "nl"),
        ("Какая столица Франции?", "ru"),
        ("法国的首都是哪里", "zh"),
        ("フランスの首都はどこですか", "ja"),
        ("프랑스의 수도는 어디입니까?", "ko"),
        ("ما هي عاصمة فرنسا؟", "ar"),
        ("Ποια είναι η πρωτεύουσα;", "el"),
        ("2 + 2 = ?", None),
        ("", None),
        ("Gradient Boosting Classifier", "latin"),
    ],
)
def test_languages(text, code):
    assert guess_language(text) == code


def test_uncertain_rows_are_kept():
    english = frozenset({"en"})
    assert may_be(None, english) and may_be("latin", english) and may_be("en", english)
    assert not may_be("de", english) and not may_be("ru", english)
    assert not may_be("latin", frozenset({"ru"}))
    assert may_be("ru", frozenset({"uk"}))  # the same letters
