"""A run's folder: ``<storage>/<name>/{config.yaml, env.json, metrics.jsonl, checkpoints/, tb/, ...}``.

On a path (local or NFS) the folder is written in place. On an object store it is written to a temporary folder of this
process and uploaded file by file; readers download what they need.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError, model_validator

from densenet_dist.environment import unique_suffix
from densenet_dist.errors import DamagedRecord, StorageError
from densenet_dist.object_store import explain_storage_error, open_filesystem, temporary_folder

if TYPE_CHECKING:
    from pyarrow import fs

CONFIG_FILE = "config.yaml"
ENV_FILE = "env.json"
CLASSES_FILE = "classes.json"
SPLIT_FILE = "split.json.gz"  # 4.4 MB for the 1.3 million names of ImageNet, which take 51 MB uncompressed
METRICS_FILE = "metrics.jsonl"
PAGE_FILE = "report.html"
SUMMARY_FILE = "summary.json"
WEIGHTS_FILE = "initial.safetensors"
TEST_RESULTS_FILE = "test_results.json"
TRIAL_FILE = "trial.json"
TENSORBOARD_FOLDER = "tb"
CHECKPOINTS_FOLDER = "checkpoints"
_MAX_UNPACKED = 1 << 30  # bytes: a small .gz file can unpack to any size
_OTHER_STORAGE = "choose another place with storage=PATH_OR_URI"
_RESUME_LATER = "everything saved so far is intact: fix the problem, then resume with --resume"
_RESTORE_COPY = "delete it, or restore a copy"
T = TypeVar("T")


_Count: TypeAlias = Annotated[int, Field(ge=0, le=10**12)]
_Number: TypeAlias = Annotated[float, AfterValidator(lambda value: value if abs(value) < 1e15 else math.nan)]
"""Larger numbers become NaN: they cannot be results of a run, and cannot be plotted."""


class _Summary(BaseModel, extra="allow"):
    """summary.json."""

    status: str
    epochs: _Count
    trained_epochs: _Number | None = None
    """The passes over the data, with a fraction if the time was over; older versions did not write it."""
    global_step: _Count
    train_seconds: _Number
    best: dict[str, _Count | _Number]
    loss: _Number = Field(alias="test/loss")
    top1: _Number = Field(alias="test/top1")
    top5: _Number | None = Field(None, alias="test/top5")
    images: _Count | None = Field(None, alias="test/images")


class _Line(BaseModel, extra="allow"):
    """A line of metrics.jsonl: an epoch's, the test's, or, without ``epoch``, that of ``log.every_steps`` steps."""

    __pydantic_extra__: dict[str, _Number]
    epoch: _Count | None = None
    global_step: _Count
    slowest_host: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> _Line:
        splits = {key.partition("/")[0] for key in self.__pydantic_extra__} & {"train", "val", "test"}
        splits |= {"step"} if self.epoch is None else set()
        needed = {f"{split}/{name}" for split in splits for name in ("loss", "top1")}
        if missing := needed - self.__pydantic_extra__.keys():
            raise ValueError(f"{min(missing)} is missing")
        return self


class RunFolder:
    """The folder to which one run writes everything.

    All methods raise StorageError if the folder cannot be read or written.

    Args:
        storage: a path, or the URI of an object store (see `densenet_dist.object_store`).
        name: the run's name; the folder is ``storage/name``.

    Attributes:
        path: the local folder to write to: the run's folder, or a temporary one that is uploaded.
        uri: the folder as shown in messages: a path or a URI.
        location: the folder as a command-line argument: on an object store, the URI with its query parameters.
        guard: called before checkpoints and records are written; raises StorageError if the job has lost its lease.
    """

    def __init__(self, storage: str, name: str) -> None:
        self.storage, self.name = storage, name
        self.guard: Callable[[], None] = lambda: None
        self._remote: fs.FileSystem | None = None
        if "://" in storage:
            self.location = join_location(storage, name)
            self.uri = self.location.partition("?")[0]
            self._remote, self._prefix = open_filesystem(self.location)
            self.path = temporary_folder()
        else:
            self.path = Path(storage).absolute() / name
            self.uri = self.location = str(self.path)

    def create(self) -> None:
        """Create the folder and check that it is writable."""
        probe = ".write-test"
        with self._errors("cannot be written", remedy=_OTHER_STORAGE):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / probe).write_text("ok")
            self._upload(probe)
            self._delete(probe)

    def exists(self, relative: str = CONFIG_FILE) -> bool:
        """Return whether a file or folder exists; by default, whether a run has started here."""
        with self._errors("cannot be read", relative):
            if self._remote is None:
                return (self.path / relative).exists()
            info: Any = self._remote.get_file_info(f"{self._prefix}/{relative}")
            return bool(info.type.value)

    def names(self, relative: str) -> set[str]:
        """Return the names in a folder of the run, local and on the object store; none if it is missing."""
        local = self.path / relative
        with self._errors("cannot be read", relative):
            found = set(os.listdir(local)) if local.is_dir() else set()
            if self._remote is not None:
                from pyarrow import fs

                selector = fs.FileSelector(f"{self._prefix}/{relative}", allow_not_found=True)
                found |= {info.base_name for info in self._remote.get_file_info(selector)}
        return found

    def fetch(self, relative: str) -> Path:
        """Return the local path of a file or folder of the run, after downloading it from an object store.

        Raises:
            DamagedRecord: it is or contains something other than files and folders, such as a pipe.
        """
        local = self.path / relative
        with self._errors("cannot be read", relative):
            if self._remote is not None:
                from pyarrow import fs

                source = f"{self._prefix}/{relative}"
                if self._remote.get_file_info(source).type == fs.FileType.Directory:
                    local.mkdir(parents=True, exist_ok=True)
                local.parent.mkdir(parents=True, exist_ok=True)
                fs.copy_files(source, str(local), self._remote, fs.LocalFileSystem())
            for path in (local, *local.rglob("*")):
                if path.exists() and not (path.is_file() or path.is_dir()):
                    raise DamagedRecord(f"{path} is not a regular file\n  {_RESTORE_COPY}")
        return local

    def publish(self, *relative: str) -> None:
        """Upload files or folders to an object store; on a path they are in place already."""
        for item in relative:
            with self._errors("cannot be written", item):
                self._upload(item)

    def remove(self, relative: str) -> None:
        """Delete a file or folder of the run, local and on the object store; it may be missing."""
        with self._errors("cannot be written", relative):
            self._delete(relative)

    def _upload(self, relative: str) -> None:
        source = self.path / relative
        if self._remote is None or not source.exists():
            return
        from pyarrow import fs

        target = f"{self._prefix}/{relative}"
        self._remote.create_dir(target if source.is_dir() else target.rpartition("/")[0], recursive=True)
        fs.copy_files(str(source), target, fs.LocalFileSystem(), self._remote)

    def _delete(self, relative: str) -> None:
        local = self.path / relative
        if local.is_dir():
            shutil.rmtree(local)
        else:
            local.unlink(missing_ok=True)
        if self._remote is not None:
            place = f"{self._prefix}/{relative}"
            delete = {"Directory": self._remote.delete_dir, "File": self._remote.delete_file}
            kind = self._remote.get_file_info(place).type.name
            if kind in delete:
                delete[kind](place)

    def write(self, relative: str, content: str | bytes) -> None:
        """Write and publish a file (.gz: compressed) atomically: readers see the old content or the new."""
        content = content.encode() if isinstance(content, str) else content
        with self._errors("cannot be written", relative):
            target = self.path / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.{unique_suffix()}")
            with open(beside, "wb") as file:
                file.write(gzip.compress(content, mtime=0) if relative.endswith(".gz") else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
            sync(target.parent)
        self.publish(relative)

    def append(self, relative: str, text: str) -> None:
        """Append to a text file in place; `publish` uploads it."""
        with self._errors("cannot be written", relative), open(self.path / relative, "a", encoding="utf-8") as file:
            file.write(text)

    def read(self, relative: str, kind: type[T], *, strict: bool = True, remedy: str = _RESTORE_COPY) -> T | None:
        """Read a JSON file of the run.

        Args:
            relative: path of the file in the folder.
            kind: type of its content: a dataclass, or another type that pydantic supports.
            strict: whether a damaged file raises an error; otherwise it is treated as missing.
            remedy: what to do about a damaged file, for the message.

        Returns:
            The content, or None if there is no file.

        Raises:
            DamagedRecord: the file is truncated, of another type, or not a regular file.
        """
        if not self.exists(relative):
            return None
        try:
            return TypeAdapter(kind).validate_python(json.loads(self._content(relative)))
        except (DamagedRecord, ValueError, TypeError, OverflowError, RecursionError) as error:
            if not strict:
                return None
            if isinstance(error, DamagedRecord):
                raise
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise DamagedRecord(f"{self.uri}/{relative} is damaged: {problem}\n  {remedy}") from error

    def read_json(self, relative: str) -> dict[str, Any]:
        """Read the object in a JSON file; empty if there is none. Errors are those of `read`."""
        return self.read(relative, dict[str, Any]) or {}

    def update_json(self, relative: str, **values: Any) -> None:
        """Set keys of the object in a JSON file. Errors are those of `read` and `write`."""
        self.write(relative, json.dumps(self.read_json(relative) | values, indent=1) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """Read summary.json; empty while the run has not finished. Errors are those of `read`."""
        found = self.read(SUMMARY_FILE, _Summary)
        return {} if found is None else found.model_dump(by_alias=True, exclude_none=True)

    def read_records(self, *, steps: bool = False) -> list[dict[str, Any]]:
        """Read the records of metrics.jsonl, in order; damaged lines are skipped.

        With `steps` those of ``log.every_steps`` are included, which have no ``epoch``.

        Raises:
            DamagedRecord: no line is a record.
        """
        if not self.exists(METRICS_FILE):
            return []
        records = []
        lines = self._content(METRICS_FILE).splitlines()
        for line in lines:
            with suppress(ValueError, OverflowError, RecursionError):
                records.append(_Line.model_validate(json.loads(line)).model_dump(exclude_none=True))
        if not records and len(lines) > 1:  # a single line may have been torn by a crash
            raise DamagedRecord(f"{self.uri}/{METRICS_FILE} is damaged: no line is a record\n  {_RESTORE_COPY}")
        return [record for record in records if steps or "epoch" in record]

    def _content(self, relative: str) -> bytes:
        path = self.fetch(relative)
        with self._errors("cannot be read", relative):
            content = path.read_bytes()
        if path.suffix != ".gz":
            return content
        try:
            with gzip.open(BytesIO(content)) as file:
                return file.read(_MAX_UNPACKED)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(error) from error

    @contextmanager
    def _errors(self, what: str, relative: str = "", remedy: str = _RESUME_LATER) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # pyarrow's errors of storage are OSErrors too
            place = f"{self.uri}/{relative}" if relative else f"the run folder {self.uri}"
            raise StorageError(f"{place} {what}: {explain_storage_error(error)}\n  {remedy}") from error


def open_run(location: str | Path, file: str = CONFIG_FILE, kind: str = "run") -> RunFolder:
    """Open the folder of an existing run or sweep.

    Args:
        location: its path or URI, or its name under ``runs/``.
        file: a file that every such folder has.
        kind: run or sweep, for the error.

    Raises:
        StorageError: there is none.
    """
    text = str(location)
    if "://" not in text:
        path = Path(os.path.expanduser(text))
        if not os.path.exists(path / file) and os.path.exists(Path("runs") / path / file):
            path = Path("runs") / path
        text = str(path.absolute())
    folder = RunFolder(*split_location(text))
    if not folder.exists(file):
        raise StorageError(f"there is no {kind} at {folder.uri}: it has no {file}")
    return folder


def split_location(location: str) -> tuple[str, str]:
    """Split the path or URI of a folder into the arguments of `RunFolder`: storage and name."""
    if "://" not in location:
        return os.path.split(location.rstrip("/"))
    base, question, query = location.partition("?")
    parent, _, name = base.rstrip("/").rpartition("/")
    return f"{parent}{question}{query}", name


def join_location(storage: str, name: str) -> str:
    """The reverse of `split_location`."""
    if "://" not in storage:
        return os.path.join(storage, name)
    base, question, query = storage.partition("?")
    return f"{base.rstrip('/')}/{name}{question}{query}"


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
