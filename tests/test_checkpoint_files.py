"""Checkpoints on disk: what is damaged, foreign or dangerous is refused by name, what is half done is never found."""

import io
import json
import os
import pickle
import shutil
import signal
import time
import zlib
from contextlib import suppress
from math import prod
from pathlib import Path

import pytest
import torch
from checkpoint_runs import data, every_step, fit, model, strategy
from tiny_runs import make_trainer

from mimo_strategy.checkpoint import CheckpointError, SaveError
from mimo_strategy.checkpoint.directory import begin, located, newest_whole, publish, remove
from mimo_strategy.checkpoint.loading import Checkpoint
from mimo_strategy.checkpoint.manifest import MANIFEST, is_whole, write_file, write_manifest
from mimo_strategy.checkpoint.shards import rectangles
from mimo_strategy.testing import RankError, run_on_ranks


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 3, 2), (2, 1, 4), (1, 1, 3), (2, 3, 2, 2)], ids=str)
def test_rectangles_cover_a_range_of_a_flattened_tensor(shape):
    numbers = torch.arange(prod(shape)).view(shape)
    for start in range(numbers.numel()):
        for stop in range(start + 1, numbers.numel() + 1):
            covered = []
            for offset, sizes, position in rectangles(shape, start, stop):
                part = numbers[tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True))]
                assert part.shape == sizes
                assert part.flatten()[0] == position
                covered += part.flatten().tolist()
            assert covered == list(range(start, stop))


# ---- damage and payloads


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of the first step of two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(lambda: fit(strategy(), 1, callbacks=(every_step(folder),)), 2)
    return folder / "step=1.ckpt"


FILES = ["__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json", "lightning.pt", MANIFEST]


def test_these_are_all_the_files(saved):
    assert {path.name for path in saved.iterdir()} == set(FILES)


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy.ckpt"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink], ids=["truncated", "bit-flipped", "missing"])
def test_damage_is_noticed_and_named(copy, name, damage):
    Checkpoint(copy)
    damage(copy / name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Checkpoint(copy)


def test_every_rank_says_what_each_has_found(copy):
    """Of the two largest files each rank looks at one."""
    names = ["__0_0.distcp", "__1_0.distcp"]
    for name in names:
        flip_a_bit(copy / name)

    def validate():
        try:
            make_trainer(strategy(), limit_val_batches=1).validate(model(), data(), ckpt_path=copy, verbose=False)
        except CheckpointError as error:
            return str(error)

    messages = run_on_ranks(validate, 2, timeout=60)
    found = [f"{copy} is damaged:\n  {name}: its content is not what was written" for name in names]
    assert messages[0] == messages[1]
    assert messages[0] in ("\n".join(found), "\n".join(found[::-1]))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def sign(directory: Path) -> None:
    """What an attacker does who knows the format: a manifest that fits the files."""
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
        for path in directory.iterdir()
        if path.name != MANIFEST
    }
    write_manifest(directory, files)


def load(path: Path) -> None:
    def run():
        fit(strategy(), 2, path)

    run_on_ranks(run, 1)


def test_a_signed_copy_loads(copy):
    sign(copy)
    load(copy)


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
@pytest.mark.parametrize("name", [".metadata", "lightning.pt", "__1_0.distcp"])
def test_a_planted_payload_is_refused_and_named(copy, tmp_path, name, protocol):
    executed = tmp_path / "executed"
    payload = Payload(executed)
    path = copy / name
    index = pickle.loads((copy / ".metadata").read_bytes())
    if protocol == "torch":
        # torch.save itself takes no such file name as .metadata
        stream = io.BytesIO()
        torch.save({"state": payload}, stream)
        path.write_bytes(stream.getvalue())
    else:
        path.write_bytes(pickle.dumps(payload))
    if name.endswith(".distcp"):
        for place in index.storage_data.values():
            if place.relative_path == name:
                place.offset, place.length = 0, path.stat().st_size
        (copy / ".metadata").write_bytes(pickle.dumps(index))
    sign(copy)
    with pytest.raises(RankError, match=f"CheckpointError: .*{name}"):
        load(copy)
    assert not executed.exists()
    # it is a payload
    with suppress(Exception):
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False) if protocol == "torch" else pickle.loads(
            path.read_bytes()
        )
    assert executed.exists()


def test_what_upstream_would_read_beside_is_not_read(copy, tmp_path):
    torch.save(Payload(tmp_path / "executed"), copy / "common.pt")
    sign(copy)
    load(copy)
    assert not (tmp_path / "executed").exists()


