"""Train a small vision-language model on scanned digits, on four ranks, each module on a layout of its own.

Writes runs/NAME/: metrics.csv, curves.png, captions.png, layout.png, last.ckpt/ and summary.json.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from datamodules import DigitsDataModule, collate
from mimo_strategy import MimoHeteroStrategy, ModuleParallel, OptimizerConfig
from mimo_strategy.callbacks import Throughput
from mimo_strategy.generation import Generation
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

WORLD_SIZE = 4
# Two microbatches let encoder and language model of disjoint ranks work at the same time.
LAYOUTS = {
    "non_colocated": {
        "modules": {
            "images": ModuleParallel(dp=2),
            "language": ModuleParallel(tp=2, dp=1, ep=2, rank_offset=2),
        },
        "num_microbatches": 2,
    },
    "colocated": {
        "modules": {
            "images": ModuleParallel(dp=4),
            "language": ModuleParallel(tp=2, dp=2, ep=2),
        },
        "num_microbatches": 1,
    },
}
SHOWN_CAPTIONS = 24


def main() -> None:
    args = parse_arguments()
    seed_everything(args.seed)
    folder = Path("runs") / (args.name or f"digits-{args.layout}")

    radio = RadioConfig.tiny()
    data = DigitsDataModule(
        args.batch_size, image_size=radio.image_height, tokens_per_image=radio.tokens_per_image, seed=args.seed
    )
    model = NemotronVLM(
        radio,
        MambaMoEConfig.tiny(vocab_size=data.vocab_size),
        image_token_id=data.image_token_id,
        end_token_id=data.end_token_id,
        optimizer=OptimizerConfig(lr=args.lr, weight_decay=0.05, adam_beta2=0.98),
        warmup_steps=50,
    )
    answers = CollectAnswers()
    trainer = Trainer(
        strategy=MimoHeteroStrategy(**LAYOUTS[args.layout]),
        devices=WORLD_SIZE,
        max_epochs=args.epochs,
        max_steps=args.max_steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=CSVLogger(folder.parent, name=folder.name, version=""),
        callbacks=[
            Throughput(),
            LearningRateMonitor(),
            ModelCheckpoint(folder, save_last=True, save_top_k=0),
            answers,
        ],
    )

    began = time.perf_counter()
    trainer.fit(model, datamodule=data)
    train_seconds = time.perf_counter() - began

    blind = DataLoader(OtherImages(data.val_dataset), args.batch_size, collate_fn=collate)
    (blind_result,) = trainer.test(model, blind, verbose=False)
    answers.generations.clear()
    (result,) = trainer.test(model, datamodule=data, verbose=False)

    if trainer.is_global_zero:
        summary = {
            "heldout_accuracy": result["heldout_accuracy"],
            "heldout_accuracy_with_shuffled_images": blind_result["heldout_accuracy"],
            "steps": trainer.global_step,
            "train_seconds": round(train_seconds, 1),
            "world_size": trainer.world_size,
            "layout": {name: str(module) for name, module in trainer.strategy.layout.modules.items()},
            "placement": str(trainer.strategy.layout.placement),
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        draw(folder, trainer, data, answers)
        report(folder, summary)


class CollectAnswers(Callback):
    """Keeps what :meth:`NemotronVLM.test_step` generated."""

    def __init__(self) -> None:
        self.generations: list[Generation] = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.generations.append(outputs)


class OtherImages(Dataset):
    """The questions of a data set, each asked about the image of another sample."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._others = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict:
        return {**self._dataset[index], "images": self._dataset[self._others[index]]["images"]}


def draw(folder: Path, trainer: Trainer, data: DigitsDataModule, answers: CollectAnswers) -> None:
    """Write the three pictures."""
    from mimo_strategy.pictures import CaptionedImage, draw_captions, draw_curves, draw_layout

    words = data.vocabulary
    samples = []
    for generation in answers.generations:
        shown = (generation.tokens, generation.answers, generation.sample_ids)
        for tokens, answer, index in zip(*shown, strict=True):
            item = data.val_dataset[int(index)]
            prompt = item["input_ids"][: item["prompt_length"]]
            samples.append(
                CaptionedImage(
                    item["images"][0],
                    prompt=words.decode(prompt[prompt != words.image_token_id].tolist()),
                    generated=words.decode(tokens.tolist()),
                    truth=words.decode(answer[answer >= 0].tolist()),
                )
            )
    evenly = samples[:: max(1, len(samples) // SHOWN_CAPTIONS)][:SHOWN_CAPTIONS]
    draw_captions(evenly).savefig(folder / "captions.png")
    draw_curves(folder / "metrics.csv").savefig(folder / "curves.png")
    draw_layout(trainer.strategy.layout).savefig(folder / "layout.png")


def report(folder: Path, summary: dict) -> None:
    """Print what came out and where it lies."""
    print(
        f"\nheld-out accuracy   {summary['heldout_accuracy']:.1%}"
        f"   (with the images shuffled among the questions: {summary['heldout_accuracy_with_shuffled_images']:.1%})"
        f"\ntraining            {summary['steps']} steps in {summary['train_seconds']:.0f} s"
        f"\npictures            {folder}/captions.png  {folder}/curves.png  {folder}/layout.png"
        f"\ncheckpoint          {folder}/last.ckpt"
    )


def parse_arguments() -> argparse.Namespace:
    """Command line of the example."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="non_colocated", help="where the modules run")
    parser.add_argument("--name", help="folder under runs/; digits-LAYOUT if not given")
    parser.add_argument("--epochs", type=int, default=3, help="times that every question is seen")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many optimizer steps, if not -1")
    parser.add_argument("--batch-size", type=int, default=64, help="samples of an optimizer step, over all ranks")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and data order")
    return parser.parse_args()


if __name__ == "__main__":
    main()
