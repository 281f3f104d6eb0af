"""`oddsmith train --num_processes N`: starts the processes of a run through accelerate's launcher."""

import logging
import os
import signal
import sys
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import once

# Set for the processes that are started here, with the time of the first start.
STARTED = "ODDSMITH_STARTED"

# Files of accelerate's that the package has, and what they are for.
SHIPPED = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass
class LaunchArguments:
    """The processes of a run. The names are those of `accelerate launch`, and torchrun's as aliases.

    Args:
        num_processes (`int`, *optional*): Processes on all machines; `None`: one for each GPU, if
            another argument of these is given.
        num_machines (`int`, *optional*, defaults to 1): Machines. Alias: `nnodes`.
        machine_rank (`int`, *optional*, defaults to 0): Number of this machine. Alias: `node_rank`.
        main_process_ip (`str`, *optional*): Address of machine 0. Alias: `master_addr`.
        main_process_port (`int`, *optional*): A free port of machine 0. Alias: `master_port`.
        gpu_ids (`str`, *optional*): GPUs of this machine, such as `0,1`.
        max_restarts (`int`, *optional*, defaults to 0): How often the processes are started again
            after one has ended early.
        accelerate_config (`str`, *optional*): `ddp`, `fsdp2`, `zero2`, `zero3`, or a file that
            `accelerate config` has written.
    """

    num_processes: int | None = field(
        default=None, metadata={"help": "Processes to start, on all machines together."}
    )
    num_machines: int = field(
        default=1,
        metadata={
            "help": "Machines; start the command on each.",
            "aliases": ["--nnodes"],
        },
    )
    machine_rank: int = field(
        default=0,
        metadata={
            "help": "Number of this machine, from 0.",
            "aliases": ["--node_rank", "--node-rank"],
        },
    )
    main_process_ip: str | None = field(
        default=None,
        metadata={
            "help": "Address of machine 0.",
            "aliases": ["--master_addr", "--master-addr"],
        },
    )
    main_process_port: int | None = field(
        default=None,
        metadata={
            "help": "A free port of machine 0.",
            "aliases": ["--master_port", "--master-port"],
        },
    )
    gpu_ids: str | None = field(default=None, metadata={"help": "GPUs to use, such as 0,1."})
    max_restarts: int = field(
        default=0,
        metadata={"help": "Times that the processes are started again after one has failed."},
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "ddp, fsdp2, zero2, zero3, or a file of accelerate config."},
    )

    def given(self) -> list[str]:
        """Names of the arguments that differ from their defaults."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]


def wants_processes(arguments: LaunchArguments) -> bool:
    """
    Whether this process has to start those of the run, and is none of them.

    Raises:
        UserError: If another launcher has started this process, or the arguments contradict each
            other.
    """
    given = arguments.given()
    if not given or STARTED in os.environ:
        return False
    if "LOCAL_RANK" in os.environ:
        raise UserError(
            f"--{given[0]}: another launcher has started this process already; give the number of "
            "processes to one of the two"
        )
    if arguments.num_processes is not None and arguments.num_processes < 1:
        raise UserError(f"--num_processes {arguments.num_processes}: must be at least 1")
    if arguments.num_machines < 1 or not 0 <= arguments.machine_rank < arguments.num_machines:
        raise UserError(
            f"--machine_rank {arguments.machine_rank}: must be from 0 to below --num_machines "
            f"{arguments.num_machines}"
        )
    if arguments.num_machines > 1:
        if arguments.max_restarts:
            raise UserError(
                f"--max_restarts {arguments.max_restarts}: is for one machine, because processes that are "
                "started again may wait for those of another machine that have ended; let the scheduler "
                "start the job again, with --resume_from_checkpoint auto"
            )
        for name in ("num_processes", "main_process_ip", "main_process_port"):
            if getattr(arguments, name) is None:
                raise UserError(f"--num_machines {arguments.num_machines}: needs --{name}")
        if cast_processes(arguments) % arguments.num_machines:
            raise UserError(
                f"--num_processes {arguments.num_processes}: is the number on all machines, and "
                f"must be a multiple of --num_machines {arguments.num_machines}"
            )
    elif arguments.num_processes == 1 and set(given) == {"num_processes"}:
        return False
    return True


def cast_processes(arguments: LaunchArguments) -> int:
    """Processes on all machines: those asked for, or one for each GPU of this machine."""
    if arguments.num_processes is not None:
        return arguments.num_processes
    import torch

    return max(torch.cuda.device_count(), 1)


def config_file(name: str) -> Path:
    """
    A file of accelerate's, by the name of a shipped one or its path.

    Raises:
        UserError: If there is none.
    """
    if name in SHIPPED:
        return Path(str(files("oddsmith.cli") / "accelerate_configs" / f"{name}.yaml"))
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"--accelerate_config {name}: must be {', '.join(SHIPPED)} or a file that exists"
        )
    return path


def launcher_options(arguments: LaunchArguments, argv: list[str]) -> Any:
    """
    The arguments of accelerate's launcher, as its own parser makes them.

    Args:
        arguments ([`LaunchArguments`]): The processes.
        argv (`list[str]`): The arguments of `oddsmith train`.

    Raises:
        UserError: If accelerate cannot read the file, or it is for another number of machines.
    """
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = config_file(arguments.accelerate_config or "ddp")
    try:
        loaded = load_config_from_file(str(path))
    except Exception as error:  # of yaml, of accelerate's dataclass, or no mapping at all
        raise UserError(f"--accelerate_config {arguments.accelerate_config}: {error}") from error
    # Those of the file would be overruled by the defaults here: each machine would train on its own.
    machines = getattr(loaded, "num_machines", None) or 1
    if machines > 1 and arguments.num_machines != machines:
        raise UserError(
            f"--accelerate_config {arguments.accelerate_config}: is for {machines} machines, and "
            f"--num_machines is {arguments.num_machines}; give --num_machines, --machine_rank, "
            "--main_process_ip and --main_process_port as flags too"
        )
    processes = arguments.num_processes
    if processes is None and arguments.accelerate_config not in (None, *SHIPPED):
        processes = getattr(loaded, "num_processes", -1)
        processes = None if processes in (None, -1) else processes
    processes = cast_processes(arguments) if processes is None else processes
    here = max(processes // arguments.num_machines, 1)
    flags = {
        "config_file": path,
        "num_processes": processes,
        "num_machines": arguments.num_machines,
        "machine_rank": arguments.machine_rank,
        "main_process_ip": arguments.main_process_ip,
        # 0: a free one
        "main_process_port": arguments.main_process_port or 0,
        "gpu_ids": arguments.gpu_ids,
        "max_restarts": arguments.max_restarts,
        "num_cpu_threads_per_process": os.environ.get("OMP_NUM_THREADS")
        or max((os.cpu_count() or 1) // here, 1),
    }
    options = [
        part
        for name, value in flags.items()
        if value is not None
        for part in (f"--{name}", str(value))
    ]
    parser = launch_command_parser()
    parsed = parser.parse_args([*options, "--module", "oddsmith", "train", *argv])
    if arguments.max_restarts:
        # accelerate's default keeps one store for all starts, in which processes that are started again
        # find the addresses of those that have ended: they wait for them. torchrun's own makes a new one.
        parsed.standalone = True
    return parsed


def ignored_on_cpus(name: str | None, has_gpu: bool) -> str | None:
    """What accelerate does not say of a shipped configuration where there is no GPU."""
    if has_gpu or name not in SHIPPED or name == "ddp":
        return None
    return f"--accelerate_config {name}: accelerate splits nothing on CPUs; the run is one of DDP"


def start(arguments: LaunchArguments, argv: list[str]) -> int:
    """
    Starts the processes of a run, waits for them, and returns the exit code of the first that
    failed, or 0.

    Args:
        arguments ([`LaunchArguments`]): The processes.
        argv (`list[str]`): The arguments of `oddsmith train`, which each process gets.

    Raises:
        UserError: If accelerate refuses the arguments.
    """
    import time

    import torch
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launcher_options(arguments, argv)
    ignored = ignored_on_cpus(arguments.accelerate_config, torch.cuda.is_available())
    if ignored:
        once.say(f"oddsmith train: {ignored}")
    os.environ[STARTED] = repr(time.time())
    if not os.environ.get("ODDSMITH_TRACEBACK"):
        # The process that failed has said why. Of these loggers each prints some lines more.
        for name in ("torch.distributed.elastic", "torch.distributed.run"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch_command(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _code(rank, failure.exitcode)
    except SignalException as error:  # the processes have got it too
        return 128 + int(error.sigval)
    except (ValueError, ImportError, ConnectionError) as error:
        raise UserError(f"accelerate: {error}") from error
    finally:
        del os.environ[STARTED]
    return 0


def _code(rank: int, code: int) -> int:
    """The exit code of the shell for that of a process; says so if a signal has ended it."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    why = ", as a system does that is out of memory" if name == "SIGKILL" else ""
    print(f"oddsmith train: error: process {rank} was ended by {name}{why}", file=sys.stderr)
    return 128 - code
