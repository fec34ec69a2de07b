"""Synthetic image samples of any size, with answers that cannot be guessed without seeing the images."""

import hashlib
import math

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import StepDataModule
from datamodules.batch import Sample, build_sample, require_fit

NUM_CLASSES = 4
PROMPT_TOKENS = 4


class MockImageDataset(Dataset[Sample]):
    """Samples that are a function of (seed, split, index) alone; `MockImageDataModule` has the arguments."""

    def __init__(
        self,
        *,
        split: str,
        length: int,
        image_size: tuple[int, int],
        tokens_per_image: int,
        images_per_sample: tuple[int, int],
        seq_length: int,
        vocab_size: int,
        image_token_id: int,
        seed: int,
    ) -> None:
        self.split = split
        self.length = length
        self.image_size = image_size
        self.tokens_per_image = tokens_per_image
        self.images_per_sample = images_per_sample
        self.seq_length = seq_length
        self.image_token_id = image_token_id
        self.seed = seed
        text_ids = [token_id for token_id in range(vocab_size) if token_id != image_token_id]
        self.pad_token_id, self.end_token_id, *text_ids = text_ids
        self.class_token_ids = text_ids[:NUM_CLASSES]
        self.prompt_token_ids = text_ids[NUM_CLASSES:]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside the {self.length} samples of split {self.split!r}")
        generator = _generator(self.seed, self.split, index)
        fewest, most = self.images_per_sample
        num_images = _draw(fewest, most + 1, 1, generator)[0]
        question = _draw(0, len(self.prompt_token_ids), PROMPT_TOKENS, generator)
        image_classes = _draw(0, NUM_CLASSES, num_images, generator)

        first, *rest = [self.prompt_token_ids[i] for i in question]
        answer_classes = image_classes or [question[-1] % NUM_CLASSES]
        return build_sample(
            prompt=[first, *[self.image_token_id] * (self.tokens_per_image * num_images), *rest],
            answer=[*[self.class_token_ids[c] for c in answer_classes], self.end_token_id],
            images=_draw_images(image_classes, self.image_size, generator),
            seq_length=self.seq_length,
            pad_token_id=self.pad_token_id,
            sample_id=index,
        )


class MockImageDataModule(StepDataModule):
    """Noise images with one bright quadrant each, and answers that name the quadrants.

    An image belongs to one of K = `NUM_CLASSES` = 4 equally likely classes: the quadrant that is bright, in
    reading order. A sample is `PROMPT_TOKENS` random prompt tokens, with the images after the first of them;
    the answer is one token per image, for the image's class, and the end token. A sample without an image is
    answered by the one token that its last prompt token determines, and the end token. A model that ignores
    the images cannot do better than log K nats on an image's answer token: see `blind_loss`.

    The padding id, the end id, the K class ids and the prompt ids are, in this order, the ids from 0 that are
    not `image_token_id`.

    Args:
        image_size: pixels, one number or (height, width); at least 2.
        tokens_per_image: positions that one image occupies in `input_ids`.
        images_per_sample: images of every sample, or an inclusive (fewest, most) to draw uniformly from.
        seq_length: length of `input_ids` in tokens.
        vocab_size: number of ids, `image_token_id` included.
        image_token_id: id that fills an image's positions.
        batch_size: samples of the WHOLE optimizer step, over all ranks and microbatches.
        num_samples: training samples.
        num_val_samples: held-out samples.
        seed: seed of the samples and of the training order.
        num_workers: loader processes per rank.

    Raises:
        ValueError: the longest sample does not fit in `seq_length`, the vocabulary is too small,
            `image_token_id` is outside it, or a size or count is out of range.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        tokens_per_image: int,
        images_per_sample: int | tuple[int, int] = 1,
        seq_length: int,
        vocab_size: int,
        image_token_id: int,
        batch_size: int,
        num_samples: int = 1024,
        num_val_samples: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < 2:
            raise ValueError(f"image_size must be at least 2 pixels each way, got {height} x {width}")
        fewest, most = (
            (images_per_sample, images_per_sample) if isinstance(images_per_sample, int) else images_per_sample
        )
        if not 0 <= fewest <= most:
            raise ValueError(f"images_per_sample must be 0 <= fewest <= most, got {fewest} and {most}")
        if min(num_samples, num_val_samples) < 1:
            raise ValueError(f"each split needs a sample, got {num_samples=} and {num_val_samples=}")
        smallest = 3 + 2 * NUM_CLASSES
        if vocab_size < smallest:
            raise ValueError(
                f"pad, end and image ids 3 + {NUM_CLASSES} class ids + at least {NUM_CLASSES} prompt ids = "
                f"{smallest} > vocab_size {vocab_size}"
            )
        if not 0 <= image_token_id < vocab_size:
            raise ValueError(f"image_token_id {image_token_id} is outside the vocabulary of {vocab_size} ids")
        require_fit(
            tokens_per_image=tokens_per_image,
            max_images=most,
            text_tokens=PROMPT_TOKENS + _answer_length(most),
            seq_length=seq_length,
        )
        train_dataset, val_dataset = (
            MockImageDataset(
                split=split,
                length=length,
                image_size=(height, width),
                tokens_per_image=tokens_per_image,
                images_per_sample=(fewest, most),
                seq_length=seq_length,
                vocab_size=vocab_size,
                image_token_id=image_token_id,
                seed=seed,
            )
            for split, length in (("train", num_samples), ("val", num_val_samples))
        )
        super().__init__(
            train_dataset=train_dataset,
            val_dataset=val_dataset,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.images_per_sample = (fewest, most)
        self.vocab_size = vocab_size
        self.image_token_id = image_token_id
        self.pad_token_id = train_dataset.pad_token_id
        self.end_token_id = train_dataset.end_token_id

    @property
    def blind_loss(self) -> float:
        """Lowest expected loss of a model that ignores the images, in nats per answer token.

        Each image's answer token costs such a model log `NUM_CLASSES`; end tokens and the answers of samples
        without an image can be known and cost nothing. The mean is over the tokens with loss mask 1.
        """
        fewest, most = self.images_per_sample
        counts = range(fewest, most + 1)
        return math.log(NUM_CLASSES) * sum(counts) / sum(map(_answer_length, counts))


def _answer_length(num_images: int) -> int:
    return max(num_images, 1) + 1


def _generator(seed: int, split: str, index: int) -> torch.Generator:
    # CPU generators keep 32 bits of a seed, so the three parts have to be mixed into that many.
    digest = hashlib.blake2b(f"{seed}/{split}/{index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def _draw(low: int, high: int, count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(low, high, (count,), generator=generator).tolist()


def _draw_images(classes: list[int], size: tuple[int, int], generator: torch.Generator) -> Tensor:
    height, width = size
    images = torch.randn(len(classes), 3, height, width, generator=generator) * 0.5
    for image, quadrant in zip(images, classes, strict=True):
        rows = slice(height // 2) if quadrant < 2 else slice(height // 2, None)
        columns = slice(width // 2) if quadrant % 2 == 0 else slice(width // 2, None)
        image[:, rows, columns] += 1.5
    return images
