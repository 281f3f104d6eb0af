"""What the docstrings of these optimisers share."""

ARGS_DOC = """params (`Iterable`):
            Parameters, or groups of them; `fp32`, `bf16` or `fp16`. A group may set `optim_bits`,
            `min_8bit_size` and `stochastic_rounding`, and `full_precision`: the indices of its
            parameters whose moments have 32 bits.
        lr (`float`, *optional*, defaults to 1e-3):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Decay of the moments.
        eps (`float`, *optional*, defaults to 1e-8):
            Added to the root of the second moment, after the bias correction.
        weight_decay (`float`, *optional*, defaults to 1e-2):
            Decoupled weight decay, after the update."""

REST_DOC = """stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Round `bf16` parameters up or down at random, so that small updates are not lost.
        seed (`int`, *optional*, defaults to 0):
            Seed of the rounding; a run with the same seed gives the same values.

    Raises:
        ValueError: If an option is unknown or out of range, or a parameter is of another dtype."""

PAGES_DOC = """page_dir (`str` or `Path`, *optional*):
            Folder for the state of parameters on a CPU; by default the folder of temporary files.
        device_budget (`int`, *optional*, defaults to 256 MiB):
            GPU memory in bytes that buffers the state of parameters on a GPU."""
