"""What tests of inspection share."""

import pytest

from support.word_tokenizer import word_tokenizer


@pytest.fixture
def tokenizer():
    return word_tokenizer()
