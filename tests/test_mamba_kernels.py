"""The Mamba kernels against the recurrence they stand for, run step by step in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mimo_strategy.cpu.mamba_kernels import (
    MAX_CHUNK_SIZE,
    GatedRMSNorm,
    bind,
    causal_conv1d,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)

BATCH, HEADS, HEADDIM, STATE, WIDTH = 2, 4, 3, 5, 4
TOLERANCE = 1e-10


def recurrence(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_limit=(0.0, math.inf)):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = (C_t h_t + D x_t) silu(z_t): y and the last h."""
    heads, groups = x.shape[2], B.shape[2]
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    B, C = (t.repeat_interleave(heads // groups, dim=2) for t in (B, C))
    h = torch.zeros(*x.shape[:1], *x.shape[2:], B.shape[-1], dtype=x.dtype)
    if initial_states is not None:
        h = initial_states
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t] * A)[..., None, None] * h
        h = h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        y = torch.einsum("bhn,bhpn->bhp", C[:, t], h)
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]) * x[:, t]
        outputs.append(y if z is None else y * z[:, t] / (1 + torch.exp(-z[:, t])))
    return torch.stack(outputs, dim=1), h


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def scan_inputs(length, groups, D="per head", z=True, dt_bias=True, initial_states=True):
    D_shapes = {None: None, "per head": (HEADS,), "per channel": (HEADS, HEADDIM)}
    return {
        "x": leaf(BATCH, length, HEADS, HEADDIM),
        "dt": torch.rand(BATCH, length, HEADS, dtype=torch.float64).requires_grad_(),
        "A": (-torch.rand(HEADS, dtype=torch.float64) - 0.1).requires_grad_(),
        "B": leaf(BATCH, length, groups, STATE),
        "C": leaf(BATCH, length, groups, STATE),
        "D": leaf(*D_shapes[D]) if D else None,
        "z": leaf(BATCH, length, HEADS, HEADDIM) if z else None,
        "dt_bias": torch.rand(HEADS, dtype=torch.float64).requires_grad_() if dt_bias else None,
        "initial_states": leaf(BATCH, HEADS, HEADDIM, STATE) if initial_states else None,
    }


def fused_inputs(length, groups, D="per head"):
    inner, conv_width = HEADS * HEADDIM, HEADS * HEADDIM + 2 * groups * STATE
    return {
        "zxbcdt": leaf(BATCH, length, inner + conv_width + HEADS),
        "conv1d_weight": leaf(conv_width, WIDTH),
        "conv1d_bias": leaf(conv_width),
        "dt_bias": leaf(HEADS),
        "A": (-torch.rand(HEADS, dtype=torch.float64) - 0.1).requires_grad_(),
        "D": leaf(HEADS) if D == "per head" else leaf(HEADS, HEADDIM),
    }


def assert_same(actual, expected, inputs):
    """Compare tuples of outputs and the gradients of all inputs by relative norm."""
    cotangents = [torch.randn_like(t) for t in expected]
    leaves = {name: t for name, t in inputs.items() if t is not None}
    pairs = {f"output {i}": pair for i, pair in enumerate(zip(actual, expected, strict=True))}
    gradients = [torch.autograd.grad(outputs, leaves.values(), cotangents) for outputs in (actual, expected)]
    pairs |= {f"gradient of {name}": pair for name, *pair in zip(leaves, *gradients, strict=True)}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape, name
        assert b.norm() > 0, name
        assert (a - b).norm() / b.norm() < TOLERANCE, name


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (7, 8), (8, 4), (16, 1), (23, 5), (33, 128)])
def test_scan_equals_recurrence(length, chunk_size, groups):
    inputs = scan_inputs(length, groups)
    actual = mamba_chunk_scan_combined(**inputs, chunk_size=chunk_size, dt_softplus=True, return_final_states=True)
    assert_same(actual, recurrence(**inputs, dt_softplus=True), inputs)


@pytest.mark.parametrize("chunk_size", [8, 16])
@pytest.mark.parametrize("dt_softplus", [False, True])
@pytest.mark.parametrize("dt_bias", [False, True])
@pytest.mark.parametrize("z", [False, True])
@pytest.mark.parametrize("D", [None, "per head", "per channel"])
def test_scan_options(D, z, dt_bias, dt_softplus, chunk_size):
    inputs = scan_inputs(11, 2, D, z, dt_bias, initial_states=False)
    actual = mamba_chunk_scan_combined(**inputs, chunk_size=chunk_size, dt_softplus=dt_softplus)
    assert_same([actual], recurrence(**inputs, dt_softplus=dt_softplus)[:1], inputs)


