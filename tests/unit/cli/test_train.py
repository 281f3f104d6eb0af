"""From checked arguments to a run: model arguments, adapter, checkpoint; tests/e2e/test_cli.py trains."""

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest

from oddsmith import ORPOConfig
from oddsmith.cli import train
from oddsmith.cli.train_flags import AdapterArguments, RunArguments
from oddsmith.errors import UserError
from support.word_tokenizer import word_tokenizer


def config(tmp_path, **changed):
    return ORPOConfig(str(tmp_path / "out"), use_cpu=True, report_to="none", **changed)


def test_flags_overrule_model_init_kwargs(tmp_path):
    args = config(tmp_path, model_init_kwargs={"dtype": "float16", "device_map": "cpu"})
    assert train.model_init_kwargs(RunArguments(), args) == {
        "dtype": "float16", "device_map": "cpu"
    }  # fmt: skip
    run = RunArguments(dtype="bfloat16", attn_implementation="eager", model_revision="v2")
    assert train.model_init_kwargs(run, args) == {
        "dtype": "bfloat16", "device_map": "cpu", "attn_implementation": "eager", "revision": "v2"
    }  # fmt: skip


def test_four_bit_weights_compute_in_the_dtype_of_the_model():
    assert train.quantization(RunArguments()) is None
    run = RunArguments(load_in_4bit=True, dtype="bfloat16", use_bnb_nested_quant=True)
    made = train.quantization(run).to_dict()
    assert str(made["bnb_4bit_compute_dtype"]).endswith("bfloat16")
    assert made["bnb_4bit_use_double_quant"] is True
    plain = train.quantization(RunArguments(load_in_4bit=True, dtype="auto")).to_dict()
    assert plain["bnb_4bit_use_double_quant"] is False


def test_four_bits_need_an_adapter(tmp_path):
    run = RunArguments("m", "d", load_in_4bit=True)
    with pytest.raises(UserError, match="--load_in_4bit needs --use_peft"):
        train.run_train(run, AdapterArguments(), config(tmp_path))


def test_the_adapter_is_pefts():
    assert train.make_adapter(AdapterArguments()) is None
    flags = AdapterArguments(
        use_peft=True, lora_r=4, lora_alpha=9, lora_dropout=0.25, use_rslora=True,
        lora_target_modules=["q_proj", "v_proj"], lora_modules_to_save=["lm_head"],
    )  # fmt: skip
    made = train.make_adapter(flags)
    assert (made.r, made.lora_alpha, made.lora_dropout) == (4, 9, 0.25)
    assert (made.use_rslora, made.use_dora, made.bias) == (True, False, "none")
    assert made.target_modules == {"q_proj", "v_proj"} and made.modules_to_save == ["lm_head"]
    flags = AdapterArguments(use_peft=True, lora_target_modules=["all-linear"], use_dora=True)
    assert train.make_adapter(flags).target_modules == "all-linear"  # not a module of that name
    assert train.make_adapter(flags).use_dora


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, None),
        ("false", None),
        ("False", None),
        ("true", "out/checkpoint-4"),
        ("auto", "out/checkpoint-4"),
        ("folder", "folder"),
    ],
)
def test_the_checkpoint_to_go_on_from(given, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out/checkpoint-4", "folder"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out/checkpoint-4/trainer_state.json").write_text('{"global_step": 4}')
    (tmp_path / "out/checkpoint-6").mkdir()  # written in part
    args = config(tmp_path, resume_from_checkpoint=given)
    expected = str(tmp_path / found) if found and found.startswith("out") else found
    assert train.checkpoint_to_resume(args) == expected


def test_nothing_to_go_on_from_is_the_beginning(tmp_path, capsys):
    args = config(tmp_path, resume_from_checkpoint="auto")
    assert train.checkpoint_to_resume(args) is None
    assert capsys.readouterr().err == "Goes on from the beginning\n"


