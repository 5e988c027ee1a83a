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
import codecs
import contextlib
import glob
import hashlib
import importlib
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

FORMAT = 3  # of the token files
AGAIN = "prepare its text again with `python data.py prepare`"
HELD_OUT = 0.03  # share of the documents that is kept for validation
LONGEST_PIECE = 16_384  # characters; longer text files are cut into documents, after a blank line if there is one
LONGEST_VALUE = 16 << 20  # bytes of a line or a value; a longer document is more likely a mistake than a text
SHARD_TOKENS = 2**24  # a shard, what is shuffled and written at once, ends with the job that reaches this many tokens
JOB_BYTES = 2**20  # text that one thread encodes at a time


# ---- text sources ---------------------------------------------------------------------------------------------
# A reader yields (text, held, offset) for each document of a file. held: a number in [0, 1), uniform over documents,
# below HELD_OUT for validation; None: the hash of the text. offset: what to skip to resume behind the document.

PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "backports.zstd"}  # suffix -> module
TEXT = {"keep_default_na": False}  # "NA" and "null" in a table are text
ROWS = {".parquet": ("parquet", {}), ".arrow": ("arrow", {}), ".json": ("json", {}), ".csv": ("csv", TEXT),
        ".tsv": ("csv", TEXT | {"sep": "\t"})}  # suffix -> builder in `datasets` and its options


def uniform(key: str) -> float:
    """A number in [0, 1) from the key alone: the same key is always on the same side, in every run and order."""
    return int.from_bytes(hashlib.sha256(utf8(key)).digest()[:6], "big") / 2**48


def needs(package: str, what: str | Path):
    """An optional package. UserError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{what} needs a package that is missing: pip install {package}") from None


@contextlib.contextmanager
def decoding(path: str | Path) -> Iterator[None]:
    """`reading`, with a hint for text that is not UTF-8."""
    with reading(path):
        try:
            yield
        except UnicodeDecodeError as error:
            name = "UTF-16" if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "WINDOWS-1252"
            raise UserError(f"{path} is not UTF-8 text, but perhaps {name}: convert it with `iconv -f {name} -t UTF-8` "
                            "or leave it out") from None


@contextlib.contextmanager
def opened(file: str | Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, unpacked if it is .gz, .bz2, .xz or .zst. Whatever goes wrong meanwhile is a UserError."""
    module = needs(PACKED.get(Path(file).suffix.lower(), "builtins"), file)
    with decoding(file), module.open(file, "rb") as stream:
        yield stream


def text_blocks(file: Path) -> Iterator[str]:
    """A UTF-8 text file, LONGEST_PIECE characters at a time."""
    with opened(file) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig")
        while block := text.read(LONGEST_PIECE):
            if "\0" in block:
                raise UserError(f"{file} is not UTF-8 text, but binary or UTF-16: leave it out, or convert it with "
                                "`iconv -f UTF-16LE -t UTF-8`")
            yield block


