"""Data modules that feed whole optimizer steps to the strategy; `datamodules.batch` has the contract."""

from datamodules.base import StepDataModule
from datamodules.batch import Batch, Sample, build_sample, collate, require_fit
from datamodules.digits import DigitsDataModule
from datamodules.mock import MockImageDataModule
from datamodules.vocabulary import WordVocabulary

__all__ = [
    "Batch",
    "DigitsDataModule",
    "MockImageDataModule",
    "Sample",
    "StepDataModule",
    "WordVocabulary",
    "build_sample",
    "collate",
    "require_fit",
]
