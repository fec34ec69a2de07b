"""Train one model in several layouts in one launch, each beside a loop on megatron-core alone, and print a table.

    torchrun --nproc-per-node 4 benchmarks/gpu.py --output gpu.json

Each loop makes its model, process groups and optimizer, and destroys them before the next one. The model is RADIO
ViT-H on an image of 1024 x 2048 pixels a sample, and a language model of 20 layers with 8 experts for each GPU on
sequences of 4,096 tokens, of which 2,048 are the image's; a step has 2 samples for each GPU. Small images are of 512 x
512 pixels. On GPUs of too little memory the language model is made smaller, and cases that still do not fit are left
out. One GPU is enough for the colocated cases. ``--tiny`` takes a tiny model, on CPUs where there is no GPU, to try
the script.
"""

import argparse
import gc
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks.gpu_measure import Measured, Stopwatch, matmul_rate
from benchmarks.gpu_report import heading, table
from benchmarks.gpu_sizes import SIZES, Sizes, fits, needed_bytes
from benchmarks.megatron_loop import IMAGES, MegatronLoop
from datamodules import collate
from mimo_strategy import DistributedDataParallelConfig, Layout, MimoHeteroStrategy, ModuleParallel, OptimizerConfig
from mimo_strategy.agreement import of_every_rank
from mimo_strategy.frame_stack import call_with_room
from mimo_strategy.layout import LANGUAGE
from mimo_strategy.planning.memory import gibibytes
from mimo_strategy.runtime import data_parallel
from mimo_strategy.runtime.data_parallel import DistributedDataParallel
from mimo_strategy.testing import trainer_ranks
from modules import MambaMoE, MambaMoEConfig, NemotronVLM, RadioConfig, fp8, layer_specs, transformer

IMAGE_TOKEN = 511


@dataclass(frozen=True)
class Case:
    """A loop to measure.

    Attributes:
        name: of what is compared; cases of one name stand side by side.
        loop: ``megatron`` is the loop on megatron-core alone, ``plain`` the strategy with its settings, ``strategy``
            with the fused kernels that it has by default.
        images: layout of the encoder; ``None`` is the language model alone, on text.
        language: layout of the language model.
        microbatches: per step.
        batch_size: samples per step.
        encoder_batching: microbatches that an encoder takes at once.
        encoder_ahead: microbatches that an encoder runs ahead.
        cuda_graphs: whether layers of the language model are replayed.
        class_tokens: of the encoder; with 16 its tokens are a multiple of 16.
        fp8: whether encoder and language model multiply in fp8.
        small_images: an image of 512 x 512 pixels a sample, in sequences of 2,048 tokens.
    """

    name: str
    loop: str
    images: ModuleParallel | None
    language: ModuleParallel
    microbatches: int
    batch_size: int
    encoder_batching: int = 1
    encoder_ahead: int = 0
    class_tokens: int = 8
    fp8: bool = False
    cuda_graphs: bool = False
    small_images: bool = False

    @property
    def modules(self) -> dict[str, ModuleParallel]:
        """The layout of every module."""
        return ({} if self.images is None else {IMAGES: self.images}) | {LANGUAGE: self.language}


def cases(num_gpus: int) -> list[Case]:
    """What is measured on so many GPUs: one, or an even number."""
    batch = 2 * num_gpus
    everywhere = ModuleParallel(dp=num_gpus)
    experts = ModuleParallel(dp=num_gpus, ep=num_gpus)
    colocated = [
        *(Case("colocated", loop, everywhere, experts, 1, batch) for loop in ("megatron", "plain", "strategy")),
        Case("colocated", "strategy", everywhere, experts, 1, batch, cuda_graphs=True),
        *(Case("language model alone", loop, None, experts, 4, 2 * batch) for loop in ("plain", "strategy")),
        Case("language model alone", "strategy", None, experts, 4, 2 * batch, cuda_graphs=True),
        *(Case("encoder batching", "strategy", everywhere, experts, 4, 2 * batch, size) for size in (1, 4)),
        *(
            Case("small images", "strategy", everywhere, experts, 8, 4 * batch, size, small_images=True)
            for size in (1, 8)
        ),
        *(
            Case("fp8", "strategy", everywhere, experts, 1, batch, class_tokens=16, fp8=in_fp8)
            for in_fp8 in (False, True)
        ),
    ]
    if num_gpus == 1:
        return colocated
    half = num_gpus // 2
    first, last = ModuleParallel(dp=half), ModuleParallel(dp=half, ep=half, rank_offset=half)
    sharded = ModuleParallel(tp=num_gpus, ep=num_gpus)
    return [
        *colocated,
        *(Case("non-colocated", loop, first, last, 4, batch) for loop in ("megatron", "strategy")),
        Case("non-colocated", "strategy", first, last, 4, batch, cuda_graphs=True),
        *(
            Case("non-colocated", "strategy", first, last, 4, batch, encoder_ahead=ahead, cuda_graphs=True)
            for ahead in (1, 2)
        ),
        Case("heterogeneous", "strategy", everywhere, sharded, 2, batch),
        Case("homogeneous", "strategy", ModuleParallel(tp=num_gpus), sharded, 4, batch),
    ]


