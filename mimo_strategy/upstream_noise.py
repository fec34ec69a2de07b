"""Messages of upstream that a user of this package can do nothing about, silenced by their exact wording."""

import logging
import warnings

import torch

_WARNINGS = [
    # imports of megatron-core: optional packages, and classes that this package exists to use
    ".*Apex (are|is) not installed.*",
    ".*absl.logging is not installed.*",
    ".*experimental and still under active development.*",
    # set by megatron-core's own defaults
    ".*full scope is deprecated. Use empty cuda_graph_modules.*",
    # expert layers take the module's config, with etp 1 as well as with tp > 1
    ".*`sequence_parallel` is set to `True`, but tensor model parallel size is 1.*",
    # bridges broadcast what they received, outside of autograd
    ".*c10d::broadcast_: an autograd kernel was not registered.*",
    # lightning with torch 2.11
    ".*isinstance\\(treespec, LeafSpec\\).*",
]
_WITHOUT_GPU = [".*recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS.*"]
_LOGS = {
    # a computation that DistributedDataParallel then does itself
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    # what it finds are the files of other ranks
    "megatron.core.dist_checkpointing.serialization": "Overwriting old incomplete",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def silence() -> None:
    """Install the filters; others of the process are not touched."""
    for message in _WARNINGS + ([] if torch.cuda.is_available() else _WITHOUT_GPU):
        warnings.filterwarnings("ignore", message=message)
    for logger, message in _LOGS.items():
        logging.getLogger(logger).addFilter(lambda record, message=message: message not in record.getMessage())
