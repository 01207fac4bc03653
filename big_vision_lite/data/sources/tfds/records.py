"""Reads TFRecord and ArrayRecord files by random access, without TensorFlow.

A TFRecord file is a sequence of (u64 length, u32 crc, bytes, u32 crc). It is read with
`pread`, not `mmap`: other threads run on while the disk works, and a broken disk
raises an error instead of a signal.
"""

import array
import bisect
import contextlib
import importlib
import itertools
import os
import resource
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

# Pauses between attempts, long enough for a network disk to come back.
RETRY_SECONDS = (0.1, 0.5, 2.0)
# What surrounds the bytes of a record in a TFRecord file.
HEADER_BYTES, FOOTER_BYTES = 12, 4


def with_retries(read: Callable[[], T], what: str) -> T:
    """Returns `read()`, retried after I/O errors; at last an OSError names `what`."""
    for wait in (*RETRY_SECONDS, None):
        try:
            return read()
        except OSError as error:
            if wait is None:
                raise OSError(
                    error.errno,
                    f"cannot read {what} (tried {len(RETRY_SECONDS) + 1} times): "
                    f"{error.strerror or error}",
                ) from error
            time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


class TFRecordFile:
    """The records of one TFRecord file; indexed when the first one is asked for."""

    def __init__(self, path: Path, length: int):
        self.path, self.length = path, length
        self._lock = threading.Lock()
        self._file: int | None = None
        self._starts = np.zeros(0, np.int64)

    def open(self) -> int:
        """Returns the file descriptor; the first call opens and indexes the file.

        Raises:
            ValueError: the file does not hold `length` records.
        """
        with self._lock:
            if self._file is None:
                file = with_retries(
                    lambda: os.open(self.path, os.O_RDONLY), str(self.path)
                )
                weakref.finalize(self, os.close, file)
                self._starts = self._index(file)
                self._file = file
        return self._file

    def read(self, index: int) -> bytes:
        file = self.open()
        start, following = self._starts[index : index + 2].tolist()
        size = following - start - HEADER_BYTES - FOOTER_BYTES
        return with_retries(
            lambda: _pread(file, size, start + HEADER_BYTES),
            f"record {index} of {self.path}",
        )

    def _index(self, file: int) -> np.ndarray:
        """Returns the offset in bytes of every record, and of the end of the last."""
        end = os.fstat(file).st_size
        # Small records are scanned in large blocks; large ones are skipped, so that
        # indexing does not read the whole file.
        block_bytes = 1 << 20 if end < 8192 * max(self.length, 1) else 4096
        block, block_start = b"", 0
        starts, position = array.array("q", [0]), 0
        while position + HEADER_BYTES <= end:
            at = position - block_start
            if at + HEADER_BYTES > len(block):
                block = with_retries(
                    lambda start=position: os.pread(file, block_bytes, start),
                    str(self.path),
                )
                block_start, at = position, 0
            size = int.from_bytes(block[at : at + 8], "little")
            position += HEADER_BYTES + size + FOOTER_BYTES
            if position > end:
                break
            starts.append(position)
        if starts[-1] != end or len(starts) != self.length + 1:
            raise damaged(
                self.path,
                f"{len(starts) - 1} whole records and {end - starts[-1]} more bytes",
                self.length,
            )
        return np.frombuffer(starts, np.int64)


class ArrayRecordFile:
    """The records of one ArrayRecord file; opened when the first one is asked for.

    One record costs 7 us by `seek` and `read`; by `read([index])` it costs 600 us in a
    file of 60,000 records, in proportion to their number (array_record 0.8.6). `seek`
    moves a reader, so each thread takes a reader of its own and gives it back: eight
    threads that share one take 2 to 4 times the CPU time for a small record.
    """

    def __init__(self, path: Path, length: int):
        self.path, self.length = path, length
        self._idle: list[Any] = []

    def open(self) -> None:
        """Opens the file; raises ValueError when it does not hold `length` records."""
        self._idle.append(with_retries(self._take, str(self.path)))

    def read(self, index: int) -> bytes:
        return with_retries(lambda: self._read(index), f"record {index} of {self.path}")

    def _read(self, index: int) -> bytes:
        reader = self._take()
        try:
            reader.seek(index)
            record = reader.read()
        except RuntimeError as error:
            # A chunk is damaged; the reader keeps the error, so it is dropped.
            raise OSError(None, str(error)) from error
        self._idle.append(reader)
        return record

    def _take(self) -> Any:
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        # Imported here, because the digits and image folders do not need it.
        module: Any = importlib.import_module("array_record.python.array_record_module")
        os.stat(self.path)  # raises OSError
        reader = module.ArrayRecordReader(
            str(self.path), "readahead_buffer_size:0,max_parallelism:0"
        )
        count = reader.num_records() if reader.ok() else 0
        if not reader.ok() or count != self.length:
            raise damaged(self.path, f"{count} readable records", self.length)
        return reader


RecordFile = TFRecordFile | ArrayRecordFile


class Records:
    """One sequence of records that joins ranges of several files."""

    def __init__(self, parts: Sequence[tuple[RecordFile, int, int]]):
        """Joins `parts`: (file, first record, number of records)."""
        self._parts = [part for part in parts if part[2] > 0]
        counts = (count for _, _, count in self._parts)
        self._ends = list(itertools.accumulate(counts))
        _allow_open_files(len(self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        file, record = self.locate(index)
        return file.read(record)

    def locate(self, index: int) -> tuple[RecordFile, int]:
        """Returns the file that holds record `index`, and its number in that file."""
        part = bisect.bisect_right(self._ends, index)
        file, first, count = self._parts[part]
        return file, first + index - (self._ends[part] - count)


def damaged(path: Path, found: str, expected: int) -> ValueError:
    return ValueError(
        f"{path} is damaged or was copied only in part: dataset_info.json counts "
        f"{expected} records, the file holds {found}. Copy or prepare it again."
    )


def _pread(file: int, size: int, start: int) -> bytes:
    data = os.pread(file, size, start)
    if len(data) < size:
        raise OSError(None, "the file has become shorter")
    return data


def _allow_open_files(count: int) -> None:
    """Raises the soft limit of open files, which ImageNet's many shards exceed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