def test_scan_longer_than_the_largest_chunk():
    inputs = scan_inputs(2 * MAX_CHUNK_SIZE + 3, 2)
    actual = mamba_chunk_scan_combined(**inputs, chunk_size=1024, dt_softplus=True, return_final_states=True)
    assert_same(actual, recurrence(**inputs, dt_softplus=True), inputs)


@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.3, 0.6)])
def test_dt_is_clamped(dt_limit):
    inputs = scan_inputs(9, 1, dt_bias=False)
    inputs["dt"] = (inputs["dt"].detach() - 0.2).requires_grad_()
    actual = mamba_chunk_scan_combined(**inputs, chunk_size=4, dt_limit=dt_limit, return_final_states=True)
    assert_same(actual, recurrence(**inputs, dt_softplus=False, dt_limit=dt_limit), inputs)


def test_states_continue_a_sequence():
    x, dt, A, B, C, *_ = scan_inputs(20, 2).values()
    whole = mamba_chunk_scan_combined(x, dt, A, B, C, 8)
    head, states = mamba_chunk_scan_combined(x[:, :9], dt[:, :9], A, B[:, :9], C[:, :9], 8, return_final_states=True)
    tail = mamba_chunk_scan_combined(x[:, 9:], dt[:, 9:], A, B[:, 9:], C[:, 9:], 8, initial_states=states)
    torch.testing.assert_close(torch.cat([head, tail], dim=1), whole)


