"""Data: from text to batches, the chapter that matters most.

SmolLM3's recipe is a mixture that changes: web, code and math at 85/12/3 % in stage 1, 75/15/10 in stage 2, and
63/24/13 while the learning rate decays, because the model remembers best what it reads last (playbook). Text becomes
token files once. Everything after that is computed from the step number, so no loader has a state to lose:

    documents -> token files (one folder per source) -> sequences -> mixture of a stage -> batch of a step

Exact duplicates are dropped, and so are documents that repeat a span of up to 13 tokens 32 times (playbook). Packing
cuts documents into sequences, by default end to end. Document starts travel with each batch as `cu_seqlens`, so that
attention can stay inside a document: no effect in short context (loss 2.197 against 2.198), adopted for long context
and because a step gets cheaper.

    python data.py prepare                             # the embedded corpus -> data/laptop
    python data.py prepare my.txt notes/ --out data/mine [--tokenizer data/laptop]
    python data.py prepare web=dump/ hf:HuggingFaceFW/fineweb-edu:sample-10BT --max-tokens 1B --out data/web
    python data.py show data/laptop                    # how it packs, how long documents are, where they begin
    python data.py tokenizer dump/ --vocab-size 32768 --out tokenizers/mine

Without a network the Python installation is the corpus: docstrings of the standard library, numpy and torch and the
language reference (prose), the standard library's modules (code), and generated arithmetic (math).
"""

import argparse
import bisect
import bz2
import codecs
import contextlib
import copy
import functools
import glob
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import shutil
import sys
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tokenizer import Parser, Tokenizer, UserError, draw, number, option, reading, run, train_bpe, utf8

FORMAT = 2  # of the token files
HELD_OUT = 0.03  # share of the documents that is kept for validation
LONGEST_PIECE = 16_384  # bytes; longer text files are cut into documents, after a blank line where there is one
LONGEST_VALUE = 16 << 20  # bytes of a line or a value; a longer document is more likely a mistake than a text
SHARD_TOKENS = 2**24  # a shard ends with the job that reaches this many tokens: bounded files, bounded memory
JOB_BYTES = 2**20  # text that one thread encodes at a time
SMALL = 2**16  # sequences of a source whose order is kept in memory, at most 512 KB per epoch
SAMPLED_SHARDS = 64  # of a data set, for training a tokenizer


# ---- text sources ---------------------------------------------------------------------------------------------
# A reader yields (text, held, offset) for each document of one file. held: a number in [0, 1), uniform over documents,
# below HELD_OUT for validation; None: the hash of the text. offset: where the same reader resumes behind the document.

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": lambda file: open_zst(file)}
ROWS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}  # suffix -> the builder in `datasets`


def uniform(key: str) -> float:
    """A number in [0, 1) from the key alone: the same key is always on the same side, in every run and order."""
    return int.from_bytes(hashlib.sha256(utf8(key)).digest()[:6], "big") / 2**48


def open_zst(file: Path):
    """The unpacked bytes of a .zst file. Python has zstd from 3.14 on; before that a package does."""
    try:
        from compression import zstd
        return zstd.open(file)
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{file} needs a package that is missing: pip install zstandard") from None
    unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
    return io.BufferedReader(unpacker.stream_reader(open(file, "rb"), read_across_frames=True))


@contextlib.contextmanager
def opened(file: str | Path) -> Iterator:
    """The bytes of a file, unpacked if its name ends like a packed file's; UserError if they cannot be read."""
    with reading(file), OPENERS.get(Path(file).suffix.lower(), functools.partial(open, mode="rb"))(file) as stream:
        yield stream


def not_utf8(file: Path, start: bytes, place: str = "") -> UserError:
    """The error for a text that begins with `start`: names its encoding where a mark, or zeros on one side only, tell."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
             codecs.BOM_UTF16_BE: "UTF-16"}
    name = next((name for mark, name in marks.items() if start.startswith(mark)), "") or {
        (True, False): "UTF-16BE", (False, True): "UTF-16LE"}.get((0 in start[::2], 0 in start[1::2]), "")
    if not name and 0 in start:
        return UserError(f"{file} is binary, not UTF-8 text: leave it out")
    return UserError(f"{file} is {name + ', ' if name else ''}not UTF-8 text{place}: convert it, for example with "
                     f"`iconv -f {name or 'WINDOWS-1252'} -t UTF-8`, or leave it out")


def read_plain(file: Path, held: float, offset: int) -> Iterator[tuple[str, float | None, int]]:
    """A text file in documents of at most LONGEST_PIECE bytes. `held` counts for a file that is not cut; of a long file
    the last 3 % are held out, so that the two sides touch at one seam only."""
    with opened(file) as stream:
        size = sum(map(len, iter(functools.partial(stream.read, 1 << 20), b"")))
    seam = size - int(HELD_OUT * size)  # a piece that ends behind it is held out
    with opened(file) as stream:
        stream.seek(offset)
        buffer, ended = b"", False
        while buffer or not ended:
            while len(buffer) <= LONGEST_PIECE and not ended:
                block = stream.read(1 << 17)
                ended, buffer = not block, buffer + block
                if b"\0" in block:
                    raise not_utf8(file, block)
            end, whole = len(buffer), offset == 0 and len(buffer) <= LONGEST_PIECE
            if not whole:
                if (line := buffer.rfind(b"\n", 0, max(0, seam - offset)) + 1) > 0 and line <= LONGEST_PIECE:
                    end = line  # the last line break before the seam
                elif end > LONGEST_PIECE:
                    end = piece_end(buffer)
            try:
                text = buffer[:end].decode("utf-8-sig" if offset == 0 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise not_utf8(file, buffer, f" at byte {offset + error.start}") from None
            buffer, offset = buffer[end:], offset + end
            if text.strip():
                yield text, held if whole else 0.0 if offset > seam else 0.999, offset
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


def read_lines(file: Path, text_key: str, offset: int, strict: bool, leave_out: Callable) -> Iterator[
        tuple[str, float | None, int]]:
    """One document per line of JSON. A line without text is an error, unless not `strict` and a line before it had some."""
    found = offset > 0
    with opened(file) as stream:
        stream.seek(offset)
        while line := stream.readline(LONGEST_VALUE):
            begin, offset = offset, offset + len(line)
            if len(line) == LONGEST_VALUE:
                while line and not line.endswith(b"\n"):  # skip the rest without keeping it
                    line = stream.readline(LONGEST_VALUE)
                    offset += len(line)
                leave_out("documents over 16 MB", f"the line of {file} that ends at byte {offset} is longer than 16 MB")
            elif line.strip():
                try:
                    text = text_of(json.loads(line.decode("utf-8" if begin else "utf-8-sig")), text_key)
                except (ValueError, RecursionError, LookupError) as error:
                    must = strict or not found  # only then is the number of the line worth counting
                    place = f"line {line_number(file, offset)}" if must else f"the line that ends at byte {offset}"
                    if isinstance(error, UnicodeDecodeError):
                        problem = not_utf8(file, line, f" in {place}")
                    else:
                        reason = error.args[0] if isinstance(error, LookupError) else "is not JSON: correct or remove it"
                        problem = UserError(f"{file} {place} {reason}")
                    if must:
                        raise problem from None
                    leave_out("unreadable lines", str(problem))
                else:
                    found = True
                    yield text, None, offset


def line_number(file: Path, offset: int) -> int:
    """The number of the line that ends at byte `offset`."""
    with opened(file) as stream:
        return next(n for n, end in enumerate(itertools.accumulate(map(len, stream)), 1) if end >= offset)


def text_of(record: dict, text_key: str) -> str:
    """The text of a record, "" for null. LookupError, a reason to print, if it has none."""
    if not isinstance(record, dict):
        raise LookupError(f'is not a JSON object with text in "{text_key}"')
    if text_key not in record:
        raise LookupError(f"has no field {text_key}: choose one of {', '.join(record)} with --text-key")
    if not isinstance(record[text_key], str | None):
        raise LookupError(f"has no text in the field {text_key}: choose one of {', '.join(record)} with --text-key")
    return record[text_key] or ""


def read_rows(load: Callable, where: str, text_key: str, state: dict, leave_out: Callable) -> Iterator[
        tuple[str, float | None, dict]]:
    """One document per row of what `load(datasets)` streams. The offset is the state that `datasets` resumes from.

    Its iterators are closed, not abandoned: one that is left half-read may keep the process from ending.
    """
    with streaming(where) as datasets:
        rows = load(datasets)
        if rows.column_names and text_key in rows.column_names:
            rows = rows.select_columns(text_key)
        if state:
            rows.load_state_dict(state)
        with closing(iter(rows)) as stream:
            for row in stream:
                try:
                    text = text_of(row, text_key)
                except LookupError as error:
                    raise UserError(f"{where} {error.args[0]}") from None
                if len(text) >= LONGEST_VALUE:
                    leave_out("documents over 16 MB", f"a row of {where} is longer than 16 MB: {text[:40]!r}...")
                else:
                    yield text, None, rows.state_dict()


@contextlib.contextmanager
def streaming(where: str) -> Iterator:
    """The package `datasets`. Whatever goes wrong in it or between here and the Hub becomes a UserError."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{where} needs a package that is missing: pip install datasets") from None
    try:
        yield datasets
    except UserError:
        raise
    except Exception as error:  # its own errors, those of its HTTP library, of Arrow and of pandas
        hint = ("check the name, hf:DATASET:CONFIG:SPLIT where there are several, and the network, and run the command again"
                if where.startswith("hf:") else "correct the file or leave it out")
        raise UserError(f"{where} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:400]}): {hint}") from None


