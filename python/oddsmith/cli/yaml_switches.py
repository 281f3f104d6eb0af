"""`yes`, `no`, `on` and `off` of a settings file, read as what the field means."""

import argparse
from typing import Any

import yaml
from transformers.hf_argparser import string_to_bool

# All spellings of YAML 1.1 that are not `true` and `false`.
_YES = {"yes", "on"}
_NO = {"no", "off"}
# Fields that are text and have a word of their own for the two.
_WORDS = {
    "resume_from_checkpoint": {True: "true", False: "false"},
    "report_to": {True: "all", False: "none"},
    "share_prompt": {True: "true", False: "false"},
    "activation_budget": {True: "auto", False: "none"},
}


class _Word(str):
    """An unquoted yes, no, on or off, as it is written."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which `no` is false; but its spelling is kept until its field is known."""


def _switch(loader: _Loader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    return _Word(text) if text.lower() in _YES | _NO else loader.construct_yaml_bool(node)


_Loader.add_constructor("tag:yaml.org,2002:bool", _switch)


def load_yaml(text: str) -> Any:
    """
    Parses YAML; `yes`, `no`, `on` and `off` without quotes are for [`meant`].

    Raises:
        yaml.YAMLError: If it is not YAML.
    """
    return yaml.load(text, _Loader)  # a SafeLoader


def meant(action: argparse.Action, value: Any) -> Any:
    """
    The value of a setting, with words that YAML would make a bool read by the type of its field.

    A word is a bool where the field is one, one of the choices where it has those, and text
    elsewhere; within a mapping it is a bool, as YAML says.

    Args:
        action (`argparse.Action`): The flag of the same name.
        value (`Any`): As [`load_yaml`] gives it.
    """
    if isinstance(value, dict):
        return {_text(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_text(each) for each in value]
    words = _WORDS.get(action.dest)
    if isinstance(value, _Word):
        on = value.lower() in _YES
        if action.type is string_to_bool:
            return on
        choices = [str(each) for each in action.choices or ()]
        if value in choices:
            return str(value)
        if not on and "no" in choices:
            return "no"
        return words[on] if words else str(value)
    if value is False and action.choices and "no" in action.choices:
        return "no"
    if isinstance(value, bool) and words:
        return words[value]
    return value


def _plain(value: Any) -> Any:
    """A value within a mapping, as YAML 1.1 reads it."""
    if isinstance(value, _Word):
        return value.lower() in _YES
    if isinstance(value, dict):
        return {_text(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _text(value: Any) -> Any:
    """An item of a list or a key, as it is written."""
    if isinstance(value, dict):
        return _plain(value)
    return str(value) if isinstance(value, _Word) else value
