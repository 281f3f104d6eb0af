"""The temporary database: its folder, and its removal."""

import pytest

from oddsmith.prepare.scratch import scratch_database


@pytest.mark.parametrize("name", ["plain", "with 'quotes'"])
def test_it_is_in_its_folder_and_removed(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    with scratch_database(folder) as store:
        (made,) = folder.iterdir()
        assert [path.name for path in made.iterdir()] == ["rows.sqlite"]
        store.execute("CREATE TABLE t (a)")
        store.executemany("INSERT INTO t VALUES (?)", [(3,), (1,), (2,)])
        assert store.execute("SELECT a FROM t ORDER BY a").fetchall() == [(1,), (2,), (3,)]
        # Large sorts go to the same folder, not to that of the system.
        ((temporary,),) = store.execute("PRAGMA temp_store_directory").fetchall()
        assert temporary == str(made)
    assert not list(folder.iterdir())


def test_it_is_removed_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), scratch_database(tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
