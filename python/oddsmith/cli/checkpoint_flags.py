"""Flags of `oddsmith quantize` and `oddsmith merge`. Imports no slow library, for fast help."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..checkpoint.rules import DTYPES
from ..errors import UserError
from ..quant.block_sizes import BLOCK_SIZES
from .flags import add
from .near_misses import Parser


def quantize_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="oddsmith quantize",
        description="Write an NF4 checkpoint in the format of bitsandbytes, of the linear layers that "
        "transformers would quantise on loading, without loading the model.",
        epilog="NaN or infinity in a quantised weight is an error that names the weight. The folder OUT "
        "appears when it is complete.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder or hub id of a model in float32, bfloat16 or float16"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add(
        parser,
        "double_quant",
        action="store_true",
        help="quantise the scales too, which saves half a bit",
    )
    add(
        parser,
        "blocksize",
        type=int,
        choices=BLOCK_SIZES,
        default=64,
        metavar="N",
        help="values that share a scale, 32 to 4096 (default: %(default)s)",
    )
    add(
        parser,
        "compute_dtype",
        choices=DTYPES,
        help="dtype in which the layers compute (default: that of the weights)",
    )
    add(
        parser,
        "skip",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="do not quantise these modules either: ends of names, or patterns of their beginnings",
    )
    _add_common(parser)
    return parser


def merge_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="oddsmith merge",
        description="Merge a LoRA or DoRA adapter of peft into its base, tensor by tensor, without "
        "loading the model.",
        epilog="A tokenizer in the adapter's folder replaces that of the base. The folder OUT appears when it "
        "is complete.",
    )
    parser.add_argument(
        "base", metavar="BASE", help="folder or hub id of the base, in full precision or NF4"
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub id of the adapter")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add(
        parser,
        "quantize",
        action="store_true",
        help="write NF4 (default: full precision); 4-bit weights that the adapter does not change are "
        "copied",
    )
    add(
        parser,
        "double_quant",
        action=argparse.BooleanOptionalAction,
        help="with --quantize: quantise the scales too (default: as in a 4-bit base)",
    )
    add(
        parser,
        "blocksize",
        type=int,
        choices=BLOCK_SIZES,
        metavar="N",
        help="with --quantize: values that share a scale (default: as in a 4-bit base, or 64)",
    )
    add(
        parser,
        "compute_dtype",
        choices=DTYPES,
        help="with --quantize: dtype in which the layers compute (default: as in a 4-bit base, "
        "or that of the weights)",
    )
    _add_common(parser)
    return parser


def _add_common(parser: Any) -> None:
    add(
        parser,
        "dtype",
        choices=DTYPES,
        help="cast the weights to this (default: the stored dtype, or that before quantisation)",
    )
    add(parser, "overwrite", action="store_true", help="replace an existing model in OUT")
    add(
        parser,
        "trust_remote_code",
        action="store_true",
        help="allow code from the model's repository",
    )


@contextmanager
def _known_libraries() -> Iterator[None]:
    """Reports a missing private name of transformers or peft, which find the names in a
    checkpoint.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("transformers", "peft"):
            raise
        raise UserError(
            f"this command needs a transformers and a peft that it was tested with: {error}"
        ) from error


def run_quantize(argv: list[str]) -> int:
    """`oddsmith quantize`; returns the exit code."""
    flags = quantize_parser().parse_args(argv)
    with _known_libraries():
        from ..checkpoint.quantize import quantize_checkpoint

    summary = quantize_checkpoint(
        flags.model,
        flags.out,
        double_quant=flags.double_quant,
        blocksize=flags.blocksize,
        compute_dtype=flags.compute_dtype,
        dtype=flags.dtype,
        skip=flags.skip,
        overwrite=flags.overwrite,
        trust_remote_code=flags.trust_remote_code,
    )
    print(f"{flags.out}: {summary}")
    return 0


def run_merge(argv: list[str]) -> int:
    """`oddsmith merge`; returns the exit code."""
    flags = merge_parser().parse_args(argv)
    with _known_libraries():
        from ..checkpoint.merge import merge_adapter

    summary = merge_adapter(
        flags.base,
        flags.adapter,
        flags.out,
        dtype=flags.dtype,
        quantize=flags.quantize,
        double_quant=flags.double_quant,
        blocksize=flags.blocksize,
        compute_dtype=flags.compute_dtype,
        overwrite=flags.overwrite,
        trust_remote_code=flags.trust_remote_code,
    )
    print(f"{flags.out}: {summary}")
    return 0
