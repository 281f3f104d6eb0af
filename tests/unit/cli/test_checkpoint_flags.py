"""Flags of `oddsmith quantize` and `oddsmith merge`, and their values."""

import pytest

from oddsmith.cli.checkpoint_flags import merge_parser, quantize_parser, run_merge, run_quantize


@pytest.fixture
def calls(monkeypatch):
    """Records the arguments of the two functions behind the commands."""
    made = []

    def record(*args, **kwargs):
        made.append((args, kwargs))
        return "12 weights"

    monkeypatch.setattr("oddsmith.checkpoint.quantize.quantize_checkpoint", record)
    monkeypatch.setattr("oddsmith.checkpoint.merge.merge_adapter", record)
    return made


def test_quantize_flags_reach_the_run(calls, capsys):
    argv = (
        "model out --double-quant --blocksize 128 --compute_dtype bfloat16 --skip lm_head v_proj "
        "--dtype float16 --overwrite --trust-remote-code"
    )
    assert run_quantize(argv.split()) == 0
    assert capsys.readouterr().out == "out: 12 weights\n"
    run_quantize(["model", "out"])
    given = {
        "double_quant": True, "blocksize": 128, "compute_dtype": "bfloat16", "dtype": "float16",
        "skip": ["lm_head", "v_proj"], "overwrite": True, "trust_remote_code": True,
    }  # fmt: skip
    plain = {
        "double_quant": False, "blocksize": 64, "compute_dtype": None, "dtype": None, "skip": [],
        "overwrite": False, "trust_remote_code": False,
    }  # fmt: skip
    assert calls == [(("model", "out"), given), (("model", "out"), plain)]


def test_merge_flags_reach_the_run(calls, capsys):
    argv = (
        "base adapter out --quantize --no-double_quant --blocksize 256 --compute-dtype float32 "
        "--dtype bfloat16 --overwrite --trust_remote_code"
    )
    assert run_merge(argv.split()) == 0
    assert capsys.readouterr().out == "out: 12 weights\n"
    run_merge(["base", "adapter", "out"])
    given = {
        "dtype": "bfloat16", "quantize": True, "double_quant": False, "blocksize": 256,
        "compute_dtype": "float32", "overwrite": True, "trust_remote_code": True,
    }  # fmt: skip
    # None: as in a 4-bit base.
    plain = {
        "dtype": None, "quantize": False, "double_quant": None, "blocksize": None,
        "compute_dtype": None, "overwrite": False, "trust_remote_code": False,
    }  # fmt: skip
    names = ("base", "adapter", "out")
    assert calls == [(names, given), (names, plain)]


@pytest.mark.parametrize(
    ("parser", "argv", "reason"),
    [
        (quantize_parser, ["model"], "arguments are required: OUT"),
        (quantize_parser, ["model", "out", "--blocksize", "48"], "invalid choice: 48"),
        (quantize_parser, ["model", "out", "--dtype", "int8"], "invalid choice: 'int8'"),
        (merge_parser, ["base", "adapter"], "arguments are required: OUT"),
        (merge_parser, ["base", "adapter", "out", "--skip", "x"], "unrecognized arguments"),
    ],
)
def test_wrong_flags(parser, argv, reason, capsys):
    with pytest.raises(SystemExit) as exit_:
        parser().parse_args(argv)
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err
