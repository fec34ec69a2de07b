"""Write checkpoints: every rank its own shards, at once or in the background, published when all have succeeded."""

import io
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch.distributed.distributed_c10d import _get_default_store
from torch.serialization import get_unsafe_globals_in_checkpoint

from mimo_strategy.checkpoint import directory as directories
from mimo_strategy.checkpoint.errors import SaveError
from mimo_strategy.checkpoint.loading import LIGHTNING_STATE
from mimo_strategy.checkpoint.manifest import Files, write_file, write_manifest
from mimo_strategy.checkpoint.shard_file import ShardFile, ShardFileStrategy, write_index

OnFailure = Literal["raise", "warn"]

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints one after another, through a process group of its own over gloo.

    Creating, saving, draining and closing are collective over the world. In the background a checkpoint is copied
    first, into buffers that are kept for the next one, and written by a thread while training goes on.

    Args:
        in_background: write while training goes on; one checkpoint at a time, the next one waits for it.
        on_failure: what a checkpoint that could not be written does: ``raise`` or ``warn``. Either way no earlier
            checkpoint is removed until a later one has been written.
        timeout: after which a rank gives up on the others.
    """

    def __init__(self, *, in_background: bool, on_failure: OnFailure, timeout: timedelta) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        # it connects ranks pair by pair: none must leave before all have
        dist.barrier(self._group)
        self._run_began = time.time()
        self._on_failure = on_failure
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._pending: Future | None = None
        self._staged: dict[tuple, torch.Tensor] = {}
        self._is_first = dist.get_rank() == 0
        self._num_meetings = 0
        self._last_failed = False
        self._unwanted: list[Path] = []

    def save(self, directory: Path, shards: Sequence[ShardedTensor], lightning_state: dict[str, Any]) -> None:
        """Write a checkpoint, which appears under its name when it is complete, in place of one that was there.

        Args:
            directory: the checkpoint.
            shards: this rank's.
            lightning_state: the rest; rank 0's counts.

        Raises:
            SaveError: on every rank, if it (or, in the background, the one before) could not be written.
        """
        self.drain()
        lightning = _serialized(lightning_state) if self._is_first else None
        shards = [shard for shard in shards if is_main_replica(shard.replica_id)]
        if self._thread is None:
            with self._reporting_failure():
                self._write(directory, shards, lightning)
        else:
            self._pending = self._thread.submit(self._write, directory, self._copied(shards), lightning)

    def remove(self, path: Path) -> None:
        """Remove a checkpoint or a link to one, after what is still being written has succeeded."""
        if not self._is_first:
            return
        if self._thread is None:
            self._remove(path)
        else:
            self._thread.submit(self._remove, path)

    def drain(self) -> None:
        """Wait for what is being written.

        Raises:
            SaveError: on every rank, if it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._reporting_failure():
                pending.result()

    def meet(self, timeout: timedelta) -> None:
        """Wait for all ranks; where one has failed, others may never come.

        Raises:
            SaveError: if they do not come in time.
        """
        self.drain()
        # through the store: a barrier that is given up would keep its group busy
        self._num_meetings += 1
        ranks = range(dist.get_world_size())
        here = dist.PrefixStore(f"checkpoint-{self._group.group_name}-{self._num_meetings}", _get_default_store())
        here.set(str(dist.get_rank()), "")
        with suppress(RuntimeError):
            here.wait([str(rank) for rank in ranks], timeout)
        missing = [rank for rank in ranks if not here.check([str(rank)])]
        if missing:
            # not while another error is handled: what the ranks failed of is to be seen with it
            raise SaveError(
                f"rank {dist.get_rank()} saves no checkpoint: ranks {missing} have not come to save it within {timeout}"
            )

    def close(self, *, interrupted: bool = False) -> None:
        """Wait for what is being written, then give up thread, group and buffers.

        Args:
            interrupted: whether other ranks may not come here.
        """
        try:
            self.drain()
        except SaveError as error:
            if not interrupted:
                raise
            _log.warning("%s", error)
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._staged.clear()
            if not interrupted:
                dist.barrier(self._group)
            dist.destroy_process_group(self._group)

    @contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            if self._on_failure == "raise":
                raise
            if self._is_first:
                _log.warning("%s\nTraining goes on without this checkpoint.", error)

    # ---- in the background, if wanted

    def _write(self, directory: Path, shards: Sequence[ShardedTensor], lightning: bytes | Exception | None) -> None:
        try:
            self._agree(self._begin, directory, lightning)
            written = self._attempt(_write_shards, directories.unfinished(directory), shards)
            gathered = [None] * dist.get_world_size() if self._is_first else None
            dist.gather_object(written, gathered, dst=0, group=self._group)
            self._agree(self._finish, directory, gathered, lightning)
        except SaveError as error:
            self._last_failed = True
            raise SaveError(f"{directory} could not be saved: {error}") from None
        except RuntimeError as error:
            # of the process group: a rank has gone
            self._last_failed = True
            raise SaveError(
                f"{directory} could not be saved: rank {dist.get_rank()} lost the others: {error}"
            ) from None
        self._last_failed = False
        if self._is_first:
            unwanted, self._unwanted = self._unwanted, []
            for path in unwanted:
                if path != directory:
                    self._remove(path)

    def _begin(self, directory: Path, lightning: bytes | Exception) -> None:
        if isinstance(lightning, Exception):
            raise lightning
        directories.begin(directory, self._run_began)

    def _finish(self, directory: Path, written: list[ShardFile | Exception], lightning: bytes) -> None:
        unfinished = directories.unfinished(directory)
        try:
            failed = [
                f"rank {rank}: {_say(error)}" for rank, error in enumerate(written) if isinstance(error, Exception)
            ]
            if failed:
                raise SaveError("; ".join(failed))
            files = {}
            for of_rank in written:
                files |= of_rank.files
            files |= write_index(unfinished, written)
            files |= write_file(unfinished / LIGHTNING_STATE, lambda file: file.write(lightning))
            files |= _write_config(unfinished)
            write_manifest(unfinished, files)
            directories.publish(directory)
        except Exception:
            self._attempt(directories.abandon, directory)
            raise

    def _agree(self, function, *args) -> None:
        """Run ``function(*args)`` on rank 0; every rank raises if it fails."""
        outcome = [None]
        if self._is_first:
            result = self._attempt(function, *args)
            outcome = [_say(result) if isinstance(result, Exception) else None]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise SaveError(outcome[0])

    def _attempt(self, function, *args) -> Any:
        """What ``function(*args)`` returns or raises."""
        try:
            return function(*args)
        except Exception as error:
            return error

    def _remove(self, path: Path) -> None:
        if self._last_failed:
            self._unwanted.append(path)
        else:
            error = self._attempt(directories.remove, path)
            if error is not None:
                _log.warning("%s could not be removed: %s", path, error)

    # ---- copies

    def _copied(self, shards: Sequence[ShardedTensor]) -> list[ShardedTensor]:
        """The shards with copies of their data, in buffers of the host that are kept from save to save."""
        staged, self._staged = self._staged, {}
        copied = []
        for shard in shards:
            key = (shard.key, shard.global_offset, shard.local_shape, shard.dtype)
            buffer = staged.pop(key, None)
            if buffer is None:
                buffer = torch.empty(shard.local_shape, dtype=shard.dtype, pin_memory=shard.data.is_cuda)
            buffer.copy_(shard.data.detach(), non_blocking=True)
            self._staged[key] = buffer
            copied.append(replace(shard, data=buffer))
        if any(shard.data.is_cuda for shard in shards):
            torch.cuda.current_stream().synchronize()
        return copied


