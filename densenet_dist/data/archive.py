"""Where the files of a CIFAR set come from: found, extracted from the official archive, or downloaded.

What an archive puts on disk is decided here and not by the archive: regular files with the names, sizes and SHA-256 of
the official ones, nothing else. They are written aside, and the folder appears in one rename when all of them are there
and right. A lock lets one process do it while others wait; those who find the folder ready touch nothing.
"""

import gzip
import shlex
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from densenet_dist.data import cifar
from densenet_dist.data.cifar import CifarSpec
from densenet_dist.data.download import fetch
from densenet_dist.errors import DataError, StorageError
from densenet_dist.run_folder import sync

MAX_ARCHIVE_BYTES = 256 << 20  # the official ones have 170 MB
_MAX_EXTRACTED_BYTES = 256 << 20  # and hold 184 MB


def obtain(spec: CifarSpec, root: Path, *, download: bool, url: str | None, progress: bool) -> Path:
    """The folder that holds an extracted data set, made first if need be; `cifar.read_folder` checks what is in it.

    Looked for are `root/<folder>`, the files in `root` itself and `root/<archive>`, in this order; then it is
    downloaded.

    Raises:
        ConfigError: `url` is no address that can be fetched.
        DataError: it is not there and may not be downloaded, the download failed, or the archive is damaged or unsafe.
        StorageError: `root` cannot be written.
    """
    folder = _find(spec, root)
    if folder is not None:
        return folder
    if not download and not (root / spec.archive).is_file():
        raise DataError(_not_found(spec, root))
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = root / f".{spec.name}.lock"
        lock.touch()  # where no file can be made FileLock may wait for ever: fail here
        with FileLock(lock):
            # Whoever had the lock before us may have made the folder.
            folder = _find(spec, root)
            return folder or make(spec, root, url=url, mend=_ways_to_get(spec, root), progress=progress)
    except OSError as error:
        raise StorageError(
            f"cannot store the data set in {root}: {error}; name a folder that can be written: data.root=..."
        ) from error


def _find(spec: CifarSpec, root: Path) -> Path | None:
    """The folder with the extracted data set, or None."""
    if (root / spec.folder).is_dir():
        return root / spec.folder
    if any((root / name).is_file() for name in (*spec.train, spec.test)):
        return root
    cifar.refuse_other(spec, root)
    return None


def _not_found(spec: CifarSpec, root: Path) -> str:
    """Say where the set was looked for in vain."""
    if not root.exists():
        return f"{spec.title} is not there: {root} does not exist; {_ways_to_get(spec, root)}"
    looked = f"neither {root / spec.folder} nor {root / spec.archive}, nor {spec.test} in {root}"
    return f"{spec.title} is not in {root}: there is {looked}; {_ways_to_get(spec, root)}"


def _ways_to_get(spec: CifarSpec, root: Path) -> str:
    """Say how to get the set, and which other one lies in its place."""
    rival, hint = cifar.other(spec), ""
    folder, archive = (name.replace("-binary", "-python") for name in (spec.folder, spec.archive))
    pickled = [name for name in (folder.replace("-bin", "-py"), archive) if (root / name).exists()]
    if any((root / name).exists() for name in (rival.folder, rival.archive)):
        hint = f"there is {rival.title} (data.name={rival.name}); "
    elif pickled:
        hint = f"{pickled[0]} is the pickled version, which is never read: the binary version is needed; "
    return (
        f"{hint}run `densenet-dist data prepare {spec.name} --root {shlex.quote(str(root))}`, "
        f"put {spec.archive} from {spec.url} into {root}, or name a folder that has it: data.root=..."
    )


def make(spec: CifarSpec, root: Path, *, url: str | None, mend: str, progress: bool) -> Path:
    """Extract the archive in `root`, downloaded first if it is not there. One process at a time may do it.

    Args:
        mend: what to do if it cannot be downloaded, for messages.

    Raises:
        ConfigError, DataError: as `obtain`.
        OSError: `root` cannot be written.
    """
    archive = root / spec.archive
    if archive.is_file():
        return extract(spec, archive, root, source=str(archive), mend=cifar.remedy(spec, archive))
    partial = root / f".{spec.archive}.partial"
    try:
        url = url or spec.url
        fetch(url, partial, title=spec.title, limit=MAX_ARCHIVE_BYTES, mend=mend, progress=progress)
        folder = extract(spec, partial, root, source=url.partition("?")[0], mend=mend)
        # Only now does it get its name: a damaged download must not be found by the next run.
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)
    return folder


def extract(spec: CifarSpec, archive: Path, root: Path, *, source: str, mend: str) -> Path:
    """Extract the official files of an archive into `root/<folder>`, all of them or nothing.

    One process at a time may do it.

    Args:
        source: what to call the archive in messages.
        mend: what to do if it is damaged, for messages.

    Raises:
        DataError: it is damaged, unsafe or another one.
        OSError: `root` cannot be written.
    """
    seen = set()

    def official(tar: tarfile.TarFile, destination: Path) -> Iterator[tarfile.TarInfo]:
        """The members to extract, renamed to the official files that they are."""
        for member in tar:
            tarfile.data_filter(member, str(destination))  # refuses devices and what leads out, wanted or not
            seen.add(member.name)
            folder, _, name = member.name.partition("/")
            if folder == spec.folder and name in spec.members and member.isreg():
                yield member.replace(name=name, mtime=0, mode=0o644, deep=False)

    with appearing(root / spec.folder) as aside:
        try:
            with _BoundedGzip(archive) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
                tar.extractall(aside, official(tar, aside), filter="data")
        except tarfile.FilterError as error:
            raise DataError(
                f"{source} is not safe to extract: {error}; nothing was extracted. "
                "Delete the archive and get it from a source you trust"
            ) from error
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, RecursionError, ValueError, zlib.error) as error:
            raise DataError(f"{source} is damaged or truncated ({error}); {mend}") from error
        rival = cifar.other(spec)
        if f"{rival.folder}/{rival.test}" in seen:
            raise DataError(f"{source} looks like {rival.title}, not {spec.title}; set data.name={rival.name}")
        missing = [name for name in spec.members if not (aside / name).exists()]
        if missing:
            raise DataError(f"{source} is not the {spec.title} archive: it lacks {', '.join(missing)}; {mend}")
        for name in spec.members:
            cifar.read_member(spec, aside / name, source=f"{name} in {source}", mend=mend)
    return root / spec.folder


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write files to, which becomes `folder` in one rename when all of them are there."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    aside.mkdir()
    try:
        yield aside
        for path in (*aside.iterdir(), aside):
            sync(path)
        aside.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _BoundedGzip(gzip.GzipFile):
    """Fails past a number of bytes, and at the end: an archive of a few MB can unpack to any size, or declare any.

    `tarfile` reads all that a member declares without noticing the end, but nothing after the end of a sound archive.
    """

    _left = _MAX_EXTRACTED_BYTES

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if not data:
            raise EOFError("it ends within a member")
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError(f"it unpacks to more than {_MAX_EXTRACTED_BYTES} bytes")
        return data
