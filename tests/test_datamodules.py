import hashlib
import math
import pickle
import sys
from collections import Counter

import pytest
import torch
from torch.utils.data import RandomSampler, SequentialSampler

from datamodules import DigitsDataModule, MockImageDataModule, WordVocabulary, build_sample, collate
from datamodules.digits import WORDINGS
from datamodules.mock import NUM_CLASSES

MOCK = {
    "image_size": (12, 16),
    "tokens_per_image": 5,
    "images_per_sample": (0, 3),
    "seq_length": 32,
    "vocab_size": 48,
    "image_token_id": 7,
    "batch_size": 8,
    "num_samples": 40,
    "num_val_samples": 20,
    "seed": 3,
}


def mock(**overrides) -> MockImageDataModule:
    return MockImageDataModule(**MOCK | overrides)


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    return DigitsDataModule(batch_size=16)


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(torch.as_tensor(left[k]), torch.as_tensor(right[k])) for k in left
    )


def answer_of(sample) -> list[int]:
    return sample["labels"][sample["loss_mask"].bool()].tolist()


def assert_contract(
    sample, *, index, seq_length, image_shape, tokens_per_image, image_token_id, vocab_size, end_token_id
):
    input_ids, labels, loss_mask = sample["input_ids"], sample["labels"], sample["loss_mask"]
    assert input_ids.shape == labels.shape == loss_mask.shape == (seq_length,)
    assert input_ids.dtype == labels.dtype == torch.int64
    assert loss_mask.dtype == sample["images"].dtype == torch.float32
    assert sample["images"].shape[1:] == image_shape
    assert type(sample["prompt_length"]) is int and sample["sample_id"] == index
    assert torch.equal(labels[:-1], input_ids[1:])
    assert min(input_ids.min(), labels.min()) >= 0 and max(input_ids.max(), labels.max()) < vocab_size

    is_image = input_ids == image_token_id
    assert is_image.sum() == tokens_per_image * len(sample["images"])
    assert not is_image[sample["prompt_length"] :].any()

    answer = answer_of(sample)
    start = sample["prompt_length"]
    assert input_ids[start : start + len(answer)].tolist() == answer
    assert answer[-1] == end_token_id and end_token_id not in answer[:-1]
    assert loss_mask.nonzero().flatten().tolist() == list(range(start - 1, start - 1 + len(answer)))


def test_mock_samples_keep_the_contract():
    module = mock()
    for dataset in (module.train_dataset, module.val_dataset):
        for index, sample in enumerate(dataset):
            assert_contract(
                sample,
                index=index,
                seq_length=32,
                image_shape=(3, 12, 16),
                tokens_per_image=5,
                image_token_id=7,
                vocab_size=48,
                end_token_id=module.end_token_id,
            )


def test_digit_samples_keep_the_contract(digits):
    for dataset in (digits.train_dataset, digits.val_dataset):
        for index in range(0, len(dataset), 7):
            assert_contract(
                dataset[index],
                index=index,
                seq_length=16,
                image_shape=(3, 16, 16),
                tokens_per_image=4,
                image_token_id=digits.image_token_id,
                vocab_size=digits.vocab_size,
                end_token_id=digits.vocabulary.end_token_id,
            )
            assert len(dataset[index]["images"]) == 1
            assert dataset[index]["images"].abs().max() <= 1


@pytest.mark.parametrize("image_token_id", [0, 1, 3, 10])
def test_mock_ids_stay_clear_of_any_image_token(image_token_id):
    module = mock(image_token_id=image_token_id, vocab_size=11)
    special = {
        module.pad_token_id,
        module.end_token_id,
        image_token_id,
        *module.train_dataset.class_token_ids,
    }
    assert len(special) == 3 + NUM_CLASSES
    for sample in module.train_dataset:
        images = (sample["input_ids"] == image_token_id).sum()
        assert images == 5 * len(sample["images"])
        assert set(answer_of(sample)[:-1]) <= set(module.train_dataset.class_token_ids)


