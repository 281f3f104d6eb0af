"""The processes of a run: arguments, files of accelerate's, and how accelerate reads them."""

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command
from accelerate.utils.launch import (
    _filter_args,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
)
from torch.distributed.run import get_args_parser

from oddsmith.cli import commands, launch
from oddsmith.cli.launch import LaunchArguments
from oddsmith.cli.train_flags import parse_launch_arguments
from oddsmith.errors import UserError

REQUIRED = ["--model", "m", "--dataset", "d"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("LOCAL_RANK", "ODDSMITH_STARTED", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def parse(*flags):
    return parse_launch_arguments([*REQUIRED, *flags])


def test_names_of_accelerate_and_torchrun(tmp_path):
    expected = LaunchArguments(
        num_processes=4,
        num_machines=2,
        machine_rank=1,
        main_process_ip="a",
        main_process_port=7,
    )
    assert expected == parse(
        "--num_processes", "4", "--num_machines", "2", "--machine_rank", "1",
        "--main_process_ip", "a", "--main_process_port", "7",
    )  # fmt: skip
    assert expected == parse(
        "--num-processes", "4", "--nnodes", "2", "--node_rank", "1", "--master_addr", "a",
        "--master_port", "7",
    )  # fmt: skip
    settings = tmp_path / "run.yaml"
    settings.write_text("model: m\ndataset: d\nnum_processes: 3\naccelerate_config: fsdp2\n")
    found = parse_launch_arguments([str(settings), "--num_processes", "2"])
    assert found == LaunchArguments(num_processes=2, accelerate_config="fsdp2")


def test_who_starts_processes(monkeypatch):
    wants = launch.wants_processes
    assert not wants(LaunchArguments()) and not wants(LaunchArguments(num_processes=1))
    assert wants(LaunchArguments(num_processes=2))
    assert wants(LaunchArguments(num_processes=1, max_restarts=2))
    assert wants(LaunchArguments(accelerate_config="fsdp2"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not wants(LaunchArguments())
    with pytest.raises(UserError, match="--num_processes: another launcher has started this"):
        wants(LaunchArguments(num_processes=2))
    monkeypatch.setenv("ODDSMITH_STARTED", "1.5")  # one of the processes
    assert not wants(LaunchArguments(num_processes=2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_processes": 0}, "--num_processes 0: must be at least 1"),
        ({"num_processes": 2, "machine_rank": 1}, "--machine_rank 1: must be from 0 to below"),
        ({"num_machines": 2}, "--num_machines 2: needs --num_processes"),
        ({"num_machines": 2, "max_restarts": 1}, "--max_restarts 1: is for one machine"),
        ({"num_machines": 2, "num_processes": 4}, "--num_machines 2: needs --main_process_ip"),
        (
            {
                "num_machines": 2,
                "num_processes": 3,
                "main_process_ip": "a",
                "main_process_port": 5,
            },
            "--num_processes 3: is the number on all machines, and must be a multiple",
        ),
    ],
)
def test_processes_that_cannot_be(arguments, words):
    with pytest.raises(UserError, match=words):
        launch.wants_processes(LaunchArguments(**arguments))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="--accelerate_config fsdp3: must be ddp, fsdp2, zero2"):
        launch.launcher_options(LaunchArguments(accelerate_config="fsdp3"), [])
    broken = tmp_path / "x.yaml"
    broken.write_text("distributed_type: FSDP\nno_such_key: 1\n")
    with pytest.raises(UserError, match="no_such_key"):
        launch.launcher_options(LaunchArguments(accelerate_config=str(broken)), [])


@pytest.mark.parametrize("name", launch.SHIPPED)
def test_accelerate_reads_the_shipped_files(name):
    path = launch.config_file(name)
    loaded = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[name]
    assert loaded.distributed_type.value == kind
    # None says how many processes there are: that is the command's.
    assert "num_processes" not in yaml.safe_load(path.read_text())


def environment(name, *flags):
    """What the processes get, as accelerate makes it."""
    options = launch.launcher_options(
        LaunchArguments(num_processes=2, accelerate_config=name), ["--model", "m"]
    )
    options, *_ = _validate_launch_command(options)
    assert options.training_script_args == ["train", "--model", "m"]
    assert (options.training_script, options.module, options.num_processes) == ("oddsmith", True, 2)
    if not name.startswith("zero"):
        return prepare_multi_gpu_env(options), options
    options.deepspeed_fields_from_accelerate_config = ""
    return prepare_deepspeed_cmd_env(options)[1], options


@pytest.mark.parametrize(("restarts", "machines"), [(0, 1), (1, 1), (0, 2)])
def test_processes_that_start_again_find_each_other(restarts, machines):
    """torchrun's rendezvous for one machine makes a new store for each start."""
    given = LaunchArguments(
        num_processes=2, num_machines=machines, main_process_ip="localhost",
        main_process_port=29511, max_restarts=restarts,
    )  # fmt: skip
    options = launch.launcher_options(given, ["--model", "m"])
    for_torchrun = _filter_args(options, get_args_parser(), ["-m", "oddsmith"])
    assert int(for_torchrun.max_restarts) == restarts
    assert for_torchrun.standalone == (restarts > 0 and machines == 1)


def test_what_the_processes_get(capsys, caplog):
    ddp, options = environment("ddp")
    assert "ACCELERATE_USE_FSDP" not in ddp and "ACCELERATE_USE_DEEPSPEED" not in ddp
    assert str(options.nproc_per_node) == "2" and options.multi_gpu
    fsdp, _ = environment("fsdp2")
    expected = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    assert {key: fsdp[key] for key in expected} == expected
    for stage in (2, 3):
        zero, _ = environment(f"zero{stage}")
        assert zero["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert zero["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
        # The trainer's arguments decide these.
        assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in zero
        assert "ACCELERATE_GRADIENT_CLIPPING" not in zero
    assert zero["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
    # Nothing is left for accelerate to warn of.
    assert "were not passed to" not in caplog.text + capsys.readouterr().err


def test_a_file_of_the_users_says_how_many(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 3\n"
    )
    options = launch.launcher_options(LaunchArguments(accelerate_config=str(path)), [])
    assert options.num_processes == 3
    given = LaunchArguments(accelerate_config=str(path), num_processes=5)
    assert launch.launcher_options(given, []).num_processes == 5


def test_a_file_for_several_machines(tmp_path):
    """One that was written on each machine, whose numbers the command's own would overrule."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 4\n"
        "num_machines: 2\nmachine_rank: 1\nmain_process_ip: 10.0.0.1\nmain_process_port: 29500\n"
    )
    with pytest.raises(UserError, match="is for 2 machines, and --num_machines is 1; give"):
        launch.launcher_options(LaunchArguments(accelerate_config=str(path)), [])
    given = LaunchArguments(
        accelerate_config=str(path), num_processes=4, num_machines=2, machine_rank=1,
        main_process_ip="10.0.0.1", main_process_port=29500,
    )  # fmt: skip
    options = launch.launcher_options(given, [])
    assert (options.num_machines, options.machine_rank, options.num_processes) == (2, 1, 4)


def test_what_cpus_do_not_do_is_said():
    said = launch.ignored_on_cpus("fsdp2", has_gpu=False)
    assert said == (
        "--accelerate_config fsdp2: accelerate splits nothing on CPUs; the run is one of DDP"
    )
    assert launch.ignored_on_cpus("zero3", has_gpu=True) is None
    for name in (None, "ddp", "mine.yaml"):
        assert launch.ignored_on_cpus(name, has_gpu=False) is None


def test_exit_codes(capsys):
    assert launch._code(1, 143) == 143
    assert capsys.readouterr().err == ""
    assert launch._code(1, -9) == 137
    assert "process 1 was ended by SIGKILL, as a system does" in capsys.readouterr().err


def test_the_command_that_goes_on():
    assert commands._again(["a b.yaml", "--lora_r", "4"]) == (
        "oddsmith train 'a b.yaml' --lora_r 4 --resume_from_checkpoint auto"
    )
    resumed = ["--model", "m", "--resume_from_checkpoint", "auto"]
    assert commands._again(resumed) == "oddsmith train --model m --resume_from_checkpoint auto"
