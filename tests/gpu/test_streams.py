"""Streams, CUDA graphs, threads and out-of-memory errors."""

import threading

import pytest
import torch

from oddsmith import functional
from support.gpu_cases import pairs, same, to, weights


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device("cuda")


def round_trip(values):
    packed, state = functional.quantize_nf4(values)
    return functional.dequantize_nf4(packed, state)


def test_threads_at_once(gpu):
    """Each with its stream on a GPU; backward passes have other threads too."""
    inputs = [weights((130, 70 + i), torch.float32, seed=i).to(gpu.device) for i in range(4)]
    with gpu.slices():
        expected = [round_trip(values.cpu()) for values in inputs]
    gpu.sync()
    results: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(index):
        if gpu.emulated:
            results[index] = [round_trip(inputs[index]) for _ in range(5)]
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results[index] = [round_trip(inputs[index]) for _ in range(200)]
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for several, one in zip(results, expected):
        assert several and all(same(each, one) for each in several)


@pytest.mark.gpu
def test_kernels_go_to_the_current_stream(cuda):
    """Input is written late on a side stream: a launch on another stream would read the old
    values."""
    late = torch.zeros(1 << 22, device=cuda)
    expected = round_trip(torch.full_like(late, 3.0))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.fill_(3.0)
        found = round_trip(late)
    side.synchronize()
    assert same(found, expected)


@pytest.mark.gpu
def test_a_graph_of_kernels(cuda):
    hidden, weight, *rows = to(cuda, *pairs(1009, 64, ((3, 17), (3, 29)), torch.bfloat16))
    values = torch.randn(64, 128, device=cuda)

    def work():
        logps = functional.linear_logps(hidden, weight, rows[0])
        return round_trip(values), logps

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    values.copy_(torch.randn(64, 128))
    hidden.mul_(1.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(same, captured, work()))


@pytest.mark.gpu
def test_memory_that_runs_out_leaves_the_process_usable(cuda):
    hidden, weight, *rows = to(cuda, *pairs(4099, 64, ((9, 170), (9, 290)), torch.float32))
    inputs = hidden.requires_grad_(), weight.requires_grad_()

    def work():
        out = functional.linear_orpo(*inputs, *rows, 0.29)
        return [out.loss, *torch.autograd.grad(out.loss, inputs)]

    expected = work()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    failures = 0
    for spare in range(0, 24 << 20, 2 << 20):  # fails at another allocation each time
        limit = torch.cuda.memory_reserved() + spare
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            work()
        except torch.OutOfMemoryError:
            failures += 1
        except RuntimeError as error:
            assert "out of memory" in str(error)
            failures += 1
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
    assert failures
    assert all(map(same, work(), expected))


def test_a_failed_launch_leaves_the_process_usable(emulated_driver):
    values = weights((130, 70), torch.float32)
    expected = round_trip(values)
    for nth in (1, 2):
        emulated_driver.fail(nth)
        with pytest.raises(RuntimeError, match=r"nf4_\w+_f32.*grid .*LAUNCH_FAILED.*on request"):
            round_trip(values)
    emulated_driver.fail(0)
    assert same(round_trip(values), expected)