def test_the_index_must_not_point_elsewhere(copy):
    index = pickle.loads((copy / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../elsewhere"
    (copy / ".metadata").write_bytes(pickle.dumps(index))
    sign(copy)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: it points to '\.\./elsewhere'"):
        Checkpoint(copy)


def test_an_index_with_a_gap_is_refused(copy):
    index = pickle.loads((copy / ".metadata").read_bytes())
    stored = index.state_dict_metadata["optimizer.exp_avg.language_model.output_layer.weight"]
    stored.chunks.pop()
    (copy / ".metadata").write_bytes(pickle.dumps(index))
    sign(copy)
    with pytest.raises(RankError, match="its index does not cover all tensors"):
        load(copy)


# ---- another model


@pytest.mark.parametrize(
    ("changes", "mismatches"),
    [
        ({"hidden_size": 32}, ["final_norm.weight: [64] in the checkpoint, [32] in the model"]),
        (
            {"pattern": "M*E-*"},
            [
                "layers.4.input_layernorm.weight: not in the checkpoint",
                "layers.4.self_attention.linear_qkv.weight: not",
            ],
        ),
        ({"pattern": "M*E"}, ["layers.3.mlp.linear_fc1.weight: not in the model"]),
        (
            {"num_experts": 8},
            ["router.weight: [4, 64] in the checkpoint, [8, 64]", "experts.7.linear_fc1.weight: not in"],
        ),
        (
            {"vocab_size": 128},
            ["word_embeddings.weight: [64, 64] in the checkpoint, [128, 64]", "output_layer.weight: ["],
        ),
    ],
    ids=lambda value: "-".join(f"{name}-{number}" for name, number in value.items()) if isinstance(value, dict) else "",
)
def test_another_model_is_told_all_that_differs(saved, changes, mismatches):
    def run():
        try:
            fit(strategy(), 2, saved, module=model(**changes))
        except CheckpointError as error:
            return str(error)

    for message in run_on_ranks(run, 2):
        assert message.startswith(f"{saved} does not fit the model:\n")
        for mismatch in mismatches:
            assert mismatch in message


# ---- what killed runs leave


RUN_BEGAN = time.time()


def make(directory: Path, content: str, run_began: float = RUN_BEGAN) -> None:
    begin(directory, run_began)
    unfinished = directory.parent / ".unfinished" / directory.name
    files = write_file(unfinished / "content", lambda file: file.write(content.encode()))
    write_manifest(unfinished, files)
    publish(directory)


def content_of(directory: Path) -> str:
    path = located(directory)
    assert is_whole(path)
    return (path / "content").read_text()


def killed_at_call(number: int, function) -> bool:
    """Run ``function`` in a process that is killed at its ``number``-th call on files; whether it made so many."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(change):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **kwargs)

            return call

        for name in ("mkdir", "rename", "unlink", "rmdir", "open", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replacing"])
def test_killed_at_any_call_either_the_old_or_the_new_one_is_there(tmp_path, exists):
    found = set()
    for number in range(1, 100):
        folder = tmp_path / str(number)
        path = folder / "last.ckpt"
        make(folder / "other.ckpt", "other")
        if exists:
            make(path, "old")
        killed = killed_at_call(number, lambda path=path: make(path, "new"))
        newest = newest_whole([folder / "*.ckpt"])
        found.add(content_of(newest))
        if newest.name != "other.ckpt":
            assert content_of(path) == content_of(newest)
        make(path, "newer")
        assert content_of(path) == "newer"
        # of an earlier run, not of this one: the process that was killed has the same start
        assert {entry.name for entry in folder.iterdir()} == {"last.ckpt", "other.ckpt"}
        if not killed:
            break
    assert number > 5
    assert found == ({"old", "new"} if exists else {"other", "new"})


def test_a_checkpoint_killed_while_it_is_removed_is_not_found(tmp_path):
    for number in range(1, 100):
        path = tmp_path / str(number) / "last.ckpt"
        make(path, "old")
        if not killed_at_call(number, lambda path=path: remove(path)):
            break
        assert newest_whole([path.parent / "*.ckpt"]) in (path, None)
    assert not path.exists()
    assert number > 2


def test_leftovers_of_earlier_runs_are_cleaned_up_and_others_are_not(tmp_path):
    leftovers = tmp_path / ".unfinished"
    for name in ("step=1.ckpt", "step=2.ckpt"):
        (leftovers / name).mkdir(parents=True)
    os.utime(leftovers / "step=1.ckpt", (0, 0))
    make(tmp_path / "step=3.ckpt", "new")
    assert {path.name for path in tmp_path.iterdir()} == {".unfinished", "step=3.ckpt"}
    assert {path.name for path in leftovers.iterdir()} == {"step=2.ckpt"}
    # by the next run they are, however soon it begins
    make(tmp_path / "step=4.ckpt", "newer", time.time())
    assert {path.name for path in tmp_path.iterdir()} == {"step=3.ckpt", "step=4.ckpt"}


def test_the_newest_whole_one_is_found(tmp_path):
    for name in ("a.ckpt", "b.ckpt", "c.ckpt"):
        make(tmp_path / name, name)
    (tmp_path / "d.ckpt").mkdir()
    assert newest_whole([tmp_path / "*.ckpt"]) == tmp_path / "c.ckpt"
    truncate(tmp_path / "c.ckpt" / "content")
    assert newest_whole([tmp_path / "*.ckpt"]) == tmp_path / "b.ckpt"
    truncate(tmp_path / "b.ckpt" / MANIFEST)
    assert newest_whole([tmp_path / "*.ckpt"]) == tmp_path / "a.ckpt"
    (tmp_path / "a.ckpt" / "content").unlink()
    assert newest_whole([tmp_path / "*.ckpt"]) is None
    assert json.loads((tmp_path / "c.ckpt" / MANIFEST).read_text())["files"].keys() == {"content"}


@pytest.mark.parametrize("inside", ["nested/notes.txt", None], ids=["folder", "file"])
def test_what_is_no_checkpoint_is_not_replaced(tmp_path, inside):
    path = tmp_path / ("runs" if inside else "last.ckpt")
    notes = path / inside if inside else path
    notes.parent.mkdir(parents=True, exist_ok=True)
    notes.write_text("kept")
    with pytest.raises(SaveError, match="no checkpoint has this name"):
        make(path, "new")
    assert notes.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*none.ckpt"):
        Checkpoint(tmp_path / "none.ckpt")


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    make(tmp_path / "last.ckpt", "new")
    assert content_of(tmp_path / "last.ckpt") == "new"
