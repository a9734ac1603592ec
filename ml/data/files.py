"""Finds and opens the files of a source; local disk and remote stores go through fsspec, in one code path."""

import contextlib
import dataclasses
import hashlib
import lzma
import posixpath
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import fsspec

from ml.errors import UserError, nearest

# Metadata, in order of preference, that changes when a remote or local file is rewritten at the same size.
_VERSION_KEYS = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "updated")
_MAGIC = frozenset("*?[")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
      name: path relative to the source's root, with ``/``; the same on every machine.
      path: path inside ``filesystem``, as shown in messages.
      filesystem: the fsspec filesystem.
      size: bytes.
      version: changes when the content does (a modification time or an entity tag); empty if the store tells none.
    """

    name: str
    path: str
    filesystem: Any
    size: int
    version: str

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens for reading bytes, decompressed by the name's suffix; failures to read become `UserError`."""
        try:
            with fsspec.core.OpenFile(self.filesystem, self.path, mode="rb", compression=_compression(self.name)) as f:
                yield f
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UserError(f"{self.path}: cannot be read ({reason}): copy the file again or remove it") from error


def find_files(
    url: str, suffixes: tuple[str, ...], where: str, *, skip_directories: Iterable[str] = ()
) -> tuple[SourceFile, ...]:
    """Lists the files that ``url`` (a file, a directory or a glob) stands for, sorted by name.

    A directory is searched all the way down for names that end in ``suffixes``; hidden files and directories (a
    leading dot), linked directories and ``skip_directories`` are passed over. A file named outright is taken whatever
    its suffix.

    Args:
      url: local path or fsspec URL.
      suffixes: such as ``(".jsonl", ".jsonl.gz")``.
      where: the configuration field, for messages.
      skip_directories: directory names that are not entered.

    Raises:
      UserError: nothing is there (names the nearest sibling), nothing matches, or the store's driver is not installed.
    """
    filesystem, root = _filesystem(url, where)
    try:
        # A name may hold a bracket without being a pattern.
        if _MAGIC & set(root) and not filesystem.exists(root):
            base = _directory_before_magic(root)
            infos = _files_among(filesystem, filesystem.glob(root, detail=True).values())
            if not infos:
                raise UserError(f"{where}: no file matches {url!r}: check the pattern and the directory {base!r}")
        else:
            if not filesystem.exists(root):
                raise UserError(f"{where}: {url!r} does not exist; {_sibling_hint(filesystem, root)}")
            if filesystem.isdir(root):
                base = root
                infos = _walk(filesystem, root, suffixes, frozenset(skip_directories))
                if not infos:
                    wanted = ", ".join(suffixes)
                    raise UserError(f"{where}: no {wanted} file below {url!r}: give another directory or a glob")
            else:
                base = posixpath.dirname(root)
                infos = [filesystem.info(root)]
    except OSError as error:
        at = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise UserError(f"{where}: {url!r} cannot be listed ({at}): mend or remove what is named") from error
    files = (_source_file(filesystem, base, info) for info in infos)
    return tuple(sorted(files, key=lambda file: file.name))


def listing_fingerprint(files: Iterable[SourceFile], *, with_version: bool = True) -> str:
    """A hash of the files' names, sizes and versions: equal as long as none was touched. Reads no content."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(repr((file.name, file.size, file.version if with_version else "")).encode())
    return digest.hexdigest()


def _filesystem(url: str, where: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}.get(url.split(":")[0])
        mend = f"run `pip install {package}`" if package else str(error)
        raise UserError(f"{where}: {url!r} needs a driver that is not installed: {mend}") from error
    except ValueError as error:
        raise UserError(f"{where}: {url!r} cannot be opened ({error}): use a local path or a gs:// URL") from error


def _walk(filesystem: Any, root: str, suffixes: tuple[str, ...], skip: frozenset[str]) -> list[dict[str, Any]]:
    found = []
    for _, directories, files in filesystem.walk(root, detail=True):
        for name in [name for name in directories if name in skip or name.startswith(".")]:
            del directories[name]  # the walk does not enter what is taken out
        matching = [info for name, info in files.items() if name.endswith(suffixes) and not name.startswith(".")]
        found += _files_among(filesystem, matching)
    return found


def _files_among(filesystem: Any, infos: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops what is no file, and puts a linked file's own size and time in place of the link's."""
    resolved = (filesystem.info(info["name"]) if info.get("islink") else info for info in infos)
    return [info for info in resolved if info["type"] == "file"]


def _source_file(filesystem: Any, base: str, info: dict[str, Any]) -> SourceFile:
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    name = posixpath.relpath(info["name"], base or "/") if base else info["name"]
    return SourceFile(name, info["name"], filesystem, int(info["size"] or 0), version)


def _directory_before_magic(pattern: str) -> str:
    head = pattern[: min(pattern.index(char) for char in _MAGIC if char in pattern)]
    return posixpath.dirname(head)


def _sibling_hint(filesystem: Any, path: str) -> str:
    parent = posixpath.dirname(path)
    try:
        siblings = [posixpath.basename(entry.rstrip("/")) for entry in filesystem.ls(parent, detail=False)]
    except OSError:
        return f"neither does the directory {parent!r}"
    name = posixpath.basename(path)
    siblings = [sibling for sibling in siblings if sibling != name]  # a link to nothing is its own neighbour
    if not siblings:
        return f"the directory {parent!r} is empty"
    hint = nearest(name, siblings)
    return hint if hint.startswith("did you mean") else f"nothing in {parent!r} has a name like it"


def _compression(name: str) -> str | None:
    for suffix, codec in ((".gz", "gzip"), (".bz2", "bz2"), (".xz", "xz")):
        if name.endswith(suffix):
            return codec
    return None
