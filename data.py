"""Data: from text to batches, the chapter that matters most.

SmolLM3's recipe is a mixture that changes: web, code and math at 85/12/3 % in stage 1, 75/15/10 in stage 2, and
63/24/13 while the learning rate decays, because the model remembers best what it reads last (playbook). Text becomes
token files once. Everything after that is computed from the step number, so no loader has a state to lose:

    documents -> token files (one folder per source) -> sequences -> mixture of a stage -> batch of a step

Exact duplicates and documents that repeat a span of up to 13 tokens 32 times are dropped (playbook); flags also drop
near-duplicates, what breaks FineWeb's rules, and quotes of evaluations. Document starts travel with each batch as
`cu_seqlens`, so that attention can stay inside a document. In short context that changes nothing (loss 2.197 against
2.198); the playbook adopted it for long context, and because a step gets cheaper.

    python data.py prepare                             # the embedded corpus (`embedded`) -> data/laptop
    python data.py prepare my.txt notes/ --out data/mine [--tokenizer data/laptop]
    python data.py prepare web=dump/ hf:HuggingFaceFW/fineweb-edu:sample-10BT --max-tokens 1B --out data/web
    python data.py show data/laptop                    # how it packs, how long documents are, where they begin
    python data.py tokenizer dump/ --vocab-size 32768 --out tokenizers/mine
"""

import glob
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import zlib
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from tokenizer import (PATTERNS, WORDS, Parser, Tokenizer, UserError, add_options, check_options, file_sha256,
                       given_options, installed, option, parse_options, read_json, reading, run, train_bpe, utf8,
                       write_json)

import numpy as np
from tqdm import tqdm


FORMAT = 3  # of the token files
SPLITS = "train", "val"
AGAIN = "prepare its text again with `python data.py prepare`"
HELD_OUT = 0.03  # share of the documents that is kept for validation
LONGEST_PIECE = 16_384  # characters; longer text files are cut into documents, after a blank line if there is one
LONGEST_VALUE = 16 << 20  # bytes of a line or a value; a longer document is more likely a mistake than a text
SHARD_TOKENS = 2**24  # a shard, what is shuffled and written at once, ends with the job that reaches this many tokens
JOB_BYTES = 2**20  # text that one thread encodes at a time
REMEMBERED = 2**22  # documents among which duplicates are found (about 400 MB of memory, 470 more for near ones)


@dataclass
class DataOptions:
    out: str = option("", "prepare, tokenizer: folder to make; empty: data/NAME or tokenizers/NAME of the first source")
    tokenizer: str = option("", "prepare: folder, file or hf:ORG/NAME of one to use; empty: train one on the sources")
    max_tokens: float = option(0.0, "prepare: per source, about; 0: all", 0, 1e15)
    vocab_size: int = option(4096, "of a tokenizer that is trained")
    sample_bytes: float = option(2e7, "of text to train a tokenizer on; for `tokenizer` ten times this", 1, 1e15)
    pretokenizer: str = option("qwen", "tokenizer: how text is cut before merging", choices=tuple(PATTERNS))
    text_key: str = option("text", "the field of a data set that holds the text")
    unwrap: bool = option(False, "join the lines of a paragraph in .txt and .md files that are hard-wrapped")
    near_duplicates: bool = option(False, "prepare: drop near-copies of about the last 2^22 documents; 470 MB; slower")
    quality: str = option("", "prepare: `web`: FineWeb's rules for English prose, not code, math", choices=("", "web"))
    decontaminate: str = option("", "prepare: .jsonl files of evaluations, separated by commas; drops what quotes them")
    context: int = option(2048, "show: tokens of a sequence", 1)


# ---- text sources ---------------------------------------------------------------------------------------------
PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "backports.zstd"}  # suffix -> module
TEXT = {"keep_default_na": False}  # "NA" and "null" in a table are text
TABLES = {".parquet": ("parquet", {}), ".arrow": ("arrow", {}), ".json": ("json", {}), ".csv": ("csv", TEXT),
          ".tsv": ("csv", TEXT | {"sep": "\t"})}  # suffix -> builder in `datasets` and its options


def uniform(key):
    """A number in [0, 1) from the key alone: the same key is always on the same side, in every run and order."""
    return int.from_bytes(hashlib.sha256(utf8(key)).digest()[:6], "big") / 2**48


def unpacked(file):
    """The bytes of a file, unpacked if it is .gz, .bz2, .xz or .zst."""
    return installed(PACKED.get(file.suffix.lower(), "builtins"), file).open(file, "rb")


def unwrapped(text):
    """Joins the lines of each paragraph, if a quarter of the line breaks stand behind 40 to 90 characters and before a
    lower-case letter. A break stays behind a much shorter line, as in verse, or before an indent, a list or a table."""
    widths = sorted(map(len, re.findall(r"(?m)^(.{40,90})\n(?=[a-zß-ÿа-я])", text)))
    if len(widths) < max(5, text.count("\n") / 4):
        return text
    width = int(np.quantile(widths, 0.95))  # a longer line may be an address
    return re.sub(rf"(?m)^(.{{{width * 4 // 5},}}?) *\n(?=[\"'“‘(]?(?!\d+[.)] )\w)", r"\1 ", text)


def files_below(path, seen):
    """A file, or those of a folder in a fixed order, but hidden ones. A folder behind several links is read once."""
    if path.is_file():
        yield path
    elif path.is_dir() and (real := os.path.realpath(path)) not in seen:
        seen.add(real)
        for inside in sorted(path.iterdir()):
            if inside.name[0] != "." and inside.name != "__pycache__":
                yield from files_below(inside, seen)


class Document(NamedTuple):
    text: str
    held: float  # in [0, 1), uniform over documents; below HELD_OUT it is for validation
    position: tuple[str, int | dict]  # file and offset; Source.read(position) resumes behind this document


