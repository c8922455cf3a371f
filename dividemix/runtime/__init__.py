"""How the algorithm is run, and never what is computed: `device` has the `Runtime`, one device with its precision and
memory format, and picks it for the flags; `graph` captures steps in CUDA graphs; `layers` take several batches at once;
`ranks` are the processes that train together."""

from dividemix.runtime.device import (
    Runtime,
    at_once,
    available_cores,
    computes_bf16,
    is_out_of_memory,
    load_optimizer,
    set_learning_rate,
    start,
)
from dividemix.runtime.ranks import Ranks, from_environment

__all__ = [
    "Ranks",
    "Runtime",
    "at_once",
    "available_cores",
    "computes_bf16",
    "from_environment",
    "is_out_of_memory",
    "load_optimizer",
    "set_learning_rate",
    "start",
]
