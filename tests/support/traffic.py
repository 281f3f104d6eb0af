"""What the processes of a run send each other in a step, by formula.

`python -m support.traffic`, with `tests` on the path, prints the table of docs/distributed.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Shape",
    "Traffic",
    "ddp",
    "flops_per_token",
    "fsdp2",
    "fsdp2_nf4",
    "shape_of",
    "table",
    "tokens_at_limit",
]


@dataclass(frozen=True)
class Shape:
    """
    Sizes of a decoder: what its processes send depends on nothing else.

    Args:
        layers (`int`): Layers.
        linears (`tuple`): `(inputs, outputs)` of each linear weight of a layer.
        norms (`int`): Elements of a layer's norms.
        hidden (`int`): Hidden size.
        vocabulary (`int`): Rows of the embeddings and of the head.
    """

    layers: int
    linears: tuple[tuple[int, int], ...]
    norms: int
    hidden: int
    vocabulary: int

    @property
    def matrices(self) -> int:
        """Elements of the linear weights of all layers."""
        return self.layers * sum(rows * columns for rows, columns in self.linears)

    @property
    def embeddings(self) -> int:
        """Elements of the embeddings, and of a head that is not tied to them."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Elements of all weights, with a head that is not tied."""
        return self.matrices + self.layers * self.norms + 2 * self.embeddings + self.hidden

    def adapter(self, rank: int) -> int:
        """Elements of LoRA's factors of all linear weights."""
        return self.layers * rank * sum(rows + columns for rows, columns in self.linears)


