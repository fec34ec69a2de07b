"""What the layers of the hybrid language model cost: weights, operations, kept activations, traffic.

Counts of kept elements follow what autograd saves: with megatron-core's own layers and this project's reference scan,
and with Transformer Engine's layers and fused scans (``Workload.fused``). With tensor parallelism sequences are cut,
too, so that every rank keeps its part of everything.
"""

from typing import TYPE_CHECKING

from mimo_strategy.layout import ModuleLayout
from mimo_strategy.planning.cost import Experts, Layer, ModuleCost, Transfer, Weight, Work, Workload

if TYPE_CHECKING:
    from modules.mamba_moe import MambaMoEConfig

# of Mamba-2 in megatron-core
_CONVOLUTION_WIDTH = 4
# of the reference scan, see mimo_strategy.cpu.mamba_kernels
_CHUNK = 64
_FLOAT = 4
_INT64 = 8


def layer_work(config: "MambaMoEConfig", symbol: str, length: int) -> Work:
    """Operations of one layer's forward pass for one token of a sequence; attention as if not causal.

    Without dropping, every token takes ``experts_per_token`` experts wherever these are. A scan costs 5 operations
    for each element of the state: to decay it, to make and add what is new, and to read it.
    """
    width = config.hidden_size
    match symbol:
        case "*":
            attention = config.attention_width
            return Work(matmul=2 * width * (config.qkv_width + attention), attention=4 * length * attention)
        case "-":
            return Work(matmul=4 * width * config.ffn_hidden_size)
        case "E":
            experts = config.experts_per_token * config.expert_ffn_hidden_size + config.shared_expert_ffn_hidden_size
            return Work(matmul=2 * width * config.num_experts + 4 * width * experts)
        case _:
            inner, channels = config.mamba_width, config.mamba_width + 2 * config.mamba_state_width
            return Work(
                matmul=2 * width * (config.mamba_projection_width + inner),
                scan=2 * _CONVOLUTION_WIDTH * channels + 5 * inner * config.mamba_state_dim,
            )


def output_work(config: "MambaMoEConfig") -> Work:
    """Operations of the logits of one token."""
    return Work(matmul=2 * config.hidden_size * config.vocab_size)


def language_cost(config: "MambaMoEConfig", layout: ModuleLayout, workload: Workload) -> ModuleCost:
    """Cost of the language model for one microbatch of a lane."""
    costs = _LayerCosts(config, layout, workload)
    by_symbol = {symbol: costs.layer(symbol) for symbol in set(config.layers)}
    stages = [[by_symbol[symbol] for symbol in stage] for stage in config.stages(layout.pp).split("|")]
    stages[0].insert(0, costs.embedding())
    stages[-1].append(costs.output())
    return ModuleCost(tuple(map(tuple, stages)), sent=costs.hidden_bytes / layout.tp, recompute=config.recompute_layers)