@pytest.mark.parametrize("chunk_size", [8, 128])
def test_extreme_steps_leave_finite_gradients(chunk_size):
    inputs = {name: t.detach().float().requires_grad_() for name, t in scan_inputs(40, 1).items()}
    inputs["A"] = (inputs["A"].detach() * 16).requires_grad_()
    steps = torch.tensor([1e4, -1e4, 50.0, -50.0, 0.0])
    inputs["dt"] = steps[torch.randint(5, inputs["dt"].shape)].requires_grad_()
    y, states = mamba_chunk_scan_combined(**inputs, chunk_size=chunk_size, dt_softplus=True, return_final_states=True)
    gradients = torch.autograd.grad(y.sum() + states.sum(), inputs.values())
    for name, t in {"y": y, "states": states, **dict(zip(inputs, gradients, strict=True))}.items():
        assert t.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    inputs = {name: t.detach().to(dtype) for name, t in scan_inputs(40, 2).items()}
    y, states = mamba_chunk_scan_combined(**inputs, chunk_size=16, dt_softplus=True, return_final_states=True)
    expected = recurrence(**{name: t.double() for name, t in inputs.items()}, dt_softplus=True)
    assert (y.dtype, states.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y.double(), expected[0], rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(states.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [2, 9])
def test_convolution_equals_torch(length, bias, activation):
    inputs = {"x": leaf(BATCH, length, 6), "weight": leaf(6, WIDTH), "bias": leaf(6) if bias else None}
    expected = F.conv1d(inputs["x"].mT, inputs["weight"][:, None], inputs["bias"], padding=WIDTH - 1, groups=6).mT[
        :, :length
    ]
    expected = expected if activation is None else F.silu(expected)
    assert_same([causal_conv1d(**inputs, activation=activation)], [expected], inputs)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("group_size", [None, 4])
def test_gated_rms_norm(group_size, gated, norm_before_gate):
    norm = GatedRMSNorm(8, 0.1, group_size, norm_before_gate, device="cpu", dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    inputs = {"weight": norm.weight, "x": leaf(3, 5, 8), "z": leaf(3, 5, 8) if gated else None}
    gate = inputs["z"] * torch.sigmoid(inputs["z"]) if gated else 1
    expected = inputs["x"] if norm_before_gate else inputs["x"] * gate
    expected = torch.cat(
        [t / torch.sqrt((t**2).mean(-1, keepdim=True) + 0.1) for t in expected.split(group_size or 8, -1)], -1
    )
    expected = expected * norm.weight * (gate if norm_before_gate else 1)
    assert_same([norm(inputs["x"], inputs["z"])], [expected], inputs)


def composition(inputs, groups, activation="silu", norm_before_gate=False):
    """What the fused entry stands for, with the recurrence in its middle: output and last states."""
    channels, inner = len(inputs["conv1d_weight"]), HEADS * HEADDIM
    z, xBC, dt = inputs["zxbcdt"].split([inner, channels, HEADS], dim=-1)
    xBC = F.conv1d(F.pad(xBC.mT, (3, 0)), inputs["conv1d_weight"][:, None], inputs["conv1d_bias"], groups=channels).mT
    if activation is not None:
        xBC = F.silu(xBC)
    x, B, C = xBC.split([inner, groups * STATE, groups * STATE], dim=-1)
    y, states = recurrence(
        x.unflatten(-1, (HEADS, HEADDIM)),
        dt,
        inputs["A"],
        B.unflatten(-1, (groups, STATE)),
        C.unflatten(-1, (groups, STATE)),
        inputs["D"],
        None,
        inputs["dt_bias"],
        inputs.get("initial_states"),
        dt_softplus=True,
    )
    y, gate = y.flatten(-2), F.silu(z)
    if "rmsnorm_weight" not in inputs:
        y = y * gate
    else:
        y = (y if norm_before_gate else y * gate).unflatten(-1, (groups, -1))
        y = (y / torch.sqrt((y**2).mean(-1, keepdim=True) + 1e-6)).flatten(-2) * inputs["rmsnorm_weight"]
        y = y * gate if norm_before_gate else y
    if "outproj_weight" in inputs:
        y = y @ inputs["outproj_weight"].T + inputs["outproj_bias"]
    return y, states


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("D", ["per head", "per channel"])
@pytest.mark.parametrize("tail", ["gate", "norm", "projection"])
def test_fused_entry_equals_composition(groups, D, tail):
    inputs = fused_inputs(13, groups, D)
    inner = HEADS * HEADDIM
    if tail != "gate":
        inputs["rmsnorm_weight"] = leaf(inner)
    if tail == "projection":
        inputs |= {"outproj_weight": leaf(7, inner), "outproj_bias": leaf(7)}
    inputs["initial_states"] = leaf(BATCH, HEADS, HEADDIM, STATE)
    actual = mamba_split_conv1d_scan_combined(
        **inputs,
        chunk_size=4,
        headdim=HEADDIM if D == "per head" else None,
        ngroups=groups,
        norm_before_gate=False,
        return_final_states=True,
    )
    assert_same(actual, composition(inputs, groups), inputs)


@pytest.mark.parametrize("chunk_size", [4, 128])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("norm_before_gate", [None, False, True])
def test_fused_entry_without_states(norm_before_gate, activation, chunk_size):
    """As in training: no state comes in or goes out, so that a sequence of one chunk needs none at all."""
    inputs = fused_inputs(13, 2)
    if norm_before_gate is not None:
        inputs["rmsnorm_weight"] = leaf(HEADS * HEADDIM)
    options = {"activation": activation, "norm_before_gate": bool(norm_before_gate)}
    actual = mamba_split_conv1d_scan_combined(**inputs, chunk_size=chunk_size, headdim=HEADDIM, ngroups=2, **options)
    assert_same([actual], composition(inputs, 2, **options)[:1], inputs)


def test_packed_sequences_are_refused():
    x, dt, A, B, C, *_ = scan_inputs(4, 1).values()
    boundaries = torch.zeros(BATCH, 4, dtype=torch.int32)
    for argument in ({"seq_idx": boundaries}, {"cu_seqlens": boundaries}, {"return_varlen_states": True}):
        with pytest.raises(NotImplementedError, match=next(iter(argument))):
            mamba_chunk_scan_combined(x, dt, A, B, C, 4, **argument)
    with pytest.raises(NotImplementedError, match="seq_idx"):
        mamba_split_conv1d_scan_combined(**fused_inputs(4, 1), chunk_size=4, headdim=HEADDIM, seq_idx=boundaries)


def test_unknown_activation_is_refused():
    with pytest.raises(NotImplementedError, match="gelu"):
        mamba_split_conv1d_scan_combined(**fused_inputs(4, 1), chunk_size=4, headdim=HEADDIM, activation="gelu")


def test_head_dimension_must_be_known():
    with pytest.raises(ValueError, match="headdim"):
        mamba_split_conv1d_scan_combined(**fused_inputs(4, 1), chunk_size=4)


def test_bind_leaves_an_installed_mamba_ssm_alone():
    installed = SimpleNamespace(HAVE_MAMBA_SSM=True)
    bind(installed)
    assert vars(installed) == {"HAVE_MAMBA_SSM": True}