def shape_of(config: Any) -> Shape:
    """The shape of a model of Llama's kind, by its configuration."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = ((hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden))
    mlp = ((hidden, inner), (hidden, inner), (inner, hidden))
    return Shape(
        config.num_hidden_layers, (*attention, *mlp), 2 * hidden, hidden, config.vocab_size
    )


@dataclass(frozen=True)
class Traffic:
    """
    Bytes of the tensors of a step's collectives, each the whole tensor.

    Args:
        reduced (`int`, *optional*, defaults to 0): Of all-reduce, once for each step.
        gathered (`int`, *optional*, defaults to 0): Of all-gather, once for each micro-batch.
        scattered (`int`, *optional*, defaults to 0): Of reduce-scatter, once for each step.
    """

    reduced: int = 0
    gathered: int = 0
    scattered: int = 0

    def sent(self, processes: int, micro_batches: int = 1) -> float:
        """
        Bytes that each process sends to its neighbour in a ring, and receives. An all-reduce is a
        reduce-scatter and an all-gather.
        """
        once = self.scattered + 2 * self.reduced
        return (processes - 1) / processes * (once + micro_batches * self.gathered)


def ddp(trained: int, size: int = 4) -> Traffic:
    """DDP: the gradients.

    Args:
        trained (`int`): Elements of the trained weights.
        size (`int`, *optional*, defaults to 4): Bytes of an element.
    """
    return Traffic(reduced=size * trained)


def fsdp2(shape: Shape, rank: int | None = None, size: int = 2) -> Traffic:
    """FSDP2: all weights, and the gradients of those that are trained.

    Layers and embeddings are gathered for the forward pass and again for the backward pass; the last
    norm and the head once, because the backward pass begins with them.

    Args:
        shape (`Shape`): The model.
        rank (`int`, *optional*): Of LoRA's factors of all linear weights; `None`: all weights are
            trained.
        size (`int`, *optional*, defaults to 2): Bytes of an element as it is sent.
    """
    adapter = 0 if rank is None else shape.adapter(rank)
    twice = shape.matrices + shape.layers * shape.norms + adapter + shape.embeddings
    once = shape.hidden + shape.embeddings
    trained = shape.parameters if rank is None else adapter
    return Traffic(gathered=size * (2 * twice + once), scattered=size * trained)


def fsdp2_nf4(shape: Shape, rank: int, size: int = 2, codes_split: bool = True) -> Traffic:
    """FSDP2 of a 4-bit model with LoRA: codes of half a byte take the place of the linear weights.

    Args:
        shape (`Shape`): The model.
        rank (`int`): Of LoRA's factors of all linear weights.
        size (`int`, *optional*, defaults to 2): Bytes of an element as it is sent.
        codes_split (`bool`, *optional*, defaults to `True`): Whether codes are stored as floats,
            which FSDP2 splits. Those of `uint8` are on each process and are not sent.
    """
    whole = fsdp2(shape, rank, size)
    codes = shape.matrices // 2 if codes_split else 0
    gathered = whole.gathered + 2 * (codes - size * shape.matrices)
    return Traffic(gathered=gathered, scattered=whole.scattered)


def flops_per_token(shape: Shape, rank: int | None = None, checkpointing: bool = True) -> int:
    """Floating-point operations of a token's products with weights, without attention.

    Two for each element in the forward pass, two for the gradient of its input, two for the gradient
    of a trained weight, and two if a checkpointed layer is computed again.

    Args:
        shape (`Shape`): The model.
        rank (`int`, *optional*): Of LoRA's factors of all linear weights; `None`: all weights are
            trained.
        checkpointing (`bool`, *optional*, defaults to `True`): Gradient checkpointing.
    """
    adapter = 0 if rank is None else shape.adapter(rank)
    layers, head = shape.matrices + adapter, shape.embeddings
    trained = layers + head if rank is None else adapter
    return 4 * (layers + head) + 2 * trained + (2 * layers if checkpointing else 0)


# ---- The table ----


def _decoder(layers: int, hidden: int, keys: int, inner: int, vocabulary: int) -> Shape:
    attention = ((hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden))
    mlp = ((hidden, inner), (hidden, inner), (inner, hidden))
    return Shape(layers, (*attention, *mlp), 2 * hidden, hidden, vocabulary)


#: Mistral 7B and Llama 3 70B.
MODELS = {
    "7B": _decoder(32, 4096, 1024, 14336, 32000),
    "70B": _decoder(80, 8192, 1024, 28672, 128256),
}
RANK = 16
#: Bytes per second in each direction, as they are sold.
LINKS = {
    "NVLink 4": 450e9,
    "PCIe 5": 63e9,
    "400 Gb/s": 50e9,
    "PCIe 4": 31.5e9,
    "100 Gb/s": 12.5e9,
}
#: Operations per second: 40 % of what an H100 is sold for in bfloat16.
SPEED = 4e14
GPUS = (8, 64)


def _runs(shape: Shape) -> dict[str, tuple[Traffic, int]]:
    adapter = flops_per_token(shape, RANK)
    return {
        "DDP, LoRA": (ddp(shape.adapter(RANK)), adapter),
        "FSDP2, full": (fsdp2(shape), flops_per_token(shape)),
        "FSDP2, QLoRA": (fsdp2_nf4(shape, RANK), adapter),
    }


def tokens_at_limit(traffic: Traffic, flops: float, processes: int, link: float) -> float:
    """The tokens of a process's micro-batch whose products take as long as its traffic."""
    return traffic.sent(processes) / link * SPEED / flops


def _rounded(value: float) -> str:
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def table() -> str:
    """The table of docs/distributed.md."""
    titles = ["Run", "Model", "GPUs", "GB sent", *LINKS]
    rows = [titles, ["---", "---", *["---:"] * (len(titles) - 2)]]
    for run in _runs(MODELS["7B"]):
        for model, shape in MODELS.items():
            traffic, flops = _runs(shape)[run]
            for processes in GPUS:
                tokens = [
                    tokens_at_limit(traffic, flops, processes, link) for link in LINKS.values()
                ]
                sent = traffic.sent(processes) / 1e9
                rows.append([run, model, str(processes), *map(_rounded, [sent, *tokens])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
