"""SIGTERM ends a command, and nothing half-written is left."""

import os
import signal

from oddsmith import cli
from oddsmith.cli import commands
from oddsmith.stage import staged_file


def test_sigterm_ends_a_command_as_an_error_does(monkeypatch, tmp_path, capsys):
    def convert(argv):
        with staged_file(tmp_path / "out") as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("goes on")

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        monkeypatch.setitem(commands.COMMANDS, "quantize", convert)
        assert cli.main(["quantize"]) == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "oddsmith quantize: ended by SIGTERM\n"
    assert not list(tmp_path.iterdir())


def test_a_handler_that_is_there_stays(monkeypatch):
    def own(number, frame):
        pass

    def look(argv):
        assert signal.getsignal(signal.SIGTERM) is own
        return 0

    before = signal.signal(signal.SIGTERM, own)
    try:
        monkeypatch.setitem(commands.COMMANDS, "quantize", look)
        assert cli.main(["quantize"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
