"""Data: from text to batches, the chapter that matters most.

SmolLM3's recipe is a mixture that changes: web, code and math at 85/12/3 % in stage 1, 75/15/10 in stage 2, and
63/24/13 while the learning rate decays, because what comes last is remembered best (playbook). Text becomes token
files once; everything after that is computed from the step number, so that no loader has a state to lose:

    documents -> token files (one folder a source) -> sequences -> mixture of a stage -> batch of a step

Exact duplicates go, and so do documents that repeat a span of up to 13 tokens 32 times (playbook). Packing cuts documents
into sequences, by default end to end. Document starts travel with each batch as `cu_seqlens`, so attention can stay inside
a document: no effect in short context (2.197 against 2.198), adopted for long context and because a step gets cheaper.

    python data.py prepare                            # the embedded corpus -> data/laptop
    python data.py prepare my.txt notes/ --out data/mine [--tokenizer data/laptop]
    python data.py prepare web=dump/ hf:HuggingFaceFW/fineweb-edu:sample-10BT --max-tokens 1e9 --out data/web
    python data.py show data/laptop                   # how it packs, how long documents are, where they begin

Without network the Python installation is the corpus: docstrings of the standard library, numpy and torch and the
language reference (prose), the standard library's modules (code), and generated arithmetic (math).
"""

import argparse
import bisect
import contextlib
import copy
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tokenizer import Parser, Tokenizer, UserError, run, train_bpe, utf8

FORMAT = 2  # of the token files
SHARD_TOKENS = 2**24  # a shard ends with the job that reaches this many: bounded files, bounded memory
SMALL = 2**16  # sequences of a source whose order is kept in memory, 512 KB an epoch at the most
JOB_BYTES = 2**20  # text that one thread encodes at a time


# ---- text sources ---------------------------------------------------------------------------------------------

HELD_OUT = 0.03  # the share of documents that data.py keeps for validation
LONGEST_PIECE = 16_384  # characters; longer text files are cut into documents after a blank line
LONGEST_LINE = 16 << 20  # bytes of a jsonl line; a document this long is more likely a mistake than a text
LARGEST_PAGE = 64 << 20  # bytes of a parquet page that Arrow may read: it holds one up to five times over
LARGEST_BLOCK = 640 << 20  # bytes of a larger page, packed and unpacked: it is held once
SAMPLED_FILES = 64  # of a remote data set, for a tokenizer's sample


class Document(NamedTuple):
    text: str
    held: float  # in [0, 1), uniform; below HELD_OUT it is for validation
    position: tuple[str, int]  # Source.read(position) goes on behind this document


def uniform(key: str) -> float:
    """A number in [0, 1) from the key alone: what has the same key is held out, or not, in every run and order."""
    return int.from_bytes(hashlib.sha256(utf8(key)).digest()[:6], "big") / 2**48


