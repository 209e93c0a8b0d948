"""Parts: zips, tars, Parquet files and folders of images, all read by member.

Whatever lies on disk may be broken or hostile. An archive is judged by its directory and read in
memory, member by expected name, never extracted; what is refused is refused by name and with a
reason.
"""

import contextlib
import os
import re
import stat
import struct
import tarfile
import threading
import zipfile
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet

from rsdlib import files
from rsdlib.errors import BadArchiveError, BadImageError, refusing

MAX_BYTES = 64 * 2**20  # of one file or member
MAX_MEMBERS = 100_000  # of one archive; DiffusionDB's zips hold 1,001
MAX_RATIO = 200  # unpacked to packed, of a member above 1 MiB
MAX_GROUP = 4 * 2**30  # bytes of a row group, unpacked: as much is in memory

# Not a plain relative path by the rules of either POSIX or Windows: empty, absolute, drive,
# backslash, NUL, or climbing.
_UNSAFE = re.compile(r"^$|^/|^[A-Za-z]:|\\|\0|//|(^|/)\.{1,2}(/|$)")
# What systems leave in folders and archives: hidden files, previews, waste bins.
_CLUTTER = re.compile(r"(?i)(^|/)(\.|__MACOSX/|@eaDir/|.recycle(.bin)?/|thumbs\.db$|desktop\.ini$)")
# What libraries raise on broken data.
BROKEN = (OSError, EOFError, LookupError, ArithmeticError, RuntimeError, TypeError, ValueError)
BROKEN += (struct.error, zlib.error, tarfile.TarError, zipfile.BadZipFile)
BROKEN += (pyarrow.ArrowException,)


def is_clutter(name):
    """Tell whether a relative path means what a system left, nobody's file."""
    return _CLUTTER.search(name) is not None


@contextlib.contextmanager
def open_part(path):
    """Open a zip, a tar, a Parquet file with images, or a folder of them.

    What it gives has `where`, ``names()``, ``crc(name)`` and ``read(name)``; threads may share it.
    """
    where = files.relative(path)
    if path.suffix not in _KINDS or path.is_dir():
        yield _Folder(path, where)
        return
    opener, kind = _KINDS[path.suffix]
    message = f"{where} cannot be opened as a {path.suffix[1:]}: {{}}"
    with contextlib.ExitStack() as stack:
        with refusing(BROKEN, BadArchiveError, message):
            part = kind(stack.enter_context(opener(path)), where)
        yield part


class _Part:
    """What all parts share: they read under limits."""

    def __init__(self, archive, where):
        self.where, self._archive, self._lock = where, archive, threading.Lock()

    def crc(self, name):
        """Return the CRC-32 of the member's bytes, None if it cannot be read."""
        with contextlib.suppress(BadImageError):
            return zlib.crc32(self.read(name))
        return None

    def read(self, name):
        """Return the member's bytes."""
        with refusing(BROKEN, BadImageError, name, self.where, "it cannot be read ({})"):
            content = self._read(name)
        if content is None:
            raise BadImageError(name, self.where, "there is no such file or member")
        if len(content) > MAX_BYTES:
            raise BadImageError(name, self.where, f"it has more than {MAX_BYTES:,} bytes")
        return content


class _Folder(_Part):
    """One folder of loose files."""

    def names(self):
        """Return the names of the files, without what systems left there."""
        with os.scandir(self._archive) as entries:
            return {e.name for e in entries if e.is_file() and not is_clutter(e.name)}

    def _read(self, name):
        path = self._archive / name
        if not path.is_file():  # a named pipe would block
            return None
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)


class _Archive(_Part):
    """One zip or tar, open for reading; every member's entry is judged before any is read."""

    def __init__(self, archive, where):
        super().__init__(archive, where)
        self._members = {}
        for name, refusals, member in self._entries():
            refusals |= {
                "its name stands twice": name in self._members,
                "its name is not a plain relative path": _UNSAFE.search(name),
                "too many stand before it": len(self._members) >= MAX_MEMBERS,
            }
            if any(refusals.values()):
                reason = next(reason for reason, applies in refusals.items() if applies)
                raise BadArchiveError(f"{where}, member {name!r}: {reason}", "Do not use it.")
            self._members[name] = member

    def names(self):
        """Return the names of the members that are files, without what systems left there."""
        return {name for name, member in self._members.items() if member and not is_clutter(name)}

    def _read(self, name):
        member = self._members.get(name)
        return member and self._content(member)