def test_a_mock_sample_depends_on_seed_split_and_index_alone():
    module, twin, other_seed = mock(), mock(), mock(seed=4)
    twin.train_dataset[11]
    torch.manual_seed(0)
    sample = module.train_dataset[5]
    torch.rand(3)
    assert same(sample, module.train_dataset[5])
    assert same(sample, twin.train_dataset[5])
    assert same(sample, mock(num_samples=6, batch_size=1).train_dataset[5])
    assert not same(sample, other_seed.train_dataset[5])
    assert not same(sample, module.val_dataset[5])
    assert not torch.equal(sample["input_ids"], module.train_dataset[6]["input_ids"])


def test_mock_image_counts_cover_the_inclusive_range():
    assert {len(sample["images"]) for sample in mock().train_dataset} == {0, 1, 2, 3}
    assert {len(sample["images"]) for sample in mock(images_per_sample=2).train_dataset} == {2}


def test_a_mock_answer_names_the_bright_quadrants():
    dataset = mock(images_per_sample=2).train_dataset
    for sample in dataset:
        brightness = sample["images"].mean(1).unflatten(2, (2, 8)).unflatten(1, (2, 6)).mean((2, 4))
        brightest = brightness.flatten(1).argmax(1)
        assert answer_of(sample)[:-1] == [dataset.class_token_ids[quadrant] for quadrant in brightest]


def test_the_prompt_determines_a_mock_answer_without_images():
    samples = list(mock(images_per_sample=0, num_samples=400).train_dataset)
    answers = {}
    for sample in samples:
        last = sample["input_ids"][sample["prompt_length"] - 1].item()
        answers.setdefault(last, set()).add(tuple(answer_of(sample)))
    assert all(len(found) == 1 for found in answers.values())
    assert len(set.union(*answers.values())) == NUM_CLASSES


@pytest.mark.parametrize("images_per_sample", [0, 1, 2, (0, 3)])
def test_blind_loss_is_the_entropy_of_the_classes_per_answer_token(images_per_sample):
    module = mock(images_per_sample=images_per_sample, image_size=2, num_samples=1500)
    classes, answer_tokens = Counter(), 0
    for sample in module.train_dataset:
        answer = answer_of(sample)
        answer_tokens += len(answer)
        classes.update(answer[: len(sample["images"])])
    total = classes.total()
    entropy = -sum(n / total * math.log(n / total) for n in classes.values())
    assert module.blind_loss == pytest.approx(entropy * total / answer_tokens, rel=0.03)


def test_collate_joins_mixed_image_counts_in_sample_order():
    dataset = mock().train_dataset
    samples = [dataset[index] for index in range(8)]
    batch = collate(samples)
    counts = [len(sample["images"]) for sample in samples]
    assert len(set(counts)) > 2 and 0 in counts
    assert batch["num_images"].tolist() == counts
    assert batch["images"].shape == (sum(counts), 3, 12, 16)
    for sample, images in zip(samples, batch["images"].split(counts), strict=True):
        assert torch.equal(images, sample["images"])
    for key in ("input_ids", "labels", "loss_mask"):
        assert batch[key].shape == (8, 32)
    for key in ("num_images", "prompt_length", "sample_id"):
        assert batch[key].shape == (8,) and batch[key].dtype == torch.int64


def test_collate_without_any_image():
    batch = collate([mock(images_per_sample=0).train_dataset[index] for index in range(2)])
    assert batch["images"].shape == (0, 3, 12, 16)
    assert batch["num_images"].tolist() == [0, 0]


