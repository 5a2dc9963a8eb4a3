"""Unpack archives of images into a cache, once for any number of processes at a time."""

import hashlib
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from filelock import FileLock

from odconv.system.files import cache_folder

SUFFIXES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".zip")


def find_archive(folder: Path, name: str) -> Path | None:
    """Return the archive called `name` plus one of SUFFIXES, or None."""
    return next((path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)


def unpack(archive: Path, cache: str | Path | None = None) -> Path:
    """Unpack an archive, tar or zip, into a folder of the cache, unless that was done before; return the folder.

    The folder appears under its name only when it is complete, and an archive that was changed gets another folder. It
    is a ValueError if the archive is damaged or holds a file that would land outside, an OSError if the cache cannot be
    written.
    """
    root, archive = cache_folder(cache), archive.resolve()
    stat = archive.stat()
    key = hashlib.sha256(f"{archive}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    target = root / f"{archive.parent.name}-{archive.name.split('.')[0]}-{key}"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # the others wait instead of unpacking too
            if not target.is_dir():
                _unpack_whole(archive, target)
    except OSError as error:
        raise OSError(
            f"cannot unpack {archive} into the cache folder {root}: {error}; name another one with $ODCONV_CACHE"
        ) from error
    return target


def _unpack_whole(archive: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}-", ignore_cleanup_errors=True) as folder:
        partial = Path(folder, "partial")
        partial.mkdir()
        try:
            _extract(archive, partial)
        except Exception as error:  # tarfile, zipfile and the decompressors each raise their own
            if isinstance(error, OSError) and error.errno:  # the file system's; gzip's and bz2's have no number
                raise
            raise ValueError(f"the archive {archive} is damaged or unsafe: {error}") from error
        try:
            partial.rename(target)
        except OSError:
            # where locks do not work (some network file systems), another process may have been faster
            if not target.is_dir():
                raise


def _extract(archive: Path, folder: Path) -> None:
    if archive.suffix != ".zip":
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # refuses links and names that lead outside
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile does not miss the block of zeros that ends an archive
                raise ValueError("it is cut short")
        return
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
                raise ValueError(f"{name!r} would land outside the folder")
        file.extractall(folder)
