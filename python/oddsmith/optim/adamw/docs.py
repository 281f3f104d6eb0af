"""What the docstrings of these optimisers share."""

ARGS_DOC = """params (`Iterable`):
            Parameters, or groups of them; `fp32`, `bf16` or `fp16`. A group may have `optim_bits`,
            `min_8bit_size` and `stochastic_rounding` of its own, and `full_precision`: the places of
            parameters in it whose moments have 32 bits.
        lr (`float`, *optional*, defaults to 1e-3):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Of the moments.
        eps (`float`, *optional*, defaults to 1e-8):
            Added to the root of the second moment, after the correction of its bias.
        weight_decay (`float`, *optional*, defaults to 1e-2):
            Decoupled, after the update."""

REST_DOC = """stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Round `bf16` parameters up or down by chance, so that small updates are not lost.
        seed (`int`, *optional*, defaults to 0):
            Of that chance: with it and the step, a run can be repeated.

    Raises:
        ValueError: If an option is unknown or out of range, or a parameter is of another dtype."""

PAGES_DOC = """page_dir (`str` or `Path`, *optional*):
            Folder for the state of parameters on a CPU; that of temporary files by default.
        device_budget (`int`, *optional*, defaults to 256 MiB):
            Bytes of a GPU's memory through which the state of parameters there passes."""
