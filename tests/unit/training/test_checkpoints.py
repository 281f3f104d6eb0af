"""Which checkpoint a run goes on from."""

import os

from oddsmith.training.checkpoints import checkpoints, is_whole, newest_whole

WRONG = (
    (70, '{"a":' * 10_000 + "1" + "}" * 10_000),
    (71, '{"global_step": "1"}'),
    (72, '{"global_step": null}'),
)


def write(folder, step, text='{"global_step": 1}', written=1000.0):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if text is not None:
        (path / "trainer_state.json").write_text(text)
        os.utime(path / "trainer_state.json", (written, written))
    return path


def test_the_newest_that_is_whole(tmp_path):
    assert newest_whole(tmp_path) is None and newest_whole(tmp_path / "none") is None
    second, tenth = write(tmp_path, 2), write(tmp_path, 10, written=900.0)
    for step, text in ((30, None), (40, '{"glob'), (50, "[]"), (60, "7"), *WRONG):
        assert not is_whole(write(tmp_path, step, text))
    (tmp_path / "checkpoint-99").touch()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        f"checkpoint-{step}" for step in (72, 71, 70, 60, 50, 40, 30, 10, 2)
    ]
    assert newest_whole(tmp_path) == tenth
    assert newest_whole(tmp_path, since=950.0) == second
    assert newest_whole(tmp_path, since=1001.0) is None
