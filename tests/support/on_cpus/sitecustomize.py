"""Python runs this file when it starts, if its folder is on PYTHONPATH.

Processes that a launcher has started then run FSDP2 and DeepSpeed on CPUs.
"""

import os

if "LOCAL_RANK" in os.environ:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from support.deepspeed_on_cpu import allow_cpus

        allow_cpus()
    else:
        from support.engines import lifted

        kept = lifted()  # it ends with the last reference
        kept.__enter__()