class _Zip(_Archive):
    def _entries(self):
        for member in self._archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            size, method = member.file_size, member.compress_type
            refusals = {
                "it is a link or a special file": kind not in (0, stat.S_IFREG, stat.S_IFDIR),
                "its entry points outside the file": member.header_offset < 0,
                "it is encrypted": member.flag_bits & 0x1,
                "it is neither stored nor deflated": method not in (0, 8),
                "it unpacks to too many bytes": size > MAX_BYTES,
                "it is packed too well": size > max(2**20, MAX_RATIO * member.compress_size),
            }
            # `filename` is cut at a NUL, its separators are replaced.
            yield member.orig_filename, refusals, None if member.is_dir() else member

    def crc(self, name):
        """Return the member's CRC-32 as the zip's directory states it, None without a member."""
        return self._members[name].CRC if self._members.get(name) else None

    def _content(self, member):
        with self._archive.open(member) as stream:
            content = stream.read(member.file_size + 1)  # inflates no more than it is asked for
        if len(content) != member.file_size:
            raise ValueError("cut short")
        return content


class _Tar(_Archive):
    def _entries(self):
        for member in self._archive:
            file = member.isreg() and not member.issparse()
            refusals = {
                "it is a link or a special file": not (file or member.isdir()),
                "it unpacks to too many bytes": not 0 <= member.size <= MAX_BYTES,
            }
            yield member.name, refusals, member if file else None
        self._archive.fileobj.seek(self._archive.offset)
        end = self._archive.fileobj.read(2**20)
        if not end or end.strip(b"\0"):  # `tarfile` takes a damaged header for the end
            raise ValueError("it is damaged, or cut short")

    def _content(self, member):
        with self._lock:
            return self._archive.extractfile(member).read()


class _Header(tarfile.TarInfo):
    """A tar's header; of those that hold names and attributes, `tarfile` reads all that follows."""

    @classmethod
    def frombuf(cls, *header):
        member = super().frombuf(*header)
        if member.size > MAX_BYTES:
            raise ValueError(f"the entry {member.name!r} has more than {MAX_BYTES:,} bytes")
        return member


class _Parquet(_Part):
    """One Parquet file; a member is ``<row>/<column>``. A row group's images are in memory."""

    def __init__(self, file, where):
        super().__init__(file, where)
        self._loaded, about = {}, file.metadata
        self.columns, self.others = {}, []  # those with bytes, and where in them; the plain ones
        for leaf in map(file.schema.column, range(about.num_columns)):
            name, dot, inner = leaf.path.partition(".")
            kind = leaf.physical_type, leaf.logical_type.type
            if kind == ("BYTE_ARRAY", "NONE") and inner in ("", "bytes"):
                self.columns[name] = leaf.path
            elif not dot:
                self.others.append(name)
        # A group's columns are not looked at: Arrow ends the process where they are damaged.
        groups = [about.row_group(group) for group in range(about.num_row_groups)]
        rows = [group.num_rows for group in groups]
        self._ends = np.cumsum(rows, dtype=int)
        if sum(rows) != about.num_rows or sum(rows) * len(self.columns) > MAX_MEMBERS:
            raise ValueError("its rows are miscounted, or too many")
        if any(group.total_byte_size > MAX_GROUP for group in groups):
            raise ValueError(f"a row group unpacks to more than {MAX_GROUP:,} bytes")

    def names(self):
        """Return the names of the images, one a row and column."""
        rows = range(self._archive.metadata.num_rows)
        return {f"{row:06}/{column}" for row in rows for column in self.columns}

    def _read(self, name):
        row, _, column = name.partition("/")
        if column not in self.columns or not row.isdecimal() or int(row) >= self._ends[-1]:
            return None
        group = int(np.searchsorted(self._ends, int(row), side="right"))
        with self._lock:
            if self._loaded.get(column, (None,))[0] != group:
                self._loaded.pop(column, None)  # before the next is read
                table = self._archive.read_row_group(group, [self.columns[column]])
                self._loaded[column] = group, table.column(0)
            values = self._loaded[column][1]
        value = values[int(row) - int(self._ends[group])].as_py()  # counted from the end
        return value["bytes"] if isinstance(value, dict) else value


_KINDS = {
    ".zip": (lambda path: zipfile.ZipFile(path), _Zip),
    ".tar": (lambda path: tarfile.TarFile(path, tarinfo=_Header, errors="replace"), _Tar),
    ".parquet": (pyarrow.parquet.ParquetFile, _Parquet),
}