def test_a_restarted_run_goes_on_from_its_own_checkpoints(tmp_path, monkeypatch, capsys):
    args = config(tmp_path)
    for step, written in ((2, 100.0), (4, 200.0)):
        (folder := tmp_path / f"out/checkpoint-{step}").mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        os.utime(folder / "trainer_state.json", (written, written))
    monkeypatch.setenv("ODDSMITH_STARTED", "150.5")
    assert train.checkpoint_to_resume(args) is None  # its first start
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.checkpoint_to_resume(args) == str(tmp_path / "out/checkpoint-4")
    monkeypatch.setenv("ODDSMITH_STARTED", "250.5")  # both are of another run
    assert train.checkpoint_to_resume(args) is None
    assert "Goes on from the beginning" in capsys.readouterr().err
    monkeypatch.delenv("ODDSMITH_STARTED")
    assert train.checkpoint_to_resume(args) is None  # by the start of the launcher, the parent
    args.resume_from_checkpoint = "false"
    assert train.checkpoint_to_resume(args) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [("true", "has no checkpoint; remove the flag"), ("/no/such", "/no/such: no such folder")],
)
def test_a_checkpoint_that_is_not_there(given, words, tmp_path):
    with pytest.raises(UserError, match=words):
        train.checkpoint_to_resume(config(tmp_path, resume_from_checkpoint=given))


def test_the_tokenizer_with_padding_and_template(tmp_path):
    saved = word_tokenizer()
    saved.pad_token = None
    saved.save_pretrained(tmp_path / "model")
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    run = RunArguments(str(tmp_path / "model"), "d", chat_template=str(template))
    tokenizer = train.load_tokenizer(run, config(tmp_path))
    assert tokenizer.pad_token == "</s>"
    said = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert said == "a"
    run.chat_template = str(tmp_path / "absent.jinja")
    with pytest.raises(UserError, match="--chat_template: .*absent.jinja"):
        train.load_tokenizer(run, config(tmp_path))
    run.model_name_or_path = "/no/such/model"
    with pytest.raises(UserError, match="--model /no/such/model: no such folder"):
        train.load_tokenizer(run, config(tmp_path))


def test_the_last_evaluation_is_that_of_the_finished_model():
    history = [
        {"step": 4, "eval_loss": 3.0},
        {"step": 8, "eval_loss": 2.0, "eval_rewards/margins": 0.5},
        {"step": 8, "train_runtime": 1.0},
    ]
    state = SimpleNamespace(log_history=history, global_step=8)
    assert train.last_evaluation(state) == {"eval_loss": 2.0, "eval_rewards/margins": 0.5}
    state.global_step = 9
    assert train.last_evaluation(state) is None


def test_a_run_without_curves_is_no_failure(tmp_path, caplog):
    train.draw_curves([{"step": 1, "train_runtime": 2.0}], tmp_path)
    assert "No curves: " in caplog.text and not list(tmp_path.iterdir())
    train.draw_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], tmp_path)
    assert (tmp_path / "curves.png").is_file()


def test_an_interrupted_run_says_what_it_has_left(tmp_path):
    args = config(tmp_path)
    assert train._left(args, "again") == "there is no checkpoint yet"
    folder = tmp_path / "out" / "checkpoint-7"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    assert train._left(args, "oddsmith train") == f"{folder} is whole. To go on: oddsmith train"


class Saves:
    """A trainer that says what is saved and uploaded, in order."""

    def __init__(self, args, fails=None):
        self.args, self.fails, self.done = args, fails, []
        self.state = SimpleNamespace(log_history=[])

    def _did(self, what):
        if what == self.fails:
            raise OSError("No space left on device")
        self.done.append(what)

    def save_model(self):
        self._did("model")
        if self.args.push_to_hub:
            self._did("upload")

    def save_state(self):
        self._did("state")

    def save_metrics(self, split, metrics):
        self._did(f"{split} {metrics}")

    def push_to_hub(self, commit_message, revision):
        self._did(f"upload: {commit_message}, {revision}")

    def is_world_process_zero(self):
        return True


def test_metrics_are_saved_after_their_model_and_uploaded_with_it(tmp_path, monkeypatch):
    args = config(tmp_path, hub_revision="v2")
    args.push_to_hub = True
    made: Any = Saves(args)
    monkeypatch.setattr(train, "draw_curves", lambda *given: made.done.append("curves"))
    train.save_run(made, {"train": {"a": 1.0}, "eval": {"b": 2.0}})
    assert made.done == [
        "model", "state", "train {'a': 1.0}", "eval {'b': 2.0}", "curves", "upload: Model save, v2"
    ]  # fmt: skip
    assert args.push_to_hub
    made = Saves(args, fails="model")
    with pytest.raises(OSError, match="No space"):
        train.save_run(made, {"train": {"a": 1.0}})
    assert made.done == [] and args.push_to_hub
