"""The block sizes of NF4. No imports: the flags of `oddsmith quantize --help` are built from them."""

__all__ = ["BLOCK_SIZES"]

# Values that may share a scale.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
