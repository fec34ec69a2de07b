"""The collectives that megatron-core asks of NCCL and gloo does not have."""

import functools

import torch
import torch.distributed as dist


def over_gloo(create):
    """Wrap a function that creates process groups: NCCL is replaced by gloo, its options are dropped."""

    @functools.wraps(create)
    def create_over_gloo(*args, backend=None, pg_options=None, **kwargs):
        return create(*args, backend="gloo" if backend == "nccl" else backend, **kwargs)

    return create_over_gloo


def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
    """``dist.all_to_all_single`` that also takes the split sizes as tensors.

    megatron-core's token dispatcher leaves them on the device and converts only CUDA tensors.
    """

    def as_list(sizes):
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    return dist.all_to_all_single(output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs)


def all_gather(tensor_list, tensor, group=None, async_op=False):
    """``dist.all_gather`` that also gathers tensors of unequal length (expert tensor parallelism), by broadcasts."""
    if len({part.shape for part in tensor_list}) == 1:
        return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)
    _refuse_async(async_op)
    for position, part in enumerate(tensor_list):
        if position == dist.get_rank(group):
            part.copy_(tensor)
        dist.broadcast(part, group=group, group_src=position)


def reduce_scatter(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
    """``dist.reduce_scatter`` that also scatters tensors of unequal length, by one all-reduce."""
    if len({part.shape for part in input_list}) == 1:
        return dist.reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
    _refuse_async(async_op)
    reduced = torch.cat(input_list)
    dist.all_reduce(reduced, op=op, group=group)
    output.copy_(reduced.split([len(part) for part in input_list])[dist.get_rank(group)])


def _refuse_async(async_op):
    if async_op:
        raise NotImplementedError("collectives of unequal lengths are synchronous over gloo")
