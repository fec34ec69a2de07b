"""Mamba-2 training kernels in plain PyTorch, for machines where ``mamba_ssm`` cannot be installed.

The functions keep the names, argument order and meaning of ``mamba_ssm.ops.triton``, so that megatron-core's
``MambaMixer`` can call them unchanged. The state space model is, per head,

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

and is evaluated by the chunked matrix form of state space duality (Dao and Gu, 2024, arXiv 2405.21060,
section 6): attention-like products within a chunk, and states handed from chunk to chunk. Gradients are
autograd's.

Shapes use b batch, l length, h heads, p head dimension, g groups, n state size; inside, also r heads per
group, c chunks, q positions per chunk. Arithmetic is float32, or float64 where the input is float64.
"""

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

# The result does not depend on the chunk length. Work within chunks grows with it, work between chunks
# shrinks: on CPU a short sequence is best taken as one chunk, and a long one costs about twice as much at the
# 128 usual for the GPU kernels.
MAX_CHUNK_SIZE = 64

# Decays are powers of 2, because torch.exp on CPU takes up to 40 times longer near underflow, where they end.
LOG2_E = math.log2(math.e)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence with a selective state space model, as ``mamba_ssm.ops.triton.ssd_combined`` does.

    Args:
        x: (b, l, h, p) input.
        dt: (b, l, h) step sizes, before bias, softplus and limits.
        A: (h,) decay rates, negative.
        B: (b, l, g, n) input projections; head i reads group i // (h / g).
        C: (b, l, g, n) output projections.
        chunk_size: longest chunk to use, capped at ``MAX_CHUNK_SIZE``.
        D: (h,) or (h, p) skip weights.
        z: (b, l, h, p) gate; the output is multiplied by ``silu(z)``.
        dt_bias: (h,) added to ``dt``.
        initial_states: (b, h, p, n) state before the first position; zero if None.
        seq_idx, cu_seqlens, return_varlen_states: packed sequences, not supported.
        dt_softplus: whether to apply softplus to ``dt`` after the bias.
        dt_limit: range to which ``dt`` is clamped at last.
        return_final_states: whether to return the state after the last position too.

    Returns:
        The output (b, l, h, p) in the dtype of ``x``; with ``return_final_states``, also the states
        (b, h, p, n).
    """
    _refuse(seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=return_varlen_states)
    out_dtype, dtype = x.dtype, _compute_dtype(x)
    x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)

    u, log2_decay = x * dt[..., None], dt * (A * LOG2_E)
    chunk_size = min(chunk_size, MAX_CHUNK_SIZE)
    y, final_states = _ssd(u, log2_decay, B, C, chunk_size, initial_states, return_final_states)
    if D is not None:
        y = torch.addcmul(y, x, (D if D.dim() == 2 else D[:, None]).to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(out_dtype)
    return (y, final_states) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Everything between a Mamba-2 block's input projection and its output, as in ``mamba_ssm``.

    Causal convolution of x, B and C, scan with ``softplus(dt + dt_bias)``, gate, and, where their weights are
    given, gated RMSNorm per group and output projection.

    Args:
        zxbcdt: (b, l, 2 h p + 2 g n + h) gate z, input x, B, C and dt side by side.
        conv1d_weight: (h p + 2 g n, width) one filter per channel of x, B and C.
        conv1d_bias: (h p + 2 g n,).
        dt_bias, A, chunk_size, initial_states, dt_limit, return_final_states:
            see :func:`mamba_chunk_scan_combined`.
        D: (h,), which needs ``headdim``, or (h, p).
        seq_idx: packed sequences, not supported.
        activation: after the convolution: "silu", its other name "swish", or None.
        rmsnorm_weight: (h p,); without it the gate is applied alone.
        outproj_weight: (d, h p).
        outproj_bias: (d,).
        headdim: p, if ``D`` does not show it.
        ngroups: g.
        norm_before_gate: order of RMSNorm and gate.

    Returns:
        The output, (b, l, h p) or (b, l, d); with ``return_final_states``, also the states (b, h, p, n).
    """
    _refuse(seq_idx=seq_idx)
    if D.dim() == 2:
        headdim = D.shape[1]
    elif headdim is None:
        raise ValueError("headdim is needed where D has one weight per head")
    nheads, conv_width = D.shape[0], conv1d_weight.shape[0]
    inner, state_width = nheads * headdim, (conv_width - nheads * headdim) // 2

    z, xBC, dt = zxbcdt.split([inner, conv_width, nheads], dim=-1)
    x, B, C = causal_conv1d(xBC, conv1d_weight, conv1d_bias, activation).split(
        [inner, state_width, state_width], dim=-1
    )
    scanned = mamba_chunk_scan_combined(
        x.unflatten(-1, (nheads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (nheads, headdim)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    y, final_states = scanned if return_final_states else (scanned, None)
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = _gated_rms_norm(y, rmsnorm_weight, z, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final_states) if return_final_states else y


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """Filter every channel over the present and past positions.

    Args:
        x: (b, l, d) input, zero before the first position.
        weight: (d, width) filters, the last tap on the present position.
        bias: (d,).
        activation: "silu", "swish" or None.

    Returns:
        (b, l, d) in the dtype of ``x``.
    """
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation {activation!r} after the convolution: only silu (swish) or None")
    length, width = x.shape[1], weight.shape[1]
    past = F.pad(x.to(_compute_dtype(x)), (0, 0, width - 1, 0))
    y = 0 if bias is None else bias.to(past.dtype)
    # For a few taps this is faster than F.conv1d and its backward, which want (b, d, l).
    for shift, tap in enumerate(weight.to(past.dtype).unbind(1)):
        y = y + past[:, shift : shift + length] * tap
    return (y if activation is None else F.silu(y)).to(x.dtype)


class GatedRMSNorm(torch.nn.Module):
    """RMSNorm over groups of channels with an optional gate, as ``mamba_ssm``'s ``layernorm_gated.RMSNorm``.

    Args:
        hidden_size: channels, d.
        eps: added to the mean square.
        group_size: channels normalized together; all of them if None.
        norm_before_gate: ``norm(x) * silu(z)`` if true, else ``norm(x * silu(z))``.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.norm_before_gate = norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalize ``x`` (..., d), gated by ``z`` of the same shape if given; the dtype of ``x`` is kept."""
        return _gated_rms_norm(x, self.weight, z, self.eps, self.group_size, self.norm_before_gate)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Entries for ``megatron.core.dist_checkpointing``, the channels being split over ``tp_group``.

        ``MambaMixer`` sets ``tp_group`` on its norm, and passes ``metadata`` with "dp_cp_group".
        """
        # Imported late, because megatron.core binds parts of torch.cuda when it is first imported.
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def bind(mamba_mixer: ModuleType) -> None:
    """Give the module ``megatron.core.ssm.mamba_mixer`` these kernels, unless it found ``mamba_ssm``.

    Four globals are all that training reads, with and without ``use_mamba_mem_eff_path``:

    - ``HAVE_MAMBA_SSM``: while false, ``MambaMixer`` refuses to be built.
    - ``ExtendedRMSNorm``: without mamba_ssm it is a mock, and so would be the norm of the mixer.
    - ``mamba_split_conv1d_scan_combined``: None without mamba_ssm; the memory-efficient path calls it.
    - ``mamba_chunk_scan_combined``: None without mamba_ssm; the other path calls it, after a convolution for
      which it falls back to PyTorch by itself.

    ``MAMBA_HAS_STATE_DTYPE`` stays false: states are kept in the compute dtype here, and megatron-core then
    rejects ``mamba_training_ssm_states_dtype`` with an error.
    """
    if mamba_mixer.HAVE_MAMBA_SSM:
        return
    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.ExtendedRMSNorm = GatedRMSNorm
    mamba_mixer.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan_combined
    mamba_mixer.mamba_chunk_scan_combined = mamba_chunk_scan_combined


def _ssd(
    u: Tensor,
    log2_decay: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    initial_states: Tensor | None,
    need_final_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """Solve h_t = 2^(log2_decay_t) h_{t-1} + u_t B_t^T, y_t = h_t C_t by chunks of equal length.

    Takes ``u`` (b, l, h, p), ``log2_decay`` (b, l, h), ``B`` and ``C`` (b, l, g, n), and ``initial_states``
    (b, h, p, n) or None. Returns y (b, l, h, p) and the last state (b, h, p, n), or None if none was needed.
    """
    length, groups = B.shape[1:3]
    chunks = math.ceil(length / chunk_size)
    u, log2_decay, B, C = (_split(t, groups, chunks) for t in (u, log2_decay, B, C))
    since_start = log2_decay.cumsum(-1)  # (b, g, r, c, q), from the start of the chunk

    y = (C @ B.mT * _decay_matrix(since_start)) @ u
    final_states = None
    if chunks > 1 or initial_states is not None or need_final_states:
        # What each chunk adds to the state by its end, behind the initial state: (b, g, r, 1 + c, p, n).
        added = (u * (since_start[..., -1:] - since_start).exp2()[..., None]).mT @ B
        if initial_states is None:
            first = torch.zeros_like(added[:, :, :, :1])
        else:
            first = initial_states.to(u.dtype).unflatten(1, (groups, -1)).unsqueeze(3)
        added = torch.cat([first, added], dim=3)
        across_chunks = F.pad(since_start[..., -1], (1, 0)).cumsum(-1)
        states = (_decay_matrix(across_chunks) @ added.flatten(-2)).unflatten(-1, added.shape[-2:])
        y = y + (C @ states[:, :, :, :-1].mT) * since_start.exp2()[..., None]
        final_states = states[:, :, :, -1].flatten(1, 2)
    return y.flatten(3, 4).flatten(1, 2)[:, :, :length].transpose(1, 2), final_states


def _split(t: Tensor, groups: int, chunks: int) -> Tensor:
    """Split heads into groups and positions into chunks: (b, l, h, ...) to (b, g, r, c, q, ...).

    Missing positions at the end are filled with zeros, which leave the state as it is.
    """
    missing = -t.shape[1] % chunks
    if missing:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    return t.unflatten(2, (groups, -1)).unflatten(1, (chunks, -1)).movedim((3, 4), (1, 2))


def _decay_matrix(log2_decay: Tensor) -> Tensor:
    """Decay from position j to position i, from cumulative logarithms: (..., t) to (..., t, t), 0 if i < j.

    Entries above the diagonal become -inf before the power is taken: their differences are positive and may
    overflow, and an overflow masked afterwards still makes NaN gradients.
    """
    length = log2_decay.shape[-1]
    future = log2_decay.new_full((length, length), -math.inf).triu(1)
    # Negating the vector rather than subtracting it spares the backward pass a negated matrix.
    return (log2_decay[..., :, None] + (-log2_decay)[..., None, :]).add_(future).exp2_()


def _gated_rms_norm(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    dtype = _compute_dtype(x)
    y = x.to(dtype)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(dtype))
    y = F.rms_norm(y.unflatten(-1, (-1, group_size)), (group_size,), eps=eps).flatten(-2) * weight.to(dtype)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} (packed sequences) needs mamba_ssm; the PyTorch kernels lack it")
