"""Generated texts beside their images, as files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, override

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mimo_strategy.agreement import of_every_rank
from mimo_strategy.layout import LANGUAGE, Layout
from mimo_strategy.module import MimoModule
from mimo_strategy.prediction import Decodes, Prediction, find_decoder
from mimo_strategy.runtime.runtime import MimoRuntime
from mimo_strategy.step_batch import Batch, StepShare, narrow_samples


class _Row(NamedTuple):
    """What a rank that loaded a sample knows of it; ``position`` is that within the step batch."""

    position: int
    prompt: str
    truth: str | None
    images: list[str]


class CaptionWriter(Callback):
    """Writes, while predicting, every sample's images and generated text, in the order of the data.

    In the folder:

    - ``predictions.jsonl``: a line per sample with ``sample_id``, ``prompt``, ``text``, ``truth`` (``null`` without
      labels) and ``images``, a list of files; texts are token ids if the datamodule has nothing to decode with;
    - ``images/``: every image once, written by a rank that loaded it;
    - ``captions.png``: some of the samples, evenly spread.

    It needs a ``predict_step`` that returns a :class:`~mimo_strategy.prediction.Prediction`, and a folder that all
    ranks share.

    Args:
        folder: ``None`` is ``predictions`` in the folder of the Trainer's logger.
        shown: samples in ``captions.png``.
        encoder: name of the encoder whose items are images ``[3, height, width]``.
    """

    def __init__(self, folder: str | Path | None = None, shown: int = 24, encoder: str = "images") -> None:
        self._asked_folder = folder
        self._shown = shown
        self._encoder = encoder
        self._folder = Path()
        self._records: list[dict[str, Any]] = []

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = Path(self._asked_folder or Path(trainer.log_dir) / "predictions")
        self._records = []
        if trainer.is_global_zero:
            (self._folder / "images").mkdir(parents=True, exist_ok=True)
            self._list.unlink(missing_ok=True)
        trainer.strategy.barrier()

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: MimoModule,
        outputs: Prediction,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, Prediction):
            raise TypeError(f"CaptionWriter writes what predict_step returns as a Prediction, got {outputs!r}")
        prefix = f"{dataloader_idx}-" if len(trainer.num_predict_batches) > 1 else ""
        decoder = find_decoder(trainer.datamodule)
        rows = [
            self._write_images(position, narrow_samples(batch, row, 1, [self._encoder]), prefix, pl_module, decoder)
            for row, position in enumerate(self._positions(pl_module.runtime, batch))
            if "is_padding" not in batch or not batch["is_padding"][row]
        ]
        gathered = of_every_rank((outputs, rows))
        if trainer.is_global_zero:
            self._write_texts(*zip(*gathered, strict=True), pl_module)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and any(record["images"] for record in self._records):
            self._draw()

    @property
    def _list(self) -> Path:
        return self._folder / "predictions.jsonl"

    def _positions(self, runtime: MimoRuntime | None, batch: Batch) -> list[int]:
        num_rows = len(batch["input_ids"])
        if runtime is None:
            return list(range(num_rows))
        topology, batch_size = runtime.topology, num_rows * runtime.share.num_lanes
        return written_positions(topology.layout, self._encoder, topology.rank, runtime.num_microbatches, batch_size)

    def _write_images(
        self, position: int, sample: Batch, prefix: str, module: MimoModule, decoder: Decodes | None
    ) -> _Row:
        from mimo_strategy.pictures import save_image

        name = f"{prefix}{int(sample['sample_id'])}"
        files = []
        for number, image in enumerate(sample.get(self._encoder, ())):
            files.append(f"images/{name}-{number}.png" if number else f"images/{name}.png")
            save_image(image, self._folder / files[-1])
        prompt = sample["input_ids"][0, : int(sample["prompt_length"])]
        special = torch.tensor(list(module.special_token_ids.values()), device=prompt.device)
        truth = None
        if "labels" in sample and "loss_mask" in sample:
            answer = sample["labels"][0, sample["loss_mask"][0] > 0].tolist()
            truth = _decode(_without_end(answer, module), decoder)
        return _Row(position, _decode(prompt[~torch.isin(prompt, special)].tolist(), decoder), truth, files)

    def _write_texts(self, predictions: Iterable[Prediction], rows: Iterable[list[_Row]], module: MimoModule) -> None:
        """Put together what all ranks predicted, in their order, and what those that write images know."""
        ids = [sample_id for prediction in predictions for sample_id in prediction.sample_ids]
        texts = [
            text
            for prediction in predictions
            for text in prediction.texts
            or [_decode(_without_end(tokens, module), None) for tokens in prediction.tokens]
        ]
        known = sorted(row for part in rows for row in part)
        records = [
            {"sample_id": sample_id, "prompt": row.prompt, "text": text, "truth": row.truth, "images": row.images}
            for sample_id, text, row in zip(ids, texts, known, strict=True)
        ]
        with self._list.open("a") as lines:
            lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._records += records

    def _draw(self) -> None:
        from mimo_strategy.pictures import CaptionedImage, draw_captions, load_image

        records = [record for record in self._records if record["images"]]
        shown = records[:: max(1, len(records) // self._shown)][: self._shown]
        samples = [
            CaptionedImage(
                torch.cat([load_image(self._folder / image) for image in record["images"]], dim=2),
                prompt=record["prompt"],
                generated=record["text"],
                truth=record["truth"],
            )
            for record in shown
        ]
        draw_captions(samples).savefig(self._folder / "captions.png")


def written_positions(layout: Layout, encoder: str, rank: int, num_microbatches: int, batch_size: int) -> list[int]:
    """Positions in a step batch of the samples whose images ``rank`` writes: all that it loaded, or none.

    Ranks that run the encoder load images; those of a lane load the same ones, and the first of them writes them.
    """
    ranks = layout.modules.get(encoder, layout.modules[LANGUAGE]).ranks
    first_of_lane: dict[int, int] = {}
    for other in ranks:
        first_of_lane.setdefault(StepShare(layout, other, num_microbatches).lane, other)
    if rank not in first_of_lane.values():
        return []
    return StepShare(layout, rank, num_microbatches).positions(batch_size)


def _without_end(tokens: list[int], module: MimoModule) -> list[int]:
    return tokens[:-1] if tokens[-1:] == [getattr(module, "end_token_id", None)] else tokens


def _decode(tokens: list[int], decoder: Decodes | None) -> str:
    return " ".join(map(str, tokens)) if decoder is None else decoder.decode(tokens)