class _LayerCosts:
    def __init__(self, config: "MambaMoEConfig", layout: ModuleLayout, workload: Workload) -> None:
        self._config, self._layout, self._workload = config, layout, workload
        self._size = workload.element_size
        self._tokens = workload.samples * workload.length
        # what a rank keeps of every token
        self._share = self._tokens / layout.tp

    @property
    def hidden_bytes(self) -> float:
        """Of the hidden states of all tokens of the lane."""
        return self._tokens * self._config.hidden_size * self._size

    def layer(self, symbol: str) -> Layer:
        name, costs = {
            "*": ("attention", self._attention),
            "-": ("mlp", self._mlp),
            "E": ("experts", self._experts),
            "M": ("mamba", self._mamba),
        }[symbol]
        weights, kept, operations, experts = costs()
        forward, backward = self._sequence_parallel()
        return Layer(
            name,
            weights,
            work=layer_work(self._config, symbol, self._workload.length).times(self._tokens),
            kept=self._norm_kept() + kept,
            kept_input=self.hidden_bytes / self._layout.tp,
            forward=forward + experts,
            backward=backward + experts,
            operations=operations,
        )

    def embedding(self) -> Layer:
        config = self._config
        merged = (Transfer("tp", "all_reduce", self.hidden_bytes),) if self._layout.tp > 1 else ()
        return Layer(
            "embedding",
            (Weight(config.vocab_size * config.hidden_size, "tp"),),
            # token ids, their mask, and where the encoders' tokens go
            kept=self._tokens * 2 * _INT64,
            forward=merged,
            backward=merged,
            operations=12,
        )

    def output(self) -> Layer:
        config = self._config
        forward, backward = self._sequence_parallel()
        logits = self._share * config.vocab_size
        return Layer(
            "output",
            (Weight(config.hidden_size), Weight(config.vocab_size * config.hidden_size, "tp")),
            work=output_work(config).times(self._tokens),
            # the cross entropy keeps probabilities; in half precision fused, beside a copy in float32
            kept=self._norm_kept() + logits * max(self._size, _FLOAT) + self._tokens * 2 * _INT64,
            forward=forward,
            backward=backward,
            operations=35,
        )

    def _sequence_parallel(self) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
        if self._layout.tp == 1:
            return (), ()
        gather = Transfer("tp", "all_gather", self.hidden_bytes)
        scatter = Transfer("tp", "reduce_scatter", self.hidden_bytes)
        # the inputs of column-parallel layers are gathered again for the gradients of their weights
        return (gather, scatter), (gather, gather, scatter)

    def _norm_kept(self) -> float:
        width = self._config.hidden_size
        if self._workload.fused:
            return self._share * (2 * width * self._size + _FLOAT)
        # input and normalized input in float32, output, and one number a token
        return self._share * (width * (2 * _FLOAT + self._size) + _FLOAT)

    def _attention(self) -> tuple[tuple[Weight, ...], float, float, tuple[Transfer, ...]]:
        config, heads, length = self._config, self._config.num_attention_heads, self._workload.length
        queries, qkv = config.attention_width, config.qkv_width
        weights = (
            Weight(config.hidden_size),
            Weight(queries * config.hidden_size, "tp"),
            Weight(qkv * config.hidden_size, "tp"),
        )
        if self._workload.fused:
            return weights, self._share * ((qkv + queries) * self._size + heads * _FLOAT), 22, ()
        # keys and values are repeated for every head; scores are kept after the softmax, and a mask of bytes
        scores = _FLOAT + (self._size if self._size < _FLOAT else 0)
        kept = self._share * (4 * queries * self._size + heads * length * scores) + length**2
        return weights, kept, 22, ()

    def _mlp(self) -> tuple[tuple[Weight, ...], float, float, tuple[Transfer, ...]]:
        config = self._config
        matrix = Weight(config.hidden_size * config.ffn_hidden_size, "tp")
        kept = self._share * 2 * config.ffn_hidden_size * self._size
        return (Weight(config.hidden_size), matrix, matrix), kept, 11, ()

    def _experts(self) -> tuple[tuple[Weight | Experts, ...], float, float, tuple[Transfer, ...]]:
        config, layout, size = self._config, self._layout, self._size
        width, shared, top = config.hidden_size, config.shared_expert_ffn_hidden_size, config.experts_per_token
        matrix = Weight(width * config.expert_ffn_hidden_size, "etp")
        weights: tuple[Weight | Experts, ...] = (
            Weight(width),
            Weight(width * config.num_experts),
            Experts(config.num_experts, (matrix, matrix)),
        )
        if shared:
            weights += (Weight(width * shared, "tp"), Weight(width * shared, "tp"))
        routed = self._share * top
        # routed tokens; in the experts the activation before and after squaring, and after its weight
        kept = routed * (width + 3 * config.expert_ffn_hidden_size) * size
        kept += self._share * (2 * shared * size + config.num_experts * (5 * _FLOAT + _INT64) + 3 * top * _FLOAT)
        if size < _FLOAT:
            # the router computes in float32
            kept += self._share * width * _FLOAT
        transfers: tuple[Transfer, ...] = ()
        if layout.ep > 1:
            exchange = Transfer("ep", "all_to_all", routed * width * size)
            transfers += (exchange, exchange)
        if layout.etp > 1:
            gathered = routed * width * size * layout.etp
            transfers += (Transfer("etp", "all_gather", gathered), Transfer("etp", "reduce_scatter", gathered))
        operations = 70 if self._workload.fused else 50 + 8 * config.num_experts / layout.ep
        return weights, kept, operations, transfers

    def _mamba(self) -> tuple[tuple[Weight, ...], float, float, tuple[Transfer, ...]]:
        config, size, length = self._config, self._size, self._workload.length
        width, heads, state = config.hidden_size, config.mamba_num_heads, config.mamba_state_dim
        inner, groups, projected = config.mamba_width, config.mamba_state_width, config.mamba_projection_width
        channels = inner + 2 * groups
        weights = (
            Weight(channels * _CONVOLUTION_WIDTH, "tp"),
            Weight(channels, "tp"),
            Weight(heads, "tp"),
            Weight(heads, "tp"),
            Weight(heads, "tp"),
            Weight(width * projected, "tp"),
            Weight(inner, "tp"),
            Weight(width * inner, "tp"),
            Weight(width),
        )
        if self._workload.fused:
            return weights, self._share * (projected + 2 * inner) * size, 25, ()
        chunk = min(_CHUNK, length)
        # the reference scan computes in float32
        kept = channels * (1 + (_CONVOLUTION_WIDTH - 1) / length) + channels
        kept += 6 * inner + 3 * heads + 2 * groups + (2 * heads + config.mamba_num_groups) * chunk
        kept += config.mamba_num_groups
        if length > chunk:
            kept += 5 * inner + 2 * heads + groups + inner * state / chunk * (1 + chunk / length)
        return weights, self._share * (kept * _FLOAT + (channels + projected) * size), 56, ()
