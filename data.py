"""Data: from text to batches, the chapter that matters most.

SmolLM3's recipe is a mixture that changes: web, code and math at 85/12/3 % in stage 1, 75/15/10 in stage 2, and
63/24/13 while the learning rate decays, because what comes last is remembered best (playbook). Text becomes token
files once; everything after that is computed from the step number, so that no loader has a state to lose:

    documents -> token files (one folder a source) -> sequences -> mixture of a stage -> batch of a step

Packing concatenates shuffled documents and cuts the stream into sequences. Document starts travel with each batch
as `cu_seqlens`, so attention can stay inside a document: no effect in short context (2.197 against 2.198), adopted
for long context and because it makes a step cheaper.

    python data.py prepare                            # the embedded corpus -> data/laptop
    python data.py prepare my.txt notes/ --out data/mine [--tokenizer data/laptop]
    python data.py show data/laptop

Without network the Python installation is the corpus: docstrings of the standard library, numpy and torch and the
language reference (prose), the standard library's modules (code), and generated arithmetic (math).
"""

import argparse
import contextlib
import gzip
import hashlib
import importlib.util
import inspect
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokenizer import Parser, Tokenizer, UserError, run, train_bpe

Document = tuple[str, str]  # (key, text): the key decides between training and validation
FORMAT = 1  # of the token files
VALIDATION_SHARE = 0.03  # of the documents
LONGEST_PIECE = 16_384  # characters; longer documents of a user's files are cut at blank lines


# ---- sources of text ------------------------------------------------------------------------------------------

SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"}
DOCSTRING = re.compile(r'(?:\A(?:#[^\n]*\n|\s)*|:[ \t]*\n[ \t]*)[rR]?"""(.*?)"""', re.DOTALL)


def _python_files(root: Path) -> Iterator[Document]:
    """(path below root, text) of every module that is not a test, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not SKIPPED.intersection(inside.parts):
            with contextlib.suppress(UnicodeDecodeError, OSError):  # some distributions hold broken links
                yield inside.as_posix(), path.read_text("utf-8")


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def embedded_code() -> Iterator[Document]:
    """The standard library, one document a module."""
    return ((f"python/{key}", text) for key, text in _python_files(_standard_library()) if text.strip())


def embedded_prose() -> Iterator[Document]:
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


def generated_math(problems: int = 40_000, seed: int = 0) -> Iterator[Document]:
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


def _cut(key: str, text: str) -> Iterator[Document]:
    """A long document in pieces of at most LONGEST_PIECE characters, cut after a blank line or else a line."""
    start, number = 0, 0
    while len(text) - start > LONGEST_PIECE:
        window = text[start:start + LONGEST_PIECE]
        for mark in ("\n\n", "\n", " "):
            end = window.rfind(mark) + len(mark)
            if end > LONGEST_PIECE // 2:
                break
        else:
            end = LONGEST_PIECE
        yield f"{key}#{number}", text[start:start + end]
        start, number = start + end, number + 1
    yield f"{key}#{number}", text[start:]


def _read_text(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); check the file or leave it out") from None
    if not raw.strip():
        raise UserError(f"{path} is empty; leave it out or put text into it")
    if b"\0" in raw:
        raise UserError(f"{path} is not UTF-8 text but binary; leave it out")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it with "
                        f"`iconv -t UTF-8` or leave it out") from None


def read_documents(path: Path, text_key: str = "text") -> Iterator[Document]:
    """Documents of a user's text file, jsonl(.gz) file or folder of those, in a fixed order.

    A file that is empty or no text is an error if it was named, and left out with a line on stderr in a folder.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a text file, a .jsonl file or a folder of those")
    if not path.is_dir():
        yield from _file_documents(path, path.name, text_key)
        return
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        if file.is_file() and not hidden:
            try:
                yield from _file_documents(file, inside.as_posix(), text_key)
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr)


