"""Reads the files that W&B writes offline, which newer versions of its package have no Python reader for."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEAD = 7
_BLOCK = 32768
_FULL, _LAST = 1, 4


def wandb_run(path: Path) -> tuple[Any, list[dict[str, Any]]]:
    """What one ``.wandb`` file says: of the run, and its history, a dictionary a row."""
    from wandb.proto import wandb_internal_pb2

    run, history = None, []
    for data in _chunks(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
        elif record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return run, history


def _chunks(data: bytes) -> Iterator[bytes]:
    """The records after W&B's head: a LevelDB log, see github.com/google/leveldb/blob/main/doc/log_format.md."""
    assert data.startswith(b":W&B"), data[:_HEAD]
    at, joined = _HEAD, b""
    while at + _HEAD <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:  # too little for a record's head: the rest of a block is empty
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        joined += data[at + _HEAD : at + _HEAD + length]
        at += _HEAD + length
        if kind in (_FULL, _LAST):
            yield joined
            joined = b""
