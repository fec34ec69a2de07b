"""Train a small vision-language model on scanned digits, on four ranks, each module on a layout of its own.

Writes runs/NAME/: metrics.csv, curves.png, captions.png, layout.png, a checkpoint and summary.json.
"""

import argparse
import time
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from datamodules import DigitsDataModule
from mimo_strategy import MimoHeteroStrategy, ModuleParallel, OptimizerConfig
from mimo_strategy.callbacks import Throughput
from modules import MambaMoEConfig, NemotronVLM, RadioConfig

WORLD_SIZE = 4
LAYOUTS = {
    "non_colocated": {
        "images": ModuleParallel(dp=2),
        "language": ModuleParallel(tp=2, dp=1, ep=2, rank_offset=2),
    },
    "colocated": {
        "images": ModuleParallel(dp=4),
        "language": ModuleParallel(tp=2, dp=2, ep=2),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="non_colocated")
    parser.add_argument("--name", help="folder under runs/ (default: digits-LAYOUT)")
    parser.add_argument("--max-steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64, help="samples of an optimizer step")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    seed_everything(args.seed)
    folder = Path("runs") / (args.name or f"digits-{args.layout}")

    radio = RadioConfig.tiny()
    data = DigitsDataModule(
        batch_size=args.batch_size, tokens_per_image=radio.tokens_per_image, seq_length=24
    )
    model = NemotronVLM(
        radio,
        MambaMoEConfig.tiny(vocab_size=data.vocab_size),
        image_token_id=data.image_token_id,
        end_token_id=data.vocabulary.end_token_id,
        optimizer=OptimizerConfig(lr=args.lr, weight_decay=0.05, adam_beta2=0.98),
        warmup_steps=50,
    )
    strategy = MimoHeteroStrategy(LAYOUTS[args.layout], num_microbatches=args.microbatches)
    trainer = Trainer(
        strategy=strategy,
        accelerator="auto",
        devices=WORLD_SIZE,
        max_steps=args.max_steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        enable_checkpointing=False,
        logger=CSVLogger(folder.parent, name=folder.name, version=""),
        callbacks=[Throughput()],
        log_every_n_steps=10,
    )
    began = time.perf_counter()
    trainer.fit(model, datamodule=data)
    train_seconds = time.perf_counter() - began
    trainer.test(model, datamodule=data)
    print(train_seconds)


if __name__ == "__main__":
    main()