def _file_documents(path: Path, key: str, text_key: str) -> Iterator[Document]:
    text = _read_text(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _cut(key, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                document = json.loads(line)[text_key]
            except (ValueError, KeyError, TypeError):
                document = None
            if not isinstance(document, str):
                raise UserError(f'{path} line {number} is not a JSON object with text in "{text_key}"; name the field '
                                "that holds the text with --text-key")
            yield f"{key}#{number}", document


# ---- token files ----------------------------------------------------------------------------------------------
# One folder a source: {train,val}.bin hold the ids (uint16 or uint32, little-endian) of all documents, each opened
# by EOS; {train,val}.starts the document starts (int64); meta.json, written last, says what they must hold. EOS
# opens a document because it is then both the target that ends the document before and the prompt that starts
# this one: the attention of a document begins at its own EOS.


def _held_out(key: str) -> float:
    """A number in [0, 1) from the key alone: the same key is on the same side in every run and order."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def _write_split(folder: Path, split: str, texts: list[str], tokenizer: Tokenizer, bar: tqdm) -> dict:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    starts, position, size = [0], 0, 0
    with open(folder / f"{split}.bin", "wb") as file:
        for i in range(0, len(texts), 256):
            part = texts[i:i + 256]
            for ids in tokenizer.encode_batch(part, os.cpu_count() or 1):
                np.array([tokenizer.eos_id, *ids], dtype).tofile(file)
                position += 1 + len(ids)
                starts.append(position)
            size_of_part = sum(map(utf8_size, part))
            size += size_of_part
            bar.update(size_of_part)
    np.array(starts, "<i8").tofile(folder / f"{split}.starts")
    return {"documents": len(texts), "tokens": position, "bytes": size,
            "sha256": {end: _sha256(folder / f"{split}.{end}") for end in ("bin", "starts")}}


def utf8_size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hold_out(name: str, documents: Iterable[Document]) -> dict[str, list[str]]:
    """{"train": texts, "val": texts}, disjoint by key: VALIDATION_SHARE of them, and at least one, are held out."""
    documents = [(_held_out(key), text) for key, text in documents if text.strip()]
    limit = max(VALIDATION_SHARE, np.nextafter(min(documents, default=(0, ""))[0], 1))
    splits = {"train": [text for h, text in documents if h >= limit], "val": [text for h, text in documents if h < limit]}
    if not splits["train"]:
        raise UserError(f"{name} has {len(documents)} document(s), and one must be held out; give more text (a file "
                        f"is cut into documents every {LONGEST_PIECE:,} characters)")
    return splits


def write_source(folder: Path, splits: dict[str, list[str]], tokenizer: Tokenizer, seed: int = 0) -> None:
    """Shuffles the texts and writes the token files of one source."""
    folder.mkdir(parents=True)
    meta = {"format": FORMAT, "tokenizer": tokenizer.hash, "vocab_size": tokenizer.vocab_size,
            "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32", "seed": seed}
    total = sum(utf8_size(text) for texts in splits.values() for text in texts)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenize {folder.name}", leave=False, delay=1) as bar:
        for split, texts in splits.items():
            texts = list(texts)
            random.Random(seed).shuffle(texts)
            meta[split] = _write_split(folder, split, texts, tokenizer, bar)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


@dataclass
class Split:
    """The tokens of one source on one side, memory-mapped."""

    name: str
    tokens: np.ndarray  # [number of tokens] uint16 or uint32
    starts: np.ndarray  # [documents + 1] int64, the last is the number of tokens
    bytes: int  # of the text, UTF-8
    sha256: str  # of the tokens

    def sequences(self, context: int) -> int:
        """How many sequences an epoch has; the last may be shorter and is padded. Every token is a target once,
        but for the very first, which nothing precedes."""
        return -(-(len(self.tokens) - 1) // context)


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
            for end, dtype, count in (("bin", meta["dtype"], entry["tokens"]),
                                      ("starts", "int64", entry["documents"] + 1)):
                path, dtype = folder / f"{split}.{end}", np.dtype(dtype).newbyteorder("<")
                if path.stat().st_size != count * dtype.itemsize:
                    raise UserError(f"{path} has {path.stat().st_size:,} bytes, not the {count * dtype.itemsize:,} "
                                    f"that were written: it is truncated or torn; {remake}")
                if verify and _sha256(path) != entry["sha256"][end]:
                    raise UserError(f"{path} is not what was written (its sha256 differs); {remake}")
                arrays.append(np.memmap(path, dtype, "r"))
            splits[split] = Split(folder.name, *arrays, entry["bytes"], entry["sha256"]["bin"])
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


def prepare(sources: dict[str, Iterable[Document]], out: str | Path, tokenizer: Tokenizer | None = None,
            vocab_size: int = 4096, sample_characters: int = 20_000_000, seed: int = 0) -> Tokenizer:
    """Tokenizes {name: documents} into `out`/name; without a tokenizer trains one on equal parts of the sources.

    At most `sample_characters` of the training side go into the tokenizer's training. Everything is written beside
    `out` and renamed at the end, so that a folder that exists is complete; one that exists is never touched.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; remove it or write elsewhere with --out")
    splits = {name: hold_out(name, documents) for name, documents in sources.items()}
    if tokenizer is None:
        sample = []
        for name, split in splits.items():
            budget = sample_characters // len(splits)
            for text in random.Random(seed).sample(split["train"], len(split["train"])):
                if budget > 0:
                    sample.append(text[:budget])
                    budget -= len(text)
        tokenizer = train_bpe(sample, vocab_size)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, split in splits.items():
            write_source(partial / name, split, tokenizer, seed)
        tokenizer.save(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return tokenizer


def prepare_embedded(out: str | Path, vocab_size: int = 4096) -> Tokenizer:
    """The embedded corpus: prose, code and math from the Python installation, with a tokenizer of their own."""
    return prepare({name: documents() for name, documents in EMBEDDED.items()}, out, vocab_size=vocab_size)


# ---- order: which sequence comes when -------------------------------------------------------------------------


def permute(index: np.ndarray, n: int, key: list[int]) -> np.ndarray:
    """Where a shuffle of range(n) puts each index, in constant time and memory: no array of n is made.

    A Feistel network (Luby and Rackoff 1988) permutes the even power of two that holds n; what lands outside
    range(n) goes through again. index [..] int64 in range(n), key: non-negative integers that name the shuffle. Returns int64 of the same shape.
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


def dealt(n: np.ndarray, shares: list[float]) -> np.ndarray:
    """How many of a stage's first n sequences come from each source, [S, *n.shape] int64.

    Source by source, floor(share of what is left): exact to within one a source for every n, so that each batch
    has the mixture that was asked for, not just the average of many; and each step of n deals exactly one.
    """
    counts, left = [], np.asarray(n, np.int64)
    for i, share in enumerate(shares):
        rest = sum(shares[i:])  # the last source with a share takes all that is left: share / share is exactly 1
        counts.append(np.floor(left * (share / rest if rest else 0.0)).astype(np.int64))
        left = left - counts[-1]
    return np.stack(counts)


def interleave(index: np.ndarray, shares: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Of a stage's sequences `index`: (which source each is from, how many of that source came before it)."""
    before = dealt(index, shares)
    source = (dealt(index + 1, shares) - before).argmax(0)
    return source, before[source, np.arange(len(index))]


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one mixture."""

    name: str
    tokens: float
    mixture: dict[str, float]  # source -> weight; weights are divided by their sum; {}: as large as they are

    def shares(self, sources: list[str], tokens: list[int]) -> list[float]:
        """Weights in the order of `sources`, summing to 1."""
        if unknown := set(self.mixture) - set(sources):
            raise UserError(f"stage {self.name} wants {', '.join(sorted(unknown))}, but the data has "
                            f"{', '.join(sources)}; change the mixture or --data")
        weights = [self.mixture.get(name, 0.0) for name in sources] if self.mixture else tokens
        if min(weights) < 0 or sum(weights) <= 0:
            raise UserError(f"stage {self.name}: the weights of its mixture must not be negative and not all be 0")
        return [w / sum(weights) for w in weights]


@dataclass
class Batch:
    tokens: np.ndarray  # [B, T] int64
    targets: np.ndarray  # [B, T] int64: the next token; -100 where there is none
    cu_seqlens: np.ndarray  # [M] int32: document starts in the flattened batch, padded with B*T
    sources: np.ndarray  # [B]: which source each row is from


def cut_sequences(split: Split, indices: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Sequences of a split: tokens and targets [B, T], and each row's document starts within it (0 first)."""
    tokens, targets = np.zeros((len(indices), context), np.int64), np.full((len(indices), context), -100, np.int64)
    starts = []
    for row, index in enumerate(indices):
        begin = int(index) * context
        part = split.tokens[begin:begin + context + 1]
        tokens[row, :len(part) - 1], targets[row, :len(part) - 1] = part[:-1], part[1:]
        first, last = np.searchsorted(split.starts, [begin + 1, begin + len(part) - 1])
        starts.append(np.concatenate(([0], split.starts[first:last] - begin)))
    return tokens, targets, starts


def pack_cu_seqlens(starts: list[np.ndarray], context: int, length: int) -> np.ndarray:
    """Row starts -> cu_seqlens [length] int32 over the flattened batch."""
    flat = np.concatenate([row * context + s for row, s in enumerate(starts)])
    out = np.full(length, len(starts) * context, np.int32)
    out[:len(flat)] = flat
    return out


def most_documents(split: Split, context: int) -> int:
    """An upper bound of the documents that one sequence touches."""
    starts = split.starts
    return int((np.searchsorted(starts, starts + context) - np.arange(len(starts))).max()) + 1


class Curriculum:
    """The batch of every step, as a pure function: (seed, step) -> rows of the stages' mixtures.

    Global order does not depend on the number of processes: a process asks for its own rows of the global batch.
    Shuffled at sequence level, anew each epoch (playbook).
    """

    def __init__(self, sources: list[Split], stages: list[Stage], context: int, rows: int, seed: int = 0,
                 documents: int = 0):
        """`rows`: sequences in a global batch. `documents`: room for so many a row in cu_seqlens, at least."""
        for split in sources:
            if len(split.tokens) <= context:
                raise UserError(f"{split.name} has {len(split.tokens):,} tokens, fewer than one sequence of "
                                f"{context}; give more text or a shorter --max_position_embeddings")
        self.sources, self.stages, self.context, self.rows, self.seed = sources, stages, context, rows, seed
        names, sizes = [s.name for s in sources], [len(s.tokens) for s in sources]
        self.shares = [stage.shares(names, sizes) for stage in stages]
        ends = np.cumsum([stage.tokens for stage in stages]) / (rows * context)
        self.ends = [max(1, round(end)) for end in ends]  # the step at which each stage ends
        self.steps = self.ends[-1]
        self.most_documents = max(documents, *(most_documents(s, context) for s in sources))
        self.used = [np.zeros(len(sources), np.int64)]  # sequences of each source before each stage
        for begin, end, shares in zip([0, *self.ends], self.ends, self.shares):
            self.used.append(self.used[-1] + dealt((end - begin) * rows, shares))

    def stage(self, step: int) -> int:
        return int(np.searchsorted(self.ends, step, side="right").clip(max=len(self.ends) - 1))

    def epochs(self) -> dict[str, float]:
        """How often the run goes through each source; the playbook stays under about 4."""
        return {s.name: float(n / s.sequences(self.context)) for s, n in zip(self.sources, self.used[-1])}

    def locate(self, step: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, sequence index in it) of the rows first .. first + count of a step's global batch."""
        stage = self.stage(step)
        begin = self.ends[stage - 1] if stage else 0
        index = (step - begin) * self.rows + np.arange(first, first + count, dtype=np.int64)
        source, rank = interleave(index, self.shares[stage])
        rank = rank + self.used[stage][source]
        sequence = np.empty(count, np.int64)
        for s in np.unique(source):
            n = self.sources[s].sequences(self.context)
            for epoch in np.unique(rank[source == s] // n):
                here = (source == s) & (rank // n == epoch)
                sequence[here] = permute(rank[here] % n, n, key=[self.seed, int(s), int(epoch)])
        return source, sequence

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Batch:
        """The rows first .. first + count of the global batch of a step (all without them)."""
        count = self.rows if count is None else count
        source, sequence = self.locate(step, first, count)
        tokens, targets = np.empty((count, self.context), np.int64), np.empty((count, self.context), np.int64)
        starts: list[np.ndarray] = [None] * count
        for s in np.unique(source):
            rows = np.flatnonzero(source == s)
            tokens[rows], targets[rows], parts = cut_sequences(self.sources[s], sequence[rows], self.context)
            for row, part in zip(rows, parts):
                starts[row] = part
        length = count * self.most_documents + 1
        return Batch(tokens, targets, pack_cu_seqlens(starts, self.context, length), source)


def validation_batches(split: Split, context: int, rows: int, sequences: int, documents: int) -> Iterator[Batch]:
    """The first `sequences` sequences of a split: a fixed slice, whatever the batch size. The last batch is filled up
    with rows that have no targets, so that all have one shape. `documents`: at most so many touch a row."""
    indices = np.arange(min(sequences, split.sequences(context)))
    for i in range(0, len(indices), rows):
        tokens, targets, starts = cut_sequences(split, indices[i:i + rows], context)
        missing = rows - len(tokens)
        tokens, targets = np.pad(tokens, ((0, missing), (0, 0))), np.pad(targets, ((0, missing), (0, 0)), constant_values=-100)
        starts += [np.zeros(1, np.int64)] * missing
        yield Batch(tokens, targets, pack_cu_seqlens(starts, context, rows * documents + 1), np.zeros(rows, np.int64))


# ---- command line ---------------------------------------------------------------------------------------------


def describe(data: str) -> str:
    """One line a source: documents, tokens, bytes a token."""
    tokenizer = Tokenizer.load(find_tokenizer(data))
    lines = []
    for folder in source_folders(data):
        splits = load_source(folder, tokenizer)
        train, val = splits["train"], splits["val"]
        lines.append(f"{folder.name:12} {len(train.starts) - 1:9,} documents {len(train.tokens):13,} tokens "
                     f"{train.bytes / len(train.tokens):5.2f} bytes/token | held out {len(val.starts) - 1:6,} documents "
                     f"{len(val.tokens):9,} tokens")
    return "\n".join(lines)


def show(data: str, documents: int = 2) -> None:
    """Prints the sources and the beginnings of a few documents of each."""
    tokenizer = Tokenizer.load(find_tokenizer(data))
    print(describe(data))
    for folder in source_folders(data):
        split = load_source(folder, tokenizer)["train"]
        for start, end in list(zip(split.starts, split.starts[1:]))[:documents]:
            text = tokenizer.decode(split.tokens[start:min(end, start + 60)].tolist())
            print(f"\n--- {folder.name}, document of {end - start:,} tokens\n{text}")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare | show")
    p = commands.add_parser("prepare", help="text -> token files")
    p.add_argument("sources", nargs="*", metavar="SOURCE", help="files or folders (name=PATH to name one); none: the embedded corpus")
    p.add_argument("--out", help="where to (default: data/NAME of the first source)")
    p.add_argument("--tokenizer", help="folder or file of a tokenizer; without it one is trained on the sources")
    p.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer that is trained")
    p.add_argument("--text-key", default="text", help="the field of a jsonl file that holds the text")
    p = commands.add_parser("show", help="what prepared data holds")
    p.add_argument("data", metavar="DIR")
    args = parser.parse_args()
    if args.command == "show":
        return show(args.data)
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    if not args.sources:
        out = args.out or "data/laptop"
        sources = {name: documents() for name, documents in EMBEDDED.items()}
    else:
        pairs = [s.split("=", 1) if "=" in s and not Path(s).exists() else (Path(s).resolve().name.split(".")[0], s)
                 for s in args.sources]
        named = dict(pairs)
        if len(named) < len(pairs):
            raise UserError("two sources have the same name; name them apart with NAME=PATH")
        for name in named:
            if not re.fullmatch(r"[\w-]+", name):
                raise UserError(f"{name!r} is no name for a source; give one of letters and digits as NAME=PATH")
        out = args.out or f"data/{next(iter(named))}"
        sources = {name: read_documents(Path(path), args.text_key) for name, path in named.items()}
    prepare(sources, out, tokenizer, args.vocab_size)
    print(describe(out))
    print(f"Prepared {out}. Train on it with: python train.py --data {out}")


if __name__ == "__main__":
    run(main)
