"""A folder has the old model or the new one, or does not look like a model, wherever a process is killed."""

import json
import os
from pathlib import Path

import pytest

from oddsmith import replace
from oddsmith.replace import NEW, complete, replace_model
from oddsmith.stage import new_folder

OLD = {
    "config.json": "old",
    "model.safetensors": "old",
    "tokenizer.json": "old",
    "notes.txt": "mine",
}
SHARDS = {f"model-0000{n}-of-00002.safetensors": "new" for n in (1, 2)}
INDEX = "model.safetensors.index.json"
MODELS = {
    "one file": {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new"},
    "weights alone": {"config.json": "old", "model.safetensors": "new", "tokenizer.json": "old"},
    "in parts": {"config.json": "new", INDEX: "new", **SHARDS, "tokenizer.json": "new"},
    "with a folder": {
        "config.json": "new",
        "model.safetensors": "new",
        "more/adapter_config.json": "new",
    },
}


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """A disk that nobody waits for."""
    monkeypatch.setattr(replace, "sync", lambda path: None)


class Killed(BaseException):
    """Instead of a kill, after which no code runs."""


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def read(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".oddsmith")
    }


def removed(new):
    return ["model.safetensors"] if INDEX in new else []


def put(folder, new):
    with new_folder(folder) as stage:
        write(stage, new)
        replace_model(stage, folder, removed(new))


def killed(folder, new, after, monkeypatch):
    """Whether the process got so far that it was killed before a call number `after` of the system."""
    calls = 0

    def counted(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            nonlocal calls
            if calls == after:
                raise Killed
            calls += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    with new_folder(folder) as stage, monkeypatch.context() as patch:
        write(stage, new)
        for name in ("rename", "replace", "link", "unlink"):
            counted(name)
        # What cleans up would run in the killed process.
        patch.setattr(replace.shutil, "rmtree", lambda *args, **kwargs: None)
        try:
            replace_model(stage, folder, removed(new))
        except Killed:
            found = True
        else:
            found = False
        monkeypatch.undo()
    return found


@pytest.mark.parametrize("new", MODELS.values(), ids=MODELS)
def test_whenever_it_is_killed(new, tmp_path, monkeypatch):
    """At every rename, link and removal."""
    for after in range(100):
        folder = tmp_path / str(after)
        folder.mkdir()
        write(folder, OLD)
        with pytest.MonkeyPatch.context() as patch:
            ended = not killed(folder, new, after, patch)
        found = read(folder)
        if not ended:
            has = {name: text for name, text in found.items() if not name.startswith(NEW)}
            if "config.json" in has:
                whole = {**OLD, **new}
                for name in removed(new):
                    del whole[name]
                assert has in (OLD, whole)
            if (folder / NEW).is_dir():
                assert {name: found[f"{NEW}/{name}"] for name in new} == new
            else:
                assert has == OLD
                continue
        complete(folder)
        expected = {**OLD, **new}
        for name in removed(new):
            del expected[name]
        assert read(folder) == expected and not (folder / NEW).exists()
        if ended:
            assert after > 1
            return
    raise AssertionError("it does not end")


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("Operation not permitted")

    write(tmp_path, OLD)
    monkeypatch.setattr(os, "link", refuse)
    put(tmp_path, MODELS["in parts"])
    assert read(tmp_path) == {**MODELS["in parts"], "notes.txt": "mine"}


def test_one_file_is_replaced_at_once(tmp_path, monkeypatch):
    """Weights alone: the folder is a model all the time."""
    write(tmp_path, OLD)
    unlinked, unlink = [], Path.unlink

    def record(path, missing_ok=False):
        unlinked.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", record)
    put(tmp_path, MODELS["weights alone"])
    assert "config.json" not in unlinked
    assert read(tmp_path) == {**OLD, "model.safetensors": "new"}


def test_a_link_is_replaced_and_not_followed(tmp_path):
    target, folder = tmp_path / "target", tmp_path / "out"
    target.write_text("another's")
    folder.mkdir()
    (folder / "config.json").symlink_to(target)
    put(folder, {"config.json": "another's", "model.safetensors": "new"})
    assert target.read_text() == "another's" and not (folder / "config.json").is_symlink()


def test_what_was_moved_in_whole_is_no_new_model(tmp_path):
    write(tmp_path, {"config.json": "new"})
    (tmp_path / NEW).mkdir()
    (tmp_path / NEW / "config.json").write_text("half removed")
    complete(tmp_path)
    assert read(tmp_path) == {"config.json": "new"} and not (tmp_path / NEW).exists()


def test_names_of_removed_files_stay_in_the_folder(tmp_path):
    folder = tmp_path / "out"
    (folder / NEW).mkdir(parents=True)
    (tmp_path / "outside").write_text("mine")
    (folder / NEW / ".oddsmith-removed.json").write_text(json.dumps(["../outside"]))
    complete(folder)
    assert (tmp_path / "outside").exists()