class Samples(Dataset):
    """The same few samples over and over, in host memory: text, of which every token counts, behind an image if any.

    Args:
        language: sizes of the language model.
        radio: sizes of the encoder; ``None`` is text alone.
        dtype: of images.
    """

    def __init__(self, language: MambaMoEConfig, radio: RadioConfig | None, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(
            IMAGE_TOKEN + 1, language.vocab_size, (4, language.max_sequence_length), generator=generator
        )
        if radio is not None:
            tokens[:, : radio.tokens_per_image] = IMAGE_TOKEN
        self._samples: list[dict[str, Any]] = [
            {"input_ids": row, "labels": row.roll(-1), "loss_mask": (row != IMAGE_TOKEN).float()} for row in tokens
        ]
        if radio is not None:
            for position, sample in enumerate(self._samples):
                image = torch.randn(1, 3, radio.image_height, radio.image_width, generator=generator).to(dtype)
                sample |= {"images": image, "prompt_length": 1, "sample_id": position}

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._samples[index % len(self._samples)]


class Watches(Callback):
    """Tells a stopwatch of every step."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._stopwatch.step_ended()


@dataclass(frozen=True)
class Bench:
    """How everything is measured."""

    tiny: bool
    warmup: int
    steps: int
    device: torch.device
    dtype: torch.dtype
    num_gpus: int
    sizes: Sizes = SIZES[0]

    def model(self, case: Case) -> NemotronVLM | MambaMoE:
        encoder = {"class_tokens": case.class_tokens, "fp8": case.fp8}
        if self.tiny:
            radio = RadioConfig.tiny(**encoder)
            # groups for tp 4, and a projection of Mamba of a size that fp8 takes
            groups = {"num_query_groups": 4, "mamba_num_groups": 4, "mamba_num_heads": 32}
            language = MambaMoEConfig.tiny(vocab_size=1024, pattern="M*E-", fp8=case.fp8, **groups)
        else:
            height, width, length = (512, 512, 2048) if case.small_images else (1024, 2048, 4096)
            radio = RadioConfig(image_height=height, image_width=width, **encoder)
            language = MambaMoEConfig(
                pattern=self.sizes.pattern,
                max_sequence_length=length,
                num_experts=max(8, self.sizes.experts * self.num_gpus),
                vocab_size=self.sizes.vocabulary,
                fp8=case.fp8,
            )
        optimizer = OptimizerConfig(lr=2e-4)
        if case.images is None:
            return MambaMoE(language, optimizer)
        return NemotronVLM(radio, language, image_token_id=IMAGE_TOKEN, end_token_id=0, optimizer=optimizer)

    def layout(self, case: Case) -> Layout:
        return Layout.resolve(self.model(case).module_sizes(), self.num_gpus, case.modules)

    def needed_bytes(self, case: Case) -> float:
        return needed_bytes(
            self.model(case),
            self.layout(case),
            loop=case.loop,
            microbatches=case.microbatches,
            batch_size=case.batch_size,
            encoder_batching=case.encoder_batching,
            encoder_ahead=case.encoder_ahead,
        )

    def measure(self, case: Case) -> Measured:
        layout = self.layout(case)
        stopwatch = Stopwatch(self.warmup, self.steps, layout.placement)
        run = self._megatron if case.loop == "megatron" else self._strategy
        with nullcontext() if case.loop == "strategy" else plain_kernels():
            # as the Trainer is called: what frames cost is no luck of the depth of either loop
            call_with_room(run, case, layout, stopwatch)
        forget_everything()
        return stopwatch.measured

    def step_flops(self, case: Case) -> float:
        """Of the model, for a step batch: three times the forward pass of both modules."""
        model = self.model(case)
        length, _ = model.longest_sample()
        batch = {"input_ids": torch.empty(case.batch_size, length), IMAGES: range(case.batch_size)}
        return 3 * sum(model.forward_flops(name, batch) for name in case.modules)

    def _megatron(self, case: Case, layout: Layout, stopwatch: Stopwatch) -> None:
        half = self.dtype is torch.bfloat16
        config = OptimizerConfig(
            lr=2e-4, clip_grad=1.0, use_distributed_optimizer=True, bf16=half, params_dtype=self.dtype
        )
        loop = MegatronLoop(
            self.model(case), layout, case.microbatches, case.batch_size, config, self.dtype, self.device
        )
        for _ in range(stopwatch.total):
            loop.step()
            stopwatch.step_ended()
        loop.destroy()
        release(loop.model, loop.optimizer._active_optimizers)

    def _strategy(self, case: Case, layout: Layout, stopwatch: Stopwatch) -> None:
        seed_everything(1, verbose=False)
        ddp = None
        if case.loop == "plain":
            ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
        strategy = MimoHeteroStrategy(
            case.modules,
            case.microbatches,
            ddp=ddp,
            encoder_batching=case.encoder_batching,
            encoder_ahead=case.encoder_ahead,
            cuda_graphs=case.cuda_graphs,
        )
        trainer = Trainer(
            accelerator=self.device.type,
            **trainer_ranks(),
            strategy=strategy,
            precision="bf16-mixed" if self.dtype is torch.bfloat16 else "32-true",
            max_steps=stopwatch.total,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[Watches(stopwatch)],
        )
        model = self.model(case)
        if case.images is None:
            samples, collate_fn = Samples(model.config, None, self.dtype), default_collate
        else:
            samples, collate_fn = Samples(model.language.config, model.encoder.config, self.dtype), collate
        data = DataLoader(samples, case.batch_size, collate_fn=collate_fn, num_workers=2)
        trainer.fit(model, data)
        model.runtime.destroy()


@contextmanager
def plain_kernels():
    """Without the fused kernels that models and strategy use on GPUs, except for those that the other loop has too."""
    with (
        mock.patch.dict(transformer.FUSED_KERNELS, {"moe_permute_fusion": True}, clear=True),
        mock.patch.object(data_parallel, "accumulate_in_kernels", lambda module: None),
        mock.patch.object(layer_specs, "add_biases_in_products", lambda spec: spec),
        mock.patch.object(layer_specs, "launch_less", lambda spec, num_experts: spec),
        mock.patch.object(layer_specs, "split_into_views", lambda: None),
        mock.patch("megatron.core.transformer.attention.SplitAlongDim", None),
    ):
        yield


def release(model: torch.nn.Module, optimizers: list[Any]) -> None:
    """Free the memory of buffers and optimizer states, which megatron-core's hooks in the graph keep alive."""
    kept = []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            for buffer in (*module.buffers, *module.expert_parallel_buffers):
                kept += [buffer.param_data, buffer.grad_data]
    for part in (part for optimizer in optimizers for part in optimizer.chained_optimizers):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                kept += [parameter, parameter.grad, *part.optimizer.state[parameter].values()]
    for tensor in kept:
        if isinstance(tensor, torch.Tensor):
            tensor.untyped_storage().resize_(0)


def forget_everything() -> None:
    """Give up what a loop held: process groups with their communicators, and memory."""
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    dist.barrier()


def of_all_ranks(measured: Measured) -> dict[str, Any]:
    """What rank 0 measured, with the most memory and communicators of any rank."""
    ranks = of_every_rank(measured)
    worst = {
        name: max(getattr(rank, name) for rank in ranks) for name in ("peak_memory", "communicators", "other_memory")
    }
    shares = {f"shares of rank {number}": rank.shares for number, rank in enumerate(ranks)}
    return asdict(measured) | worst | {"median": measured.median} | shares


def device_memory() -> int:
    """Bytes of the smallest of all ranks' GPUs."""
    memory = torch.tensor(torch.cuda.get_device_properties().total_memory, device="cuda")
    dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    return int(memory)


def largest_that_fits(bench: Bench, case: Case, memory: float) -> Bench:
    """With the largest sizes for which ``case`` fits the memory, or the smallest of all."""
    benches = [replace(bench, sizes=sizes) for sizes in SIZES]
    return next((each for each in benches if fits(each.needed_bytes(case), memory)), benches[-1])


def why_not(bench: Bench, case: Case, memory: float) -> str | None:
    """Why a case cannot be measured here, if so."""
    if case.fp8:
        try:
            fp8.check_machine(bench.dtype)
        except ValueError as error:
            return str(error)
    needed = bench.needed_bytes(case)
    return None if fits(needed, memory) else f"may need {gibibytes(needed)}, of {gibibytes(memory)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warmup", type=int, default=4, help="steps to leave out")
    parser.add_argument("--steps", type=int, default=20, help="steps to time")
    parser.add_argument("--only", nargs="*", help="names of the cases to measure")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    parser.add_argument("--memory", type=float, help="GiB of a GPU that may be used (default: all of it)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    dtype, world_size = torch.bfloat16 if on_gpu else torch.float32, dist.get_world_size()
    memory = options.memory * 2**30 if options.memory else device_memory() if on_gpu else math.inf
    bench = Bench(options.tiny, options.warmup, options.steps, device, dtype, world_size)
    every_case = cases(world_size)
    if not options.tiny:
        bench = largest_that_fits(bench, every_case[0], memory)
    report = {
        "machine": f"{world_size} x {torch.cuda.get_device_name() if on_gpu else 'CPU'}",
        "model": "tiny" if options.tiny else str(bench.sizes),
        "matmul": matmul_rate() if on_gpu else 1.0,
        "cases": [],
    }
    say: Callable[..., None] = print if dist.get_rank() == 0 else lambda *_, **__: None
    say(heading(report), flush=True)
    for case in every_case:
        if options.only and case.name not in options.only:
            continue
        if reason := why_not(bench, case, memory):
            say(f"left out: {case.name}, {case.loop}: {reason}", flush=True)
            continue
        measured = of_all_ranks(bench.measure(case))
        sequence, _ = bench.model(case).longest_sample()
        report["cases"].append(asdict(case) | measured | {"sequence": sequence, "flops": bench.step_flops(case)})
        say(table(report).splitlines()[-1], flush=True)
        if options.output and dist.get_rank() == 0:
            with open(options.output, "w") as file:
                json.dump(report, file, indent=1)
    say(table(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