def test_build_sample_fills_the_sequence_to_its_last_position():
    sample = build_sample(
        prompt=[5, 6],
        answer=[8, 1],
        images=torch.zeros(0, 3, 2, 2),
        seq_length=4,
        pad_token_id=0,
        sample_id=9,
    )
    assert sample["input_ids"].tolist() == [5, 6, 8, 1]
    assert sample["labels"].tolist() == [6, 8, 1, 0]
    assert sample["loss_mask"].tolist() == [0, 1, 1, 0]
    with pytest.raises(ValueError, match=r"2 prompt tokens [+] 3 answer tokens = 5 > seq_length 4"):
        build_sample(
            prompt=[5, 6],
            answer=[8, 8, 1],
            images=sample["images"],
            seq_length=4,
            pad_token_id=0,
            sample_id=9,
        )


@pytest.mark.parametrize("make", [mock, lambda **overrides: DigitsDataModule(batch_size=500, **overrides)])
def test_loaders_yield_the_same_samples_with_and_without_workers(make):
    def ids(num_workers):
        loader = make(num_workers=num_workers).val_dataloader()
        return torch.cat([batch["sample_id"] for batch in loader])

    alone = ids(0)
    assert torch.equal(alone, ids(2))
    assert torch.equal(alone, torch.arange(len(alone)))


def test_the_training_order_is_the_same_whatever_the_global_generator():
    def order(module, global_seed, epochs=2):
        torch.manual_seed(global_seed)
        loader = module.train_dataloader()
        return [[i for batch in loader for i in batch["sample_id"].tolist()] for _ in range(epochs)]

    first, second = order(mock(), 0)
    assert [first, second] == order(mock(), 1)
    assert first != second and sorted(first) == sorted(second) == list(range(40))
    assert first != order(mock(seed=4), 0)[0]


def test_loaders_are_plain_and_keep_the_last_batch():
    module = mock(batch_size=16)
    assert type(module.train_dataloader().sampler) is RandomSampler
    for loader in (module.val_dataloader(), module.test_dataloader(), module.predict_dataloader()):
        assert type(loader.sampler) is SequentialSampler
        assert [len(batch["sample_id"]) for batch in loader] == [16, 4]


def test_digit_split_is_disjoint_stratified_and_fixed(digits):
    train = [image for image, _ in digits.train_dataset.questions]
    held_out = [image for image, _ in digits.val_dataset.questions]
    assert set(train).isdisjoint(held_out) and set(train) | set(held_out) == set(range(1797))
    assert len(held_out) == len(set(held_out)) == 355
    per_digit = Counter(digits.val_dataset.digits[image] for image in held_out)
    assert set(per_digit.values()) <= {34, 35, 36}

    assert DigitsDataModule(batch_size=16, seed=1).val_dataset.questions == digits.val_dataset.questions
    assert hashlib.sha256(str(held_out).encode()).hexdigest()[:16] == "ea907db21f50bbcb"


def test_training_asks_every_question_about_every_image(digits):
    questions = digits.train_dataset.questions
    assert len(questions) == len(set(questions)) == 1442 * len(WORDINGS)


def test_held_out_wordings_are_balanced_and_a_blind_guess_is_poor(digits):
    dataset = digits.val_dataset
    per_wording = Counter(wording for _, wording in dataset.questions)
    assert max(per_wording.values()) - min(per_wording.values()) <= 5
    answers = Counter((wording, dataset.digits[image]) for image, wording in dataset.questions)
    best_guesses = sum(max(answers[wording, digit] for digit in range(10)) for wording in range(len(WORDINGS)))
    assert best_guesses / len(dataset) < 0.13


def test_digit_samples_depend_on_the_index_alone(digits):
    other = DigitsDataModule(batch_size=4, seed=9)
    for index in (0, 6, 7209):
        assert same(digits.train_dataset[index], other.train_dataset[index])
    assert same(digits.train_dataset[6], pickle.loads(pickle.dumps(digits.train_dataset))[6])