class Document(NamedTuple):
    text: str
    held: float  # in [0, 1), uniform over documents; below HELD_OUT it is for validation
    position: tuple[str, int | dict]  # Source.read(position) resumes behind this document


class Source:
    """The documents of a path: text, source code, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow (text and jsonl also
    as .gz, .xz, .bz2, .zst), a folder of those, or hf:DATASET[:CONFIG[:SPLIT]]. A stream in a fixed order, from any position.

    What is held out is decided here and nowhere else: documents of data sets by the hash of their text, text files by that
    of their name, a long text file at a seam (read_plain). A file that is named must be readable; in a folder an
    unreadable one is left out, said on stderr and counted. What fails on the way to the Hub is always an error.
    """

    def __init__(self, where: str | Path, text_key: str = "text", revision: str | None = None):
        self.where, self.text_key, self.revision, path = str(where), text_key, revision, Path(where)
        self.dropped, self.said = Counter(), {}  # documents left out per reason, and what was printed of them
        self.hub, self.folder, self.size = self.where.startswith("hf:"), path.is_dir(), 0
        if self.hub:
            return self.open_hub()
        self.files = files_below(path) if self.folder else {path.name: path}
        if not path.exists() or not self.files:
            raise UserError(f"{path} {'holds no files' if self.folder else 'does not exist'}: give a text file, .jsonl, "
                            ".parquet, .csv or a folder of those")
        self.sizes = {name: file.stat().st_size for name, file in self.files.items()}
        if not any(file.suffix.lower() in OPENERS | ROWS for file in self.files.values()):
            self.size = sum(self.sizes.values())  # bytes that will be read; 0: not known

    def open_hub(self) -> None:
        """Finds a data set and its shards, on the Hub at one revision, so that an interrupted preparation reads on in what
        it began with."""
        name, config, split = (self.where[3:].split(":") + ["", ""])[:3]
        with streaming(self.where) as datasets:
            import huggingface_hub

            if not self.revision and not Path(name).exists():
                self.revision = huggingface_hub.HfApi().dataset_info(name).sha
            self.rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True,
                                              revision=self.revision)
        self.files = dict.fromkeys(map(str, range(self.rows.num_shards)), self.where)
        self.sizes = dict.fromkeys(self.files, 1)

    def read(self, position: tuple[str, int | dict] | None = None) -> Iterator[Document]:
        """All documents, or those behind `position`."""
        names, offset = list(self.files), 0
        if position:
            if position[0] not in self.files:
                raise UserError(f"{self.where} no longer holds {position[0]}, which was being read; put it back, or remove "
                                "the unfinished preparation")
            names, offset = names[names.index(position[0]):], position[1]
        for name in names:
            try:
                with closing(self.open(name, offset)) as documents:
                    for text, held, offset in documents:
                        yield Document(text, uniform(text) if held is None else held, (name, offset))
            except UserError as error:
                if not self.folder:
                    raise
                self.leave_out("unreadable files", str(error))
            offset = 0

    def open(self, name: str, offset: int | dict) -> Iterator[tuple[str, float | None, int | dict]]:
        """The reader of one file (one shard on the Hub) from an offset on."""
        file, rest = self.files[name], (self.text_key, offset)
        if self.hub:
            return read_rows(lambda _: self.rows.shard(self.rows.num_shards, int(name)), self.where, *rest, self.leave_out)
        suffixes = [suffix for suffix in map(str.lower, file.suffixes) if suffix not in OPENERS]
        kind, builder = suffixes[-1] if suffixes else "", ROWS.get(suffixes[-1] if suffixes else "")
        if kind not in (".parquet", ".arrow"):
            with opened(file) as stream:
                start = stream.read(4096).removeprefix(codecs.BOM_UTF8)
            if b"\0" in start or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise not_utf8(file, start)
            if kind == ".json":  # an array, JSON lines, or one object, a setting for example, which is read as text
                first, line_ends, _ = start.lstrip().partition(b"\n")
                builder = "json" if first.startswith(b"[") else None
                kind = ".jsonl" if first.startswith(b"{") and (first.rstrip().endswith(b"}") or not line_ends) else kind
        if builder:
            options = {"sep": "\t"} if kind == ".tsv" else {}
            options |= {"keep_default_na": False} if builder == "csv" else {}  # "NA" and "null" are text
            return read_rows(lambda datasets: datasets.load_dataset(
                builder, data_files={"train": glob.escape(str(file))}, split="train", streaming=True, **options),
                str(file), *rest, self.leave_out)
        if kind in (".jsonl", ".ndjson"):
            return read_lines(file, *rest, not self.folder, self.leave_out)
        return read_plain(file, uniform(name), offset)

    def done(self, position: tuple[str, int]) -> int:
        """Bytes of the files read up to a position, where `size` is known."""
        names = list(self.files)
        return sum(self.sizes[name] for name in names[:names.index(position[0])]) + position[1]

    def leave_out(self, reason: str, what: str) -> None:
        """Counts a document or file that is left out. Prints the first three per reason: a folder of pictures must not fill
        the screen."""
        self.dropped[reason] += 1
        said = self.said.setdefault(reason, [])
        if what not in said and len(said) < 3:
            said.append(what)
            tqdm.write(f"left out: {what}", file=sys.stderr)

    def sample(self, max_bytes: float, held_out: float = 0.0) -> Iterator[str]:
        """Text of at most max_bytes, nothing that is held out: the same share from the start of each file, or from the start
        of some shards on the Hub, evenly apart."""
        names = list(self.files)[::-(-len(self.files) // SAMPLED_SHARDS) if self.hub else 1]
        size = max(1, sum(self.sizes[name] for name in names))
        for name in names:
            part, left = copy.copy(self), max_bytes * self.sizes[name] / size
            part.files, part.dropped = {name: self.files[name]}, Counter()  # what is left out counts when all is read
            with closing(part.read()) as documents:
                for document in documents:
                    if document.held >= held_out:
                        text = document.text[:max(1, int(left))]
                        left -= len(utf8(text))
                        yield text
                    if left <= 0:
                        break


def files_below(folder: Path) -> dict[str, Path]:
    """{path inside the folder: file} without what is hidden. A folder that links lead to twice is read once."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
        elif not seen.add(real):
            found += [Path(root, name) for name in names if not name.startswith(".")]
    return {file.relative_to(folder).as_posix(): file for file in sorted(found) if file.is_file()}


# ---- the embedded corpus --------------------------------------------------------------------------------------
# (key, text) pairs. Texts with the same key are held out, or trained on, together.

SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"}
DOCSTRING = re.compile(r'(?:\A(?:#[^\n]*\n|\s)*|:[ \t]*\n[ \t]*)[rR]?"""(.*?)"""', re.DOTALL)
THINGS = "apples books coins stamps pencils shells tickets marbles cards stones".split()
PEOPLE = "Ada Ben Chen Dora Emil Fatima Goro Hana Ivan Julia".split()


def modules(name: str, root: str | Path) -> Iterator[tuple[str, str]]:
    """(name/path below root, text) of every module that is not a test, in a fixed order."""
    for path in sorted(Path(root).rglob("*.py")):
        inside = path.relative_to(root)
        if not SKIPPED.intersection(inside.parts):
            with contextlib.suppress(UnicodeDecodeError, OSError):  # some distributions hold broken links
                yield f"{name}/{inside.as_posix()}", path.read_text("utf-8")


def embedded_code() -> Iterator[tuple[str, str]]:
    """The standard library, one document per module."""
    return (pair for pair in modules("python", sysconfig.get_paths()["stdlib"]) if pair[1].strip())


def embedded_prose() -> Iterator[tuple[str, str]]:
    """Docstrings of at least 200 characters, and the language reference that `help()` shows.

    The key is the module's, so no held-out docstring stands in a module that the model trains on.
    """
    roots = {name: Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")}
    for name, root in ({"python": sysconfig.get_paths()["stdlib"]} | roots).items():
        for key, text in modules(name, root):
            for match in DOCSTRING.finditer(text):
                if len(match[1]) >= 200:
                    yield key, inspect.cleandoc(match[1]) + "\n"
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics
        yield from ((f"reference/{key}", topics[key]) for key in sorted(topics))


def added(a: int, b: int) -> str:
    """The steps of written addition, from the last digit to the first, and the result."""
    steps, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        steps.append(f"{x} + {y}" + (f" + {carry}" if carry else "") + f" = {total}")
        carry = total // 10
    return ", ".join(steps) + f". So {a} + {b} = {a + b}."


def subtracted(a: int, b: int) -> str:
    """a - b in two steps: the tens, then the rest."""
    tens = b // 10 * 10
    return f"{a} - {tens} = {a - tens}, {a - tens} - {b % 10} = {a - b}. So {a} - {b} = {a - b}."


def multiplied(a: int, b: int) -> str:
    """a * b by the digits of a, which has two."""
    tens, ones = a // 10 * 10, a % 10
    return (f"{tens} * {b} = {tens * b}, {ones} * {b} = {ones * b}, {tens * b} + {ones * b} = {a * b}. "
            f"So {a} * {b} = {a * b}.")


def generated_math(problems: int = 40_000, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Arithmetic with worked steps, which come before the result because a model writes from left to right. The key is the
    problem without its story, so the same numbers are never both trained on and held out."""
    rng = random.Random(seed)
    signs = {"sum": "+", "difference": "-", "product": "*", "comparison": "?", "got": "+", "left": "-"}
    for _ in range(problems):
        kind, limit = rng.choice(list(signs)), rng.choice([10, 100, 1000])
        a, b = rng.randrange(limit), rng.randrange(limit)
        who, what = rng.choice(PEOPLE), rng.choice(THINGS)
        high, low, sign = max(a, b), min(a, b), ">" if a > b else "<" if a < b else "="
        x, y = a % 90 + 10, b % 8 + 2  # of a product
        question, answer = {
            "sum": (f"What is {a} + {b}?", added(a, b)),
            "difference": (f"What is {high} - {low}?", subtracted(high, low)),
            "product": (f"What is {x} * {y}?", multiplied(x, y)),
            "comparison": (f"Which is larger, {a} or {b}?", f"{a} {sign} {b}, so it is {high}."),
            "got": (f"{who} has {a} {what} and gets {b} more. How many {what} does {who} have now?",
                    f"{who} has {a} + {b} {what}. {added(a, b)}"),
            "left": (f"{who} has {high} {what} and gives away {low}. How many {what} are left?",
                     f"{who} has {high} - {low} {what}. {subtracted(high, low)}")}[kind]
        yield f"{x}*{y}" if kind == "product" else f"{low}{signs[kind]}{high}", f"Question: {question}\nAnswer: {answer}\n"


EMBEDDED = {"prose": embedded_prose, "code": embedded_code, "math": generated_math}

# Lookups: notes of a key and a value between the lines of a text, asked for behind it. A pair is held out by its hash:
# the pairs that an evaluation asks for never occur in training, so only the text in front of the question can tell.
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
    """The value follows its key at once: a small model learns to look that up (an induction head) in 150 steps, but does not
    in 400 steps with a word between them."""
    return f"Note: {key} {value}.\n"


def note_question(key: str) -> str:
    """Ends where the value must follow, after its key as in the note; in the form of the math source's problems."""
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
    """(key, text) pairs in memory, with the interface of Source. The key decides what is held out."""

    def __init__(self, documents: Iterable[tuple[str, str]]):
        self.documents, self.where, self.dropped = list(documents), "memory", Counter()
        self.size = sum(len(utf8(text)) for _, text in self.documents)

    def read(self, position: tuple[str, int] | None = None) -> Iterator[Document]:
        begin = position[1] if position else 0
        for i, (key, text) in enumerate(self.documents[begin:], start=begin + 1):
            yield Document(text, uniform(key), ("", i))

    def done(self, position: tuple[str, int]) -> int:
        return sum(len(utf8(text)) for _, text in self.documents[:position[1]])

    def sample(self, max_bytes: float, held_out: float = 0.0) -> Iterator[str]:
        texts = [text for key, text in self.documents if uniform(key) >= held_out]
        for text in random.Random(0).sample(texts, len(texts)):
            if max_bytes > 0:
                yield text[:int(max_bytes)]
                max_bytes -= len(text)


# ---- token files ----------------------------------------------------------------------------------------------
# One folder per source: {train,val}-NNNNN.bin hold the ids (uint16 or uint32, little-endian) of documents, each opened
# by EOS; {train,val}.starts the document starts (int64); meta.json, written last, says what these files must hold. EOS
# opens a document because it is then both the target that ends the document before and the prompt that starts this one:
# the attention of a document begins at its own EOS.
#
# All of it is made in OUT.partial, a shard at a time, and renamed at the end, so that a folder that exists is complete.
# A shard is complete once its shard-NNNNN.json is there: it says up to which document of the source everything is
# stored. Whatever stops the work, kill -9 too, the same command resumes behind that document and makes the unfinished
# shard again.


class Seen:
    """Hashes (uint64) of the documents read: 8 bytes each, for the last LIMIT documents (256 MB); older ones are forgotten.

    Sorted arrays, each at least twice as long as the next, so that adding is cheap and a search visits few of them.
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

    ids [N]: documents end to end, starts [D + 1] int64: where each begins, and N. Returns bool [D]. In a span of n tokens
    that stands k times in a row, n * (k - 1) consecutive tokens equal the one n places later.
    """
    bad = np.zeros(len(starts) - 1, bool)
    for n in range(1, longest + 1):
        same = ids[n:] == ids[:-n]
        run = same  # run[i]: the 1, 2, 4, 8, 16 places from i on are the same; ends most searches in a few passes
        for shift in (1, 2, 4, 8):
            run = run[:-shift] & run[shift:]
        if run.any():
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
    position: tuple[str, int | dict]  # of the last document read, in this job or one before
    dropped: Counter  # reason -> documents


def read_jobs(source: Source | Listed, position: tuple | None, seen: Seen, limit: float) -> Iterator[Job]:
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
                   np.array([len(raw) for _, raw in kept], np.int64), hashes[new], last, dropped)

    with closing(source.read(position)) as stream:
        for document in stream:
            documents.append(document)
            size, last = size + len(document.text), document.position
            if size >= JOB_BYTES or len(documents) >= 4096:
                yield job()
                documents, size = [], 0
        if documents or source.dropped and last:  # what is left out behind the last document counts as well
            yield job()


def encode_job(job: Job, tokenizer: Tokenizer) -> tuple[Job, np.ndarray, np.ndarray, np.ndarray]:
    """The job; ids [N] of its documents, each opened by EOS; starts [D + 1]; which documents repeat a span too often [D]."""
    parts = [tokenizer.encode_array(text) for text in job.texts]
    job.texts.clear()  # a shard's text would take more memory than its tokens
    starts = np.cumsum([0, *(1 + len(part) for part in parts)])
    ids = np.full(starts[-1], tokenizer.eos_id, token_dtype(tokenizer))
    for start, part in zip(starts, parts):
        ids[start + 1:start + 1 + len(part)] = part
    # tokens that are hardly longer than bytes would make a ruled line a repeated span
    return job, ids, starts, repeats_spans(ids, starts) if tokenizer.vocab_size > 512 else np.zeros(len(parts), bool)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def write_source(folder: Path, source: Source | Listed, tokenizer: Tokenizer, seen: Seen, limit: float, seed: int,
                 max_tokens: float) -> None:
    """Makes the token files of a source, or resumes. Encoding runs on all cores: tiktoken releases Python's lock."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    while (file := folder / f"shard-{len(shards):05}.json").exists():
        shards.append(json.loads(file.read_text("utf-8")))
        seen.add(np.fromfile(file.with_suffix(".hash"), "<u8"))
    if (folder / "meta.json").exists():
        return
    position, ended = (tuple(shards[-1]["position"]), shards[-1]["ended"]) if shards else (None, False)
    workers, queue, pending, tokens = os.cpu_count() or 1, deque(), [], sum(shard["read"] for shard in shards)
    with (closing(read_jobs(source, position, seen, limit)) as jobs, ThreadPoolExecutor(workers) as pool,
          tqdm(total=source.size or None, initial=source.done(position) if position and source.size else 0, unit="B",
               unit_scale=True, desc=f"tokenize {folder.name}", leave=False, delay=1) as bar):
        while not ended and (not max_tokens or tokens < max_tokens):
            while (len(queue) < 16 * workers and sum(job.sizes.sum() for job, _ in queue) < 4 * workers * JOB_BYTES
                   and (job := next(jobs, None))):
                queue.append((job, pool.submit(encode_job, job, tokenizer)))
            if ended := not queue:
                break
            job, future = queue.popleft()
            pending.append(future.result())
            tokens += pending[-1][2][-1]
            bar.update(source.done(job.position) - bar.n if source.size else job.sizes.sum())
            if sum(starts[-1] for _, _, starts, _ in pending) >= SHARD_TOKENS:
                shards.append(write_shard(folder, len(shards), pending, seed, ended=False))
                pending = []
        for job, future in queue:
            future.cancel()
            seen.forget(job.hashes)
        nothing_held = not any(s["val"]["documents"] for s in shards) and not any(job.held.any() for job, *_ in pending)
        if max_tokens and pending and nothing_held:  # the held-out end of a long text file was not reached
            held = pending[-1][0].held
            held[-max(1, round(HELD_OUT * len(held))):] = True
        if pending:
            shards.append(write_shard(folder, len(shards), pending, seed, ended))
    finish_source(folder, shards, tokenizer, seed)


def write_shard(folder: Path, number: int, pending: list[tuple], seed: int, ended: bool) -> dict:
    """The files of one shard, its documents shuffled, and the contents of its shard-NNNNN.json. `ended`: it is the last."""
    jobs, ids, starts, bad = zip(*pending)
    offsets = np.cumsum([0, *map(len, ids)])
    begins = np.concatenate([s[:-1] + o for s, o in zip(starts, offsets)])
    lengths = np.concatenate([np.diff(s) for s in starts])
    ids, bad, held, sizes, hashes = (np.concatenate(x) for x in (
        ids, bad, [j.held for j in jobs], [j.sizes for j in jobs], [j.hashes for j in jobs]))
    dropped = sum((job.dropped for job in jobs), Counter({"repeated spans": int(bad.sum())}))
    shard = {"position": jobs[-1].position, "dropped": dropped, "read": int(offsets[-1]), "ended": ended}
    order, name = np.random.default_rng([seed, number]).permutation(len(begins)), f"shard-{number:05}"
    for split, wanted in (("train", ~held & ~bad), ("val", held & ~bad)):
        chosen = order[wanted[order]]
        file = folder / f"{split}-{number:05}.bin"
        write_file(file.with_suffix(".lengths"), [lengths[chosen].astype("<i8")])
        shard[split] = {"documents": len(chosen), "tokens": int(lengths[chosen].sum()), "bytes": int(sizes[chosen].sum()),
                        "sha256": write_file(file, (ids[b:b + n] for b, n in zip(begins[chosen], lengths[chosen])))}
    write_file(folder / f"{name}.hash", [hashes])
    write_file(folder / f"{name}.json", [json.dumps(shard).encode()])
    return shard


def write_file(path: Path, parts: Iterable[np.ndarray | bytes]) -> str:
    """Writes the parts one after another, the whole file or nothing. Returns its sha256."""
    partial, digest = path.with_name(path.name + ".partial"), hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
    partial.replace(path)
    return digest.hexdigest()


def finish_source(folder: Path, shards: list[dict], tokenizer: Tokenizer, seed: int) -> None:
    """Document starts over all shards, and meta.json."""
    dropped = sum((Counter(shard["dropped"]) for shard in shards), Counter())
    meta = {"format": FORMAT, "tokenizer": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "seed": seed,
            "dtype": token_dtype(tokenizer).name, "dropped": dropped}
    for split in ("train", "val"):
        entries = [shard[split] for shard in shards]
        meta[split] = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "bytes")}
        if meta[split]["documents"] == 0:
            kept = sum(shard[s]["documents"] for shard in shards for s in ("train", "val"))
            raise UserError(f"{folder.name} has {kept} document(s) left ({counted(dropped) or 'nothing'} dropped), and one "
                            "must be held out; give more text")
        files = [folder / f"{split}-{number:05}.lengths" for number in range(len(shards))]
        meta[split] |= {"starts_sha256": write_file(folder / f"{split}.starts", document_starts(files)),
                        "shards": [{key: entry[key] for key in ("tokens", "sha256")} for entry in entries]}
    write_file(folder / "meta.json", [json.dumps(meta, indent=1).encode()])


def counted(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in dropped.items())


def document_starts(files: list[Path]) -> Iterator[np.ndarray]:
    """From the lengths of each shard's documents: where each begins, and the end of the last; one array per shard."""
    position = 0
    for file in files:
        ends = position + np.cumsum(np.fromfile(file, "<i8"))
        if len(ends):
            yield np.concatenate(([position], ends[:-1])).astype("<i8")
            position = int(ends[-1])
    yield np.array([position], "<i8")


class Tokens:
    """The tokens of several files end to end, memory-mapped: len(), an index, a slice."""

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
    labels: Tokens | None = None  # the tokens as targets, -100 for those that are not learned; None: the tokens


def load_source(folder: str | Path, tokenizer: Tokenizer, verify: bool = True) -> dict[str, Split]:
    """{"train": Split, "val": Split}, after checking that the files are what meta.json says.

    `verify` reads the files once, to compare their sha256, their ids with the vocabulary, and the order of the starts;
    without it only their sizes are checked.
    """
    folder, splits = Path(folder), {}
    remake = f"remove {folder.parent} and make it again with `python data.py prepare`"
    with reading(folder / "meta.json"):
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta["format"] != FORMAT:
            raise UserError(f"{folder} has token-file format {meta['format']}, this code reads {FORMAT}; {remake}")
        if meta["tokenizer"] != tokenizer.hash:
            raise UserError(f"{folder} was encoded with another tokenizer (hash {meta['tokenizer'][:8]}, not "
                            f"{tokenizer.hash[:8]}); put its tokenizer.json beside it, or prepare the text again with "
                            "`--tokenizer`")
        for split in ("train", "val"):
            entry, arrays = meta[split], []
            files = [(f"{split}-{i:05}.bin", token_dtype(tokenizer), shard["tokens"], shard["sha256"])
                     for i, shard in enumerate(entry["shards"])]
            for name, dtype, count, sha256 in [*files, (f"{split}.starts", np.dtype("<i8"), entry["documents"] + 1,
                                                        entry["starts_sha256"])]:
                path = folder / name
                size = path.stat().st_size if path.exists() else 0
                if size != count * dtype.itemsize:
                    raise UserError(f"{path} has {size:,} bytes, not the {count * dtype.itemsize:,} that were written: it is "
                                    f"missing, truncated or torn; {remake}")
                with open(path, "rb") as file:
                    if verify and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                        raise UserError(f"{path} is not the file that was written (its sha256 differs); {remake}")
                arrays.append(np.memmap(path, dtype, "r") if count else np.empty(0, dtype))
            *parts, starts = arrays
            tokens = Tokens(parts)
            if verify and (max(int(part.max()) for part in tokens.parts) >= tokenizer.vocab_size
                           or starts[0] != 0 or starts[-1] != len(tokens) or (starts[1:] <= starts[:-1]).any()):
                raise UserError(f"{folder} holds ids beyond the vocabulary of {tokenizer.vocab_size:,}, or documents that "
                                f"overlap; {remake}")
            sha256 = hashlib.sha256("".join(file[3] for file in files).encode()).hexdigest()
            splits[split] = Split(folder.name, tokens, starts, int(entry["bytes"]), sha256)
    return splits


def source_folders(data: str) -> list[Path]:
    """`data` names folders, separated by commas; each is a source or holds sources. UserError unless all were made with
    one tokenizer."""
    folders, hashes = [], []
    for name in data.split(","):
        root = Path(name)
        found = [root] if (root / "meta.json").exists() else sorted(p.parent for p in root.glob("*/meta.json"))
        if not found:
            text = root.is_file() or root.is_dir() and any(root.iterdir())  # of the user's own, which nobody must remove
            raise UserError(f"{name} is not prepared data: run `python data.py prepare {name}`, then train on what it makes"
                            if text else f"{name} does not exist; make it with `python data.py prepare YOUR_TEXT --out {name}`")
        folders += found
    for folder in folders:
        with reading(folder / "meta.json"):
            hashes.append(json.loads((folder / "meta.json").read_text("utf-8"))["tokenizer"])
        if hashes[-1] != hashes[0]:
            raise UserError(f"{folder} was encoded with another tokenizer than {folders[0]}: prepare its text again with "
                            f"`--tokenizer {folders[0].parent}`")
    if len({folder.name for folder in folders}) < len(folders):
        raise UserError(f"two sources of {data} have the same name; prepare one again as NAME=PATH")
    return folders


def find_tokenizer(data: str) -> Path:
    """The tokenizer.json of prepared data: in its first folder, or beside it."""
    first = source_folders(data.split(",")[0])[0]
    for folder in (first, first.parent):
        if (folder / "tokenizer.json").exists():
            return folder / "tokenizer.json"
    raise UserError(f"{first.parent} has no tokenizer.json; put it back, or prepare the text again")


def held_out_limit(source: Source | Listed) -> float:
    """Documents whose `held` is below this are held out: HELD_OUT of them, but of fewer than 1,000 at least one."""
    with closing(source.read()) as documents:
        held = [document.held for document in itertools.islice(documents, 1000) if document.text.strip()]
    source.dropped = Counter()  # what is left out is counted when all is read
    if len(held) < 2:
        raise UserError(f"{source.where} has {len(held)} document(s), and one must be held out; give more text (a text file "
                        f"is cut into documents every {LONGEST_PIECE:,} bytes)")
    return max(HELD_OUT, float(np.nextafter(min(held), 1)) if len(held) < 1000 else 0.0)


def prepare(sources: dict[str, Source | Iterable[tuple[str, str]]], out: str | Path, tokenizer: Tokenizer | None = None,
            vocab_size: int = 4096, sample_bytes: float = 2e7, seed: int = 0, max_tokens: float = 0) -> Tokenizer:
    """Tokenizes {name: documents} into `out`/name; without a tokenizer trains one on equal parts of the sources.

    At most `sample_bytes` of the training side go into the tokenizer's training; `max_tokens`: about so many per source.
    A folder that exists is never touched. Interrupted work stays in `out`.partial, and the same call resumes it.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already and is left as it is: choose another --out")
    sources = {name: s if isinstance(s, Source) else Listed(s) for name, s in sources.items()}
    partial = out.with_name(out.name + ".partial")
    task = {"sources": {name: [s.where, s.size if isinstance(s, Listed) else s.text_key] for name, s in sources.items()},
            "tokenizer": tokenizer.hash if tokenizer else [vocab_size, sample_bytes], "seed": seed, "max_tokens": max_tokens,
            "format": FORMAT}
    if (partial / "task.json").exists():
        with reading(partial / "task.json"):
            saved = json.loads((partial / "task.json").read_text("utf-8"))
            if saved["task"] != task:
                raise UserError(f"{partial} is the unfinished preparation of something else; run the command that began it "
                                "again, or remove that folder")
            limits, tokenizer = saved["limits"], Tokenizer.load(partial)
        for name, revision in saved["revisions"].items():
            sources[name] = Source(sources[name].where, sources[name].text_key, revision)
        print(f"resuming {partial}")
    else:
        shutil.rmtree(partial, ignore_errors=True)  # killed before anything was finished
        limits = [held_out_limit(source) for source in sources.values()]
        if tokenizer is None:
            tokenizer = train_bpe((text for source, limit in zip(sources.values(), limits)
                                   for text in source.sample(sample_bytes / len(sources), limit)), vocab_size)
        tokenizer.save(partial)
        revisions = {name: s.revision for name, s in sources.items() if isinstance(s, Source) and s.revision}
        write_file(partial / "task.json", [json.dumps({"task": task, "limits": limits, "revisions": revisions}).encode()])
    seen = Seen()
    try:
        for (name, source), limit in zip(sources.items(), limits):
            write_source(partial / name, source, tokenizer, seen, limit, seed, max_tokens)
        partial.rename(out)
        for pattern in ("*/shard-*", "*/*.lengths", "task.json"):  # meta.json holds all of it
            for path in out.glob(pattern):
                path.unlink()
    except BaseException as error:
        if out.exists() and not partial.exists():
            raise  # complete; only leftovers were still there
        if not any(partial.glob("*/shard-*.json")):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        note = f"finished parts are in {partial}: run the same command again to resume"
        if isinstance(error, (UserError, OSError)):
            raise UserError(f"{error}; {note}") from None
        print(f"\n{note}", file=sys.stderr)
        raise
    return tokenizer


def prepare_embedded(out: str | Path, vocab_size: int = 4096) -> Tokenizer:
    """The embedded corpus: prose, code and math from the Python installation, with a tokenizer of their own."""
    return prepare({name: documents() for name, documents in EMBEDDED.items()}, out, vocab_size=vocab_size)


def prepare_recall(out: str | Path, tokenizer: Tokenizer) -> None:
    """Lookups for contexts of 128, 512 and 2048 of the embedded corpus' tokens, which have about 4 bytes here."""
    prepare({f"recall-{n}": generated_recall(size, documents, seed=n)
             for n, size, documents in ((128, 430, 6000), (512, 1600, 2000), (2048, 6500, 1000))}, out, tokenizer)


# ---- packing: documents -> sequences --------------------------------------------------------------------------
# A packing takes document starts [D + 1] and a context, and returns the row, begin and size of each piece, three int64
# arrays [P]; pieces of one row stand in it in the order of the arrays. PACKINGS is the only place that lists them.


def best_fit(lengths: np.ndarray, context: int) -> np.ndarray:
    """Row of each piece [P] int64: longest first, into the open row that it fills most (Ding et al. 2024, arXiv 2404.10830).

    `room[c]` lists the rows with c places left, bit c of `some` says that there is one: the lowest bit from a piece's
    length on is its best fit. One step per piece, whatever the number of rows.
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


def pack_best_fit(starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents whole, in the fullest row that has room; only longer ones are cut; the rest of a row is padding."""
    cuts = -(-np.diff(starts) // context)  # pieces of each document
    number = np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    begins = np.repeat(starts[:-1], cuts) + number * context
    sizes = np.minimum(context, np.repeat(starts[1:], cuts) - begins)
    return best_fit(sizes, context), begins, sizes


def pack_bos(starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every row begins with a document; the part that does not fit into the row is dropped (nanochat, modded-nanogpt)."""
    lengths = np.diff(starts)
    rows, sizes, row, used = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64), 0, 0
    for i, n in enumerate(lengths.tolist()):
        rows[i], sizes[i] = row, min(n, context - used)
        row, used = (row + 1, 0) if used + n >= context else (row, used + n)
    return rows, starts[:-1], sizes


# concat: documents end to end, cut every `context` tokens. Nothing is lost or padded; arithmetic instead of arrays.
PACKINGS = {"concat": None, "best-fit": pack_best_fit, "bos": pack_bos}


class Packing:
    """The sequences of a split under one of PACKINGS: `count` of them, and the pieces of the token files in each.

    All but concat take 16 bytes of memory per document, and a pass over them (about 1 us each) before training.
    """

    def __init__(self, split: Split, context: int, strategy: str = "concat"):
        self.split, self.context, self.pack = split, context, PACKINGS[strategy]
        self.count = -(-(len(split.tokens) - 1) // context)  # the last may be shorter; the very first token is no target
        if self.pack:
            rows, begins, sizes = self.pack(split.starts, context)
            order = np.argsort(rows, kind="stable")
            self.begins, self.sizes, self.count = begins[order], sizes[order], int(rows.max()) + 1
            self.rows = np.searchsorted(rows[order], np.arange(self.count + 1))  # first piece of each row, and the end

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(where it begins in the tokens, its length) of each piece of a sequence."""
        if not self.pack:
            return [(row * self.context, min(self.context, len(self.split.tokens) - 1 - row * self.context))]
        here = slice(self.rows[row], self.rows[row + 1])
        return list(zip(self.begins[here].tolist(), self.sizes[here].tolist()))

    def targets(self, row: int) -> int:
        """How many targets of a sequence count: neither padding nor left out by labels."""
        end, labels = len(self.split.tokens), self.split.labels
        spans = [(begin + 1, min(begin + length + 1, end)) for begin, length in self.pieces(row)]
        return sum(b - a if labels is None else int((labels[a:b] >= 0).sum()) for a, b in spans)

    def report(self) -> dict[str, float]:
        """What the packing does to the split's documents.

        utilisation: share of the rows' places that hold a token; dropped: share of the tokens in no row; cut: share of the
        documents that are not whole in one row; mean_square: mean of the squared lengths of the pieces of documents that
        attention sees, to which its work is proportional.
        """
        total, starts = len(self.split.tokens), np.asarray(self.split.starts)
        if self.pack:
            begins, sizes = self.begins, self.sizes
        else:
            begins = np.union1d(starts[:-1], np.arange(0, total, self.context))
            sizes = np.diff(begins, append=total)
        document = np.searchsorted(starts, begins, side="right") - 1
        whole = (begins == starts[document]) & (begins + sizes == starts[document + 1])
        kept = sizes.sum()
        return {"rows": self.count, "utilisation": kept / (self.count * self.context), "dropped": 1 - kept / total,
                "cut": 1 - whole.sum() / (len(starts) - 1), "mean_square": float((sizes.astype(float) ** 2).mean())}


# ---- order: which sequence comes when -------------------------------------------------------------------------


def permute(index: np.ndarray, n: int, key: list[int]) -> np.ndarray:
    """Where a shuffle of range(n) puts each index, in constant time and memory: no array of n is made.

    A Feistel network (Luby and Rackoff 1988) permutes the even power of two that holds n; an index that lands outside
    range(n) goes through again. index [..] int64 in range(n), key: non-negative integers that name the shuffle. Returns
    int64 of the same shape.
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
    """`permute` of all of range(n), kept: for a small source one array is cheaper than many small calls."""
    return permute(np.arange(n), n, list(key))


def dealt(n: np.ndarray, weights: list[float]) -> np.ndarray:
    """How many of a stage's first n sequences come from each source, [S, *n.shape] int64.

    Half of the sources get floor(n * their share) and the others the rest; then each half deals likewise among its own.
    So each step of n deals exactly one, and each count is exact to within 1 + log2(S): every stretch has the mixture that
    was asked for, not just the average. Whole weights (rows of the sources) are dealt in whole numbers, so that the first
    sum(weights) sequences are exactly one epoch.
    """
    n = np.asarray(n, np.int64)
    if len(weights) == 1:
        return n[None]
    half, total = len(weights) // 2, sum(weights)
    if isinstance(total, int):
        first = np.asarray(n.astype(object) * sum(weights[:half]) // max(1, total), np.int64)
    else:
        first = np.floor(n * (sum(weights[:half]) / total if total else 0.0)).astype(np.int64)
    return np.concatenate([dealt(first, weights[:half]), dealt(n - first, weights[half:])])


def interleave(index: np.ndarray, weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """For a stage's sequences `index`: (the source of each, how many of that source came before it)."""
    before = dealt(index, weights)
    source = (dealt(index + 1, weights) - before).argmax(0)
    return source, before[source, np.arange(len(index))]


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one mixture, and everything else that changes with it. 0: as in the recipe."""

    name: str = option("", "name of the stage")
    tokens: float = option(0.0, "tokens of the stage", low=0)
    mixture: dict[str, float] = field(default_factory=dict)  # source -> weight, divided by their sum; {}: by their rows
    context: int = option(0, "tokens of a sequence; 0: the model's max_position_embeddings", low=0)
    rope_theta: float = option(0.0, "RoPE's base; 0: the model's", low=0)
    learning_rate: float = option(0.0, "a peak of its own, after warmup_steps, then a cosine to 0; 0: the run's schedule", low=0)
    warmup_steps: int = option(0, "warmup of a stage with a learning rate of its own", low=0)
    batch_tokens: int = option(0, "tokens of a batch, so that a growing batch is a row of stages; 0: the recipe's", low=0)


@dataclass
class Batch:
    tokens: np.ndarray  # [B, T] int64
    targets: np.ndarray  # [B, T] int64: the next token; -100 if there is none
    cu_seqlens: np.ndarray  # [M] int32: document starts in the flattened batch, padded with B*T
    sources: np.ndarray  # [B]: the source of each row


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
    """Row starts -> cu_seqlens int32 over the flattened batch, padded with its end to a power of two, at least 16: few
    lengths to compile for, and no work for documents that are not there."""
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
        """A stage with another context has as many tokens per batch, in fewer or more rows."""
        if packing not in PACKINGS:
            raise UserError(f"--packing {packing} is not one of {', '.join(PACKINGS)}")
        self.sources, self.stages, self.seed = sources, stages, seed
        self.contexts = [stage.context or context for stage in stages]
        self.batches = [stage.batch_tokens or batch_tokens for stage in stages]
        for stage, length, batch in zip(stages, self.contexts, self.batches):
            if batch % length:
                near = [n for n in (batch // length * length, -(-batch // length) * length) if n]
                raise UserError(f"stage {stage.name}: a batch of {batch:,} tokens does not divide into sequences of "
                                f"{length:,}; the nearest batch that does has {' or '.join(f'{n:,}' for n in near)} tokens")
        self.packings = {length: [Packing(split, length, packing) for split in sources] for length in set(self.contexts)}
        self.weights = [self.stage_weights(stage, length) for stage, length in zip(stages, self.contexts)]
        self.shares = [[w / sum(weights) for w in weights] for weights in self.weights]
        self.ends, self.passed = [], [0]  # the step at which each stage ends; tokens before each stage, and in all
        self.before = []  # sequences of each source before each stage; another context cuts, and so counts, anew
        self.used = {length: np.zeros(len(sources), np.int64) for length in self.packings}
        for wanted, batch, length, weights in zip(np.cumsum([stage.tokens for stage in stages]), self.batches, self.contexts,
                                                  self.weights):
            begin = self.ends[-1] if self.ends else 0
            end = max(1, begin, round((wanted - (self.passed[-1] - begin * batch)) / batch))
            self.ends.append(end)
            self.passed.append(self.passed[-1] + (end - begin) * batch)
            self.before.append(self.used[length])
            self.used[length] = self.used[length] + dealt((end - begin) * (batch // length), weights)
        self.steps = self.ends[-1]

    def stage_weights(self, stage: Stage, length: int) -> list[float]:
        """What `dealt` takes: weights that sum to 1, or without a mixture the rows of each source."""
        names = [split.name for split in self.sources]
        if unknown := set(stage.mixture) - set(names):
            raise UserError(f"stage {stage.name} wants {', '.join(sorted(unknown))}, but the data has "
                            f"{', '.join(names)}; change the mixture or --data")
        weights = [stage.mixture.get(name, 0.0) for name in names] if stage.mixture else [
            packing.count for packing in self.packings[length]]
        if min(weights) < 0 or sum(weights) <= 0:
            raise UserError(f"stage {stage.name}: the weights of its mixture must not be negative and not all be 0")
        for packing, weight in zip(self.packings[length], weights):
            if weight and not packing.pack and len(packing.split.tokens) <= length:
                raise UserError(f"{packing.split.name} has {len(packing.split.tokens):,} tokens, fewer than one sequence of "
                                f"{length}; give more text or a shorter --max_position_embeddings")
        return [w / sum(weights) for w in weights] if stage.mixture else weights

    def stage(self, step: int) -> int:
        return int(np.searchsorted(self.ends, step, side="right").clip(max=len(self.ends) - 1))

    def rows(self, step: int) -> int:
        """Rows of a step's global batch."""
        stage = self.stage(step)
        return self.batches[stage] // self.contexts[stage]

    def tokens(self, step: int) -> int:
        """Tokens in the steps before this one."""
        stage = self.stage(step)
        return self.passed[stage] + (step - (self.ends[stage - 1] if stage else 0)) * self.batches[stage]

    def epochs(self) -> dict[str, float]:
        """How often the run goes through each source; the playbook stays under about 4."""
        return {split.name: float(sum(used[s] / self.packings[length][s].count for length, used in self.used.items()))
                for s, split in enumerate(self.sources)}

    def report(self) -> list[str]:
        """What the playbook would say of the mixture: epochs, and the share of other languages than English."""
        lines = [f"warning   {name} is read {n:.1f} times; past about 4 epochs repeated text teaches little (playbook)"
                 for name, n in self.epochs().items() if n > 4]
        tokens = np.diff(self.passed)
        for stage, batch, n in zip(self.stages, self.batches, tokens):
            if not n:
                lines.append(f"warning   stage {stage.name} is left out: its {stage.tokens:,.0f} tokens are no step of {batch:,}")
            if stage.mixture and abs(sum(stage.mixture.values()) - 1) > 1e-6:
                lines.append(f"mixture   the weights of stage {stage.name} sum to {sum(stage.mixture.values()):.5g}: divided "
                             "by that")
        foreign = [i for i, split in enumerate(self.sources) if split.name.startswith("multilingual")]
        if foreign:
            share = sum(n * shares[i] for n, shares in zip(tokens, self.shares) for i in foreign) / tokens.sum()
            lines.append(f"languages {share:.1%} of the run is multilingual; the playbook settled on 12 %, and the limit of "
                         f"20 % that summaries give is {'exceeded' if share > 0.2 else 'kept'}")
        return lines

    def locate(self, step: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, sequence index in it) of the rows first .. first + count of a step's global batch."""
        stage = self.stage(step)
        begin, length = self.ends[stage - 1] if stage else 0, self.contexts[stage]
        index = (step - begin) * self.rows(step) + np.arange(first, first + count, dtype=np.int64)
        source, rank = interleave(index, self.weights[stage])
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
        """How many targets of a step's global batch count: its mean loss is divided by this number, however many processes
        share it. A mean of their means would give more weight to a token in a share with few targets."""
        packings = self.packings[self.contexts[self.stage(step)]]
        return sum(packings[source].targets(int(row)) for source, row in zip(*self.locate(step, 0, self.rows(step))))

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
    with rows that have no targets, so that all have one shape."""
    packing = Packing(split, context)
    indices = np.arange(min(sequences, packing.count))
    for i in range(0, len(indices), rows):
        tokens, targets, starts = cut_sequences(packing, indices[i:i + rows])
        missing = rows - len(tokens)
        tokens = np.pad(tokens, ((0, missing), (0, 0)))
        targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-100)
        yield Batch(tokens, targets, pack_cu_seqlens(starts + [np.zeros(1, np.int64)] * missing, context),
                    np.zeros(rows, np.int64))


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


def summary(data: str) -> str:
    """One line per source: documents, tokens, bytes per token; and what was dropped."""
    tokenizer, lines = Tokenizer.load(find_tokenizer(data)), []
    for folder in source_folders(data):
        splits = load_source(folder, tokenizer, verify=False)
        train, val = splits["train"], splits["val"]
        lines.append(f"{folder.name:12} {len(train.starts) - 1:9,} documents {len(train.tokens):13,} tokens "
                     f"{train.bytes / len(train.tokens):5.2f} bytes/token | held out {len(val.starts) - 1:6,} documents "
                     f"{len(val.tokens):9,} tokens")
        with reading(folder / "meta.json"):
            if dropped := counted(json.loads((folder / "meta.json").read_text("utf-8"))["dropped"]):
                lines.append(f"{'':13}dropped: {dropped}")
    return "\n".join(lines)


def show(data: str, context: int = 2048, documents: int = 2) -> None:
    """Prints the sources, the packings side by side, document lengths, and the first documents with their boundaries."""
    tokenizer, lengths = Tokenizer.load(find_tokenizer(data)), {}
    print(summary(data))
    for folder in source_folders(data):
        split = load_source(folder, tokenizer, verify=False)["train"]
        lengths[folder.name] = np.diff(split.starts)
        print(f"\n{folder.name}: packed into sequences of {context:,}\n"
              f"{'':10}{'sequences':>12}{'utilisation':>13}{'dropped':>10}{'cut':>10}{'mean square of lengths':>25}")
        for strategy in PACKINGS:
            row = Packing(split, context, strategy).report()
            print(f"{strategy:10}{row['rows']:>12,}{row['utilisation']:>13.1%}{row['dropped']:>10.1%}{row['cut']:>10.1%}"
                  f"{row['mean_square']:>25,.0f}")
        print("tokens per document " + histogram(lengths[folder.name]))
        for start, end in zip(split.starts[:documents], split.starts[1:documents + 1]):
            text = tokenizer.decode(split.tokens[start + 1:min(end, start + 60)].tolist())
            print(f"--- tokens {start:,} to {end:,}, a document of {end - start:,}\n{text}")

    def paint(axes):
        bins = np.geomspace(1, max(int(n.max()) for n in lengths.values()) + 1, 50)
        for name, n in lengths.items():
            axes.hist(n, bins, histtype="step", label=name, weights=np.full(len(n), 1 / len(n)))
        axes.set(xscale="log", xlabel="tokens per document", ylabel="share of the documents")
        axes.legend()

    path = Path(data.split(",")[0]) / "document-lengths.png"
    if draw(path, paint):
        print(f"\nThe lengths of all documents are drawn in {path}")


def histogram(lengths: np.ndarray) -> str:
    """Shares of documents by length, in powers of 4."""
    edges = [4**i for i in range(2, 10)]
    counts = np.histogram(lengths, [0, *edges, np.inf])[0] / len(lengths)
    names = [f"<{edges[0]}", *(f"{a:,}-{b - 1:,}" for a, b in zip(edges, edges[1:])), f">={edges[-1]:,}"]
    return ", ".join(f"{name}: {share:.0%}" for name, share in zip(names, counts) if share > 0)


def named_sources(words: list[str], text_key: str) -> dict[str, Source]:
    """{name: source} of NAME=SOURCE, or of SOURCE, which then lends its own name."""
    pairs = [word.split("=", 1) if "=" in word and not Path(word).exists() else
             (word.split(":")[1].split("/")[-1] if word.startswith("hf:") else Path(word).resolve().name.split(".")[0], word)
             for word in words]
    if len(named := dict(pairs)) < len(pairs):
        raise UserError("two sources have the same name; name them apart with NAME=PATH")
    for name in named:
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{name!r} is no name for a source; give one of letters and digits as NAME=PATH")
    return {name: Source(path, text_key) for name, path in named.items()}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare | show | tokenizer")
    p = commands.add_parser("prepare", help="text -> token files")
    p.add_argument("sources", nargs="*", metavar="SOURCE",
                   help="files, folders, hf:DATASET[:CONFIG[:SPLIT]]; none: the embedded corpus. NAME=SOURCE names one; a "
                   "name multilingual... counts as other languages than English")
    p.add_argument("--out", help="folder for the token files (default: data/NAME of the first source)")
    p.add_argument("--tokenizer", help="as for `tokenizer.py fertility`; without it one is trained on the sources")
    p.add_argument("--max-tokens", type=number, default=0, help="per source, about; 0: all (default: 0)")
    t = commands.add_parser("tokenizer", help="train a tokenizer on any source that `prepare` reads")
    t.add_argument("sources", nargs="+", metavar="PATH", help="as for prepare")
    t.add_argument("--out", required=True, help="folder for tokenizer.json")
    t.add_argument("--pretokenizer", default="qwen", help="as for `tokenizer.py train` (default: qwen)")
    for q, vocabulary, sample in ((p, 4096, 2e7), (t, 32_768, 2e8)):
        q.add_argument("--vocab-size", type=int, default=vocabulary, help=f"of the trained tokenizer (default: {vocabulary})")
        q.add_argument("--sample-bytes", type=number, default=sample,
                       help=f"bytes of text that the tokenizer is trained on (default: {sample / 1e6:.0f}M)")
        q.add_argument("--text-key", default="text", help="the field of a data set that holds the text (default: text)")
    s = commands.add_parser("show", help="what prepared data holds, and how it packs")
    s.add_argument("data", metavar="DIR")
    s.add_argument("--context", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    args = parser.parse_args()
    if args.command == "show":
        if args.context < 1:
            raise UserError(f"--context {args.context} is no length of a sequence; give 1 or more, such as 2048")
        return show(args.data, args.context)
    if not 0 < args.sample_bytes < math.inf or not 0 <= getattr(args, "max_tokens", 0) < math.inf:
        raise UserError("--sample-bytes and --max-tokens are numbers above 0, such as 20M")
    if args.command == "tokenizer":
        sources = [Source(path, args.text_key) for path in args.sources]
        texts = (text for source in sources for text in source.sample(args.sample_bytes / len(sources)))
        trained = train_bpe(texts, args.vocab_size, args.pretokenizer)
        return print(f"{trained.vocab_size:,} tokens -> {trained.save(args.out)}")
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    sources = named_sources(args.sources, args.text_key) or {name: documents() for name, documents in EMBEDDED.items()}
    out = args.out or f"data/{next(iter(sources)) if args.sources else 'laptop'}"
    prepare(sources, out, tokenizer, args.vocab_size, args.sample_bytes, max_tokens=args.max_tokens)
    print(summary(out))
    print(f"Prepared {out}. Train on it with: python train.py --data {out}")


if __name__ == "__main__":
    run(main)
