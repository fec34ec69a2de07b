"""Data modules that ``test_cli`` names on command lines."""

from lightning.pytorch import LightningDataModule

from datamodules import DigitsDataModule


class SilentData(LightningDataModule):
    """Does not say what its ids are."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size


class TenDigits(DigitsDataModule):
    """The first ten held-out digits to predict."""

    def predict_dataloader(self):
        self.val_dataset.questions = self.val_dataset.questions[:10]
        return super().predict_dataloader()