def test_prompts_and_answers_decode_to_their_wording(digits):
    dataset, vocabulary = digits.val_dataset, digits.vocabulary
    for index, (image, wording) in enumerate(dataset.questions):
        sample = dataset[index]
        prompt = sample["input_ids"][4 : sample["prompt_length"]]
        assert vocabulary.decode(prompt) == WORDINGS[wording].prompt
        assert vocabulary.decode(answer_of(sample)) == WORDINGS[wording].answer_for(dataset.digits[image])
    assert [wording.answer_for(9) for wording in WORDINGS] == [
        "nine",
        "a handwritten nine",
        "nine is odd",
        "after nine comes ten",
        "twice nine is eighteen",
    ]


def test_every_word_of_the_digit_captions_is_encodable(digits):
    vocabulary = digits.vocabulary
    assert digits.vocab_size == len(vocabulary) == 64
    for wording in WORDINGS:
        for text in (wording.prompt, *map(wording.answer_for, range(10))):
            assert vocabulary.decode(vocabulary.encode(text)) == text


def test_vocabulary_special_tokens_and_unused_ids():
    vocabulary = WordVocabulary(["a", "digit"], size=8)
    assert len(vocabulary) == 8 and len(WordVocabulary(["a", "digit"])) == 5
    assert vocabulary.encode("<image> a digit <end> <pad>") == [2, 3, 4, 1, 0]
    assert vocabulary.decode([2, 3, 4, 1, 0]) == "<image> a digit"
    assert vocabulary.decode(torch.tensor([0, 4, 6])) == "<pad> digit <unused6>"
    assert vocabulary.decode([]) == ""


def test_vocabulary_errors():
    with pytest.raises(KeyError, match=r"no id for \['twelfty'\] of 'a twelfty'.*<image> a digit"):
        WordVocabulary(["a", "digit"]).encode("a twelfty")
    with pytest.raises(ValueError, match=r"3 special tokens [+] 2 words = 5 > size 4"):
        WordVocabulary(["a", "digit"], size=4)
    with pytest.raises(ValueError, match=r"distinct.*\['<pad>', 'a'\]"):
        WordVocabulary(["a", "a", "<pad>"])
    with pytest.raises(ValueError, match=r"whitespace, got \['a b', ''\]"):
        WordVocabulary(["a b", ""])
    with pytest.raises(IndexError):
        WordVocabulary(["a"]).decode([4])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"tokens_per_image": 9},
            "tokens_per_image 9 x 3 images [+] 8 text tokens = 35 > seq_length 32; "
            "use seq_length >= 35, or tokens_per_image <= 8",
        ),
        ({"seq_length": 10}, "5 x 3 images [+] 8 text tokens = 23 > seq_length 10; use seq_length >= 23$"),
        (
            {"seq_length": 5, "images_per_sample": 0},
            "x 0 images [+] 6 text tokens = 6 > seq_length 5; .* >= 6$",
        ),
        ({"tokens_per_image": 0}, "tokens_per_image must be at least 1, got 0"),
        ({"vocab_size": 10}, "3 [+] 4 class ids [+] at least 4 prompt ids = 11 > vocab_size 10"),
        ({"image_token_id": 48}, "image_token_id 48 is outside the vocabulary of 48 ids"),
        ({"image_token_id": -1}, "image_token_id -1 is outside"),
        ({"images_per_sample": (2, 1)}, "images_per_sample .* got 2 and 1"),
        ({"images_per_sample": -1}, "images_per_sample .* got -1 and -1"),
        ({"image_size": (1, 8)}, "image_size .* got 1 x 8"),
        ({"num_samples": 0}, "num_samples=0 and num_val_samples=20"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_mock_rejects_what_cannot_work(overrides, message):
    with pytest.raises(ValueError, match=message):
        mock(**overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"seq_length": 11},
            "tokens_per_image 4 x 1 images [+] 8 text tokens = 12 > seq_length 11; "
            "use seq_length >= 12, or tokens_per_image <= 3",
        ),
        ({"image_size": 7}, "image_size .* got 7"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_digits_reject_what_cannot_work(overrides, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**{"batch_size": 4} | overrides)


def test_digits_say_how_to_install_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        DigitsDataModule(batch_size=4)
