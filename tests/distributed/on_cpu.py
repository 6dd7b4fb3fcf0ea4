"""Run a script under DeepSpeed or FSDP2 on a machine without an accelerator, where accelerate would take DDP instead.

Usage: on_cpu.py SCRIPT [ARGUMENTS], started by a launcher that says in the environment what it launches.
"""

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

by_deepspeed = "--deepspeed" in sys.argv or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = (
    DistributedType.DEEPSPEED if by_deepspeed else DistributedType.MULTI_GPU
)
if by_deepspeed:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
script = next(argument for argument in sys.argv[1:] if argument.endswith(".py"))
flags = [argument for argument in sys.argv[1:] if argument != script]  # deepspeed puts one before the script
sys.argv = [script, *flags, "--accelerator_config", '{"use_configured_state": true}']
runpy.run_path(script, run_name="__main__")
