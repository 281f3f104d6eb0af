"""Transformers' tables of attention while there is a packed row: which names are served."""

import pytest
from transformers import AttentionInterface

from oddsmith.integrations.attention_table import TABLE, PackedRow, why_not

ROW = ((1, 1, 1),)


def test_every_name_with_a_known_function_is_served():
    assert not TABLE.serves("sdpa")
    row = PackedRow(ROW)
    for name in ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"):
        assert TABLE.serves(name) and why_not(name) is None
    assert not TABLE.serves("paged|eager") and not TABLE.serves(None)
    del row
    assert not TABLE.serves("sdpa") and why_not("sdpa") is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mine", "'mine', which transformers does not have"),
        ("theirs", "'theirs' is computed by a function of another library"),
        (None, "None, which transformers does not have"),
    ],
)
def test_reasons(name, reason, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "theirs", lambda *_: None)
    assert reason in why_not(name)
    row = PackedRow(ROW)
    assert reason in why_not(name)
    del row


def test_one_foreign_name_leaves_the_others(monkeypatch):
    def foreign(*args, **kwargs):
        return None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", foreign)
    row = PackedRow(ROW)
    assert AttentionInterface()["flash_attention_2"] is foreign
    assert not TABLE.serves("flash_attention_2") and TABLE.serves("sdpa")
    del row


def test_eager_attention_comes_from_the_models_file():
    def eager(*args, **kwargs):
        return args, kwargs

    table = AttentionInterface()
    assert table.get_interface("eager", eager) is eager
    row = PackedRow(ROW)
    ours = table.get_interface("eager", eager)
    assert ours is not eager
    assert ours(1, scaling=2) == ((1,), {"scaling": 2})
    assert table.get_interface("sdpa", eager) is table["sdpa"]
    del row
    assert table.get_interface("eager", eager) is eager
