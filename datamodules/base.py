"""What all data modules share: data loaders of whole step batches, in the same order on every rank."""

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import Sample, collate


class StepDataModule(LightningDataModule):
    """Serves one training and one held-out dataset as step batches (see `datamodules.batch`).

    The loaders have no distributed sampler: the strategy lets each rank load its share of every step batch. The
    training order comes from a generator of its own, seeded with `seed`, because the ranks' global generators may
    have diverged.

    Args:
        train_dataset: map-style dataset of training samples.
        val_dataset: map-style dataset of held-out samples; also what testing and prediction read, in order.
        batch_size: samples of the WHOLE optimizer step, over all ranks and microbatches.
        seed: seed of the training order, unless Lightning sets a sampler for distributed training: that one follows
            `seed_everything`.
        num_workers: loader processes per rank.

    Raises:
        ValueError: `batch_size` below 1.
    """

    def __init__(
        self,
        *,
        train_dataset: Dataset[Sample],
        val_dataset: Dataset[Sample],
        batch_size: int,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.train_dataset = train_dataset
        self.val_dataset = val_dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        """Shuffled training samples; the order depends on the seed and the epochs this loader has served."""
        return DataLoader(
            self.train_dataset,
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader:
        """Held-out samples in dataset order."""
        # by keyword: for prediction Lightning makes the loader again, with arguments of its own
        return DataLoader(
            self.val_dataset, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate
        )

    def test_dataloader(self) -> DataLoader:
        """The same samples as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """The same samples as `val_dataloader`."""
        return self.val_dataloader()
