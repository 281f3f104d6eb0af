"""How a run is spread, by arguments, by accelerate and by the model itself."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from oddsmith.training import engine
from oddsmith.training.engine import Engine, check_engine, data_parallel, engine_of


def args(**changed):
    return SimpleNamespace(**{"fsdp": [], "fsdp_plugin_args": None, **changed})


def deepspeed(**config):
    return SimpleNamespace(deepspeed_config=config)


@pytest.fixture
def state(monkeypatch):
    """What accelerate knows; without it, accelerate has not started."""

    def started(**values):
        known = {"distributed_type": DistributedType.NO, "deepspeed_plugin": None, **values}
        monkeypatch.setattr(engine, "is_initialized", lambda: True)
        monkeypatch.setattr(engine, "AcceleratorState", lambda: SimpleNamespace(**known))

    monkeypatch.setattr(engine, "is_initialized", lambda: False)
    return started


def test_one_process_has_none(state):
    assert engine_of(args()) == Engine()
    state()
    assert engine_of(args(), nn.Linear(2, 2)) == Engine()
    assert Engine().splits is None


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_of_arguments_and_of_the_environment(version, state):
    by_arguments = args(fsdp=True, fsdp_plugin_args={"fsdp_version": version})
    assert engine_of(by_arguments) == Engine(fsdp=version)
    plugin = SimpleNamespace(fsdp_version=version)
    state(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    assert engine_of(args()) == Engine(fsdp=version)
    assert Engine(fsdp=version).splits == f"FSDP{version}"


def test_deepspeed_of_arguments_and_of_the_environment(state):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    plugin = deepspeed(zero_optimization=zero, optimizer={"type": "AdamW"})
    expected = Engine(zero=2, offload="cpu", offloaded=0.5, optimizer=True)
    assert engine_of(args(deepspeed_plugin=plugin)) == expected
    state(distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
    assert engine_of(args(deepspeed_plugin=None)) == expected
    assert expected.splits == "DeepSpeed ZeRO-2"


def test_moments_that_are_not_offloaded(state):
    zero = {"stage": 3, "offload_optimizer": {"device": "none"}}
    state(deepspeed_plugin=deepspeed(zero_optimization=zero))
    assert engine_of(args()) == Engine(zero=3)


def test_tensor_and_context_parallelism(state):
    parallel = SimpleNamespace(tp_size=2, cp_size=1, sp_size=4)
    state(parallelism_config=parallel)
    assert engine_of(args()) == Engine(tensor=2, context=4)
    assert Engine(tensor=2).splits == "tensor parallelism"
    state(deepspeed_plugin=deepspeed(zero_optimization={}, tensor_parallel={"autotp_size": 2}))
    assert engine_of(args()) == Engine(zero=0, tensor=2)
    model = nn.Linear(2, 2)
    model.tp_size = 8
    assert engine_of(args(), model).tensor == 8


def test_a_model_that_is_split_when_it_is_loaded(state):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for names, place, fsdp in [
            (("fsdp",), Shard(0), 2),
            (None, Shard(0), 2),
            (("tp",), Shard(0), 0),
            (("fsdp",), Replicate(), 0),
        ]:
            mesh = init_device_mesh("cpu", (1,), mesh_dim_names=names)
            model = nn.Linear(4, 4, bias=False)
            model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [place]))
            assert engine_of(args(), model) == Engine(fsdp=fsdp), (names, place)
    finally:
        dist.destroy_process_group()


def test_split_sequences_are_refused():
    check_engine(Engine(fsdp=2, tensor=4), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="over 2 processes splits each sequence"):
        check_engine(Engine(context=2), nn.Linear(2, 2))


def test_adapters_are_looked_at_under_tensor_parallelism_alone():
    model = nn.Linear(2, 2)
    model.peft_config = {"default": SimpleNamespace(peft_type="IA3")}
    check_engine(Engine(fsdp=2), model)
    with pytest.raises(ValueError, match="tensor parallelism trains LoRA alone"):
        check_engine(Engine(tensor=2), model)


class Mesh(dict):
    """Sizes of the dimensions of a mesh."""

    @property
    def mesh_dim_names(self):
        return tuple(self)

    def __getitem__(self, name):
        return SimpleNamespace(size=lambda: dict.__getitem__(self, name))


@pytest.mark.parametrize(
    "mesh, expected",
    [
        (None, [(8, index) for index in range(8)]),
        (Mesh(dp_shard=8), [(8, index) for index in range(8)]),
        (Mesh(dp_shard=4, tp=2), [(4, index // 2) for index in range(8)]),
        (Mesh(dp_replicate=2, cp=2, tp=2), [(2, index // 4) for index in range(8)]),
    ],
)
def test_processes_that_share_a_layer_get_the_same_rows(mesh, expected):
    found = [
        data_parallel(
            SimpleNamespace(
                torch_device_mesh=mesh,
                distributed_type=DistributedType.MULTI_GPU,
                num_processes=8,
                process_index=index,
            )
        )
        for index in range(8)
    ]
    assert found == expected


def test_deepspeed_has_a_mesh_of_its_own():
    accelerator = SimpleNamespace(
        torch_device_mesh=None,
        state=SimpleNamespace(ds_device_mesh=Mesh(tp=2)),
        distributed_type=DistributedType.DEEPSPEED,
        num_processes=4,
        process_index=3,
    )
    assert data_parallel(accelerator) == (2, 1)
    accelerator.state = SimpleNamespace()
    assert data_parallel(accelerator) == (4, 3)


@pytest.mark.parametrize(
    "engine, gathers",
    [
        (Engine(), False),
        (Engine(zero=2), False),
        (Engine(tensor=2), False),
        (Engine(zero=3), True),
        (Engine(fsdp=1), True),
        (Engine(fsdp=2, tensor=2), True),
    ],
    ids=["DDP", "ZeRO-2", "TP", "ZeRO-3", "FSDP1", "FSDP2 and TP"],
)
def test_layers_that_are_gathered_from_other_processes(engine, gathers):
    assert engine.gathers is gathers
