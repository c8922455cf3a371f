"""How the algorithm is run, and never what is computed. `device`: the `Runtime`, one device with its precision and
memory format, and which one the flags choose. `average`: averages of weights. `graph`: steps captured in CUDA graphs.
`layers`: batch norm that takes several batches at once. `loops`: the steps of a training phase and the batches of an
evaluation. `ranks`: the processes that train together."""

from dividemix.runtime.average import Average
from dividemix.runtime.device import Runtime, available_cores, is_out_of_memory, set_learning_rate, start
from dividemix.runtime.loops import Batches, Forward, evaluate, evaluate_rows, run_steps, update
from dividemix.runtime.ranks import ALONE, Ranks, from_environment