class Source:
    """The documents of a file of text or data, a folder, or hf:DATASET[:CONFIG[:SPLIT]], in a fixed order. The hash of
    a text in a data set, or of a text file's name in a folder, decides whether it is held out; of a text file given by
    name, the end is. A file that is named must be readable; in a folder, unreadable ones are left out and counted."""
    def __init__(self, where, text_key="text", revision=None, unwrap=False):
        self.where, self.text_key, self.revision, self.unwrap = str(where), text_key, revision, unwrap
        self.hub, self.folder = self.where.startswith("hf:"), (path := Path(where)).is_dir()
        self.dropped, self.warned = Counter(), set()  # documents left out per reason; reasons that were printed
        root = path if self.folder else path.parent
        self.files = {file.relative_to(root).as_posix(): file for file in files_below(path, set())}
        if self.hub:
            name, config, split = (self.where[3:].split(":") + ["", ""])[:3]
            with self.checked(label := f"{where} (check its name, DATASET:CONFIG:SPLIT, and the network)"):
                load = installed("datasets", where).load_dataset
                if not revision and not Path(name).exists():  # a resumed preparation reads the same revision
                    self.revision = installed("huggingface_hub", where).HfApi().dataset_info(name).sha
                self.rows = load(name, config or None, split=split or "train", streaming=True, revision=self.revision)
                self.files = {str(i): label for i in range(self.rows.num_shards)}
        if not self.files:
            raise UserError(f"there is nothing to read at {where}: give a text file, .jsonl, .parquet or a folder")

    @contextmanager
    def checked(self, where, reason="unreadable files"):
        """`reading`, with a hint for text that is not UTF-8. In a folder, what fails is left out instead."""
        try:
            with reading(where):
                try:
                    yield
                except UnicodeDecodeError as error:
                    name = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
                    raise UserError(f"{where} is not UTF-8 text, but perhaps {name}: convert it with `iconv -f {name} "
                                    "-t UTF-8`") from None
        except UserError as error:
            if not self.folder:
                raise
            self.leave_out(reason, error)

    def leave_out(self, reason, what):
        self.dropped[reason] += 1
        self.say_once(reason, f"left out: {what} (more {reason} are only counted)")

    def say_once(self, about, line):
        """Prints the first line about a thing: a folder of pictures must not fill the screen."""
        if about not in self.warned:
            self.warned.add(about)
            tqdm.write(line, file=sys.stderr)

    def read(self, position=None):
        """All documents, or those behind `position`."""
        names = list(self.files)
        start, offset = position or (names[0], 0)
        if start not in names:
            raise UserError(f"{start} of {self.where} is gone: put it back, or remove the unfinished preparation")
        for name in names[names.index(start):]:
            yield from self.read_file(name, offset)
            offset = 0

    def read_file(self, name, offset=0):
        """The documents of one file, or of one shard on the Hub, from an offset on."""
        file = self.files[name]
        kind = "" if self.hub else next((s for s in map(str.lower, file.suffixes[::-1]) if s not in PACKED), "")
        with self.checked(file):
            if self.hub:
                rows = self.read_rows(self.rows.shard(self.rows.num_shards, int(name)), file, offset)
            elif kind in TABLES:
                builder, options = TABLES[kind]
                table = installed("datasets", file).load_dataset(
                    builder, data_files=glob.escape(str(file.absolute())), split="train", streaming=True, **options)
                rows = self.read_rows(table, file, offset)
            else:
                rows = (self.read_lines if kind in (".jsonl", ".ndjson") else self.read_text)(name, file, offset)
            yield from (Document(text, held, (name, offset)) for text, held, offset in rows)

    def read_text(self, name, file, skip):
        """Documents of at most LONGEST_PIECE; the offset counts them. Of a file that is cut, or named, the end is held
    out."""
        size, begin, rest, count = 0, 0, "", 0
        with io.TextIOWrapper(unpacked(file), "utf-8-sig") as stream:
            while block := stream.read(LONGEST_PIECE):
                size += len(block)
                if "\0" in block:
                    raise UserError(f"{file} is not UTF-8 text, but binary or UTF-16: convert it with `iconv`")
            stream.seek(0)
            seam = size - int(HELD_OUT * size) * (cut := size > LONGEST_PIECE or not self.folder)
            while rest := rest + stream.read(LONGEST_PIECE - len(rest)):
                end, line = len(rest), rest.rfind("\n", 0, max(0, seam - begin)) + 1
                if begin + end > seam and line:
                    end = line  # the last line break before the seam
                elif begin + end < size:  # after a blank line, or else a line or a space
                    end = next((i + len(mark) for mark in ("\n\n", "\n", " ")
                                if (i := rest.rfind(mark, end // 2)) >= 0), end)
                text, rest, begin, count = rest[:end], rest[end:], begin + end, count + 1
                if count > skip and text.strip():
                    joined = unwrapped(text) if re.search(r"(?i)\.(txt|md)\b", file.name) else text
                    if self.unwrap:
                        text = joined
                    elif text != joined:
                        self.say_once("wraps", f"{file} looks hard-wrapped; --unwrap true joins the lines of a "
                                      "paragraph (more such files are not named)")
                    yield text, uniform(name) if not cut else 0.0 if begin > seam else 0.999, count

    def read_lines(self, name, file, skip):
        """One document per line of JSON; the offset is the number of the line."""
        with unpacked(file) as stream:
            for count, line in enumerate(iter(lambda: stream.readline(LONGEST_VALUE), b""), 1):
                rest = line
                while len(rest) == LONGEST_VALUE:  # read to the end of the line without keeping it
                    rest = stream.readline(LONGEST_VALUE)
                if count > skip and len(line) == LONGEST_VALUE:
                    self.leave_out("documents over 16 MB", f"{file} line {count} is longer than 16 MB")
                elif count > skip and line.strip():
                    with self.checked(f"{file} line {count}", "unreadable lines"):
                        text = self.text_of(json.loads(line), f"{file} line {count}")
                        yield text, uniform(text), count

    def read_rows(self, rows, where, state):
        """One document per row of a data set or table; the offset is the state from which `datasets` resumes."""
        if state:
            rows.load_state_dict(state)
        with closing(iter(rows)) as stream:  # one that is left half-read may keep the process from ending
            for row in stream:
                if len(text := self.text_of(row, where)) < LONGEST_VALUE:
                    yield text, uniform(text), rows.state_dict()
                else:
                    self.leave_out("documents over 16 MB", f"a row of {where} is longer than 16 MB")

    def text_of(self, record, where):
        """The text of a record, "" for null."""
        if not isinstance(text := record.get(self.text_key, 0), str | None):
            names = ", ".join(record)
            raise UserError(f"{where} has no text in a field {self.text_key}: choose one of {names} with --text-key")
        return text or ""

    def sample(self, max_bytes, held_out=0.0):
        """At most max_bytes of training text: the same share of each file's start, or of at most 64 shards' starts."""
        names = list(self.files)[::-(-len(self.files) // 64) if self.hub else 1]
        sizes = [1 if self.hub else self.files[name].stat().st_size for name in names]
        for name, size in zip(names, sizes):
            left = max_bytes * size / max(1, sum(sizes))
            with closing(self.read_file(name)) as documents:
                for text in (document.text for document in documents if document.held >= held_out):
                    yield text[:int(left) + 1]
                    if (left := left - len(utf8(text))) <= 0:
                        break


class Listed(Source):
    """(key, text) pairs in memory. The key decides what is held out."""
    def __init__(self, pairs):
        self.pairs, self.files, self.revision = list(pairs), {"": None}, None
        self.where, self.text_key = "memory", len(self.pairs)  # the number tells two lists apart on resuming

    def read_file(self, name, offset=0):
        for i, (key, text) in enumerate(self.pairs[offset:], offset + 1):
            yield Document(text, uniform(key), (name, i))

    def sample(self, max_bytes, held_out=0.0):
        texts = [text for key, text in self.pairs if uniform(key) >= held_out]
        for text in random.Random(0).sample(texts, len(texts)):
            if max_bytes > 0:
                yield text[:int(max_bytes)]
                max_bytes -= len(text)


# ---- the embedded corpus --------------------------------------------------------------------------------------
# (key, text) pairs. Texts with the same key are held out, or trained on, together.

SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"}
DOCSTRING = re.compile(r'(?:\A(?:#[^\n]*\n|\s)*|:[ \t]*\n[ \t]*)[rR]?"""(.*?)"""', re.DOTALL)
THINGS = "apples books coins stamps pencils shells tickets marbles cards stones".split()
PEOPLE = "Ada Ben Chen Dora Emil Fatima Goro Hana Ivan Julia".split()


def modules(package):
    """(package/path, text) of every module that is not a test, in a fixed order; "python": the standard library."""
    root = Path(os.__file__ if package == "python" else importlib.util.find_spec(package).origin).parent
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        with suppress(UnicodeDecodeError, OSError):  # some distributions hold broken links
            if not SKIPPED.intersection(inside.parts) and (text := path.read_text("utf-8")).strip():
                yield f"{package}/{inside.as_posix()}", text


def embedded_prose():
    """Docstrings of at least 200 characters, and the language reference that `help()` shows. The key is the module's,
    so no held-out docstring stands in a module that the model trains on."""
    for key, text in itertools.chain.from_iterable(map(modules, ("python", "numpy", "torch"))):
        yield from ((key, inspect.cleandoc(words) + "\n") for words in DOCSTRING.findall(text) if len(words) >= 200)
    with suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics
        yield from ((f"reference/{key}", text) for key, text in sorted(topics.items()))


def added(a, b):
    """The steps of written addition, from the last digit to the first, and the result."""
    steps, carry, digits = [], 0, len(str(max(a, b)))
    for x, y in zip(f"{a:0{digits}}"[::-1], f"{b:0{digits}}"[::-1]):
        total = int(x) + int(y) + carry
        steps.append(f"{x} + {y}" + (f" + {carry}" if carry else "") + f" = {total}")
        carry = total // 10
    return f"{', '.join(steps)}. So {a} + {b} = {a + b}."


def subtracted(a, b):
    """a - b in two steps: the tens, then the rest."""
    tens = b // 10 * 10
    return f"{a} - {tens} = {a - tens}, {a - tens} - {b % 10} = {a - b}. So {a} - {b} = {a - b}."


def generated_math(problems=40_000, seed=0):
    """Arithmetic with worked steps, which come before the result because a model writes from left to right. The key is
    the problem without its story, so the same numbers are never both trained on and held out."""
    rng = random.Random(seed)
    for _ in range(problems):
        kind, limit = rng.randrange(6), rng.choice([10, 100, 1000])
        a, b = rng.randrange(limit), rng.randrange(limit)
        who, what = rng.choice(PEOPLE), rng.choice(THINGS)
        high, low, relation = max(a, b), min(a, b), ">" if a > b else "<" if a < b else "="
        x, y, ones = a % 90 + 10, b % 8 + 2, a % 10  # of a product
        sign, question, answer = [
            ("+", f"What is {a} + {b}?", added(a, b)),
            ("-", f"What is {high} - {low}?", subtracted(high, low)),
            ("*", f"What is {x} * {y}?", f"{x - ones} * {y} = {(x - ones) * y}, {ones} * {y} = {ones * y}, "
                     f"{(x - ones) * y} + {ones * y} = {x * y}. So {x} * {y} = {x * y}."),
            ("?", f"Which is larger, {a} or {b}?", f"{a} {relation} {b}, so it is {high}."),
            ("+", f"{who} has {a} {what} and gets {b} more. How many {what} does {who} have now?",
                     f"{who} has {a} + {b} {what}. {added(a, b)}"),
            ("-", f"{who} has {high} {what} and gives away {low}. How many {what} are left?",
                     f"{who} has {high} - {low} {what}. {subtracted(high, low)}")][kind]
        yield f"{x}*{y}" if sign == "*" else f"{low}{sign}{high}", f"Question: {question}\nAnswer: {answer}\n"


# Lookups: notes of a key and a value between the lines of a text, asked for behind it. A pair is held out by its hash,
# so an evaluation's pairs never occur in training, and only the text in front of the question can tell.
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


def draw_notes(rng, count, held_out):
    """(key, value) pairs, all held out or none, no key twice."""
    pairs = {}
    while len(pairs) < count:
        key, value = rng.choice(KEYS), rng.choice(VALUES)
        if key not in pairs and (uniform(f"{key} {value}") < HELD_OUT) == held_out:
            pairs[key] = value
    return list(pairs.items())


def note(key, value):
    """A small model learns to look up what follows the key in 150 steps, but not in 400 with a word between them."""
    return f"Note: {key} {value}.\n"


def note_question(key):
    """Ends where the value must follow, after its key as in the note; in the form of the math source's problems."""
    return f"Question: What is the note on {key}?\nAnswer: {key}"


def generated_recall(size, documents, seed=0):
    """Documents of about `size` bytes: docstrings with 2 to size / 80 notes between lines, then a question for each."""
    rng, texts = random.Random(seed), ([], [])
    for key, text in embedded_prose():
        texts[uniform(key) < HELD_OUT].append(text)
    for _ in range(documents):
        held_out, lines = rng.random() < HELD_OUT, []
        pairs = draw_notes(rng, rng.randint(2, min(64, size // 80)), held_out)
        questions = [f"{note_question(key)} {value}.\n" for key, value in rng.sample(pairs, len(pairs))]
        left = size - sum(map(len, questions)) - sum(len(note(*pair)) for pair in pairs)
        while (room := left - sum(map(len, lines))) > 0:
            lines += [line + "\n" for line in rng.choice(texts[held_out])[:room].splitlines()]
        for key, value in pairs:
            lines.insert(rng.randrange(len(lines) + 1), note(key, value))
        yield " ".join(pairs[0]), "".join(lines + questions)


def embedded():
    """The corpus that needs no network: docstrings, the standard library's modules, and arithmetic."""
    return {"prose": Listed(embedded_prose()), "code": Listed(modules("python")), "math": Listed(generated_math())}


# ---- what is dropped ------------------------------------------------------------------------------------------
# 14 bands of 8 hash functions x -> x * factor modulo 2**32 (FineWeb: Penedo et al. 2024, 2406.17557)
FACTORS = np.random.default_rng(0).integers(2**32, size=(14, 8, 1), dtype="u4") | 1


def add_new(seen, key):
    """Adds a hash to a set; False if it was there. A full set is emptied first: memory stays bounded."""
    if new := key not in seen:
        if len(seen) == REMEMBERED:
            seen.clear()
        seen.add(key)
    return new


def repeats_spans(documents):
    """Which of the arrays of ids hold a span of 1 to 13 tokens 32 or more times in a row, bool [D]: the playbook's
    filter (after OLMo 2). A span of n tokens stands k times in a row where n * (k - 1) tokens equal the one n later."""
    ids, ends, bad = np.concatenate(documents), np.cumsum(list(map(len, documents))), np.zeros(len(documents), bool)
    for n in range(1, 14):
        same = ids[n:] == ids[:-n]
        same[ends[ends < len(same)]] = False  # at EOS: equal documents in a row are no repeated span
        edges = np.flatnonzero(np.diff(same, prepend=False, append=False))  # where runs of equal ones begin and end
        begins = edges[::2][edges[1::2] - edges[::2] >= n * 31]
        bad[np.searchsorted(ends, begins, side="right")] = True
    return bad


def quality(text):
    """The first rule that a text breaks, or "": Gopher's (Rae et al. 2021, 2112.11446, appendix A), FineWeb's own three
    (Penedo et al. 2024, 2406.17557) and C4's for code (Raffel et al. 2020). The stop words are English. Left out are
    Gopher's on repeated paragraphs, on the most frequent 2- to 4-grams and on duplicate 5- to 10-grams."""
    def count(pattern):
        return len(re.findall(pattern, text, re.MULTILINE))
    words, lines, each_line = count(r"\S+"), count(r"^.*\S"), text.splitlines()
    broken = {
        "too short or too long": not 50 <= words <= 100_000,  # words
        "odd word lengths": not 3 * words <= count(r"\S") <= 10 * words,
        "many # or ellipses": max(count("#"), count(r"\.\.\.|…")) > 0.1 * words,
        "bullet lists": count(r"^\s*([•‣]|[-*] )") > 0.9 * lines,
        "lines cut by ellipses": count(r"(\.\.\.|…)\s*$") > 0.3 * lines,
        "words without letters": count(r"[^\W\d_]\S*") < 0.8 * words,
        "no English stop words": len({*re.findall(r"\b(the|be|to|of|and|that|have|with)\b", text.lower())}) < 2,
        "few sentence ends": count(r"[.!?…\"'”’]\s*$") <= 0.12 * lines,
        "repeated lines": len("".join(set(each_line))) <= 0.9 * len("".join(each_line)),
        "short lines": count(r"^\s*\S.{0,28}$") >= 0.67 * lines,
        "curly brackets": "{" in text}
    return next(filter(broken.get, broken), "")


def words_of(text):
    """Words in lower case; each character in scripts that write no spaces, as in `fertility`."""
    words = re.findall(r"\w+", text.lower())
    return words if text.isascii() else WORDS.findall(" ".join(words))


def band_hashes(text):
    """MinHash, int64 [14], [0] for less than five words: in each band the smallest hash of five words in a row, by 8
    functions, hashed together. Two texts that share s of their runs agree in one function with probability s (Broder
    1997), in a band or more with 1 - (1 - s**8)**14: 0.77 at s = 0.75, 0.99 at 0.85."""
    words = np.fromiter(map(zlib.crc32, map(str.encode, words_of(text))), "u4")
    if len(words) < 5:
        return np.zeros(0, "i8")
    runs = np.convolve(words, FACTORS[0, :5, 0], "valid")  # modulo 2**32
    return np.array([hash(tuple((factors * runs).min(1).tolist())) for factors in FACTORS])


def add_bands(table, bands):
    """Adds a document's bands to a table; False if one was there. In a place that two want, the later one stays."""
    places = bands % len(table)
    new = not (table[places] == bands).any()
    table[places] = bands
    return new


def runs_of(words, length):
    """Hashes of all `length` words in a row; Python's, which another process would not know."""
    return map(hash, zip(*(words[i:] for i in range(length))))


def evaluation_runs(files):
    """{length: hashes of so many words in a row} of JSON files' strings: 13 (GPT-3, 2005.14165); of 8 to 12, all.
    In scripts without spaces a word is one character, so common phrases match, too."""
    found = defaultdict(set)
    for file in files:
        with reading(file):
            texts = map(json.loads, re.findall(r'"(?:[^"\\]|\\.)*"', Path(file).read_text("utf-8")))
            long = [words for words in map(words_of, texts) if len(words) >= 8]
        for words in long:
            found[length := min(13, len(words))].update(runs_of(words, length))
        if not long:
            raise UserError(f"{file} has no text of 8 words to look for in the documents")
    return found


def drop_reason(text, options, runs):
    """Why a document is dropped before it is encoded, or "". runs: of evaluations."""
    if not text.strip():
        return "empty documents"
    words = words_of(text) if runs else []
    if any(not known.isdisjoint(runs_of(words, length)) for length, known in runs.items()):
        return "quotes of evaluations"
    return options.quality and quality(text)


# ---- token files ----------------------------------------------------------------------------------------------
# One folder per source: {train,val}.bin hold the ids (uint16 or uint32, little-endian) of documents, each opened by
# EOS; {train,val}.starts the document starts and the end (int64); meta.json what is in them, and their sha256. An EOS
# is the target that ends one document and the prompt that starts the next, whose attention begins there.
# All of it is made in OUT.partial and renamed at the end. After each shard meta.json is replaced; it says how long the
# files are and which document was last, so that the same command cuts them to these lengths and resumes.

class Encoded(NamedTuple):
    ids: np.ndarray  # uint16 or uint32, EOS first
    bytes: int  # of the text, UTF-8
    hash: int  # of the text, 64 bits
    bands: np.ndarray  # band_hashes; empty where they are not wanted
    side: str  # "train", "val", or why the document is dropped
    start: str  # its first words


def token_dtype(tokenizer):
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def encode_job(documents, tokenizer, options, runs):
    """[Document] -> [Encoded]; `runs`: of evaluations."""
    reasons = [drop_reason(document.text, options, runs) for document in documents]
    ids = [np.frombuffer(array("I", [tokenizer.eos_id, *tokenizer.encode("" if reason else document.text)]),
                         np.uint32).astype(token_dtype(tokenizer))  # twice as fast as np.array of a list
           for document, reason in zip(documents, reasons)]
    # of tokens that are hardly longer than bytes, a ruled line would be a repeated span
    bad, found = repeats_spans(ids) if ids and tokenizer.vocab_size > 512 else itertools.repeat(False), []
    for (text, held, _), tokens, reason, repeats in zip(documents, ids, reasons, bad):
        raw, side = utf8(text), reason or ("repeated spans" if repeats else "val" if held < HELD_OUT else "train")
        key = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), signed=True)
        bands = band_hashes(text if options.near_duplicates and side in SPLITS else "")
        found.append(Encoded(tokens, len(raw), key, bands, side, text[:80]))
    return found


def encoded(source, position, *settings):
    """Yields ([Encoded], the position behind them, Counter of what the source left out), about JOB_BYTES at a time.
    settings: of `encode_job`. Threads help, since tiktoken releases Python's lock."""
    workers, queue, documents, size = os.cpu_count() or 1, [], [], 0
    source.dropped = Counter()
    with closing(source.read(position)) as stream, ThreadPoolExecutor(workers) as pool:
        for document in itertools.chain(stream, [None]):
            if document:
                documents.append(document)
                size += sys.getsizeof(document.text) + 200  # in memory: an emoji makes every character take 4 bytes
                position = document.position
            if size >= JOB_BYTES or not document:
                queue.append((size, pool.submit(encode_job, documents, *settings), position, source.dropped))
                documents, size, source.dropped = [], 0, Counter()
            while queue and (sum(job[0] for job in queue) > 4 * workers * JOB_BYTES or not document):
                _, job, *rest = queue.pop(0)
                yield job.result(), *rest


def write_source(folder, source, seen, table, tokenizer, options, runs):
    """Makes the token files of a source, or resumes. seen, table: hashes and band hashes of the sources before it."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}  # bytes: of the text, UTF-8
    meta |= {"format": FORMAT, "tokenizer": tokenizer.hash, "position": None, "shards": 0, "dropped": {}, "sizes": {},
             "examples": {}}
    if (folder / "meta.json").exists():
        meta = read_json(folder / "meta.json")
        for key in np.fromfile(folder / "hashes", "<i8", meta["sizes"]["hashes"] // 8).tolist():
            add_new(seen, key)
        add_bands(table, np.fromfile(folder / "hashes.near", "<i8", meta["sizes"]["hashes.near"] // 8))
    if "sha256" in meta["val"]:
        return
    pending, size = [], 0
    with (closing(encoded(source, meta["position"], tokenizer, options, runs)) as jobs,
          tqdm(unit="B", unit_scale=True, desc=f"tokenize {folder.name}", leave=False, delay=1) as bar):
        for documents, position, dropped in jobs:
            if size >= SHARD_TOKENS:
                write_shard(folder, meta, pending)
                pending, size = [], 0
            for document in documents:
                if not add_new(seen, document.hash):
                    dropped["exact duplicates"] += 1
                    continue
                if not add_bands(table, document.bands):
                    document = document._replace(side="near duplicates")
                if document.side not in SPLITS:
                    dropped[document.side] += 1
                    meta["examples"].setdefault(document.side, document.start)
                pending.append(document)
                size += len(document.ids)
            meta |= {"position": position, "dropped": dict(Counter(meta["dropped"]) + dropped)}
            bar.update(sum(document.bytes for document in documents))
            if 0 < options.max_tokens <= size + sum(meta[split]["tokens"] for split in SPLITS):
                break
    if not meta["val"]["documents"] and "val" not in {document.side for document in pending}:
        train = [i for i, document in enumerate(pending) if document.side == "train"]
        for i in train[-max(1, round(HELD_OUT * len(train))):]:  # few documents, or the beginning of a long text
            pending[i] = pending[i]._replace(side="val")
    write_shard(folder, meta, pending, last=True)


def write_shard(folder, meta, documents, last=False):
    """Appends documents, shuffled, to the files of a source, then replaces meta.json; the last time with sha256."""
    order = np.random.default_rng([0, meta["shards"]]).permutation(len(documents))
    append(folder / "hashes", meta, [np.int64([document.hash for document in documents])])
    append(folder / "hashes.near", meta, (document.bands for document in documents))
    for split in SPLITS:
        about, chosen = meta[split], [documents[i] for i in order if documents[i].side == split]
        ends = np.cumsum([0, *(len(document.ids) for document in chosen)]) + about["tokens"]
        append(folder / f"{split}.starts", meta, [ends[min(1, meta["shards"]):]])
        append(folder / f"{split}.bin", meta, (document.ids for document in chosen))
        about["documents"] += len(chosen)
        about["tokens"] = int(ends[-1])
        about["bytes"] += sum(document.bytes for document in chosen)
        if last:
            about["sha256"] = [file_sha256(folder / f"{split}.{kind}") for kind in ("bin", "starts")]
    if last and not all(meta[split]["documents"] for split in SPLITS):
        raise UserError(f"{folder.name} has too few documents to hold one out; give more text or lines. Dropped: "
                        f"{', '.join(f'{n:,} {reason}' for reason, n in meta['dropped'].items()) or 'nothing'}")
    meta["shards"] += 1
    write_json(folder / "meta.json", meta)


def append(path, meta, parts):
    """Writes arrays behind the part of a file that meta.json knows."""
    with open(path, "ab") as file:
        file.truncate(meta["sizes"].get(path.name, 0))
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
        meta["sizes"][path.name] = file.tell()


@dataclass
class Split:
    """The tokens of one source on one side, memory-mapped."""
    name: str
    tokens: np.ndarray  # uint16 or uint32
    starts: np.ndarray  # [documents + 1] int64, the last is the number of tokens
    bytes: int  # of the text, UTF-8
    sha256: str  # of the tokens
    labels: np.ndarray | None = None  # the tokens as targets, -100 for those that are not learned; None: the tokens


def read_meta(folder):
    with reading(folder / "meta.json", AGAIN):
        meta = read_json(folder / "meta.json", AGAIN)
        if meta["format"] != FORMAT:
            raise UserError(f"{folder} has token-file format {meta['format']}, this code reads {FORMAT}: {AGAIN}")
        first = meta.get("examples", {})  # of each reason
        return meta | {"dropped": "".join(
            f"\n{'':13}dropped {n:,} {reason}" + (f", such as {first[reason]!r}" if reason in first else "")
            for reason, n in meta["dropped"].items())}


def load_source(folder, tokenizer, verify=True, place="DIR"):
    """{"train": Split, "val": Split}. `verify` compares the files' sha256 with meta.json's and their ids with the
    vocabulary. `place`: where the tokenizer is, for the message that the data has another."""
    splits, meta = {}, read_meta(folder := Path(folder))
    with reading(folder, AGAIN):
        if meta["tokenizer"] != tokenizer.hash:
            raise UserError(f"{folder} was encoded with another tokenizer: {AGAIN} and `--tokenizer {place}`")
        for split in SPLITS:
            about, files = meta[split], [folder / f"{split}.{kind}" for kind in ("bin", "starts")]
            if verify and list(map(file_sha256, files)) != about["sha256"]:
                raise UserError(f"{folder / split} is not as it was written (its sha256 differs): {AGAIN}")
            tokens = np.memmap(files[0], token_dtype(tokenizer), "r", shape=about["tokens"])
            if (verify or split == "val") and tokens.max() >= tokenizer.vocab_size:
                raise UserError(f"{files[0]} has ids beyond the vocabulary of {tokenizer.vocab_size:,}: {AGAIN}")
            starts = np.memmap(files[1], "<i8", "r", shape=about["documents"] + 1)
            if np.diff(starts, prepend=-1).min() < 1 or starts[-1] != len(tokens):
                raise UserError(f"{files[1]} is damaged: {AGAIN}")
            splits[split] = Split(folder.name, np.asarray(tokens), np.asarray(starts), int(about["bytes"]),
                                  about["sha256"][0])  # arrays, because a memmap's own slices are slow
    return splits


def source_folders(data):
    """The folders that `data` names, separated by commas; each is a source or holds sources."""
    folders = []
    for name in data.split(","):
        found = [file.parent for place in ("meta.json", "*/meta.json") for file in sorted(Path(name).glob(place))]
        if not found:
            if Path(name).exists():
                raise UserError(f"{name} is not prepared data: run `python data.py prepare {name}` and train on that")
            raise UserError(f'{name} does not exist: the commands for each recipe stand under "Data of the recipes" in '
                            f"docs/playbook.md; of text of your own, `python data.py prepare YOUR_TEXT --out {name}`")
        folders += found
    if len({folder.name for folder in folders}) < len(folders):
        raise UserError(f"two sources of {data} have the same name; prepare one again as NAME=PATH")
    return folders


def sample(sources, max_bytes, held_out=0.0):
    """Texts to train a tokenizer on, equally much of each of {name: Source}."""
    return (text for source in sources.values() for text in source.sample(max_bytes / len(sources), held_out))


def prepare(sources, out, tokenizer=None, options=DataOptions()):
    """Tokenizes {name: Source or (key, text) pairs} into `out`/name; without a tokenizer trains one on a sample.
    Interrupted work stays in `out`.partial, and the same call resumes it."""
    if (out := Path(out)).exists():
        raise UserError(f"{out} exists already and is left as it is: choose another --out")
    sources = {name: source if isinstance(source, Source) else Listed(source) for name, source in sources.items()}
    evaluations = re.findall("[^,]+", options.decontaminate)
    runs, partial, seen = evaluation_runs(evaluations), out.with_name(out.name + ".partial"), set()
    table = np.zeros(1 + 14 * REMEMBERED * options.near_duplicates, "i8")  # taken as it is filled
    places = {name: [source.where, source.text_key] for name, source in sources.items()}
    task = [places, tokenizer and tokenizer.hash, vars(options), list(map(file_sha256, evaluations))]
    if (partial / "task.json").exists():
        saved = read_json(partial / "task.json")
        if saved["task"] != task:
            raise UserError(f"{partial} is unfinished work of another command: run that again or remove the folder")
        tokenizer = Tokenizer.load(partial)
        sources |= {name: Source(*places[name], revision) for name, revision in saved["revisions"].items()}
        print(f"resuming {partial}")
    else:
        shutil.rmtree(partial, ignore_errors=True)  # killed before anything was finished
        tokenizer = tokenizer or train_bpe(sample(sources, options.sample_bytes, HELD_OUT), options.vocab_size)
        tokenizer.save(partial)
        revisions = {name: source.revision for name, source in sources.items() if source.revision}
        write_json(partial / "task.json", {"task": task, "revisions": revisions})
    try:
        for name, source in sources.items():
            write_source(partial / name, source, seen, table, tokenizer, options, runs)
        partial.rename(out)
    except BaseException:
        if any(partial.glob("*/meta.json")):
            print(f"\nfinished parts are in {partial}: run the same command again to resume", file=sys.stderr)
        else:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in [*out.glob("*/hashes*"), out / "task.json"]:  # a kill before this leaves files that nothing reads
        path.unlink()
    return tokenizer


# ---- packing: documents -> sequences --------------------------------------------------------------------------
# A packing takes document starts [D + 1] and a context, and returns the row, begin and size of each piece, three int64
# arrays [P]; pieces of one row stand in it in the order of the arrays.

def pack_best_fit(starts, context):
    """Documents whole, longest first, in the row that they fill most (Ding et al. 2024, 2404.10830); only longer ones
    are cut; the rest of a row is padding. Returns the row, the begin and the size of each piece, in the order of the
    text. `room[c]` lists the rows with c places left, bit c of `some` says whether there is one: the lowest bit from a
    piece's size on is its best fit."""
    cuts = -(-np.diff(starts) // context)  # pieces of each document
    number = np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    begins = np.repeat(starts[:-1], cuts) + number * context
    sizes = np.minimum(context, np.repeat(starts[1:], cuts) - begins)
    row, rows, some, room = np.empty_like(sizes), 0, 0, [[] for _ in range(context + 1)]
    for i in np.argsort(-sizes, kind="stable").tolist():
        n = int(sizes[i])
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
    return row, begins, sizes


# concat: documents end to end, cut every `context` tokens. Nothing is lost or padded; arithmetic instead of arrays.
PACKINGS = {"concat": None, "best-fit": pack_best_fit}


class Packing:
    """The `count` sequences of a split. Best fit takes 16 bytes and about 1 us per document at first."""
    def __init__(self, split, context, strategy="concat"):
        self.split, self.context, self.end, self.pack = split, context, len(split.tokens), PACKINGS[strategy]
        self.count = -(-(self.end - 1) // context)  # the last may be shorter; the very first token is no target
        if self.pack:
            rows, begins, sizes = self.pack(split.starts, context)
            order = np.argsort(rows, kind="stable")
            self.begins, self.sizes, self.count = begins[order], sizes[order], int(rows.max()) + 1
            self.rows = np.searchsorted(rows[order], np.arange(self.count + 1))  # first piece of each row, and the end

    def pieces(self, row):
        """(where it begins in the tokens, its length) of each piece of a sequence."""
        if not self.pack:
            return [(row * self.context, min(self.context, self.end - 1 - row * self.context))]
        here = slice(self.rows[row], self.rows[row + 1])
        return list(zip(self.begins[here].tolist(), self.sizes[here].tolist()))

    def targets(self, row):
        """How many targets of a sequence count: neither padding nor left out by labels."""
        if self.split.labels is None:
            return sum(min(n, self.end - begin - 1) for begin, n in self.pieces(row))
        return sum(int((self.split.labels[begin + 1:begin + n + 1] >= 0).sum()) for begin, n in self.pieces(row))

    def report(self):
        """(sequences; utilisation: share of their places that hold a token; dropped: share of the tokens in none; cut:
        share of the documents not whole in one; mean squared length of a piece, like attention's work)."""
        starts = self.split.starts
        begins = self.begins if self.pack else np.union1d(starts[:-1], np.arange(0, self.end, self.context))
        sizes = self.sizes if self.pack else np.diff(begins, append=self.end)
        kept, lengths = sizes.sum(), np.diff(starts)
        whole = (sizes == lengths[np.searchsorted(starts, begins, side="right") - 1]).sum()
        return (self.count, kept / (self.count * self.context), 1 - kept / self.end, 1 - whole / len(lengths),
                float((sizes.astype(float) ** 2).mean()))


# ---- order: which sequence comes when -------------------------------------------------------------------------
def permute(index, n, key):
    """Where the shuffle of range(n) seeded by the integers `key` puts each index [..] int64, without an array of n. A
    Feistel network (Luby and Rackoff 1988) permutes a power of four that holds n; others go again."""
    half = max(1, -(-(n - 1).bit_length() // 2))
    mask, keys = (1 << half) - 1, np.random.PCG64(key).random_raw(6)

    def network(x):
        left, right = x >> half, x & mask
        for k in keys:
            mixed = (right + k) * 0x9E3779B97F4A7C15  # wraps, like every product of a hash
            mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9
            left, right = right, left ^ (mixed >> 32 & mask)
        return left << half | right
    out = network(index.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


def dealt(n, weights):
    """How many of a stage's first n sequences come from each source, [S, *n.shape] int64.
    Half of the sources get floor(n * their share) and the others the rest; then each half deals likewise among its own.
    So each step of n deals exactly one, and each count is exact to within 1 + log2(S) in every stretch. Whole weights
    (rows of the sources) stay whole numbers: the first sum(weights) sequences are exactly one epoch."""
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


class Batch(NamedTuple):
    tokens: np.ndarray  # [B, T] int64
    targets: np.ndarray  # [B, T] int64: the next token; -100 if there is none
    cu_seqlens: np.ndarray  # [M] int32: document starts in the flattened batch, then B*T up to a power of two


def cut_batch(packings, sources, sequences):
    """A batch whose row i is sequence sequences[i] of packings[sources[i]]; -1: a row without tokens and targets."""
    tokens = np.zeros((len(sources), packings[0].context), np.int64)
    targets, starts = np.full_like(tokens, -100), []
    for row, (source, sequence) in enumerate(zip(sources.tolist(), sequences.tolist())):
        split, at = packings[source].split, 0
        labels = split.tokens if split.labels is None else split.labels
        for begin, length in packings[source].pieces(sequence) if sequence >= 0 else [(0, 0)]:
            part = slice(begin, begin + length + 1)  # the target after the last token opens the next document
            ids = split.tokens[part]
            here = row, slice(at, at + len(ids) - 1)  # shorter than `length` at the end of the file only
            tokens[here], targets[here] = ids[:-1], labels[part][1:]
            inside = split.starts[slice(*np.searchsorted(split.starts, [begin + 1, begin + len(ids) - 1]))]
            starts += [[row * packings[0].context + at], inside - begin + row * packings[0].context + at]
            at += length
    starts = np.concatenate(starts)
    cu_seqlens = np.full(max(16, 1 << len(starts).bit_length()), tokens.size, np.int32)  # few lengths to compile for
    cu_seqlens[:len(starts)] = starts
    return Batch(tokens, targets, cu_seqlens)


class Curriculum:
    """The batch of every step, as a pure function of (seed, step). A process asks for its rows of the global batch, so
    the order does not depend on the number of processes. Sequences are shuffled anew each epoch (playbook)."""
    def __init__(self, sources, stages, context, batch_tokens, seed=0, packing="concat"):
        self.sources, self.stages, self.seed = sources, stages, seed
        self.contexts = [stage.context or context for stage in stages]
        self.batches = [stage.batch_tokens or batch_tokens for stage in stages]  # tokens per step
        made = {n: [Packing(split, n, packing) for split in sources] for n in set(self.contexts)}
        self.packings = [made[n] for n in self.contexts]
        self.weights = list(map(self.stage_weights, stages, self.packings))
        self.shares = [[w / sum(weights) for w in weights] for weights in self.weights]
        # per stage: the step at which it begins; tokens before it; rows of each source of its context before it
        self.begins, self.passed, self.before, self.steps = [0], [0], [], 0
        self.used, planned = {length: np.zeros(len(sources), np.int64) for length in made}, 0
        for stage, length, batch, weights in zip(stages, self.contexts, self.batches, self.weights):
            planned += stage.tokens
            left = planned - (self.passed[-1] - self.steps * batch)
            steps = max(not self.steps, round(left / batch) - self.steps)
            self.steps += steps
            self.begins.append(self.steps)
            self.passed.append(self.passed[-1] + steps * batch)
            self.before.append(self.used[length])
            self.used[length] = self.used[length] + dealt(steps * (batch // length), weights)
        self.ends = self.begins[1:]

    def stage_weights(self, stage, packings):
        """Weights of the sources that sum to 1, or without a mixture their rows."""
        weights = [stage.mixture.get(p.split.name, 0.0) if stage.mixture else p.count for p in packings]
        if short := [p.split.name for p, w in zip(packings, weights) if w and not p.pack and p.end <= p.context]:
            raise UserError(f"{', '.join(short)} has fewer tokens than one sequence: take more text or less context")
        return [w / sum(weights) for w in weights] if stage.mixture else weights

    def stage(self, step):
        return sum(end <= step for end in self.ends[:-1])

    def rows(self, step):
        return self.batches[self.stage(step)] // self.contexts[self.stage(step)]

    def tokens(self, step):
        """Tokens in the steps before this one."""
        stage = self.stage(step)
        return self.passed[stage] + (step - self.begins[stage]) * self.batches[stage]

    def epochs(self):
        """{source: how often the run goes through it}; the playbook stays under about 4."""
        made = dict(zip(self.contexts, self.packings))
        return {split.name: float(sum(used[s] / made[n][s].count for n, used in self.used.items()))
                for s, split in enumerate(self.sources)}

    def report(self):
        """Lines about text read too often, stages left out, weights that were divided, and the share of languages."""
        lines = [f"warning   {name} is read {n:.1f} times; past about 4 epochs repeated text teaches little (playbook)"
                 for name, n in self.epochs().items() if n > 4]
        for stage, tokens in zip(self.stages, np.diff(self.passed)):
            total = sum(stage.mixture.values()) or 1
            if not tokens:
                lines.append(f"warning   stage {stage.name} is left out: its {stage.tokens:,.0f} tokens are no step")
            if abs(total - 1) > 1e-6:
                lines.append(f"mixture   the weights of stage {stage.name} sum to {total:.5g}: divided by that")
        # SmolLM3 took 12 % of the whole mixture, which is 14 % of its web text
        foreign = [split.name.startswith("multilingual") for split in self.sources]
        if share := np.dot(self.shares, foreign).max():
            lines.append(f"languages up to {share:.1%} of a stage is multilingual; the playbook settled on 12 %, and "
                         f"the limit of 20 % that summaries give is {'exceeded' if share > 0.2 else 'kept'}")
        return lines

    def locate(self, step, first, count):
        """(source, sequence index in it) of the rows first .. first + count of a step's global batch, [count] int64."""
        stage = self.stage(step)
        index = (step - self.begins[stage]) * self.rows(step) + np.arange(first, first + count, dtype=np.int64)
        before = dealt(index, self.weights[stage])
        source = (dealt(index + 1, self.weights[stage]) - before).argmax(0)
        rank = before[source, np.arange(count)] + self.before[stage][source]
        counts, sequence = [packing.count for packing in self.packings[stage]], np.empty_like(rank)
        epoch = rank // np.array(counts)[source]
        for s, e in set(zip(source.tolist(), epoch.tolist())):
            here = (source == s) & (epoch == e)
            sequence[here] = permute(rank[here] % counts[s], counts[s], [self.seed, s, e])
        return source, sequence

    def targets(self, step):
        """How many targets of a step's global batch count: what its summed loss is divided by, in every process."""
        packings = self.packings[self.stage(step)]
        return sum(packings[source].targets(int(row)) for source, row in zip(*self.locate(step, 0, self.rows(step))))

    def batch(self, step, first=0, count=None):
        """The rows first .. first + count of the global batch of a step (all without them)."""
        packings = self.packings[self.stage(step)]
        return cut_batch(packings, *self.locate(step, first, self.rows(step) if count is None else count))


def held_out_batches(split, context, rows, sequences):
    """The first `sequences` sequences of a split, whatever the batch size; rows without targets fill up the last."""
    packing = Packing(split, context)
    count = min(sequences, packing.count)
    for first in range(0, count, rows):
        indices = np.arange(first, first + rows)
        yield cut_batch([packing], np.zeros(rows, np.int64), np.where(indices < count, indices, -1))


def load_data(data, vocab_size=8192, verify=True):
    """(Tokenizer, [{"train": Split, "val": Split}]) of prepared folders. With `verify` sha256 is checked, and
    data/laptop (with a tokenizer of `vocab_size`) and data/recall are made if they are missing."""
    missing = [name for name in data.split(",") if verify and not Path(name).exists()]
    if "data/laptop" in missing:
        print(f"data      {Path('data/laptop').resolve()} is not there yet: reading the Python installation, "
              "training a tokenizer, encoding")
        prepare(embedded(), "data/laptop", None, DataOptions(vocab_size=vocab_size))
    first = source_folders(data.split(",")[0])[0]
    place = first if (first / "tokenizer.json").exists() else first.parent  # in a source alone, or beside sources
    tokenizer = Tokenizer.load(place)
    if "data/recall" in missing:
        print("data      data/recall is not there yet: writing documents with notes to look up, encoding")
        sizes = {128: (430, 6000), 512: (1600, 2000), 2048: (6500, 1000)}  # context: bytes, at about 4 a token; count
        prepare({f"recall-{n}": generated_recall(*sizes[n], seed=n) for n in sizes}, "data/recall", tokenizer)
    return tokenizer, [load_source(folder, tokenizer, verify, place) for folder in source_folders(data)]


def with_mixture(stages, text):
    """The stages with the mixture SOURCE=SHARE,... (--mixture); STAGE:SOURCE=SHARE,... for one, `;` between several."""
    names = [stage.name for stage in stages]
    for part in filter(None, text.split(";")):
        name, _, shares = part.rpartition(":")
        if not re.fullmatch(r"(?=.*=[.\d]*[1-9])([\w-]+=\d*\.?\d+(,|$))+", shares):  # one share at least is not 0
            raise UserError(f"--mixture {part} is no mixture; write code=.5,prose=.5, or decay:code=.8 for a stage")
        mixture = {source: float(share) for source, share in re.findall(r"([\w-]+)=([.\d]+)", shares)}
        if name and name not in names:
            raise UserError(f"--mixture {part}: the stages are {', '.join(names)}")
        stages = tuple(replace(stage, mixture=mixture) if name in ("", stage.name) else stage for stage in stages)
    return stages


def fit_stages(stages, names, tokens=0, strict=False):
    """The stages with a mixture that the sources have, `tokens` in all (0: as they are). `strict`: or UserError."""
    total, wanted = sum(stage.tokens for stage in stages), {name for stage in stages for name in stage.mixture}
    missing = ", ".join(sorted(wanted - set(names)))
    if strict and missing:
        raise UserError(f"the data has no {missing}; it has {', '.join(names)}: change --mixture (all stages) or "
                        "--candidate, or add a folder to --data")
    if missing:
        print(f"mixture   the data has {', '.join(sorted(names))}, the recipe's mixture {', '.join(sorted(wanted))}: "
              "the sources are taken as large as they are")
        stages = tuple(replace(stage, mixture={}) for stage in stages)
        if all(replace(stage, name="", tokens=0) == Stage() for stage in stages):  # nothing tells them apart
            stages = (Stage("train", total),)
    return tuple(replace(stage, tokens=stage.tokens * (tokens or total) / total) for stage in stages)


# ---- command line ---------------------------------------------------------------------------------------------
def summary(data):
    """Prints documents, tokens, bytes per token and what was dropped of each source. Returns (tokenizer, [Split])."""
    tokenizer, splits = load_data(data, verify=False)
    for folder, split in zip(source_folders(data), splits):
        train, val = split.values()
        print(f"{folder.name:12} {len(train.starts) - 1:9,} documents {len(train.tokens):13,} tokens "
              f"{train.bytes / len(train.tokens):5.2f} bytes/token | held out {len(val.starts) - 1:6,} documents "
              f"{len(val.tokens):9,} tokens{read_meta(folder)['dropped']}")
    return tokenizer, [split["train"] for split in splits]


def show(data, context):
    """Prints the sources, and of each the packings, the lengths of documents and the beginnings of the first two."""
    tokenizer, splits = summary(data)
    for split in splits:
        print(f"\n{split.name}: packed into sequences of {context:,}\n"
              "             sequences  utilisation   dropped       cut   mean square of lengths")
        for strategy in PACKINGS:
            print("{:10}{:>12,}{:>13.1%}{:>10.1%}{:>10.1%}{:>25,.0f}".format(
                strategy, *Packing(split, context, strategy).report()))
        print("tokens per document: a tenth up to {:,.0f}, half up to {:,.0f}, nine tenths up to {:,.0f}, all up to "
              "{:,.0f}".format(*np.quantile(np.diff(split.starts), (0.1, 0.5, 0.9, 1))))
        for start, end in zip(split.starts[:2], split.starts[1:]):
            text = tokenizer.decode(split.tokens[start + 1:min(end, start + 60)].tolist())
            print(f"--- tokens {start:,} to {end:,}, a document of {end - start:,}\n{text}")


def named_sources(words, options):
    """{name: Source} of NAME=SOURCE, or of SOURCE, which then lends its own name."""
    sources = {}
    for word in words:
        name, where = re.fullmatch(r"(?:([\w-]+)=)?(.*)", word).groups()
        name = name or Path(re.sub("^hf:([^:]*).*", r"\1", where)).resolve().name.split(".")[0]
        if name in sources or not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{name!r} names two sources, or is no name: give one of letters and digits as NAME=PATH")
        sources[name] = Source(where, options.text_key, unwrap=options.unwrap)
    return sources or embedded()


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=("prepare", "show", "tokenizer"))
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="files, folders, hf:DATASET[:CONFIG[:SPLIT]] or "
                        "nothing: the embedded corpus. NAME=SOURCE names one. For show: folders of prepared data")
    add_options(parser, DataOptions)
    args = parse_options(parser, sys.argv[1:], intermixed=True)
    options = DataOptions(**given_options(args, DataOptions))
    check_options(options)
    if args.command == "show":
        return show(",".join(args.sources) or "data/laptop", options.context)
    sources = named_sources(args.sources, options)
    name = next(iter(sources)) if args.sources else "laptop"
    if args.command == "tokenizer":
        tokenizer = train_bpe(sample(sources, 10 * options.sample_bytes), options.vocab_size, options.pretokenizer)
        return print(tokenizer.save(options.out or f"tokenizers/{name}"))
    out = options.out or f"data/{name}"
    prepare(sources, out, options.tokenizer and Tokenizer.load(options.tokenizer), options)
    summary(out)
    print(f"Prepared {out}. Train on it with: python train.py --data {out}")


if __name__ == "__main__":
    run(main)