def read_plain(file: Path, held: float, skip: int) -> Iterator[tuple[str, float | None, int]]:
    """A text file in documents of at most LONGEST_PIECE characters. `held` counts for a file that is not cut. The last
    3 % of a longer one are held out, so that the two sides touch at one seam only."""
    size = sum(map(len, text_blocks(file)))
    seam, at, rest, count = size - int(HELD_OUT * size), 0, "", 0
    for block in itertools.chain(text_blocks(file), [""]):
        rest += block
        while len(rest) >= LONGEST_PIECE or rest and not block:
            end, line = min(len(rest), LONGEST_PIECE), rest.rfind("\n", 0, max(0, seam - at)) + 1
            if size > LONGEST_PIECE and at + end > seam and line:
                end = line  # the last line break before the seam
            elif at + end < size:  # after a blank line, or else a line or a space
                end = next((i + len(mark) for mark in ("\n\n", "\n", " ")
                            if (i := rest.rfind(mark, end // 2, end)) >= 0), end)
            text, rest, at, count = rest[:end], rest[end:], at + end, count + 1
            if count > skip and text.strip():
                yield text, held if size <= LONGEST_PIECE else 0.0 if at > seam else 0.999, count


def read_lines(file: Path, text_key: str, skip: int, strict: bool, leave_out: Callable) -> Iterator[
        tuple[str, float | None, int]]:
    """One document per line of JSON. A line without text is an error, or if not `strict` and a line before had some, is
    left out."""
    found = skip > 0
    with opened(file) as stream:
        for count, line in enumerate(iter(lambda: stream.readline(LONGEST_VALUE), b""), 1):
            where, rest = f"{file} line {count}", line
            while len(rest) == LONGEST_VALUE:  # read to the end of the line without keeping it
                rest = stream.readline(LONGEST_VALUE)
            if count <= skip or not line.strip():
                continue
            try:
                if len(line) == LONGEST_VALUE:
                    leave_out("documents over 16 MB", f"{where} is longer than 16 MB")
                    continue
                with decoding(where):
                    text = text_of(json.loads(line), text_key, where)
            except UserError as error:
                if strict or not found:
                    raise
                leave_out("unreadable lines", str(error))
            else:
                found = True
                yield text, None, count


def text_of(record: dict, text_key: str, where: str) -> str:
    """The text of a record, "" for null."""
    if not isinstance(record, dict) or not isinstance(record.get(text_key, 0), str | None):
        names = ", ".join(record) if isinstance(record, dict) else "its fields"
        raise UserError(f"{where} has no text in a field {text_key}: choose one of {names} with --text-key")
    return record[text_key] or ""


def read_rows(rows, text_key: str, state: dict, where: str, leave_out: Callable) -> Iterator[
        tuple[str, float | None, dict]]:
    """One document per row of a dataset that streams. The offset is the state that `datasets` resumes from.

    The iterator is closed, not abandoned: one that is left half-read may keep the process from ending.
    """
    if state:
        rows.load_state_dict(state)
    with closing(iter(rows)) as stream:
        for row in stream:
            text = text_of(row, text_key, where)
            if len(text) < LONGEST_VALUE:
                yield text, None, rows.state_dict()
            else:
                leave_out("documents over 16 MB", f"a row of {where} is longer than 16 MB: {text[:40]}...")


class Document(NamedTuple):
    text: str
    held: float  # in [0, 1), uniform over documents; below HELD_OUT it is for validation
    position: tuple[str, int | dict]  # Source.read(position) resumes behind this document


class Source:
    """The documents of a path: text, source code, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow (also as .gz,
    .bz2, .xz, .zst), a folder of those, or hf:DATASET[:CONFIG[:SPLIT]]. A stream in a fixed order, from any position.

    This is the one place that decides what is held out: documents of data sets by the hash of their text, text files by
    the hash of their name, long text files at a seam (read_plain). A file that is named must be readable; in a folder
    an unreadable one is left out, said on stderr and counted. Any failure on the way to the Hub is an error.
    """

    def __init__(self, where: str | Path, text_key: str = "text", revision: str | None = None):
        self.where, self.text_key, self.revision, path = str(where), text_key, revision, Path(where)
        self.hub, self.folder = self.where.startswith("hf:"), path.is_dir()
        self.dropped, self.said = Counter(), {}  # documents left out per reason, and what was printed of them
        if self.hub:
            self.find_shards()
        elif self.folder:
            self.files = {file.relative_to(path).as_posix(): file for file in files_below(path, set())}
        else:
            self.files = {path.name: path} if path.exists() else {}
        if not self.files:
            raise UserError(f"there is nothing to read at {where}: give a text file, .jsonl, .parquet or a folder")

    def find_shards(self) -> None:
        """Opens a data set, on the Hub at one revision, so that a resumed preparation reads what it began with."""
        name, config, split = (self.where[3:].split(":") + ["", ""])[:3]
        label = f"{self.where} (check its name, DATASET:CONFIG:SPLIT, and the network)"
        with decoding(label):
            datasets = needs("datasets", self.where)
            if not self.revision and not Path(name).exists():
                self.revision = needs("huggingface_hub", self.where).HfApi().dataset_info(name).sha
            self.rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True,
                                              revision=self.revision)
            self.files = {str(i): label for i in range(self.rows.num_shards)}

    def open(self, name: str, offset: int | dict) -> Iterator[tuple[str, float | None, int | dict]]:
        """The documents of one file, or of one shard on the Hub, from an offset on."""
        file, kind = self.files[name], ""
        if not self.hub:
            kind = next((suffix for suffix in map(str.lower, reversed(file.suffixes)) if suffix not in PACKED), "")
        if self.hub or kind in ROWS:
            with decoding(file):
                if self.hub:
                    rows = self.rows.shard(self.rows.num_shards, int(name))
                else:
                    builder, options = ROWS[kind]
                    rows = needs("datasets", file).load_dataset(
                        builder, data_files={"train": glob.escape(str(file.absolute()))}, split="train", streaming=True,
                        **options)
                yield from read_rows(rows, self.text_key, offset, str(file), self.leave_out)
        elif kind in (".jsonl", ".ndjson"):
            yield from read_lines(file, self.text_key, offset, not self.folder, self.leave_out)
        else:
            yield from read_plain(file, uniform(name), offset)

    def read_file(self, name: str, offset: int | dict = 0) -> Iterator[Document]:
        try:
            for text, held, offset in self.open(name, offset):
                yield Document(text, uniform(text) if held is None else held, (name, offset))
        except UserError as error:
            if not self.folder:
                raise
            self.leave_out("unreadable files", str(error))

    def read(self, position: tuple[str, int | dict] | None = None) -> Iterator[Document]:
        """All documents, or those behind `position`."""
        names = list(self.files)
        start, offset = position or (names[0], 0)
        if start not in names:
            raise UserError(f"{self.where} no longer holds {start}, which was being read; put it back, or remove the "
                            "unfinished preparation")
        yield from self.read_file(start, offset)
        for name in names[names.index(start) + 1:]:
            yield from self.read_file(name)

    def leave_out(self, reason: str, what: str) -> None:
        """Counts what is left out. Prints the first three per reason: a folder of pictures must not fill the screen."""
        self.dropped[reason] += 1
        said = self.said.setdefault(reason, [])
        if what not in said and len(said) < 3:
            said.append(what)
            tqdm.write(f"left out: {what}", file=sys.stderr)

    def sample(self, max_bytes: float, held_out: float = 0.0) -> Iterator[str]:
        """Text of at most max_bytes, nothing that is held out: the same share from the start of each file, or from the
        start of at most 64 shards on the Hub, evenly apart."""
        names = list(self.files)[::-(-len(self.files) // 64) if self.hub else 1]
        sizes = [1 if self.hub else self.files[name].stat().st_size for name in names]
        for name, size in zip(names, sizes):
            left = max_bytes * size / max(1, sum(sizes))
            with closing(self.read_file(name)) as documents:
                for text in (document.text for document in documents if document.held >= held_out):
                    yield text[:int(left) + 1]
                    if (left := left - len(utf8(text))) <= 0:
                        break


def files_below(folder: Path, seen: set[str]) -> Iterator[Path]:
    """The files of a folder in a fixed order, without hidden ones. A folder that several links lead to is read once."""
    if (real := os.path.realpath(folder)) not in seen and not seen.add(real):
        for path in sorted(folder.iterdir()):
            if path.name[0] != "." and path.name != "__pycache__":
                if path.is_dir():
                    yield from files_below(path, seen)
                elif path.is_file():
                    yield path


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
    """Arithmetic with worked steps, which come before the result because a model writes from left to right. The key is
    the problem without its story, so the same numbers are never both trained on and held out."""
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
        key = f"{x}*{y}" if kind == "product" else f"{low}{signs[kind]}{high}"
        yield key, f"Question: {question}\nAnswer: {answer}\n"


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
    """The value follows its key at once: a small model learns to look that up (an induction head) in 150 steps, but not
    in 400 steps with a word between them."""
    return f"Note: {key} {value}.\n"


def note_question(key: str) -> str:
    """Ends where the value must follow, after its key as in the note; in the form of the math source's problems."""
    return f"Question: What is the note on {key}?\nAnswer: {key}"


def generated_recall(size: int, documents: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Documents of about `size` bytes: docstrings with 2 to size / 80 notes between their lines, then a question for
    each. The text around held-out notes is held out as well."""
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


class Listed(Source):
    """(key, text) pairs in memory. The key decides what is held out."""

    def __init__(self, documents: Iterable[tuple[str, str]]):
        self.documents = list(documents)
        self.where, self.text_key = "memory", len(self.documents)  # the number tells two lists apart on resuming
        self.files, self.revision, self.folder = {"": None}, None, False

    def open(self, name: str, offset: int) -> Iterator[tuple[str, float, int]]:
        for i, (key, text) in enumerate(self.documents[offset:], offset + 1):
            yield text, uniform(key), i

    def sample(self, max_bytes: float, held_out: float = 0.0) -> Iterator[str]:
        texts = [text for key, text in self.documents if uniform(key) >= held_out]
        for text in random.Random(0).sample(texts, len(texts)):
            if max_bytes > 0:
                yield text[:int(max_bytes)]
                max_bytes -= len(text)


# ---- token files ----------------------------------------------------------------------------------------------
# One folder per source: {train,val}.bin hold the ids (uint16 or uint32, little-endian) of documents, each opened by
# EOS; {train,val}.starts the document starts and the end (int64); meta.json, written last, the sha256 of these files.
# EOS opens a document because it is then both the target that ends the document before and the prompt that starts this
# one: the attention of a document begins at its own EOS.
#
# All of it is made in OUT.partial and renamed at the end, so that a folder that exists is complete. The files grow by a
# shard at a time; then state.json is replaced, which says how long they are and up to which document of the source
# everything is stored. Whatever stops the work, kill -9 too, the same command cuts the files to these lengths and
# resumes there.


class Seen:
    """Hashes (int64) of documents: the latest in a set, older ones in a sorted array, 8 bytes each. After LIMIT
    documents (256 MB) the older ones are forgotten."""

    RECENT, LIMIT = 2**20, 2**25

    def __init__(self):
        self.recent, self.older = set(), np.zeros(1, np.int64)

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Which of the hashes [N] were not there before (the first of equal ones), bool [N]; adds them."""
        new = self.older[np.searchsorted(self.older, hashes).clip(max=len(self.older) - 1)] != hashes
        for i in np.flatnonzero(new):
            new[i] = hashes[i] not in self.recent
            self.recent.add(hashes[i])
        if len(self.recent) > self.RECENT:
            older = self.older if len(self.older) < self.LIMIT else self.older[:0]
            self.older, self.recent = np.sort(np.concatenate([older, list(self.recent)]), kind="stable"), set()
        return new


def repeats_spans(ids: np.ndarray, starts: np.ndarray, times: int = 32, longest: int = 13) -> np.ndarray:
    """Which documents hold a span of 1 to 13 tokens 32 or more times in a row, the playbook's filter (after OLMo 2).

    ids [N]: documents end to end, starts [D]: where each begins. Returns bool [D]. In a span of n tokens that stands k
    times in a row, n * (k - 1) consecutive tokens equal the one n places later.
    """
    bad = np.zeros(len(starts), bool)
    for n in range(1, longest + 1):
        same = ids[n:] == ids[:-n]
        near = same  # near[i]: the 1, 2, 4, 8, 16 places from i on are the same; ends most searches in a few passes
        for shift in (1, 2, 4, 8):
            near = near[:-shift] & near[shift:]
        if near.any():
            edges = np.flatnonzero(np.diff(same, prepend=False, append=False))  # runs of True begin and end here
            begins = edges[::2][edges[1::2] - edges[::2] >= n * (times - 1)]
            bad[np.searchsorted(starts, begins, side="right") - 1] = True
    return bad


class Job(NamedTuple):
    """About JOB_BYTES of documents, encoded."""

    ids: np.ndarray  # [N]: of all documents, each opened by EOS
    table: np.ndarray  # [D, 5] int64, per document: tokens, bytes, hash, held out?, repeats a span?
    position: tuple[str, int | dict] | None  # of the last document
    dropped: Counter  # reason -> documents


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def encode_job(documents: list[Document], dropped: Counter, tokenizer: Tokenizer, limit: float) -> Job:
    """Documents whose `held` is below `limit` are held out."""
    rows, parts = [], [np.empty(0, np.uint32)]
    for text, held, _ in documents:
        if (raw := utf8(text)).strip():
            parts += [np.uint32([tokenizer.eos_id]), tokenizer.encode_array(text)]
            key = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), signed=True)
            rows.append((1 + len(parts[-1]), len(raw), key, held < limit, False))
    table, ids = np.array(rows, np.int64).reshape(-1, 5), np.concatenate(parts).astype(token_dtype(tokenizer))
    if tokenizer.vocab_size > 512:  # of tokens that are hardly longer than bytes, a ruled line would be a repeated span
        table[:, 4] = repeats_spans(ids, np.cumsum(table[:, 0]) - table[:, 0])
    dropped["empty documents"] += len(documents) - len(rows)
    return Job(ids, table, documents[-1].position if documents else None, dropped)


def encoded(source: Source, position: tuple | None, tokenizer: Tokenizer, limit: float) -> Iterator[Job]:
    """The documents behind `position`, in order; encoded on all cores, since tiktoken releases Python's lock."""
    workers, queue, ahead, documents, size = os.cpu_count() or 1, deque(), 0, [], 0
    source.dropped = Counter()
    with closing(source.read(position)) as stream, ThreadPoolExecutor(workers) as pool:
        for document in itertools.chain(stream, [None]):
            if document:
                documents.append(document)
                size += len(document.text) + 256  # about what a short document takes in memory
            if size >= JOB_BYTES or not document:
                queue.append((size, pool.submit(encode_job, documents, source.dropped, tokenizer, limit)))
                ahead, documents, size, source.dropped = ahead + size, [], 0, Counter()
            while queue and (ahead > 4 * workers * JOB_BYTES or not document):
                ahead -= queue[0][0]
                yield queue.popleft()[1].result()


def write_source(folder: Path, source: Source, tokenizer: Tokenizer, seen: Seen, limit: float, seed: int,
                 max_tokens: float) -> None:
    """Makes the token files of a source, or resumes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"shards": 0, "position": None, "ended": False, "read": 0, "dropped": {}, "sizes": {}, "train": [0, 0, 0],
             "val": [0, 0, 0]}  # read: tokens; sizes: bytes of the files; then documents, tokens, bytes of text
    if (folder / "state.json").exists():
        state = json.loads((folder / "state.json").read_text("utf-8"))
        seen.add(np.fromfile(folder / "hashes", "<i8", state["sizes"]["hashes"] // 8))
    if (folder / "meta.json").exists():
        return
    pending, tokens, held = [], state["read"], state["val"][0] > 0
    with (closing(encoded(source, state["position"], tokenizer, limit)) as jobs,
          tqdm(unit="B", unit_scale=True, desc=f"tokenize {folder.name}", leave=False, delay=1) as bar):
        while not state["ended"] and (not max_tokens or tokens < max_tokens):
            if not (job := next(jobs, None)):
                state["ended"] = True
                break
            new = seen.add(job.table[:, 2])
            job.dropped.update({"exact duplicates": int((~new).sum()), "repeated spans": int(job.table[new, 4].sum())})
            pending.append((job, new))
            tokens, held = tokens + job.table[new, 0].sum(), held or job.table[new, 3].any()
            bar.update(job.table[:, 1].sum())
            if sum(len(job.ids) for job, _ in pending) >= SHARD_TOKENS:
                write_shard(folder, state, pending, seed)
                pending = []
    if pending and not held and not state["ended"]:  # the held-out end of a long text file was not reached
        table = pending[-1][0].table
        table[-max(1, round(HELD_OUT * len(table))):, 3] = True
    if pending:
        write_shard(folder, state, pending, seed)
    finish_source(folder, state, tokenizer)


def write_shard(folder: Path, state: dict, pending: list[tuple[Job, np.ndarray]], seed: int) -> None:
    """Appends jobs to the files of a source, their documents shuffled, and replaces state.json."""
    jobs, new = zip(*pending)
    ids = np.concatenate([job.ids for job in jobs])
    lengths, sizes, hashes, held, repeats = np.concatenate([job.table for job in jobs]).T
    begins, new = np.cumsum(lengths) - lengths, np.flatnonzero(np.concatenate(new))
    order = new[np.random.default_rng([seed, state["shards"]]).permutation(len(new))]
    append(folder / "hashes", state, [hashes[new]])
    for side, split in enumerate(("train", "val")):
        chosen = order[(held[order] == side) & (repeats[order] == 0)]
        ends = state[split][1] + np.cumsum(lengths[chosen])
        append(folder / f"{split}.starts", state, [ends] if state["shards"] else [np.zeros(1, np.int64), ends])
        append(folder / f"{split}.bin", state, (ids[begins[i]:begins[i] + lengths[i]] for i in chosen))
        totals = len(chosen), lengths[chosen].sum(), sizes[chosen].sum()
        state[split] = [int(a + b) for a, b in zip(state[split], totals)]
    state["position"] = next((job.position for job in reversed(jobs) if job.position), state["position"])
    state["dropped"] = sum((job.dropped for job in jobs), Counter(state["dropped"]))
    state |= {"shards": state["shards"] + 1, "read": state["read"] + int(lengths[new].sum())}
    write_text(folder / "state.json", json.dumps(state))


def append(path: Path, state: dict, parts: Iterable[np.ndarray]) -> None:
    """Writes the parts behind the part of a file that state.json knows."""
    with open(path, "ab") as file:
        file.truncate(state["sizes"].get(path.name, 0))
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
        state["sizes"][path.name] = file.tell()


def write_text(path: Path, text: str) -> None:
    """Replaces a small file, the whole of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finish_source(folder: Path, state: dict, tokenizer: Tokenizer) -> None:
    meta = {"format": FORMAT, "tokenizer": tokenizer.hash, "dropped": state["dropped"]}
    for split in ("train", "val"):
        if not state[split][0]:
            raise UserError(f"{folder.name} has no document left for {split} (dropped: {counted(state['dropped'])}): "
                            "give more text")
        meta[split] = dict(zip(("documents", "tokens", "bytes"), state[split]))
        meta[split]["sha256"] = [file_sha256(folder / f"{split}.{kind}") for kind in ("bin", "starts")]
    write_text(folder / "meta.json", json.dumps(meta, indent=1))


def counted(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()) or "nothing"


Tokens = np.concatenate  # the tokens of a split, from arrays end to end


@dataclass
class Split:
    """The tokens of one source on one side, memory-mapped."""

    name: str
    tokens: np.ndarray  # uint16 or uint32
    starts: np.ndarray  # [documents + 1] int64, the last is the number of tokens
    bytes: int  # of the text, UTF-8
    sha256: str  # of the tokens
    labels: np.ndarray | None = None  # the tokens as targets, -100 for those that are not learned; None: the tokens


def read_meta(folder: Path) -> dict:
    with reading(folder / "meta.json"):
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta["format"] != FORMAT:
            raise UserError(f"{folder} has token-file format {meta['format']}, this code reads {FORMAT}: {AGAIN}")
        return meta | {"dropped": counted(meta["dropped"])}


def load_source(folder: str | Path, tokenizer: Tokenizer, verify: bool = True) -> dict[str, Split]:
    """{"train": Split, "val": Split}, after checking that the files are what meta.json says.

    `verify` reads the files once, to compare their sha256, their ids with the vocabulary, and the order of the starts;
    without it only their sizes are checked.
    """
    folder, splits = Path(folder), {}
    meta = read_meta(folder)
    with reading(folder / "meta.json"):
        if meta["tokenizer"] != tokenizer.hash:
            raise UserError(f"{folder} was encoded with another tokenizer: put that one beside it, or {AGAIN}")
        for split in ("train", "val"):
            about, arrays = meta[split], []
            for kind, dtype, count, sha256 in zip(("bin", "starts"), (token_dtype(tokenizer), np.dtype("<i8")),
                                                  (about["tokens"], about["documents"] + 1), about["sha256"]):
                path = folder / f"{split}.{kind}"
                with reading(path):
                    if path.stat().st_size != count * dtype.itemsize:
                        raise UserError(f"{path} is truncated, it must have {count * dtype.itemsize:,} bytes: {AGAIN}")
                    if verify and file_sha256(path) != sha256:
                        raise UserError(f"{path} is not the file that was written (its sha256 differs): {AGAIN}")
                    arrays.append(np.asarray(np.memmap(path, dtype, "r")))  # a memmap's own slices are slow
            tokens, starts = arrays
            if verify and (tokens.max() >= tokenizer.vocab_size or starts[0] != 0 or starts[-1] != len(tokens)
                           or (starts[1:] <= starts[:-1]).any()):
                raise UserError(f"{folder} holds ids beyond the vocabulary, or documents that overlap: {AGAIN}")
            splits[split] = Split(folder.name, tokens, starts, int(about["bytes"]), about["sha256"][0])
    return splits


def source_folders(data: str) -> list[Path]:
    """`data` names folders, separated by commas; each is a source or holds sources. UserError unless they have one
    tokenizer."""
    folders = []
    for name in data.split(","):
        root = Path(name)
        found = [root] if (root / "meta.json").exists() else sorted(file.parent for file in root.glob("*/meta.json"))
        if not found:
            raise UserError(f"{name} is not prepared data: run `python data.py prepare {name}` and train on its result"
                            if root.exists() else
                            f"{name} does not exist: make it with `python data.py prepare YOUR_TEXT --out {name}`")
        folders += found
    for folder in folders:
        if read_meta(folder)["tokenizer"] != read_meta(folders[0])["tokenizer"]:
            raise UserError(f"{folder} was encoded with another tokenizer than {folders[0]}: {AGAIN} and `--tokenizer "
                            f"{folders[0].parent}`")
    if len({folder.name for folder in folders}) < len(folders):
        raise UserError(f"two sources of {data} have the same name; prepare one again as NAME=PATH")
    return folders


def find_tokenizer(data: str) -> Path:
    """The tokenizer.json of prepared data: in its first folder, or beside it."""
    first = source_folders(data.split(",")[0])[0]
    for file in (first / "tokenizer.json", first.parent / "tokenizer.json"):
        if file.exists():
            return file
    raise UserError(f"{file} is missing: put it back, or prepare the text again")


def held_out_limit(source: Source) -> float:
    """Documents whose `held` is below this are held out: HELD_OUT of them, but at least one if there are few."""
    with closing(source.read()) as documents:
        held = [document.held for document in itertools.islice(documents, 1000) if document.text.strip()]
    if len(held) < 2:
        raise UserError(f"{source.where} has {len(held)} document(s), and one must be held out: give more text (a text "
                        f"file is cut into documents of {LONGEST_PIECE:,} characters)")
    return max(HELD_OUT, float(np.nextafter(min(held), 1)) if len(held) < 1000 else 0.0)


def prepare(sources: dict[str, Source | Iterable[tuple[str, str]]], out: str | Path, tokenizer: Tokenizer | None = None,
            vocab_size: int = 4096, sample_bytes: float = 2e7, seed: int = 0, max_tokens: float = 0) -> Tokenizer:
    """Tokenizes {name: documents} into `out`/name; without a tokenizer trains one on equal parts of the sources.

    At most `sample_bytes` of the training side go into the tokenizer's training. `max_tokens`: per source, about.
    A folder that exists is never touched. Interrupted work stays in `out`.partial, and the same call resumes it.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already and is left as it is: choose another --out")
    sources = {name: source if isinstance(source, Source) else Listed(source) for name, source in sources.items()}
    partial, seen = out.with_name(out.name + ".partial"), Seen()
    task = {"sources": {name: [source.where, source.text_key] for name, source in sources.items()}, "seed": seed,
            "tokenizer": tokenizer.hash if tokenizer else [vocab_size, sample_bytes], "max_tokens": max_tokens}
    if (partial / "task.json").exists():
        with reading(partial / "task.json"):
            saved = json.loads((partial / "task.json").read_text("utf-8"))
            if saved["task"] != task:
                raise UserError(f"{partial} is the unfinished work of another command: run that command again, or "
                                "remove the folder")
            tokenizer, limits = Tokenizer.load(partial), saved["limits"]
            sources |= {name: Source(*task["sources"][name], revision) for name, revision in saved["revisions"].items()}
        print(f"resuming {partial}")
    else:
        shutil.rmtree(partial, ignore_errors=True)  # killed before anything was finished
        limits = {name: held_out_limit(source) for name, source in sources.items()}
        tokenizer = tokenizer or train_bpe(itertools.chain.from_iterable(
            source.sample(sample_bytes / len(sources), limits[name]) for name, source in sources.items()), vocab_size)
        tokenizer.save(partial)
        revisions = {name: source.revision for name, source in sources.items() if source.revision}
        write_text(partial / "task.json", json.dumps({"task": task, "limits": limits, "revisions": revisions}))
    try:
        for name, source in sources.items():
            write_source(partial / name, source, tokenizer, seen, limits[name], seed, max_tokens)
        partial.rename(out)
    except BaseException as error:
        if not any(partial.glob("*/state.json")):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        note = f"finished parts are in {partial}: run the same command again to resume"
        if isinstance(error, (UserError, OSError)):
            raise UserError(f"{error}; {note}") from None
        print(f"\n{note}", file=sys.stderr)
        raise
    for path in [*out.glob("*/state.json"), *out.glob("*/hashes"), out / "task.json"]:
        path.unlink()
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
    """Row of each piece [P] int64: longest first, into the open row that it fills most (Ding et al. 2024, 2404.10830).

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
    """Every row begins with a document; a part that does not fit into the row is dropped (nanochat, modded-nanogpt)."""
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
        self.split, self.context, self.end, self.pack = split, context, len(split.tokens), PACKINGS[strategy]
        self.count = -(-(self.end - 1) // context)  # the last may be shorter; the very first token is no target
        if self.pack:
            rows, begins, sizes = self.pack(split.starts, context)
            order = np.argsort(rows, kind="stable")
            self.begins, self.sizes, self.count = begins[order], sizes[order], int(rows.max()) + 1
            self.rows = np.searchsorted(rows[order], np.arange(self.count + 1))  # first piece of each row, and the end

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(where it begins in the tokens, its length) of each piece of a sequence."""
        if not self.pack:
            return [(row * self.context, min(self.context, self.end - 1 - row * self.context))]
        here = slice(self.rows[row], self.rows[row + 1])
        return list(zip(self.begins[here].tolist(), self.sizes[here].tolist()))

    def targets(self, row: int) -> int:
        """How many targets of a sequence count: neither padding nor left out by labels."""
        spans = [slice(begin + 1, min(begin + length + 1, self.end)) for begin, length in self.pieces(row)]
        labels = self.split.labels
        return sum(span.stop - span.start if labels is None else int((labels[span] >= 0).sum()) for span in spans)

    def report(self) -> dict[str, float]:
        """What the packing does to the split's documents.

        utilisation: share of the rows' places that hold a token; dropped: share of the tokens in no row; cut: share of
        the documents that are not whole in one row; mean_square: mean of the squared lengths of the pieces of documents
        that attention sees, to which its work is proportional.
        """
        starts = np.asarray(self.split.starts)
        if self.pack:
            begins, sizes = self.begins, self.sizes
        else:
            begins = np.union1d(starts[:-1], np.arange(0, self.end, self.context))
            sizes = np.diff(begins, append=self.end)
        kept, lengths = sizes.sum(), np.diff(starts)
        whole = (sizes == lengths[np.searchsorted(starts, begins, side="right") - 1]).sum()
        return {"rows": self.count, "utilisation": kept / (self.count * self.context), "dropped": 1 - kept / self.end,
                "cut": 1 - whole / len(lengths), "mean_square": float((sizes.astype(float) ** 2).mean())}


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


def dealt(n: np.ndarray, weights: list[float]) -> np.ndarray:
    """How many of a stage's first n sequences come from each source, [S, *n.shape] int64.

    Half of the sources get floor(n * their share) and the others the rest; then each half deals likewise among its own.
    So each step of n deals exactly one, and each count is exact to within 1 + log2(S): every stretch has the mixture
    that was asked for, not just the average. Whole weights (rows of the sources) are dealt in whole numbers, so that
    the first sum(weights) sequences are exactly one epoch.
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


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one mixture, and everything else that changes with it. 0: as in the recipe."""

    name: str = option("", "name of the stage")
    tokens: float = option(0.0, "tokens of the stage", low=0)
    mixture: dict[str, float] = field(default_factory=dict)  # source -> weight, divided by their sum; {}: by their rows
    context: int = option(0, "tokens of a sequence; 0: the model's max_position_embeddings", low=0)
    rope_theta: float = option(0.0, "RoPE's base; 0: the model's", low=0)
    learning_rate: float = option(0.0, "peak after warmup_steps, then a cosine to 0; 0: the run's schedule", low=0)
    warmup_steps: int = option(0, "warmup of a stage with a learning rate of its own", low=0)
    batch_tokens: int = option(0, "tokens of a batch, which may grow from stage to stage; 0: the recipe's", low=0)


@dataclass
class Batch:
    tokens: np.ndarray  # [B, T] int64
    targets: np.ndarray  # [B, T] int64: the next token; -100 if there is none
    cu_seqlens: np.ndarray  # [M] int32: document starts in the flattened batch, padded with B*T
    sources: np.ndarray  # [B]: the source of each row


def cut_batch(packings: list[Packing], sources: np.ndarray, sequences: np.ndarray) -> Batch:
    """A batch whose row i is sequence sequences[i] of packings[sources[i]]; -1: a row without tokens and targets."""
    tokens = np.zeros((len(sources), packings[0].context), np.int64)
    targets, starts = np.full_like(tokens, -100), []
    for row, (source, sequence) in enumerate(zip(sources.tolist(), sequences.tolist())):
        split, at, inside = packings[source].split, 0, [[0]]
        labels = split.tokens if split.labels is None else split.labels
        for begin, length in packings[source].pieces(sequence) if sequence >= 0 else ():
            part = slice(begin, begin + length + 1)  # the target after the last token opens the next document
            ids = split.tokens[part]
            n = len(ids) - 1  # less than `length` at the end of the file only
            tokens[row, at:at + n], targets[row, at:at + n] = ids[:-1], labels[part][1:]
            first, last = np.searchsorted(split.starts, [begin + 1, begin + n])
            inside += [[at] if at else [], split.starts[first:last] - begin + at]
            at += length
        starts.append(np.concatenate(inside))
    return Batch(tokens, targets, pack_cu_seqlens(starts, tokens.shape[1]), sources)


def pack_cu_seqlens(starts: list[np.ndarray], context: int) -> np.ndarray:
    """Row starts -> cu_seqlens int32 over the flattened batch, padded with its end to a power of two, at least 16: few
    lengths to compile for, and little work for documents that are not there."""
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
        if packing not in PACKINGS:
            raise UserError(f"--packing {packing} is not one of {', '.join(PACKINGS)}")
        self.sources, self.stages, self.seed = sources, stages, seed
        self.contexts = [stage.context or context for stage in stages]
        self.batches = [stage.batch_tokens or batch_tokens for stage in stages]  # tokens per step
        self.packings = {n: [Packing(split, n, packing) for split in sources] for n in set(self.contexts)}
        self.weights = list(map(self.stage_weights, stages, self.contexts, self.batches))
        self.shares = [[w / sum(weights) for w in weights] for weights in self.weights]
        # per stage: the step at which it ends; tokens before it; rows of each source before it, which another context
        # cuts, and so counts, anew
        self.ends, self.passed, self.before = [], [0], []
        self.used = {length: np.zeros(len(sources), np.int64) for length in self.packings}
        planned = np.cumsum([stage.tokens for stage in stages])
        for tokens, length, batch, weights in zip(planned, self.contexts, self.batches, self.weights):
            begin = self.ends[-1] if self.ends else 0
            steps = max(not begin, round((tokens - (self.passed[-1] - begin * batch)) / batch) - begin)
            self.ends.append(begin + steps)
            self.passed.append(self.passed[-1] + steps * batch)
            self.before.append(self.used[length])
            self.used[length] = self.used[length] + dealt(steps * (batch // length), weights)
        self.steps = self.ends[-1]

    def stage_weights(self, stage: Stage, length: int, batch: int) -> list[float]:
        """Weights of the sources that sum to 1, or without a mixture their rows. UserError for an impossible stage."""
        if batch % length:
            near = " or ".join(f"{n:,}" for n in (batch // length * length, -(-batch // length) * length) if n)
            raise UserError(f"stage {stage.name}: a batch of {batch:,} tokens does not divide into sequences of "
                            f"{length:,}; the nearest that do are {near}")
        names = [split.name for split in self.sources]
        if unknown := set(stage.mixture) - set(names):
            raise UserError(f"stage {stage.name} wants {', '.join(sorted(unknown))}, but the data has "
                            f"{', '.join(names)}; change the mixture or --data")
        packings = self.packings[length]
        weights = [stage.mixture.get(name, 0.0) if stage.mixture else p.count for name, p in zip(names, packings)]
        if min(weights) < 0 or sum(weights) <= 0:
            raise UserError(f"stage {stage.name}: the weights of its mixture must not be negative and not all be 0")
        if short := [p.split.name for p, w in zip(packings, weights) if w and not p.pack and p.end <= length]:
            raise UserError(f"{', '.join(short)} has fewer tokens than one sequence of {length}; give more text or a "
                            "shorter --max_position_embeddings")
        return [w / sum(weights) for w in weights] if stage.mixture else weights

    def stage(self, step: int) -> int:
        return min(bisect.bisect_right(self.ends, step), len(self.ends) - 1)

    def begin(self, step: int) -> int:
        """The step at which the stage of a step begins."""
        return [0, *self.ends][self.stage(step)]

    def rows(self, step: int) -> int:
        """Rows of a step's global batch."""
        return self.batches[self.stage(step)] // self.contexts[self.stage(step)]

    def tokens(self, step: int) -> int:
        """Tokens in the steps before this one."""
        return self.passed[self.stage(step)] + (step - self.begin(step)) * self.batches[self.stage(step)]

    def epochs(self) -> dict[str, float]:
        """How often the run goes through each source; the playbook stays under about 4."""
        return {split.name: float(sum(used[s] / self.packings[length][s].count for length, used in self.used.items()))
                for s, split in enumerate(self.sources)}

    def report(self) -> list[str]:
        """What the playbook would say of the mixture: epochs, and the share of other languages than English."""
        lines = [f"warning   {name} is read {n:.1f} times; past about 4 epochs repeated text teaches little (playbook)"
                 for name, n in self.epochs().items() if n > 4]
        foreign = [split.name.startswith("multilingual") for split in self.sources]
        for stage, tokens in zip(self.stages, np.diff(self.passed)):
            total = sum(stage.mixture.values()) or 1
            if not tokens:
                lines.append(f"warning   stage {stage.name} is left out: its {stage.tokens:,.0f} tokens are no step")
            if abs(total - 1) > 1e-6:
                lines.append(f"mixture   the weights of stage {stage.name} sum to {total:.5g}: divided by that")
        if any(foreign):
            share = np.diff(self.passed) @ np.array(self.shares) @ foreign / self.passed[-1]
            lines.append(f"languages {share:.1%} of the run is multilingual; the playbook settled on 12 %, and the "
                         f"limit of 20 % that summaries give is {'exceeded' if share > 0.2 else 'kept'}")
        return lines

    def locate(self, step: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, sequence index in it) of the rows first .. first + count of a step's global batch."""
        stage = self.stage(step)
        index = (step - self.begin(step)) * self.rows(step) + np.arange(first, first + count, dtype=np.int64)
        before = dealt(index, self.weights[stage])
        source = (dealt(index + 1, self.weights[stage]) - before).argmax(0)
        rank = before[source, np.arange(count)] + self.before[stage][source]
        sequence = np.empty(count, np.int64)
        for s in np.unique(source):
            n = self.packings[self.contexts[stage]][s].count
            for epoch in np.unique(rank[source == s] // n):
                here = (source == s) & (rank // n == epoch)
                sequence[here] = permute(rank[here] % n, n, [self.seed, int(s), int(epoch)])
        return source, sequence

    def targets(self, step: int) -> int:
        """How many targets of a step's global batch count: its mean loss is divided by this number, however many
        processes share it. A mean of their means would give more weight to a token in a share with few targets."""
        packings = self.packings[self.contexts[self.stage(step)]]
        return sum(packings[source].targets(int(row)) for source, row in zip(*self.locate(step, 0, self.rows(step))))

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Batch:
        """The rows first .. first + count of the global batch of a step (all without them)."""
        packings = self.packings[self.contexts[self.stage(step)]]
        return cut_batch(packings, *self.locate(step, first, self.rows(step) if count is None else count))


def validation_batches(split: Split, context: int, rows: int, sequences: int) -> Iterator[Batch]:
    """The first `sequences` sequences of a split: a fixed slice, whatever the batch size. The last batch is filled up
    with rows that have no targets, so that all have one shape."""
    packing = Packing(split, context)
    count = min(sequences, packing.count)
    for first in range(0, count, rows):
        indices = np.arange(first, first + rows)
        yield cut_batch([packing], np.zeros(rows, np.int64), np.where(indices < count, indices, -1))


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
        print(f"mixture   the data has {', '.join(sorted(names))}, the recipe's mixture {', '.join(sorted(wanted))}: "
              "the sources are taken as large as they are")
        stages = tuple(replace(stage, mixture={}) for stage in stages)
        if all(replace(stage, name="", tokens=0) == Stage("", 0, {}) for stage in stages):  # nothing tells them apart
            stages = (Stage("train", total, {}),)
    return tuple(replace(stage, tokens=stage.tokens * (tokens or total) / total) for stage in stages)


# ---- command line ---------------------------------------------------------------------------------------------


def summary(data: str) -> str:
    """One line per source: documents, tokens, bytes per token; and what was dropped."""
    tokenizer, lines = Tokenizer.load(find_tokenizer(data)), []
    for folder in source_folders(data):
        train, val = load_source(folder, tokenizer, verify=False).values()
        lines.append(f"{folder.name:12} {len(train.starts) - 1:9,} documents {len(train.tokens):13,} tokens "
                     f"{train.bytes / len(train.tokens):5.2f} bytes/token | held out {len(val.starts) - 1:6,} "
                     f"documents {len(val.tokens):9,} tokens\n{'':13}dropped: {read_meta(folder)['dropped']}")
    return "\n".join(lines)


def show(data: str, context: int = 2048, documents: int = 2) -> None:
    """Prints the sources, the packings side by side, document lengths, and where the first documents begin."""
    tokenizer, lengths = Tokenizer.load(find_tokenizer(data)), {}
    print(summary(data))
    for folder in source_folders(data):
        split = load_source(folder, tokenizer, verify=False)["train"]
        lengths[folder.name] = np.diff(split.starts)
        print(f"\n{folder.name}: packed into sequences of {context:,}\n"
              f"{'':10}{'sequences':>12}{'utilisation':>13}{'dropped':>10}{'cut':>10}{'mean square of lengths':>25}")
        for strategy in PACKINGS:
            print("{:10}{:>12,}{:>13.1%}{:>10.1%}{:>10.1%}{:>25,.0f}".format(
                strategy, *Packing(split, context, strategy).report().values()))
        print("tokens per document", histogram(lengths[folder.name]))
        for start, end in zip(split.starts[:documents], split.starts[1:]):
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
    edges = [0, *(4**i for i in range(2, 10)), 10**18]
    shares = np.histogram(lengths, edges)[0] / len(lengths)
    return ", ".join(f"{a:,} to {b - 1:,}: {share:.0%}" for a, b, share in zip(edges, edges[1:], shares) if share)


def named_sources(words: list[str], text_key: str) -> dict[str, Source]:
    """{name: source} of NAME=SOURCE, or of SOURCE, which then lends its own name."""
    sources = {}
    for word in words:
        name, equals, where = word.partition("=")
        if not equals or Path(word).exists():
            name, where = word.split(":")[1] if word.startswith("hf:") else Path(word).resolve().name, word
        name = name.split("/")[-1].split(".")[0]
        if name in sources or not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{name!r} names two sources, or is no name: give one of letters and digits as NAME=PATH")
        sources[name] = Source(where, text_key)
    return sources or {name: Listed(documents()) for name, documents in EMBEDDED.items()}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare | show | tokenizer")
    p = commands.add_parser("prepare", help="text -> token files")
    p.add_argument("--out", help="folder for the token files (default: data/NAME of the first source)")
    p.add_argument("--tokenizer", help="as for `tokenizer.py fertility`; without it one is trained on the sources")
    p.add_argument("--max-tokens", type=number, default="0", help="per source, about; 0: all (default: 0)")
    t = commands.add_parser("tokenizer", help="train a tokenizer on any source that `prepare` reads")
    t.add_argument("--out", required=True, help="folder for tokenizer.json")
    t.add_argument("--pretokenizer", default="qwen", help="as for `tokenizer.py train` (default: qwen)")
    for q, sample in (p, "20M"), (t, "200M"):
        q.add_argument("sources", nargs="*", metavar="SOURCE",
                       help="files, folders, hf:DATASET[:CONFIG[:SPLIT]]; none: the"
                       " embedded corpus. NAME=SOURCE names one; multilingual... are languages other than English")
        q.add_argument("--vocab-size", type=int, default=4096, help="of a tokenizer that is trained (default: 4096)")
        q.add_argument("--sample-bytes", type=number, default=sample, help=f"of text for training (default: {sample})")
        q.add_argument("--text-key", default="text", help="the field of a data set that holds the text (default: text)")
    s = commands.add_parser("show", help="what prepared data holds, and how it packs")
    s.add_argument("data", metavar="DIR")
    s.add_argument("--context", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    args = parser.parse_args()
    low = {"context": 1, "sample_bytes": 1, "max_tokens": 0}
    for name in low.keys() & vars(args):
        if not low[name] <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name):g} is not a number from {low[name]} on")
    if args.command == "show":
        return show(args.data, args.context)
    sources = named_sources(args.sources, args.text_key)
    if args.command == "tokenizer":
        texts = (text for source in sources.values() for text in source.sample(args.sample_bytes / len(sources)))
        return print(train_bpe(texts, args.vocab_size, args.pretokenizer).save(args.out))
    out = args.out or f"data/{next(iter(sources)) if args.sources else 'laptop'}"
    prepare(sources, out, Tokenizer.load(args.tokenizer) if args.tokenizer else None, args.vocab_size,
            args.sample_bytes, max_tokens=args.max_tokens)
    print(f"{summary(out)}\nPrepared {out}. Train on it with: python train.py --data {out}")


if __name__ == "__main__":
    run(main)