def _write_shards(unfinished: Path, shards: Sequence[ShardedTensor]) -> ShardFile:
    strategy = ShardFileStrategy()
    # The rank's own file only; what upstream would do next is done by CheckpointWriter, in its own process group.
    dist_checkpointing.save(
        {str(number): shard for number, shard in enumerate(shards)},
        str(unfinished),
        strategy,
        validate_access_integrity=False,
        async_sharded_save=True,
    )
    return strategy.written


def _serialized(lightning_state: dict[str, Any]) -> bytes | Exception:
    """The state as a file that loads without running code, or why it would not."""
    stream = io.BytesIO()
    try:
        torch.save(lightning_state, stream)
    except Exception as error:
        return error
    stream.seek(0)
    unsafe = get_unsafe_globals_in_checkpoint(stream)
    if unsafe:
        return TypeError(
            "what Lightning keeps (hyper-parameters, callbacks, ...) must load without running code, but it holds "
            f"{', '.join(sorted(unsafe))}; keep plain values and tensors, or allow the classes, before saving and "
            "loading, by torch.serialization.add_safe_globals"
        )
    return stream.getvalue()


def _write_config(unfinished: Path) -> Files:
    config = json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode()
    return write_file(unfinished / CONFIG_FNAME, lambda file: file.write(config))


def _say(error: Exception) -> str:
    return str(error) if isinstance(error, SaveError) else f"{type(error).__name__}: {error}"
