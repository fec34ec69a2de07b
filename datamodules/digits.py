"""Real scanned digits, captioned in words whose form the wording of the prompt decides."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import StepDataModule
from datamodules.batch import Sample, build_sample, require_fit
from datamodules.vocabulary import WordVocabulary

NUMBERS = [
    *["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    *["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"],
]


class Wording(NamedTuple):
    """A prompt, and the template of its answers."""

    prompt: str
    answer: str

    def answer_for(self, digit: int) -> str:
        """The answer about an image of `digit` (0 to 9), in words."""
        return self.answer.format(
            digit=NUMBERS[digit],
            parity="odd" if digit % 2 else "even",
            next=NUMBERS[digit + 1],
            double=NUMBERS[2 * digit],
        )


WORDINGS = (
    Wording("name the digit", "{digit}"),
    Wording("describe the image", "a handwritten {digit}"),
    Wording("even or odd", "{digit} is {parity}"),
    Wording("what comes next", "after {digit} comes {next}"),
    Wording("double the digit", "twice {digit} is {double}"),
)


class DigitsDataset(Dataset[Sample]):
    """Questions about digit images.

    Args:
        images: float [N, 3, H, W].
        digits: the N images' digits.
        questions: per sample, the position of its image in `images` and of its wording in `WORDINGS`.
        vocabulary: what prompts and answers are encoded with.
        tokens_per_image: positions that an image occupies in `input_ids`.
        seq_length: length of `input_ids` in tokens.
    """

    def __init__(
        self,
        *,
        images: Tensor,
        digits: list[int],
        questions: list[tuple[int, int]],
        vocabulary: WordVocabulary,
        tokens_per_image: int,
        seq_length: int,
    ) -> None:
        self.images = images
        self.digits = digits
        self.questions = questions
        self.vocabulary = vocabulary
        self.tokens_per_image = tokens_per_image
        self.seq_length = seq_length

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Sample:
        image, wording = self.questions[index]
        prompt, answer = WORDINGS[wording].prompt, WORDINGS[wording].answer_for(self.digits[image])
        vocabulary = self.vocabulary
        return build_sample(
            prompt=[vocabulary.image_token_id] * self.tokens_per_image + vocabulary.encode(prompt),
            answer=[*vocabulary.encode(answer), vocabulary.end_token_id],
            images=self.images[image : image + 1],
            seq_length=self.seq_length,
            pad_token_id=vocabulary.pad_token_id,
            sample_id=index,
        )


class DigitsDataModule(StepDataModule):
    """The 1,797 scanned 8 x 8 digits that scikit-learn ships, each with a question and an answer in words.

    A sample is one image, one of `WORDINGS` and the answer. Every fifth image of each digit is held out,
    whatever the seed. Training goes over all pairs of an image and a wording; the held-out set asks about
    each of its images once, with the wordings spread evenly over each digit's images. A model that ignores
    the images answers about one held-out question in ten.

    Images are scaled up bilinearly, repeated over 3 channels, and range over [-1, 1].

    Args:
        batch_size: samples of the WHOLE optimizer step, over all ranks and microbatches.
        image_size: height and width in pixels.
        tokens_per_image: positions that an image occupies in `input_ids`.
        seq_length: length of `input_ids` in tokens.
        seed: see `StepDataModule`; it decides nothing but the training order.
        num_workers: loader processes per rank.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: the longest sample does not fit in `seq_length`, or a size is out of range.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        image_size: int = 16,
        tokens_per_image: int = 4,
        seq_length: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        if image_size < 8:
            raise ValueError(f"image_size must be at least the 8 pixels of the scans, got {image_size}")
        texts = [(wording.prompt, wording.answer_for(digit)) for wording in WORDINGS for digit in range(10)]
        require_fit(
            tokens_per_image=tokens_per_image,
            max_images=1,
            text_tokens=max(len(f"{prompt} {answer}".split()) for prompt, answer in texts) + 1,
            seq_length=seq_length,
        )
        words = sorted({word for text in texts for word in " ".join(text).split()})
        self.vocabulary = WordVocabulary(words, size=64)

        scans, digits = _load_scans()
        images = F.interpolate(scans / 8 - 1, size=(image_size, image_size), mode="bilinear").expand(-1, 3, -1, -1)
        train_questions, val_questions = _split(digits)
        train_dataset, val_dataset = (
            DigitsDataset(
                images=images,
                digits=digits,
                questions=questions,
                vocabulary=self.vocabulary,
                tokens_per_image=tokens_per_image,
                seq_length=seq_length,
            )
            for questions in (train_questions, val_questions)
        )
        super().__init__(
            train_dataset=train_dataset,
            val_dataset=val_dataset,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, the unused ones included: a multiple of 8."""
        return len(self.vocabulary)

    @property
    def image_token_id(self) -> int:
        """Id that fills an image's positions."""
        return self.vocabulary.image_token_id

    @property
    def end_token_id(self) -> int:
        """Id that ends an answer."""
        return self.vocabulary.end_token_id


def _load_scans() -> tuple[Tensor, list[int]]:
    """The scans, float [1797, 1, 8, 8] with ink from 0 to 16, and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("DigitsDataModule reads scikit-learn's digits: pip install scikit-learn") from error
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1), bunch.target.tolist()


def _split(digits: list[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Training and held-out (image, wording) questions."""
    train, held_out = [], []
    seen = [0] * 10
    for image, digit in enumerate(digits):
        seen[digit] += 1
        if seen[digit] % 5 == 0:
            held_out.append((image, (digit + seen[digit] // 5) % len(WORDINGS)))
        else:
            train.extend((image, wording) for wording in range(len(WORDINGS)))
    return train, held_out
