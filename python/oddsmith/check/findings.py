"""What was found on a machine, as lines for a person and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "FORMAT",
    "Findings",
    "Folder",
    "Gpu",
    "Problem",
    "Processor",
    "Route",
    "Run",
    "Speed",
    "Trial",
    "Verdict",
]

# Raised when a field of the JSON changes its meaning or goes.
FORMAT = 1


@dataclass(frozen=True)
class Problem:
    """Something that hinders a run.

    Args:
        what (`str`): What was found.
        remedy (`str`): What to do.
        fatal (`bool`): Whether nothing can be trained as long as it is so.
    """

    what: str
    remedy: str
    fatal: bool = False


@dataclass(frozen=True)
class Processor:
    """The CPU and the memory that this process may use. Sizes are in bytes, None where unknown."""

    name: str
    cores: int
    threads: int
    vector: str
    bf16: bool
    memory: int | None
    available: int | None


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use. Sizes are in bytes."""

    index: int
    name: str
    capability: str
    memory: int
    free: int
    bf16: bool


@dataclass(frozen=True)
class Folder:
    """A folder that files are written to; `free` is in bytes.

    Args:
        private (`bool`): Whether nobody else can write to it.
    """

    what: str
    path: str
    free: int
    writable: bool
    private: bool


@dataclass(frozen=True)
class Route:
    """Who computes a part of a step on a device, and why."""

    device: str
    what: str
    by: str
    why: str


@dataclass(frozen=True)
class Trial:
    """A family of operations beside torch's on the same device.

    Args:
        deviation (`float`, *optional*): From the result in `float64`, as a share; None if it failed.
        allowed (`float`, *optional*): The most that it may be; None if it failed.
        error (`str`, *optional*): Why there is no result.
    """

    device: str
    what: str
    dtype: str
    deviation: float | None
    allowed: float | None
    error: str | None = None

    @property
    def passed(self) -> bool:
        if self.deviation is None or self.allowed is None:
            return False
        return self.deviation <= self.allowed


@dataclass(frozen=True)
class Verdict:
    """What a GPU's self-test found of a family of CUDA kernels, in the dtype that is the farthest off.

    Args:
        family (`str`): As the core names it.
        seconds (`float`): What the self-test took.
        error (`str`, *optional*): Why there is no result.
    """

    device: str
    family: str
    seconds: float
    dtype: str | None = None
    deviation: float | None = None
    allowed: float | None = None
    error: str | None = None

    @property
    def passed(self) -> bool:
        if self.error is not None or self.deviation is None or self.allowed is None:
            return False
        return self.deviation <= self.allowed

    @property
    def fault(self) -> str:
        """What is wrong, for a person."""
        if self.error is not None:
            return self.error
        return f"{self.deviation:.1e} off in {self.dtype}, and {self.allowed:.1e} is allowed"


@dataclass(frozen=True)
class Speed:
    """How fast something is: `rate` is in `unit`, `share` is of the device's copy or product."""

    device: str
    what: str
    milliseconds: float
    rate: float
    unit: str
    share: float


@dataclass(frozen=True)
class Run:
    """A few steps of training, packed and padded. Losses are of the last step."""

    device: str
    what: str
    packed: float | None
    padded: float | None
    allowed: float
    path: str
    error: str | None = None

    @property
    def passed(self) -> bool:
        if self.packed is None or self.padded is None:
            return False
        return abs(self.packed - self.padded) <= self.allowed


@dataclass
class Findings:
    """Everything that `oddsmith check` found."""

    packages: dict[str, str | None] = field(default_factory=dict)
    software: dict[str, str | None] = field(default_factory=dict)
    processor: Processor | None = None
    gpus: list[Gpu] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    kernels: list[Verdict] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether what is installed can train."""
        return not any(problem.fatal for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """As docs/check.schema.json describes it."""
        found = asdict(self)
        for name in ("kernels", "trials", "runs"):
            for entry, row in zip(getattr(self, name), found[name], strict=True):
                row["passed"] = entry.passed
        return {"format": FORMAT, "ready": self.ready, **found}

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield from _section("software", _software(self))
        yield from _section("machine", _machine(self))
        yield from _section("folders", map(_folder, self.folders))
        yield from _section("what computes", map(_route, self.routes))
        yield from _section("self-test of the kernels", map(_verdict, self.kernels))
        yield from _section("tried out", map(_trial, self.trials))
        yield from _section("speed", map(_speed, self.speeds))
        yield from _section("trained, packed and padded", map(_run, self.runs))
        yield from _section("problems", map(_problem, self.problems))
        yield "What is installed can train." if self.ready else "What is installed cannot train."


def _section(title: str, lines: Any) -> Iterator[str]:
    found = list(lines)
    if found:
        yield title
        yield from (f"  {line}" for line in found)


def _size(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GB"


def _software(found: Findings) -> Iterator[str]:
    for name, version in {**found.software, **found.packages}.items():
        yield f"{name:<16}{version or 'none'}"


def _machine(found: Findings) -> Iterator[str]:
    cpu = found.processor
    if cpu is not None:
        bf16 = "with" if cpu.bf16 else "without"
        yield f"{cpu.name}: {cpu.cores} cores, {cpu.threads} threads, {cpu.vector}, {bf16} bfloat16"
        yield f"memory {_size(cpu.memory)}, available {_size(cpu.available)}"
        if not found.gpus:
            yield "no GPU"
    for gpu in found.gpus:
        bf16 = "with" if gpu.bf16 else "without"
        yield (
            f"cuda:{gpu.index}: {gpu.name}, capability {gpu.capability}, {bf16} bfloat16, "
            f"{_size(gpu.free)} of {_size(gpu.memory)} free"
        )


def _folder(folder: Folder) -> str:
    state = "writable" if folder.writable else "not writable"
    others = "" if folder.private else ", others can write to it"
    return f"{folder.what:<16}{folder.path}: {_size(folder.free)} free, {state}{others}"


def _route(route: Route) -> str:
    return f"{route.device:<8}{route.what:<18}{route.by} ({route.why})"


def _trial(trial: Trial) -> str:
    what = f"{trial.device:<8}{trial.what:<28}{trial.dtype:<10}"
    if trial.error is not None:
        return f"{what}failed: {trial.error}"
    verdict = "right" if trial.passed else "WRONG"
    return f"{what}{verdict}, {trial.deviation:.1e} off (allowed {trial.allowed:.1e})"


def _verdict(verdict: Verdict) -> str:
    what = f"{verdict.device:<8}{verdict.family:<28}"
    if not verdict.passed:
        return f"{what}not used: {verdict.fault}"
    return f"{what}used, {verdict.deviation:.1e} off (allowed {verdict.allowed:.1e}), {verdict.seconds:.2f} s"


def _speed(speed: Speed) -> str:
    share = f"{speed.share:.0%} of the device's own"
    what = f"{speed.device:<8}{speed.what:<28}{speed.milliseconds:9.2f} ms"
    return f"{what}{speed.rate:10.2f} {speed.unit:<8} {share}"


def _run(run: Run) -> str:
    what = f"{run.device:<8}{run.what:<16}"
    if run.packed is None or run.padded is None:
        return f"{what}failed: {run.error}"
    verdict = "the same" if run.passed else "NOT the same"
    return f"{what}loss {run.packed:.4f} and {run.padded:.4f}, {verdict}; {run.path}"


def _problem(problem: Problem) -> str:
    return f"{problem.what}; {problem.remedy}"