class Source:
    """The documents of a path: text, source code, .jsonl, .parquet (text and jsonl also as .gz), a folder of
    those, or hf:DATASET[:CONFIG[:SPLIT]]. Read as a stream, in a fixed order, from any position.

    A file named outright must be readable; in a folder, or behind a data set's first document, what is not is left out, said
    on stderr and counted. That a network fails is always an error.
    A data set's document is held out by the hash of its text, a text file by that of its name; of a long text
    file, which is cut into documents, the last 3 % are held out, so that the two sides touch at one seam.

    `datasets` finds the files of a data set, here or on the Hub. Those of jsonl, parquet and text are then read as they
    would be from the disk, at one revision, with bounded memory; any other format streams through `datasets` itself: its size
    is not told, its revision may change between two calls, and a long value takes what memory it takes.
    """

    def __init__(self, where: str | Path, text_key: str = "text"):
        self.where, self.text_key, path = str(where), text_key, Path(where)
        self.dropped = Counter()  # what reading leaves out, and why
        self.said: dict[str, list[str]] = {}  # reason -> what was printed of it
        self.done = 0  # bytes of the files read so far
        self.hub, self.folder = self.where.startswith("hf:"), path.is_dir()
        if self.hub:
            return self.pin(hub_files(self.where[3:], text_key))
        if not path.exists():
            raise UserError(f"{path} does not exist: give a text file, .jsonl, .parquet or a folder of those")
        self.files: dict[str, Path | str] = {path.name: path}  # name in a position -> file, or URL
        if self.folder:
            inside = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
            self.files = {name.as_posix(): file for name, file in inside.items()
                          if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)}
        if not self.files:
            raise UserError(f"{path} holds no files: give a text file, .jsonl, .parquet or a folder of those")
        self.sizes = {name: file.stat().st_size for name, file in self.files.items()}
        self.size = sum(self.sizes.values())

    def pin(self, sizes: dict[str, int]) -> None:
        """To the files of a data set and their bytes, as `hub_files` finds them; on the Hub, their URLs name a revision."""
        self.files, self.sizes, self.size = {file: file for file in sizes}, sizes, sum(sizes.values())

    def read(self, position: tuple[str, int] | None = None) -> Iterator[Document]:
        """All documents, or those behind `position`. UserError where a file that was named cannot be read."""
        names = list(self.files)
        if position and position[0] not in self.files:
            raise UserError(f"{self.where} no longer holds {position[0]}, which was being read; put it back, or remove the "
                            "unfinished preparation")
        first, found = names.index(position[0]) if position else 0, position is not None
        self.done = sum(self.sizes[name] for name in names[:first])
        for i, name in enumerate(names[first:]):
            before = self.done
            try:
                for text, held, offset, done in self.open(name, position[1] if position and not i else 0):
                    self.done, found = before + done, True
                    yield Document(text, uniform(text) if held is None else held, (name, offset))
            except UserError as error:
                if isinstance(error, Unreachable) or not (self.folder or self.hub and found):
                    raise
                self.leave_out("unreadable files", str(error))
            if self.size:
                self.done = before + self.sizes[name]

    def open(self, name: str, offset: int) -> Iterator[tuple[str, float | None, int, int]]:
        """(text, held or None, offset behind it, bytes of the file read so far) of one file's documents."""
        file = str(self.files[name])
        if self.hub and file == self.where:
            reader = stream_hub(file[3:], self.text_key, offset, self.leave_out)
        elif file.lower().endswith(".parquet"):
            reader = read_parquet(file, self.text_key, offset, self.leave_out)
        elif holds_lines(file, self.text_key):
            reader = read_jsonl(file, self.text_key, offset, self.leave_out, strict=not (self.folder or self.hub))
        else:
            reader = read_plain(file, uniform(name), offset)
        return read_hub(self.where[3:], reader) if self.hub else reader

    def leave_out(self, reason: str, what: str, documents: int = 1) -> None:
        """Counts what cannot be read, and prints the first three of a kind: a folder of pictures must not fill the screen."""
        self.dropped[reason] += documents
        said = self.said.setdefault(reason, [])
        if what not in said and len(said) < 3:
            said.append(what)
            tqdm.write(f"left out: {what}", file=sys.stderr)

    def sample(self, max_bytes: float, held_out: float = 0.0) -> Iterator[str]:
        """Text of at most max_bytes: the same share from the start of each file (of SAMPLED_FILES of a data set's, evenly
        apart), nothing that is held out."""
        names = list(self.files)[::-(-len(self.files) // SAMPLED_FILES) if self.hub else 1]
        size = sum(self.sizes[name] for name in names)
        part = copy.copy(self)
        part.dropped = Counter()  # its own: what is left out counts when all is read
        for i, name in enumerate(names):
            left = max_bytes * (self.sizes[name] / size if size else 1)
            part.files = {name: self.files[name]}
            try:
                for document in part.read():
                    if document.held >= held_out:
                        text = document.text[:max(1, int(left))]
                        left -= len(text) if text.isascii() else len(utf8(text))
                        yield text
                    if left <= 0:
                        break
            except UserError as error:
                if isinstance(error, Unreachable) or not (self.hub and i):
                    raise
            self.done += part.done


def holds_lines(file: str, text_key: str) -> bool:
    """Whether a file holds a JSON object a line; of .json that is to be seen."""
    name = file.lower().removesuffix(".gz")
    if not name.endswith(".json"):
        return name.endswith((".jsonl", ".ndjson"))
    with opened(file) as (stream, _):
        lines = (line for line in iter(lambda: stream.readline(LONGEST_LINE), b"") if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    if len(first) == LONGEST_LINE:  # too long to read, not to be a line
        return first.lstrip().startswith(b"{")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and (text_key in record or second.lstrip().startswith(b"{"))


@contextlib.contextmanager
def opened(file: Path | str) -> Iterator[tuple]:
    """(the stream of a file's bytes, unpacked if it is .gz; the stream on the disk). Errors become UserErrors."""
    try:
        with open_bytes(file) as raw, (gzip.open(raw) if str(file).lower().endswith(".gz") else raw) as stream:
            yield stream, raw
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file, "to its end", error) from None


class Unreachable(UserError):
    """What may be there another time."""


def unreadable(file: Path | str, place: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "://" in str(file) and isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
        return Unreachable(f"{file} cannot be read {place} ({reason}): check the network and run the command again")
    return UserError(f"{file} cannot be read {place} ({reason}): check the file or leave it out")


def open_bytes(file: Path | str):
    """A file to read; a URL, as `datasets` gives for what is on the Hub, through fsspec, which comes with it."""
    if "://" not in str(file):
        return open(file, "rb")
    import fsspec

    return fsspec.open(file, "rb").open()


def read_plain(file: Path | str, held: float, offset: int) -> Iterator[tuple[str, float | None, int, int]]:
    """A text file in documents of at most LONGEST_PIECE bytes; `held` is for one that need not be cut."""
    with opened(file) as (stream, raw):
        size = stream.seek(0, os.SEEK_END)
        seam = size - int(HELD_OUT * size)  # a piece that ends behind it is held out
        stream.seek(offset)
        buffer, ended = b"", False
        while buffer or not ended:
            while len(buffer) <= LONGEST_PIECE and not ended:
                block = stream.read(1 << 17)
                ended, buffer = not block, buffer + block
                if b"\0" in block:
                    raise UserError(f"{file} is not UTF-8 text but binary: leave it out")
            end, whole = len(buffer), offset == 0 and len(buffer) <= LONGEST_PIECE
            if not whole:
                if (line := buffer.rfind(b"\n", 0, max(0, seam - offset)) + 1) > 0 and line <= LONGEST_PIECE:
                    end = line  # the last line break before the seam
                elif end > LONGEST_PIECE:
                    end = piece_end(buffer)
            try:
                text = buffer[:end].decode("utf-8-sig" if offset == 0 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 text (byte {offset + error.start}): convert it with "
                                "`iconv -t UTF-8` or leave it out") from None
            buffer, offset = buffer[end:], offset + end
            if text.strip():
                yield text, held if whole else 0.0 if offset > seam else 0.999, offset, raw.tell()
            elif whole:
                raise UserError(f"{file} is empty: leave it out or put text into it")


def piece_end(buffer: bytes) -> int:
    """Where to cut: after the last blank line of the second half, or else line, space, or whole character."""
    for mark in (b"\n\n", b"\n", b" "):
        if (end := buffer.rfind(mark, LONGEST_PIECE // 2, LONGEST_PIECE)) >= 0:
            return end + len(mark)
    end = LONGEST_PIECE
    while end > LONGEST_PIECE - 4 and buffer[end] & 0xC0 == 0x80:  # a continuation byte
        end -= 1
    return end


def read_jsonl(file: Path | str, text_key: str, offset: int, leave_out: Callable,
               strict: bool = True) -> Iterator[tuple[str, float | None, int, int]]:
    """A document a line. UserError for a line without text, unless not `strict` and a line before it had some."""
    with opened(file) as (stream, raw):
        stream.seek(offset)
        found = offset > 0
        while line := stream.readline(LONGEST_LINE):
            begin, offset = offset, offset + len(line)
            if len(line) == LONGEST_LINE:  # read to its end without keeping it
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LONGEST_LINE)
                    offset += len(line)
                leave_out("documents over 16 MB", f"the line of {file} that ends at byte {offset} is longer than 16 MB")
            elif line.strip():
                problem = ""
                try:
                    record = json.loads(line.decode("utf-8" if begin else "utf-8-sig"))
                    if not isinstance(record, dict) or not isinstance(record.get(text_key), str | None):
                        problem = f'is not a JSON object with text in "{text_key}": name its field with --text-key'
                    elif text_key not in record:
                        problem = f"has no field {text_key}: choose one of {', '.join(record)} with --text-key"
                except UnicodeDecodeError:
                    problem = "is not UTF-8 text: convert the file with `iconv -t UTF-8`"
                except (ValueError, RecursionError):
                    problem = "is not JSON: mend it or leave the file out"
                if not problem:
                    found = True
                    yield record[text_key] or "", None, offset, raw.tell()  # null: an empty document, as in parquet
                elif strict or not found:
                    raise UserError(f"{file} {place(file, offset)} {problem}")
                else:
                    leave_out("unreadable lines", f"the line of {file} that ends at byte {offset} {problem}")


def place(file: Path | str, offset: int) -> str:
    """The number of the line that ends at `offset`; only for a message, so it may read the file again."""
    with opened(file) as (stream, _):
        lines, block = 1, b""
        while offset > 1 and (block := stream.read(min(1 << 20, offset - 1))):  # without the line's own end
            lines, offset = lines + block.count(b"\n"), offset - len(block)
        return f"line {lines}"


def read_parquet(file: Path | str, text_key: str, offset: int, leave_out: Callable) -> Iterator[
        tuple[str, float | None, int, int]]:
    """Row by row: through Arrow, or here where a page is so large that Arrow's copies of it would fill the memory; a row group
    whose page fills it even so is left out."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs a package that is missing: pip install pyarrow") from None
    row = 0
    try:
        with (open_bytes(file) as stream,
              pyarrow.parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False) as table):
            size = stream.seek(0, os.SEEK_END)
            names, rows = table.schema_arrow.names, max(1, table.metadata.num_rows)
            if text_key not in names:
                raise UserError(f"{file} has no column {text_key}: choose one of {', '.join(names)} with --text-key")
            kind = table.schema_arrow.field(text_key).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
                raise UserError(f"the column {text_key} of {file} is no text: choose another with --text-key")
            leaf = next(i for i in range(len(table.schema)) if table.schema.column(i).path == text_key)
            for group in range(table.metadata.num_row_groups):
                about = table.metadata.row_group(group)
                if row + about.num_rows <= offset or not about.num_rows:
                    row += about.num_rows
                    continue
                pages = large_pages(stream, about.column(leaf))
                page, block = max((page for page, _ in pages), default=0), max(map(sum, pages), default=0)
                if block > LARGEST_BLOCK:
                    leave_out("documents in huge parquet pages",
                              f"rows {row + 1} to {row + about.num_rows} of {file} share a page of {page / 1e6:.0f} MB, or lie "
                              "beside one: write the file again in smaller pages, or without what is that long", about.num_rows)
                    row += about.num_rows
                    continue
                if page > LARGEST_PAGE:
                    values = page_values(stream, about.column(leaf), table.schema.column(leaf).max_definition_level)
                else:  # no value is longer than the largest page
                    values = arrow_values(table, group, text_key, max(1, min(64, LARGEST_PAGE // max(page, 1))))
                for value in values:
                    row += 1
                    if row > offset:
                        if value is not None and len(value) >= LONGEST_LINE:
                            leave_out("documents over 16 MB", f"row {row} of {file} is longer than 16 MB")
                        else:
                            yield str(value, "utf-8") if value else "", None, row, size * row // rows
    except (pyarrow.ArrowException, OSError, ValueError, IndexError, KeyError, RecursionError) as error:
        raise unreadable(file, f"behind row {row}", error) from None


def arrow_values(table, group: int, column: str, at_once: int) -> Iterator[memoryview | None]:
    """The values of a row group's column, None where there is none, `at_once` of them in memory."""
    for batch in table.iter_batches(at_once, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0)
        for value in values.dictionary_decode() if hasattr(values, "dictionary_decode") else values:
            yield memoryview(value.as_buffer()) if value.is_valid else None


# A column chunk of parquet is pages on end, each behind a header (parquet-format, README and Encodings.md). Arrow tells the
# size of a page only when it holds it, and then needs up to five times as much for one long value.


def varint(stream) -> int:
    """7 bits a byte, the lowest first."""
    number = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)[0]
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError("a number in a page is damaged")


def read_thrift(stream, depth: int = 0) -> dict:
    """A struct in Thrift's compact protocol, {number of the field: integer, truth or struct}; other fields are passed."""
    def zigzag() -> int:  # 0, -1, 1, -2, ...
        return (number := varint(stream)) >> 1 ^ -(number & 1)

    fields, field = {}, 0
    while head := stream.read(1)[0]:  # high half: how far from the last field's number; low half: the type
        field = field + (head >> 4) if head >> 4 else zigzag()
        match head & 15:
            case 1 | 2 as truth:
                fields[field] = truth == 1
            case 3 | 7 as fixed:  # a byte, a double
                stream.seek(1 if fixed == 3 else 8, os.SEEK_CUR)
            case 4 | 5 | 6:  # integers of 16, 32 and 64 bits
                fields[field] = zigzag()
            case 8:  # bytes behind their length
                stream.seek(varint(stream), os.SEEK_CUR)
            case 12 if depth < 4:
                fields[field] = read_thrift(stream, depth + 1)
            case kind:
                raise ValueError(f"a page header holds a field of type {kind}")
    return fields


def page_headers(stream, column) -> Iterator[tuple[dict, int]]:
    """(header, where its page begins) of each page: 1 type, 2 and 3 its bytes unpacked and packed, 5, 7 and 8 more."""
    begin = column.dictionary_page_offset or column.data_page_offset
    end = begin + column.total_compressed_size
    while begin < end:
        stream.seek(begin)
        header = read_thrift(stream)
        if header[2] < 0 or header[3] < 0:
            raise ValueError("a page header is damaged")
        page = stream.tell()
        yield header, page
        begin = page + header[3]


def large_pages(stream, column) -> list[tuple[int, int]]:
    """(bytes unpacked, bytes packed) of the pages that decide how a chunk is read: of its dictionary, which any row may
    repeat, and of all where the chunk is so large that one could be."""
    sizes = ((header, (header[2], header[3] if column.compression != "UNCOMPRESSED" else 0))
             for header, _ in page_headers(stream, column))
    if column.total_uncompressed_size > LARGEST_PAGE:
        return [size for _, size in sizes]
    return [size for header, size in itertools.islice(sizes, 1) if header[1] == 2]


def page_values(stream, column, max_definition: int) -> Iterator[memoryview | None]:
    """The values of a flat column of bytes, None where there is none, a page in memory at a time (and the dictionary)."""
    import pyarrow

    codec, dictionary = column.compression.lower().replace("lz4", "lz4_raw"), []  # the name is of the one without frames
    for header, begin in page_headers(stream, column):
        stream.seek(begin)
        kind, about = header[1], header.get(5) or header.get(8) or header.get(7)
        beside = about[5] + about[6] if kind == 3 else 0  # version 2 keeps its levels apart and unpacked
        levels, data = stream.read(beside), stream.read(header[3] - beside)
        if codec != "uncompressed" and (kind != 3 or about.get(7, True)):
            data = pyarrow.decompress(data, header[2] - beside, codec, asbytes=False)
        data, count = memoryview(data), about[1]
        if kind == 2:
            dictionary = list(plain_values(data))
            continue
        if kind != 3 and max_definition:
            length = int.from_bytes(data[:4], "little")
            levels, data = data[4:4 + length], data[4 + length:]
        there = hybrid_values(levels, 1, count) if max_definition else [1] * count
        encoding = about[4] if kind == 3 else about[2]
        if encoding == 0:
            values = plain_values(data)
        elif encoding in (2, 8):
            values = (dictionary[i] for i in hybrid_values(data[1:], data[0], sum(there)))
        else:
            raise ValueError(f"pages in the encoding {encoding}, and too large for Arrow")
        for defined in there:
            value = next(values, None) if defined else None
            if defined and value is None:
                raise ValueError("a page holds fewer values than its header says")
            yield value


def plain_values(data: memoryview) -> Iterator[memoryview]:
    """Values behind their lengths of 4 bytes, little-endian (PLAIN)."""
    at = 0
    while at < len(data):
        begin = at + 4
        at = begin + int.from_bytes(data[at:begin], "little")
        if at > len(data):
            raise ValueError("a value is longer than its page")
        yield data[begin:at]


def hybrid_values(data: memoryview, width: int, count: int) -> list[int]:
    """`count` integers of `width` bits: runs of one, and groups of 8 packed bit by bit (RLE)."""
    out, stream = [], io.BytesIO(data)
    while len(out) < count:
        head = varint(stream)
        for _ in range(min(head >> 1, -(-count // 8)) if head & 1 else 0):
            if len(group := stream.read(width)) < width:
                raise ValueError("a page ends before its values")
            packed = int.from_bytes(group, "little")
            out += [packed >> i * width & (1 << width) - 1 for i in range(8)]
        if not head & 1:
            out += [int.from_bytes(stream.read((width + 7) // 8), "little")] * min(head >> 1, count)
    return out[:count]


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """What goes wrong between here and a data set, in one sentence."""
    try:
        import datasets  # noqa: F401 (missing: said here)
    except ImportError:
        raise UserError(f"hf:{name} needs a package that is missing: pip install datasets") from None
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client raises its own, its HTTP library's and OS errors
        reason = " ".join(str(error).split())[:400]
        raise Unreachable(f"hf:{name} cannot be read ({type(error).__name__}: {reason}): check the name, which is "
                        "hf:DATASET:CONFIG:SPLIT where there are several, and the network, and run the command again") from None


def hub_builder(name: str) -> tuple:
    """(the builder that `datasets` makes of DATASET[:CONFIG[:SPLIT]], a name on the Hub or a local folder; the split)."""
    import datasets

    path, config, split = (name.split(":") + ["", ""])[:3]
    return datasets.load_dataset_builder(path, config or None), split or "train"


def hub_files(name: str, text_key: str) -> dict[str, int]:
    """{path or URL: bytes} of a data set's files, where all are of a kind read here; or else {"hf:NAME": 0}."""
    def kind(file: str) -> str:
        return Path(file.lower().removesuffix(".gz")).suffix

    with hub_errors(name):
        import fsspec

        builder, split = hub_builder(name)
        files = {str(key): value for key, value in (builder.config.data_files or {}).items()}.get(split, [])
        kinds = {kind(file): file for file in files}
        if kinds and kinds.keys() <= {".parquet", ".txt", ".md", ".jsonl", ".ndjson", ".json"} and (
                ".json" not in kinds or holds_lines(kinds[".json"], text_key)):  # not a list of objects
            places = {file: fsspec.core.url_to_fs(file) for file in files}
            return {file: system.size(path) for file, (system, path) in places.items()}
    return {f"hf:{name}": 0}


def read_hub(name: str, reader: Iterator) -> Iterator[tuple[str, float | None, int, int]]:
    with hub_errors(name):
        yield from reader


def stream_hub(name: str, text_key: str, offset: int, leave_out: Callable) -> Iterator[
        tuple[str, float | None, int, int]]:
    """A data set of any other format."""
    builder, split = hub_builder(name)
    done, rows = 0, builder.as_streaming_dataset(split=split)  # bytes of text; the size of the whole is not told
    for row in rows.skip(offset) if offset else rows:
        offset += 1
        if text_key not in row:
            raise UserError(f"hf:{name} has no column {text_key}: choose one of {', '.join(row)} with --text-key")
        if not isinstance(row[text_key], str | None):
            raise UserError(f"the column {text_key} of hf:{name} is no text: choose another with --text-key")
        if len(row[text_key] or "") >= LONGEST_LINE:
            leave_out("documents over 16 MB", f"document {offset} of hf:{name} is longer than 16 MB")
        else:
            done += len(utf8(row[text_key] or ""))
            yield row[text_key] or "", None, offset, done


# ---- the embedded corpus --------------------------------------------------------------------------------------
# (key, text) pairs; what has the same key is held out, or trained on, together.

SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"}
DOCSTRING = re.compile(r'(?:\A(?:#[^\n]*\n|\s)*|:[ \t]*\n[ \t]*)[rR]?"""(.*?)"""', re.DOTALL)


def _python_files(root: Path) -> Iterator[tuple[str, str]]:
    """(path below root, text) of every module that is not a test, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not SKIPPED.intersection(inside.parts):
            with contextlib.suppress(UnicodeDecodeError, OSError):  # some distributions hold broken links
                yield inside.as_posix(), path.read_text("utf-8")


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def embedded_code() -> Iterator[tuple[str, str]]:
    """The standard library, one document a module."""
    return ((f"python/{key}", text) for key, text in _python_files(_standard_library()) if text.strip())


def embedded_prose() -> Iterator[tuple[str, str]]:
    """Docstrings of at least 200 characters, and the language reference that `help()` shows.

    The key is the module's, so a held-out docstring never stands in a module that the model trains on.
    """
    roots = {"python": _standard_library()}
    for name in ("numpy", "torch"):
        roots[name] = Path(importlib.util.find_spec(name).origin).parent
    for name, root in roots.items():
        for key, text in _python_files(root):
            for match in DOCSTRING.finditer(text):
                if len(match[1]) >= 200:
                    yield f"{name}/{key}", inspect.cleandoc(match[1]) + "\n"
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    for key in sorted(topics):
        yield f"reference/{key}", topics[key]


def _sum_with_carries(a: int, b: int) -> str:
    """The steps of written addition, from the last digit to the first."""
    steps, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        steps.append(f"{x} + {y}" + (f" + {carry}" if carry else "") + f" = {total}")
        carry = total // 10
    return ", ".join(steps) + f". So {a} + {b} = {a + b}."


THINGS = "apples books coins stamps pencils shells tickets marbles cards stones".split()
PEOPLE = "Ada Ben Chen Dora Emil Fatima Goro Hana Ivan Julia".split()


def _problem(kind: str, a: int, b: int, rng: random.Random) -> str:
    """One worked problem; its steps come before its result, as a model that writes left to right needs them."""
    who, what = rng.choice(PEOPLE), rng.choice(THINGS)
    if kind == "sum":
        return f"Question: What is {a} + {b}?\nAnswer: {_sum_with_carries(a, b)}\n"
    if kind == "difference":
        a, b = max(a, b), min(a, b)
        return (f"Question: What is {a} - {b}?\nAnswer: {a} - {b // 10 * 10} = {a - b // 10 * 10}, "
                f"{a - b // 10 * 10} - {b % 10} = {a - b}. So {a} - {b} = {a - b}.\n")
    if kind == "product":
        a, b = a % 90 + 10, b % 8 + 2
        return (f"Question: What is {a} * {b}?\nAnswer: {a // 10 * 10} * {b} = {a // 10 * 10 * b}, "
                f"{a % 10} * {b} = {a % 10 * b}, {a // 10 * 10 * b} + {a % 10 * b} = {a * b}. So {a} * {b} = {a * b}.\n")
    if kind == "comparison":
        sign = ">" if a > b else "<" if a < b else "="
        return f"Question: Which is larger, {a} or {b}?\nAnswer: {a} {sign} {b}, so it is {max(a, b)}.\n"
    if kind == "got":
        return (f"Question: {who} has {a} {what} and gets {b} more. How many {what} does {who} have now?\n"
                f"Answer: {who} has {a} + {b} {what}. {_sum_with_carries(a, b)}\n")
    a, b = max(a, b), min(a, b)
    return (f"Question: {who} has {a} {what} and gives away {b}. How many {what} are left?\n"
            f"Answer: {who} has {a} - {b} {what}. {a} - {b // 10 * 10} = {a - b // 10 * 10}, "
            f"{a - b // 10 * 10} - {b % 10} = {a - b}. So {a} - {b} = {a - b}.\n")


def generated_math(problems: int = 40_000, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Arithmetic with worked steps. The key is the problem without its story, so the same numbers are never both
    trained on and held out."""
    rng = random.Random(seed)
    kinds = {"sum": "+", "difference": "-", "product": "*", "comparison": "?", "got": "+", "left": "-"}
    for _ in range(problems):
        kind = rng.choice(list(kinds))
        limit = rng.choice([10, 100, 1000])
        a, b = rng.randrange(limit), rng.randrange(limit)
        key = f"{a % 90 + 10}*{b % 8 + 2}" if kind == "product" else f"{min(a, b)}{kinds[kind]}{max(a, b)}"
        yield key, _problem(kind, a, b, rng)


EMBEDDED = {"prose": embedded_prose, "code": embedded_code, "math": generated_math}


# Lookups: notes of a key and a value between the lines of a text, asked for behind it. A pair is held out by its hash: what
# an evaluation asks was never stated where the model trained, so only the text in front of it can tell.
KEYS = """anchor angle apples archive audio axis barrier basis batch block books boundary branch browser bucket buffer
button cache canvas cards chain channel chunk client cluster coins color column command comment cookie corner counter
cover cursor date decoder degree device dialog digits disk display distance document domain email encoder engine event
factor family feature field filter flag flow focus fork frame fusion future grammar graph grid group guard hand handling
head heading heap height help hook host hour image index input issue item label language""".split()
VALUES = """layer leaf marbles mask master matrix memory menu mesh message metric month mouse network node number object
option order origin owner package page pair parent parser pattern pencils period pickle pipe pixel place plan platform
point policy pool port power prefix process product profile program property queue quote range rank reader record region
relief report rest root rule runner sample schema scope screen seed series server shape shell side signal size socket
source space speed square stack stage star stick stones stream string style symbol table""".split()


def draw_notes(rng: random.Random, count: int, held_out: bool) -> list[tuple[str, str]]:
    """(key, value) pairs, all held out or none, no key twice."""
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        key, value = rng.choice(KEYS), rng.choice(VALUES)
        if key not in pairs and (uniform(f"{key} {value}") < HELD_OUT) == held_out:
            pairs[key] = value
    return list(pairs.items())


def note(key: str, value: str) -> str:
    """The value follows its key at once: a small model learns to look that up (an induction head) in 150 steps, but not in
    400 where a word stands between."""
    return f"Note: {key} {value}.\n"


def note_question(key: str) -> str:
    """Ends where the value is due, after its key as in the note; in the form of the math source's problems."""
    return f"Question: What is the note on {key}?\nAnswer: {key}"


def generated_recall(size: int, documents: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Documents of about `size` bytes: docstrings with 2 to size / 80 notes between their lines, then a question for each.
    The text around held-out notes is held out as well."""
    rng = random.Random(seed)
    texts: dict[bool, list[str]] = {False: [], True: []}
    for key, text in embedded_prose():
        texts[uniform(key) < HELD_OUT].append(text)
    for _ in range(documents):
        held_out = rng.random() < HELD_OUT
        pairs = draw_notes(rng, rng.randint(2, min(64, size // 80)), held_out)
        questions = [f"{note_question(key)} {value}.\n" for key, value in rng.sample(pairs, len(pairs))]
        room = size - sum(map(len, questions)) - sum(len(note(*pair)) for pair in pairs)
        yield " ".join(pairs[0]), passage(rng, texts[held_out], pairs, room) + "".join(questions)


def passage(rng: random.Random, texts: list[str], pairs: list[tuple[str, str]], size: int) -> str:
    """About `size` bytes of the texts, drawn at random, with notes between their lines."""
    lines: list[str] = []
    while (room := size - sum(map(len, lines))) > 0:
        lines += [line + "\n" for line in rng.choice(texts)[:room].splitlines()]
    for pair in pairs:
        lines.insert(rng.randrange(len(lines) + 1), note(*pair))
    return "".join(lines)


class Listed:
    """(key, text) pairs in memory, with the interface of tokenizer.Source. The key decides what is held out."""

    def __init__(self, documents: Iterable[tuple[str, str]]):
        self.documents = list(documents)
        self.where, self.size, self.done, self.dropped = "memory", sum(len(utf8(t)) for _, t in self.documents), 0, Counter()

    def read(self, position: tuple[str, int] | None = None) -> Iterator[Document]:
        begin = position[1] if position else 0
        self.done = sum(len(utf8(text)) for _, text in self.documents[:begin])
        for i, (key, text) in enumerate(self.documents[begin:], start=begin + 1):
            self.done += len(utf8(text))
            yield Document(text, uniform(key), ("", i))

    def sample(self, max_bytes: float, held_out: float = 0.0) -> Iterator[str]:
        texts = [text for key, text in self.documents if uniform(key) >= held_out]
        for text in random.Random(0).sample(texts, len(texts)):
            if max_bytes > 0:
                yield text[:int(max_bytes)]
                max_bytes -= len(text)


# ---- token files ----------------------------------------------------------------------------------------------
# One folder a source: {train,val}-NNNNN.bin hold the ids (uint16 or uint32, little-endian) of documents, each opened by
# EOS; {train,val}.starts the document starts (int64); meta.json, written last, says what they must hold. EOS opens a
# document because it is then both the target that ends the document before and the prompt that starts this one: the
# attention of a document begins at its own EOS.
#
# All is made in OUT.partial, a shard at a time, and renamed at the end, so that a folder that exists is complete. A shard is
# there once its shard-NNNNN.json is: it says up to which document of the source everything is stored. Whatever stops
# the work, kill -9 too, the same command goes on behind that document; the unfinished shard is made anew.


class Seen:
    """Hashes (uint64) of the documents read: 8 bytes each, for the last LIMIT documents (256 MB); older ones are forgotten.

    Sorted arrays, each at least twice as long as the next, so that one more costs little and a search visits few.
    """

    LIMIT = 2**25

    def __init__(self):
        self.runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Which of the hashes [N] were not there before (the first of equal ones), bool [N]; adds them."""
        new = np.zeros(len(hashes), bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for run in self.runs:
            new &= run[np.searchsorted(run, hashes).clip(max=len(run) - 1)] != hashes
        if new.any():
            self.runs.append(np.sort(hashes[new]))
        while (len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1])
               and len(self.runs[-2]) < self.LIMIT // 8):
            self.runs[-2:] = [np.sort(np.concatenate(self.runs[-2:]), kind="stable")]
        while sum(map(len, self.runs)) > self.LIMIT:
            self.runs.pop(0)
        return new

    def forget(self, hashes: np.ndarray) -> None:
        """Takes back hashes of documents that were read ahead and are not stored."""
        self.runs = [left for run in self.runs if len(left := run[~np.isin(run, hashes)])]


def repeats_spans(ids: np.ndarray, starts: np.ndarray, times: int = 32, longest: int = 13) -> np.ndarray:
    """Which documents hold a span of 1 to 13 tokens 32 or more times in a row, the playbook's filter (after OLMo 2).

    ids [N]: documents on end, starts [D + 1] int64: where each begins, and N. Returns bool [D]. A span of n tokens that
    stands k times in a row is n * (k - 1) tokens in a row that equal the one n places on.
    """
    bad = np.zeros(len(starts) - 1, bool)
    for n in range(1, longest + 1):
        same = ids[n:] == ids[:-n]
        run = same  # run[i]: the 1, 2, 4, 8, 16 places from i on are the same; ends most searches in a few passes
        for shift in (1, 2, 4, 8):
            run = run[:-shift] & run[shift:]
        if not run.any():
            continue
        edges = np.flatnonzero(np.diff(same, prepend=False, append=False))  # runs of True begin and end here
        begins = edges[::2][edges[1::2] - edges[::2] >= n * (times - 1)]
        bad[np.searchsorted(starts, begins, side="right") - 1] = True
    return bad


@dataclass
class Job:
    """About JOB_BYTES of a source's documents, without those that were seen before."""

    texts: list[str]
    held: np.ndarray  # [D] bool: for validation
    sizes: np.ndarray  # [D] int64: bytes of text
    hashes: np.ndarray  # [D] uint64
    position: tuple[str, int]  # of the last document read, in this job or one before
    done: int  # bytes of the source read
    dropped: Counter  # reason -> documents


def read_jobs(source: Source | Listed, position: tuple[str, int] | None, seen: Seen, limit: float) -> Iterator[Job]:
    """The documents of a source behind `position`; those whose `held` is below `limit` are held out."""
    documents, size, last = [], 0, position

    def job() -> Job:
        dropped, source.dropped = source.dropped, Counter()
        full = [(d, raw) for d in documents if (raw := utf8(d.text)).strip()]
        hashes = np.array([int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest()) for _, raw in full], np.uint64)
        new = seen.add(hashes)
        dropped += Counter({"empty documents": len(documents) - len(full), "exact duplicates": len(full) - int(new.sum())})
        kept = [pair for pair, keep in zip(full, new) if keep]
        return Job([d.text for d, _ in kept], np.array([d.held < limit for d, _ in kept], bool),
                   np.array([len(raw) for _, raw in kept], np.int64), hashes[new], last, source.done, dropped)

    for document in source.read(position):
        documents.append(document)
        size, last = size + len(document.text), document.position
        if size >= JOB_BYTES or len(documents) >= 4096:
            yield job()
            documents, size = [], 0
    if documents or source.dropped and last:  # what is left out behind the last document counts as well
        yield job()


def encode_job(job: Job, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [N] of all documents, each opened by EOS; starts [D + 1]; and which documents repeat a span too often [D]."""
    eos = np.array([tokenizer.eos_id], np.uint32)
    parts = [tokenizer.encode_array(text) for text in job.texts]
    job.texts.clear()  # a shard's text would take more memory than its tokens
    starts = np.cumsum([0, *(1 + len(part) for part in parts)])
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    ids = np.concatenate([x for part in parts for x in (eos, part)] or [eos[:0]]).astype(dtype)
    return ids, starts, repeats_spans(ids, starts) if merges_spans(tokenizer) else np.zeros(len(parts), bool)


def merges_spans(tokenizer: Tokenizer) -> bool:
    """Whether its tokens are longer than bytes, of which a mere ruled line would be a repeated span."""
    return tokenizer.vocab_size > 512


def write_source(folder: Path, source: Source | Listed, tokenizer: Tokenizer, seen: Seen, limit: float, seed: int = 0,
                 max_tokens: float = 0) -> None:
    """Makes or goes on with the token files of a source. Encoding runs on all cores: tiktoken leaves Python's lock."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    while (file := folder / f"shard-{len(shards):05}.json").exists():
        shards.append(json.loads(file.read_text("utf-8")))
        seen.add(np.fromfile(file.with_suffix(".hash"), "<u8"))
    if (folder / "meta.json").exists():
        return
    position, done, ended = None, 0, False
    if shards:
        position, done, ended = tuple(shards[-1]["position"]), shards[-1]["done"], shards[-1]["ended"]
    workers, queue, pending, tokens = os.cpu_count() or 1, deque(), [], sum(shard["read"] for shard in shards)
    jobs = read_jobs(source, position, seen, limit)
    with (ThreadPoolExecutor(workers) as pool,
          tqdm(total=source.size or None, initial=done, unit="B", unit_scale=True, desc=f"tokenize {folder.name}",
               leave=False, delay=1) as bar):
        while not ended and (not max_tokens or tokens < max_tokens):
            while (len(queue) < 16 * workers and sum(job.sizes.sum() for job, _ in queue) < 4 * workers * JOB_BYTES
                   and (job := next(jobs, None))):
                queue.append((job, pool.submit(encode_job, job, tokenizer)))
            if ended := not queue:
                break
            job, future = queue.popleft()
            job.done += 0 if source.size else done  # a stream of unknown size counts from where it goes on
            pending.append((job, *future.result()))
            tokens += pending[-1][2][-1]
            bar.update(job.done - bar.n)
            if sum(starts[-1] for _, _, starts, _ in pending) >= SHARD_TOKENS:
                shards.append(write_shard(folder, len(shards), pending, seed, ended=False))
                pending = []
        for job, future in queue:
            future.cancel()
            seen.forget(job.hashes)
        nothing_held = not any(s["val"]["documents"] for s in shards) and not any(job.held.any() for job, *_ in pending)
        if max_tokens and pending and nothing_held:  # of a long text file it would have been the end
            held = pending[-1][0].held
            held[-max(1, round(HELD_OUT * len(held))):] = True
        if pending:
            shards.append(write_shard(folder, len(shards), pending, seed, ended))
    finish_source(folder, shards, tokenizer, seed)


def write_shard(folder: Path, number: int, pending: list[tuple], seed: int, ended: bool) -> dict:
    """The files of one shard, its documents shuffled, and what shard-NNNNN.json says of them. `ended`: none follows."""
    jobs, ids, starts, bad = zip(*pending)
    offsets = np.cumsum([0, *map(len, ids)])
    begins = np.concatenate([s[:-1] + o for s, o in zip(starts, offsets)])
    lengths = np.concatenate([np.diff(s) for s in starts])
    ids, bad, held, sizes, hashes = (np.concatenate(x) for x in (
        ids, bad, [j.held for j in jobs], [j.sizes for j in jobs], [j.hashes for j in jobs]))
    dropped = sum((job.dropped for job in jobs), Counter({"repeated spans": int(bad.sum())}))
    shard = {"position": jobs[-1].position, "done": jobs[-1].done, "dropped": dropped, "read": int(offsets[-1]),
             "ended": ended}
    order, written = np.random.default_rng([seed, number]).permutation(len(begins)), []
    try:
        for split, wanted in (("train", ~held & ~bad), ("val", held & ~bad)):
            chosen = order[wanted[order]]
            file = folder / f"{split}-{number:05}.bin"
            written += [file, file.with_suffix(".lengths")]
            _write(written[-1], [lengths[chosen].astype("<i8")])
            shard[split] = {"documents": len(chosen), "tokens": int(lengths[chosen].sum()), "bytes": int(sizes[chosen].sum()),
                            "sha256": _write(file, (ids[b:b + n] for b, n in zip(begins[chosen], lengths[chosen])))}
        written.append(folder / f"shard-{number:05}.hash")
        _write(written[-1], [hashes])
        _write(folder / f"shard-{number:05}.json", [json.dumps(shard).encode()])
    except OSError:
        for path in written:  # a full disk: leave room
            path.unlink(missing_ok=True)
        raise
    return shard


def _write(path: Path, parts: Iterable[np.ndarray | bytes]) -> str:
    """The file, its parts on end, whole or not at all. Returns its sha256."""
    partial, digest = path.with_name(path.name + ".partial"), hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return digest.hexdigest()
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def finish_source(folder: Path, shards: list[dict], tokenizer: Tokenizer, seed: int) -> None:
    """Document starts over all shards, and meta.json."""
    meta = {"format": FORMAT, "tokenizer": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "seed": seed,
            "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
            "dropped": sum((Counter(shard["dropped"]) for shard in shards), Counter())}
    for split in ("train", "val"):
        entries = [shard[split] for shard in shards]
        meta[split] = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "bytes")}
        if meta[split]["documents"] == 0:
            kept = sum(shard[s]["documents"] for shard in shards for s in ("train", "val"))
            dropped = ", ".join(f"{n:,} {reason}" for reason, n in meta["dropped"].items()) or "nothing"
            raise UserError(f"{folder.name} has {kept} document(s) left ({dropped} dropped), and one must be held out; give "
                            "more text")
        files = [folder / f"{split}-{number:05}.lengths" for number in range(len(shards))]
        meta[split] |= {"starts_sha256": _write(folder / f"{split}.starts", document_starts(files)),
                        "shards": [{"tokens": entry["tokens"], "sha256": entry["sha256"]} for entry in entries]}
    _write(folder / "meta.json", [json.dumps(meta, indent=1).encode()])


def document_starts(files: list[Path]) -> Iterator[np.ndarray]:
    """From the lengths of each shard's documents: where each begins, and the end; shard by shard, in parts."""
    position = 0
    for file in files:
        ends = position + np.cumsum(np.fromfile(file, "<i8"))
        if len(ends):
            yield np.concatenate(([position], ends[:-1])).astype("<i8")
            position = int(ends[-1])
    yield np.array([position], "<i8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Tokens:
    """The tokens of several files on end, memory-mapped: len(), an index, a slice."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts = [np.asarray(part) for part in parts if len(part)]  # a memmap's own slices are slow
        self.ends = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, at: int | slice):
        if not isinstance(at, slice):
            return self[range(len(self))[at]:][0] if at == -1 else self[at:at + 1][0]
        begin, end, _ = at.indices(len(self))
        first, last = (min(bisect.bisect_right(self.ends, i), len(self.parts) - 1) for i in (begin, max(begin, end - 1)))
        parts = []
        for i in range(first, last + 1):
            offset = self.ends[i] - len(self.parts[i])
            parts.append(self.parts[i][max(0, begin - offset):max(0, end - offset)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass
class Split:
    """The tokens of one source on one side, memory-mapped."""

    name: str
    tokens: Tokens  # uint16 or uint32
    starts: np.ndarray  # [documents + 1] int64, the last is the number of tokens
    bytes: int  # of the text, UTF-8
    sha256: str  # of the tokens
    labels: Tokens | None = None  # the tokens as targets, -100 where nothing is to be learned; None: the tokens


def load_source(folder: str | Path, tokenizer: Tokenizer, verify: bool = True) -> dict[str, Split]:
    """{"train": Split, "val": Split}, after checking that the files are what meta.json says.

    Without `verify` their sizes are compared, but not their sha256.
    """
    folder = Path(folder)
    remake = f"remove {folder.parent} and make it again with `python data.py prepare`"
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta["format"] != FORMAT:
            raise UserError(f"{folder} has token-file format {meta['format']}, this code reads {FORMAT}; {remake}")
        if meta["tokenizer"] != tokenizer.hash:
            raise UserError(f"{folder} was encoded with another tokenizer (hash {meta['tokenizer'][:8]}, not "
                            f"{tokenizer.hash[:8]}); put that tokenizer.json beside it or {remake}")
        splits = {}
        for split in ("train", "val"):
            entry, arrays = meta[split], []
            files = [(f"{split}-{i:05}.bin", meta["dtype"], shard["tokens"], shard["sha256"])
                     for i, shard in enumerate(entry["shards"])]
            for name, dtype, count, sha256 in [*files, (f"{split}.starts", "int64", entry["documents"] + 1,
                                                        entry["starts_sha256"])]:
                path, dtype = folder / name, np.dtype(dtype).newbyteorder("<")
                if path.stat().st_size != count * dtype.itemsize:
                    raise UserError(f"{path} has {path.stat().st_size:,} bytes, not the {count * dtype.itemsize:,} "
                                    f"that were written: it is truncated or torn; {remake}")
                if verify and _sha256(path) != sha256:
                    raise UserError(f"{path} is not what was written (its sha256 differs); {remake}")
                arrays.append(np.memmap(path, dtype, "r") if count else np.empty(0, dtype))
            sha256 = hashlib.sha256("".join(file[3] for file in files).encode()).hexdigest()
            splits[split] = Split(folder.name, Tokens(arrays[:-1]), arrays[-1], entry["bytes"], sha256)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; {remake}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/meta.json is damaged ({error!r}); {remake}") from None
    return splits


def source_folders(data: str) -> list[Path]:
    """`data` names folders, separated by commas; each is a source or holds sources."""
    folders = []
    for name in data.split(","):
        root = Path(name)
        found = [root] if (root / "meta.json").exists() else sorted(p.parent for p in root.glob("*/meta.json"))
        if not found:
            raise UserError(f"{name} holds no prepared data; run `python data.py prepare YOUR_TEXT --out {name}`")
        folders += found
    if len({folder.name for folder in folders}) < len(folders):
        raise UserError(f"two sources of {data} have the same name; prepare one again as NAME=PATH")
    return folders


def find_tokenizer(data: str) -> Path:
    """The tokenizer.json of prepared data: in the first folder of `data`, or beside it."""
    first = Path(data.split(",")[0])
    for folder in (first, first.parent):
        if (folder / "tokenizer.json").exists():
            return folder / "tokenizer.json"
    raise UserError(f"{first} has no tokenizer.json; run `python data.py prepare YOUR_TEXT --out {first}`")


def look(source: Source | Listed) -> tuple[float, list[str], float, float]:
    """From the start of a source, 1000 documents or more: below which `held` to hold out (at least one document will be),
    some text, and how many bytes of text and how many documents the whole has, about."""
    held, texts, size = [], [], 0
    for read, document in enumerate(islice(source.read(), 50_000)):
        if document.text.strip():
            held.append(document.held)
            if size < 2e5:
                texts.append(document.text[:20_000])
            size += len(utf8(document.text))
        if read >= 1000 and source.done > 2**20:  # fewer bytes say little of what is packed, or read in blocks
            break
    if len(held) < 2:
        raise UserError(f"{source.where} has {len(held)} document(s), and one must be held out; give more text (a text file "
                        f"is cut into documents every {LONGEST_PIECE:,} bytes)")
    whole = source.size / source.done  # over the part that was read
    source.dropped = Counter()  # what is left out is counted when all is read
    limit = max(HELD_OUT, float(np.nextafter(min(held), 1)) if len(held) < 1000 else 0.0)
    return limit, texts, size * whole, len(held) * whole


def prepare(sources: dict[str, Source | Iterable[tuple[str, str]]], out: str | Path, tokenizer: Tokenizer | None = None,
            vocab_size: int = 4096, sample_bytes: float = 2e7, seed: int = 0, max_tokens: float = 0) -> Tokenizer:
    """Tokenizes {name: documents} into `out`/name; without a tokenizer trains one on equal parts of the sources.

    At most `sample_bytes` of the training side go into the tokenizer's training; `max_tokens`: of each source, about.
    A folder that exists is never touched. What is interrupted stays in `out`.partial, and the same call goes on.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; remove it or write elsewhere with --out")
    sources = {name: s if isinstance(s, Source) else Listed(s) for name, s in sources.items()}
    partial = out.with_name(out.name + ".partial")
    task = {"sources": {name: [s.where, s.size if isinstance(s, Listed) else s.text_key] for name, s in sources.items()},
            "tokenizer": tokenizer.hash if tokenizer else [vocab_size, sample_bytes], "seed": seed, "max_tokens": max_tokens,
            "format": FORMAT}
    if (partial / "task.json").exists():
        saved = json.loads((partial / "task.json").read_text("utf-8"))
        if saved["task"] != task:
            raise UserError(f"{partial} is the unfinished preparation of something else; run the command that began it "
                            "again, or remove that folder")
        limits, tokenizer = saved["limits"], Tokenizer.load(partial)
        for name, sizes in saved["files"].items():
            sources[name].pin(sizes)
        print(f"going on with {partial}")
    else:
        shutil.rmtree(partial, ignore_errors=True)  # killed before anything was finished
        limits, *looks = zip(*(look(source) for source in sources.values()))
        if tokenizer is None:
            share = sample_bytes / len(sources)
            tokenizer = train_bpe((text for source, limit in zip(sources.values(), limits)
                                   for text in source.sample(share, limit)), vocab_size)
        check_disk(sources, zip(*looks), tokenizer, out, max_tokens)
        tokenizer.save(partial)
        files = {name: s.sizes for name, s in sources.items() if isinstance(s, Source) and s.hub}  # as they are now
        _write(partial / "task.json", [json.dumps({"task": task, "limits": limits, "files": files}).encode()])
    if not merges_spans(tokenizer):
        print(f"repeated spans are not looked for: a vocabulary of {tokenizer.vocab_size} is of single bytes, nearly")
    seen = Seen()
    try:
        for (name, source), limit in zip(sources.items(), limits):
            write_source(partial / name, source, tokenizer, seen, limit, seed, max_tokens)
        partial.rename(out)
        for pattern in ("*/shard-*", "*/*.lengths", "task.json"):  # meta.json says it all
            for path in out.glob(pattern):
                path.unlink()
    except BaseException as error:
        if out.exists() and not partial.exists():
            raise  # only leftovers were still there
        if not any(partial.glob("*/shard-*.json")):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        note = f"what was finished is in {partial}: run the same command again to go on"
        if isinstance(error, (UserError, OSError)):
            raise UserError(f"{error}; {note}") from None
        print(f"\n{note}", file=sys.stderr)
        raise
    return tokenizer


def check_disk(sources: dict, looks: Iterable[tuple[list[str], float, float]], tokenizer: Tokenizer, out: Path,
               max_tokens: float) -> None:
    """Prints how much disk the token files will need, judged by how the sources begin; UserError if there is less."""
    need = 0.0
    for source, (sample, size, documents) in zip(sources.values(), looks):
        if not source.size:  # which is told by max_tokens only
            size, documents = 1e18 * bool(max_tokens), 0
        text = "".join(sample)
        tokens = size * len(tokenizer.encode_array(text)) / len(utf8(text)) + documents
        part = min(1.0, max_tokens / tokens) if max_tokens and tokens else 1.0
        need += part * (tokens * (2 if tokenizer.vocab_size <= 2**16 else 4) + documents * 24)  # start, length, hash
    there = next(parent for parent in (out.absolute().parent, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    unknown = [name for name, source in sources.items() if not source.size]
    size = sum(source.size for source in sources.values())
    print(f"sources of {size / 1e6:,.1f} MB need about {need / 1e6:,.1f} MB of disk; "
          f"{free / 1e9:,.1f} GB are free" + (f" ({', '.join(unknown)}: of unknown size)" if unknown else ""))
    if need > free:
        raise UserError(f"{out} would need {need / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left; write elsewhere "
                        "with --out or take less with --max-tokens")


def prepare_embedded(out: str | Path, vocab_size: int = 4096) -> Tokenizer:
    """The embedded corpus: prose, code and math from the Python installation, with a tokenizer of their own."""
    return prepare({name: documents() for name, documents in EMBEDDED.items()}, out, vocab_size=vocab_size)


def prepare_recall(out: str | Path, tokenizer: Tokenizer) -> None:
    """Lookups for contexts of 128, 512 and 2048 of the embedded corpus' tokens, which have about 4 bytes here."""
    prepare({f"recall-{n}": generated_recall(size, documents, seed=n)
             for n, size, documents in ((128, 430, 6000), (512, 1600, 2000), (2048, 6500, 1000))}, out, tokenizer)


# ---- packing: documents -> sequences --------------------------------------------------------------------------

PACKINGS = ("concat", "best-fit", "bos")


def best_fit(lengths: np.ndarray, context: int) -> np.ndarray:
    """Row of each piece [P] int64: longest first, into the open row that it fills most (Ding et al. 2024, arXiv 2404.10830).

    `room[c]` lists the rows with c places left, bit c of `some` says that there is one: the lowest bit from a piece's
    length on is its best fit. One step a piece, whatever the number of rows.
    """
    row, rows, some = np.empty(len(lengths), np.int64), 0, 0
    room: list[list[int]] = [[] for _ in range(context + 1)]
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        if fitting := some >> n:
            space = n + (fitting & -fitting).bit_length() - 1
            row[i] = room[space].pop()
            if not room[space]:
                some ^= 1 << space
        else:
            space, row[i], rows = context, rows, rows + 1
        if left := space - n:
            room[left].append(int(row[i]))
            some |= 1 << left
    return row


class Packing:
    """The sequences of a split under one of PACKINGS: `count` of them, and the pieces of the token files in each.

    concat    documents end to end, cut every `context` tokens: nothing is lost or padded; constant time and no memory
    best-fit  documents whole, in the fullest row that has room; only longer ones are cut; the rest of a row is padding
    bos       every row begins with a document; what does not fit into the row is dropped (nanochat, modded-nanogpt)

    The last two take 16 bytes of memory a document, and a pass over them (about 1 us each) before training.
    """

    def __init__(self, split: Split, context: int, strategy: str = "concat"):
        self.split, self.context, self.strategy = split, context, strategy
        total, starts = len(split.tokens), split.starts
        if strategy == "concat":  # the last sequence may be shorter; the very first token is no target
            self.count = -(-(total - 1) // context)
            return
        lengths = np.diff(starts)
        if strategy == "best-fit":
            cuts = -(-lengths // context)  # pieces of each document
            number = np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts)
            begins = np.repeat(starts[:-1], cuts) + number * context
            sizes = np.minimum(context, np.repeat(starts[1:], cuts) - begins)
            rows = best_fit(sizes, context)
        else:
            rows, sizes, row, used = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64), 0, 0
            for i, n in enumerate(lengths.tolist()):
                rows[i], sizes[i] = row, min(n, context - used)
                row, used = (row + 1, 0) if used + n >= context else (row, used + n)
            begins = starts[:-1]
        order = np.argsort(rows, kind="stable")
        self.begins, self.sizes = begins[order], sizes[order]
        self.rows = np.searchsorted(rows[order], np.arange(rows.max() + 2))  # first piece of each row, and the end
        self.count = len(self.rows) - 1

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(where it begins in the tokens, its length) of each piece of a sequence."""
        if self.strategy == "concat":
            return [(row * self.context, min(self.context, len(self.split.tokens) - 1 - row * self.context))]
        here = slice(self.rows[row], self.rows[row + 1])
        return list(zip(self.begins[here].tolist(), self.sizes[here].tolist()))

    def targets(self, row: int) -> int:
        """How many targets of a sequence count: not padding, nor what labels leave out."""
        end, labels = len(self.split.tokens), self.split.labels
        spans = [(begin + 1, min(begin + length + 1, end)) for begin, length in self.pieces(row)]
        return sum(b - a if labels is None else int((labels[a:b] >= 0).sum()) for a, b in spans)

    def most_documents(self) -> int:
        """An upper bound of the documents that one sequence touches."""
        if self.strategy != "concat":
            return int(np.diff(self.rows).max())
        starts, most = self.split.starts, 0
        for i in range(0, len(starts), 2**20):  # in blocks: there may be hundreds of millions
            block = starts[i:i + 2**20]
            most = max(most, int((np.searchsorted(starts, block + self.context) - np.arange(i, i + len(block))).max()))
        return most + 1

    def report(self) -> dict[str, float]:
        """What the packing does to the split's documents.

        utilisation: share of the rows' places that hold a token; dropped: share of the tokens in no row; cut: share of the
        documents that are not whole in one row; mean_square: mean of the squared lengths of the pieces of documents that
        attention sees, to which its work is proportional.
        """
        total, starts = len(self.split.tokens), np.asarray(self.split.starts)
        if self.strategy == "concat":
            edges = np.union1d(starts, np.arange(0, total, self.context))
            sizes, whole = np.diff(edges), np.isin(starts[1:], edges[1:][np.isin(edges[:-1], starts[:-1])])
        else:
            sizes = self.sizes
            whole = np.isin(starts[:-1], self.begins[self.begins + self.sizes == starts[1:][
                np.searchsorted(starts, self.begins, side="right") - 1]])
        kept = sizes.sum()
        return {"rows": self.count, "utilisation": kept / (self.count * self.context), "dropped": 1 - kept / total,
                "cut": 1 - whole.mean(), "mean_square": float((sizes.astype(float) ** 2).mean())}


# ---- order: which sequence comes when -------------------------------------------------------------------------


def permute(index: np.ndarray, n: int, key: list[int]) -> np.ndarray:
    """Where a shuffle of range(n) puts each index, in constant time and memory: no array of n is made.

    A Feistel network (Luby and Rackoff 1988) permutes the even power of two that holds n; what lands outside
    range(n) goes through again. index [..] int64 in range(n), key: non-negative integers that name the
    shuffle. Returns int64 of the same shape.
    """
    half = max(1, -(-(n - 1).bit_length() // 2))
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = np.random.PCG64(key).random_raw(6)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)  # wraps, like every product of a hash
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return left << shift | right

    out = network(index.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


@functools.lru_cache(maxsize=256)
def small_shuffle(n: int, key: tuple[int, ...]) -> np.ndarray:
    """`permute` of all of range(n), kept: of a small source an array is cheaper than its many small calls."""
    return permute(np.arange(n), n, list(key))


def dealt(n: np.ndarray, shares: list[float]) -> np.ndarray:
    """How many of a stage's first n sequences come from each source, [S, *n.shape] int64.

    Halves of the sources get floor(share of n) and the rest, their halves likewise: each step of n deals exactly one, and
    each count is exact to within 1 + log2(S), so that every stretch has the mixture that was asked for, not just the average.
    """
    n = np.asarray(n, np.int64)
    if len(shares) == 1:
        return n[None]
    half, total = len(shares) // 2, sum(shares)
    first = np.floor(n * (sum(shares[:half]) / total if total else 0.0)).astype(np.int64)
    return np.concatenate([dealt(first, shares[:half]), dealt(n - first, shares[half:])])


def interleave(index: np.ndarray, shares: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Of a stage's sequences `index`: (which source each is from, how many of that source came before it)."""
    before = dealt(index, shares)
    source = (dealt(index + 1, shares) - before).argmax(0)
    return source, before[source, np.arange(len(index))]


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one mixture, and whatever else changes with it."""

    name: str
    tokens: float
    mixture: dict[str, float]  # source -> weight; weights are divided by their sum; {}: as large as they are
    context: int = 0  # tokens of a sequence; 0: the model's max_position_embeddings
    rope_theta: float = 0.0  # RoPE's base; 0: the model's
    learning_rate: float = 0.0  # a peak of its own, after warmup_steps, then a cosine to 0; 0: the run's schedule
    warmup_steps: int = 0  # of a stage with a learning rate of its own
    batch_tokens: int = 0  # 0: the recipe's

    def shares(self, sources: list[str], tokens: list[int]) -> list[float]:
        """Weights in the order of `sources`, summing to 1."""
        if unknown := set(self.mixture) - set(sources):
            raise UserError(f"stage {self.name} wants {', '.join(sorted(unknown))}, but the data has "
                            f"{', '.join(sources)}; change the mixture or --data")
        weights = [self.mixture.get(name, 0.0) for name in sources] if self.mixture else tokens
        if min(weights) < 0 or sum(weights) <= 0:
            raise UserError(f"stage {self.name}: the weights of its mixture must not be negative and not all be 0")
        if self.mixture and abs(sum(weights) - 1) > 1e-6:
            print(f"mixture   the weights of stage {self.name} sum to {sum(weights):.5g}: divided by that")
        return [w / sum(weights) for w in weights]


@dataclass
class Batch:
    tokens: np.ndarray  # [B, T] int64
    targets: np.ndarray  # [B, T] int64: the next token; -100 where there is none
    cu_seqlens: np.ndarray  # [M] int32: document starts in the flattened batch, padded with B*T
    sources: np.ndarray  # [B]: which source each row is from


def cut_sequences(packing: Packing, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Sequences of a packing: tokens and targets [B, T], and each row's document starts within it (0 first)."""
    split, shape, starts = packing.split, (len(indices), packing.context), []
    tokens, targets = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    for row, index in enumerate(indices):
        at, inside = 0, []
        for begin, length in packing.pieces(int(index)):
            part = split.tokens[begin:begin + length + 1]  # the target after the last one opens the next document
            n = len(part) - 1  # less than `length` at the end of the file only
            tokens[row, at:at + n] = part[:-1]
            targets[row, at:at + n] = (part if split.labels is None else split.labels[begin:begin + length + 1])[1:]
            first, last = np.searchsorted(split.starts, [begin + 1, begin + n])
            inside += [[at], split.starts[first:last] - begin + at]
            at += length
        starts.append(np.concatenate(inside))
    return tokens, targets, starts


def pack_cu_seqlens(starts: list[np.ndarray], context: int) -> np.ndarray:
    """Row starts -> cu_seqlens int32 over the flattened batch, padded with its end to a power of two."""
    flat = np.concatenate([row * context + s for row, s in enumerate(starts)])
    out = np.full(max(16, 1 << len(flat).bit_length()), len(starts) * context, np.int32)
    out[:len(flat)] = flat
    return out


class Curriculum:
    """The batch of every step, as a pure function: (seed, step) -> rows of the stages' mixtures.

    Global order does not depend on the number of processes: a process asks for its own rows of the global batch.
    Shuffled at sequence level, anew each epoch (playbook).
    """

    def __init__(self, sources: list[Split], stages: list[Stage], context: int, batch_tokens: int, seed: int = 0,
                 packing: str = "concat"):
        self.sources, self.stages, self.seed = sources, stages, seed
        self.contexts = [stage.context or context for stage in stages]
        self.batches = [stage.batch_tokens or batch_tokens for stage in stages]
        for stage, length, batch in zip(stages, self.contexts, self.batches):
            if batch % length:
                raise UserError(f"stage {stage.name}: a batch of {batch:,} tokens does not divide into sequences of {length:,}")
        self.packings = {length: [Packing(split, length, packing) for split in sources] for length in set(self.contexts)}
        names = [s.name for s in sources]
        self.shares = [stage.shares(names, [p.count for p in self.packings[length]]) for stage, length in zip(stages, self.contexts)]
        self.ends, done = [], 0.0
        for stage, batch in zip(stages, self.batches):
            done += stage.tokens / batch
            self.ends.append(max(1, round(done)))
        self.steps = self.ends[-1]
        self.before = []
        self.used = {length: np.zeros(len(sources), np.int64) for length in self.packings}
        for begin, end, length, batch, shares in zip([0, *self.ends], self.ends, self.contexts, self.batches, self.shares):
            self.before.append(self.used[length])
            self.used[length] = self.used[length] + dealt((end - begin) * (batch // length), shares)

    def rows(self, step: int) -> int:
        number = self.stage(step)
        return self.batches[number] // self.contexts[number]

    def tokens(self, step: int) -> int:
        total = 0
        for begin, end, batch in zip([0, *self.ends], self.ends, self.batches):
            total += max(0, min(step, end) - begin) * batch
        return total

    def stage(self, step: int) -> int:
        return int(np.searchsorted(self.ends, step, side="right").clip(max=len(self.ends) - 1))

    def epochs(self) -> dict[str, float]:
        """How often the run goes through each source; the playbook stays under about 4."""
        return {split.name: float(sum(used[s] / self.packings[length][s].count for length, used in self.used.items()))
                for s, split in enumerate(self.sources)}

    def report(self) -> list[str]:
        """What the playbook would say of the mixture: epochs, and the share of other languages than English."""
        lines = [f"warning   {name} is read {n:.1f} times; past about 4 epochs repeated text teaches little (playbook)"
                 for name, n in self.epochs().items() if n > 4]
        lines += [f"warning   stage {stage.name} is left out: its {stage.tokens:,.0f} tokens are no step"
                  for stage, begin, end in zip(self.stages, [0, *self.ends], self.ends) if begin == end]
        foreign = [i for i, split in enumerate(self.sources) if split.name.startswith("multilingual")]
        if foreign:
            tokens = np.diff([0, *self.ends])
            share = sum(n * shares[i] for n, shares in zip(tokens, self.shares) for i in foreign) / tokens.sum()
            lines.append(f"languages {share:.1%} of the run is multilingual; the playbook settled on 12 %, and the limit of "
                         f"20 % that summaries give is {'exceeded' if share > 0.2 else 'kept'}")
        return lines

    def locate(self, step: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, sequence index in it) of the rows first .. first + count of a step's global batch."""
        stage = self.stage(step)
        begin, length = self.ends[stage - 1] if stage else 0, self.contexts[stage]
        index = (step - begin) * self.rows(step) + np.arange(first, first + count, dtype=np.int64)
        source, rank = interleave(index, self.shares[stage])
        rank = rank + self.before[stage][source]
        sequence = np.empty(count, np.int64)
        for s in np.unique(source):
            n = self.packings[length][s].count
            for epoch in np.unique(rank[source == s] // n):
                here = (source == s) & (rank // n == epoch)
                place, key = rank[here] % n, (self.seed, int(s), int(epoch))
                sequence[here] = small_shuffle(n, key)[place] if n <= SMALL else permute(place, n, list(key))
        return source, sequence

    def targets(self, step: int) -> int:
        """How many targets of a step's global batch count: what its mean loss is divided by, however many processes share
        it. A mean of their means would give a token more weight where there are few."""
        packings = self.packings[self.contexts[self.stage(step)]]
        rows = self.rows(step)
        return sum(packings[source].targets(int(row)) for source, row in zip(*self.locate(step, 0, rows)))

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Batch:
        """The rows first .. first + count of the global batch of a step (all without them)."""
        context = self.contexts[self.stage(step)]
        count = self.rows(step) if count is None else count
        source, sequence = self.locate(step, first, count)
        tokens, targets = np.empty((count, context), np.int64), np.empty((count, context), np.int64)
        starts: list[np.ndarray] = [None] * count
        for s in np.unique(source):
            rows = np.flatnonzero(source == s)
            tokens[rows], targets[rows], parts = cut_sequences(self.packings[context][s], sequence[rows])
            for row, part in zip(rows, parts):
                starts[row] = part
        return Batch(tokens, targets, pack_cu_seqlens(starts, context), source)


def validation_batches(split: Split, context: int, rows: int, sequences: int) -> Iterator[Batch]:
    """The first `sequences` sequences of a split: a fixed slice, whatever the batch size. The last batch is filled up
    with rows that have no targets, so that all have one shape. `documents`: at most so many touch a row."""
    packing = Packing(split, context)
    indices = np.arange(min(sequences, packing.count))
    for i in range(0, len(indices), rows):
        tokens, targets, starts = cut_sequences(packing, indices[i:i + rows])
        missing = rows - len(tokens)
        tokens = np.pad(tokens, ((0, missing), (0, 0)))
        targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-100)
        starts += [np.zeros(1, np.int64)] * missing
        yield Batch(tokens, targets, pack_cu_seqlens(starts, context), np.zeros(rows, np.int64))


def load_data(data: str, vocab_size: int = 8192, verify: bool = True) -> tuple[Tokenizer, list[dict[str, Split]]]:
    """The tokenizer and the sources of prepared folders. With `verify` their sha256 is checked, and the embedded corpus
    is made, with a tokenizer of `vocab_size`, if it is asked for and not there yet."""
    if verify and data.split(",")[0] == "data/laptop" and not Path("data/laptop").exists():
        print("data      data/laptop is not there yet: reading the Python installation, training a tokenizer, encoding")
        prepare_embedded("data/laptop", vocab_size)
    tokenizer = Tokenizer.load(find_tokenizer(data))
    if verify and "data/recall" in data.split(",") and not Path("data/recall").exists():
        print("data      data/recall is not there yet: writing documents with notes to look up, encoding")
        prepare_recall("data/recall", tokenizer)
    return tokenizer, [load_source(folder, tokenizer, verify) for folder in source_folders(data)]


def fit_stages(stages: tuple[Stage, ...], names: list[str], tokens: float = 0) -> tuple[Stage, ...]:
    """The stages with a mixture that the sources have, and `tokens` in all (0: as many as the stages say)."""
    total, wanted = sum(stage.tokens for stage in stages), {name for stage in stages for name in stage.mixture}
    if wanted - set(names):
        print(f"mixture   the data has {', '.join(sorted(names))}, the recipe's mixture {', '.join(sorted(wanted))}: the "
              "sources are taken as large as they are")
        stages = tuple(replace(stage, mixture={}) for stage in stages)
        if all(replace(stage, name="", tokens=0) == Stage("", 0, {}) for stage in stages):  # nothing tells them apart
            stages = (Stage("train", total, {}),)
    return tuple(replace(stage, tokens=stage.tokens * (tokens or total) / total) for stage in stages)


# ---- command line ---------------------------------------------------------------------------------------------


def describe(data: str) -> str:
    """One line a source: documents, tokens, bytes a token; what was dropped."""
    tokenizer = Tokenizer.load(find_tokenizer(data))
    lines = []
    for folder in source_folders(data):
        splits = load_source(folder, tokenizer, verify=False)
        train, val = splits["train"], splits["val"]
        lines.append(f"{folder.name:12} {len(train.starts) - 1:9,} documents {len(train.tokens):13,} tokens "
                     f"{train.bytes / len(train.tokens):5.2f} bytes/token | held out {len(val.starts) - 1:6,} documents "
                     f"{len(val.tokens):9,} tokens")
        if dropped := json.loads((folder / "meta.json").read_text("utf-8"))["dropped"]:
            lines.append(" " * 13 + "dropped: " + ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()))
    return "\n".join(lines)


def show(data: str, context: int = 2048, documents: int = 2) -> None:
    """Prints the sources, the packings side by side, document lengths, and the first sequence with its boundaries."""
    tokenizer = Tokenizer.load(find_tokenizer(data))
    print(describe(data))
    lengths = {}
    for folder in source_folders(data):
        split = load_source(folder, tokenizer, verify=False)["train"]
        lengths[folder.name] = np.diff(split.starts)
        print(f"\n{folder.name}: packed into sequences of {context:,}\n"
              f"{'':10}{'sequences':>12}{'utilisation':>13}{'dropped':>10}{'cut':>10}{'mean square of lengths':>25}")
        for strategy in PACKINGS:
            row = Packing(split, context, strategy).report()
            print(f"{strategy:10}{row['rows']:>12,}{row['utilisation']:>13.1%}{row['dropped']:>10.1%}{row['cut']:>10.1%}"
                  f"{row['mean_square']:>25,.0f}")
        print("tokens a document " + histogram(lengths[folder.name]))
        for start, end in zip(split.starts[:documents], split.starts[1:documents + 1]):
            text = tokenizer.decode(split.tokens[start + 1:min(end, start + 60)].tolist())
            print(f"--- tokens {start:,} to {end:,}, a document of {end - start:,}\n{text}")
    path = Path(data.split(",")[0]) / "document-lengths.png"
    if picture(lengths, path):
        print(f"\nThe lengths of all documents are drawn in {path}")


def histogram(lengths: np.ndarray) -> str:
    """Shares of documents by length, in powers of 4."""
    edges = [4**i for i in range(2, 10)]
    counts = np.histogram(lengths, [0, *edges, np.inf])[0] / len(lengths)
    names = [f"<{edges[0]}", *(f"{a:,}-{b - 1:,}" for a, b in zip(edges, edges[1:])), f">={edges[-1]:,}"]
    return ", ".join(f"{name}: {share:.0%}" for name, share in zip(names, counts) if share > 0)


def picture(lengths: dict[str, np.ndarray], path: Path) -> bool:
    """The histogram of lengths as a picture; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    bins = np.geomspace(1, max(int(n.max()) for n in lengths.values()) + 1, 50)
    for name, n in lengths.items():
        axes.hist(n, bins, histtype="step", label=name, weights=np.full(len(n), 1 / len(n)))
    axes.set(xscale="log", xlabel="tokens a document", ylabel="share of the documents")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare | show")
    p = commands.add_parser("prepare", help="text -> token files")
    p.add_argument("sources", nargs="*", metavar="SOURCE",
                   help="files, folders, hf:DATASET[:CONFIG[:SPLIT]]; none: the embedded corpus. NAME=SOURCE names one; what "
                   "is named multilingual... counts as other languages than English")
    p.add_argument("--out", help="where to (default: data/NAME of the first source)")
    p.add_argument("--tokenizer", help="as for `tokenizer.py fertility`; without it one is trained on the sources")
    p.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer that is trained")
    p.add_argument("--sample-bytes", type=float, default=2e7, help="of text that the tokenizer is trained on")
    p.add_argument("--max-tokens", type=float, default=0, help="of each source, about; 0: all")
    p.add_argument("--text-key", default="text", help="the field of a data set that holds the text")
    p = commands.add_parser("show", help="what prepared data holds, and how it packs")
    p.add_argument("data", metavar="DIR")
    p.add_argument("--context", type=int, default=2048, help="tokens of a sequence")
    args = parser.parse_args()
    if args.command == "show":
        if args.context < 1:
            raise UserError(f"--context {args.context} is no length of a sequence; give 1 or more, such as 2048")
        return show(args.data, args.context)
    if not 0 < args.sample_bytes < math.inf or not 0 <= args.max_tokens < math.inf:
        raise UserError("--sample-bytes and --max-tokens are numbers above 0, such as 2e7")
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    if not args.sources:
        out = args.out or "data/laptop"
        sources = {name: documents() for name, documents in EMBEDDED.items()}
    else:
        pairs = [s.split("=", 1) if "=" in s and not Path(s).exists() else
                 (s.split(":")[1].split("/")[-1] if s.startswith("hf:") else Path(s).resolve().name.split(".")[0], s)
                 for s in args.sources]
        named = dict(pairs)
        if len(named) < len(pairs):
            raise UserError("two sources have the same name; name them apart with NAME=PATH")
        for name in named:
            if not re.fullmatch(r"[\w-]+", name):
                raise UserError(f"{name!r} is no name for a source; give one of letters and digits as NAME=PATH")
        out = args.out or f"data/{next(iter(named))}"
        sources = {name: Source(path, args.text_key) for name, path in named.items()}
    prepare(sources, out, tokenizer, args.vocab_size, args.sample_bytes, max_tokens=args.max_tokens)
    print(describe(out))
    print(f"Prepared {out}. Train on it with: python train.py --data {out}")


if __name__ == "__main__":
    run(main)
