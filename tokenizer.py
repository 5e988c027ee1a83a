"""Chapter 1: the tokenizer, a byte-level BPE trained from scratch in pure Python.

1. Cut the text into chunks with a regular expression (pre-tokenization) and count each distinct chunk once.
2. Merge the most frequent pair of neighbouring tokens into a new token; repeat up to the vocabulary size.
3. Encode with tiktoken (the same merges at Rust speed); save one file, Hugging Face's tokenizer.json.
4. Text never becomes a control token: "<|endoftext|>" in a document is ordinary characters to `encode`;
   control tokens come only from `control(name)` and the chat template.

The playbook: about 50k tokens do for English alone, 100k+ for many languages, in a multiple of 128. Judge by
fertility (tokens per word) and PCW (proportion of continued words: two tokens or more); English: Llama 3
1.48 and .322, Gemma 3 1.41 and .260, Mistral Small 1.59 and .368, Qwen3 1.54 and .328. Most modern tokenizers
split numbers into single digits, Llama 3 into groups of up to three. Take an existing tokenizer if it covers
your languages and domain; train one for low-resource languages or an unusual mix, on a sample of that mix.

    python tokenizer.py train PATH... --vocab-size 4096 --out DIR    # PATH: text, code, .jsonl, .parquet, folder, hf:...
    python tokenizer.py train PATH... --vocab-size 32768 --out DIR --pretokenizer llama3
    python tokenizer.py fertility DIR hf:ORG/NAME bytes -- text/*     # tokenizers side by side, a line per PATH
    python tokenizer.py advise --parameters 1e9 --languages 1         # a vocabulary size
"""

import argparse
import base64
import codecs
import contextlib
import copy
import gzip
import hashlib
import heapq
import io
import itertools
import json
import os
import sys
import time
import unicodedata
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import regex  # a dependency of tiktoken; unlike `re` it knows \p{L} (letters) and \p{N} (digits)
import tiktoken
from tqdm import tqdm


class UserError(Exception):
    """A mistake the user can put right: the message is one sentence, what is wrong and what to do instead."""


# How text is cut before BPE; merges never cross a cut. No possessive quantifiers and the like, so that
# `regex` (training), tiktoken (encoding) and Oniguruma (Hugging Face's tokenizers) read them alike.
PATTERNS = {
    # openai/gpt-2 encoder.py: contractions, then runs of letters, of digits, of other symbols after one space
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3's tokenizer.json, after OpenAI's cl100k: any one symbol may lead letters, up to three digits,
    # symbols take the newlines that follow
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen2's and Qwen3's tokenizer.json: the same with single digits
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Kimi K2's and Moonlight's tokenization_*.py: Chinese apart, then as o200k, where a word starts anew at a capital
    "kimi": r"[\p{Han}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # SmolLM2's tokenizer.json: cut out single digits, then gpt2 on what lies between, as one expression
    "smollm2": r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
PATTERNS["cl100k"] = PATTERNS["llama3"]  # the same cuts, as a test shows
# Ids 0..3, before the 256 bytes and the merges, so that a larger vocabulary extends a smaller one id for id.
CONTROL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
# The first present wins.
EOS_NAMES = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "<|eot_id|>"]
PAD_NAMES = ["<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|fim_pad|>"]
BLOCK = 1 << 20  # characters read and pre-tokenized at a time: bounds memory on a file that is one huge line
MAX_CHUNK = 128  # training: longer chunks (base64, DNA) are cut here, or every merge would rescan them
MAX_SPACE = 100_000  # encoding: tiktoken's regex engine overflows its stack at 1,000,000 white spaces

# GPT-2's byte alphabet: every byte as one visible character, so that tokens can stand in a JSON file.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_TO_CHAR = {b: chr(b) for b in VISIBLE}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def visible(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[b] for b in token)


def compiled(pattern: str) -> regex.Pattern:
    """`regex` knows the set operation && in its version 1 only."""
    return regex.compile(pattern, regex.V1 if "&&" in pattern else regex.V0)


def utf8(text: str) -> bytes:
    """UTF-8 bytes; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD as it does in tiktoken."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


# ----- training --------------------------------------------------------------------------------------------

def count_chunks(texts: Iterable[str], pattern: str, total: int | None = None) -> Counter[bytes]:
    """Distinct pre-token chunks (UTF-8) with their counts; `total` characters, if known, give an ETA."""
    findall, chunks, counts = compiled(pattern).findall, Counter(), Counter()
    bar = tqdm(total=total, desc="counting", unit="B", unit_scale=True, delay=1, mininterval=1, leave=False)
    for text in texts:
        for start in range(0, len(text), BLOCK):
            block = text[start:start + BLOCK]
            chunks.update(findall(block))
            bar.update(len(block))
    bar.close()
    for chunk, n in chunks.items():  # to bytes only here, once per distinct chunk
        for start in range(0, len(chunk), MAX_CHUNK):
            counts[utf8(chunk[start:start + MAX_CHUNK])] += n
    return counts


def bpe_merges(chunk_counts: dict[bytes, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """The first `num_merges` merges, fewer if no pair is left (Sennrich et al. 2016, arXiv 1508.07909).

    Rule: merge the most frequent pair of neighbouring tokens, left to right without overlap ("aaa" -> "aa"
    "a"); of equally frequent pairs, the one whose (left bytes, right bytes) sort first. Every position
    counts, so "aaa" holds (a, a) twice. Neither the order of the texts nor the hash seed matters.

    A merge visits only the chunks that hold its pair. The heap is lazy: after the merge that creates a pair
    its count only falls, so an entry is an upper bound, and one out of date goes back with the present count.
    """
    tokens = [bytes([b]) for b in range(256)]
    chunks = [list(chunk) for chunk in chunk_counts]  # each a list of indices into `tokens`
    counts = list(chunk_counts.values())
    pair_count: dict[tuple[int, int], int] = defaultdict(int)
    pair_chunks: dict[tuple[int, int], set[int]] = defaultdict(set)  # chunks that hold, or held, the pair
    for c, ids in enumerate(chunks):
        for pair in zip(ids, ids[1:]):
            pair_count[pair] += counts[c]
            pair_chunks[pair].add(c)

    def entry(pair: tuple[int, int]) -> tuple[int, bytes, bytes, tuple[int, int]]:
        return -pair_count[pair], tokens[pair[0]], tokens[pair[1]], pair

    heap = [entry(pair) for pair in pair_count]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    bar = tqdm(total=num_merges, desc="merging", unit="merge", delay=1, mininterval=1, leave=False)
    while heap and len(merges) < num_merges:
        negative_count, left, right, (a, b) = heapq.heappop(heap)
        if pair_count[a, b] != -negative_count:
            if pair_count[a, b] > 0:
                heapq.heappush(heap, entry((a, b)))
            continue
        new = len(tokens)
        tokens.append(left + right)
        merges.append((left, right))
        created = set()
        for c in pair_chunks.pop((a, b)):
            ids, n = chunks[c], counts[c]
            i, last = 0, len(ids) - 1
            while i < last:
                if ids[i] == a and ids[i + 1] == b:
                    ids[i] = new
                    del ids[i + 1]
                    last -= 1
                    if i > 0:  # (x, a) becomes (x, new)
                        x = ids[i - 1]
                        pair_count[x, a] -= n
                        pair_count[x, new] += n
                        pair_chunks[x, new].add(c)
                        created.add((x, new))
                    if i < last:  # (b, y) becomes (new, y)
                        y = ids[i + 1]
                        pair_count[b, y] -= n
                        pair_count[new, y] += n
                        pair_chunks[new, y].add(c)
                        created.add((new, y))
                i += 1
        del pair_count[a, b]
        for pair in created:
            if pair_count[pair] > 0:  # 0: made and unmade in one merge, as (aa, a) in "aaaa" -> "aa" "aa"
                heapq.heappush(heap, entry(pair))
        bar.update()
    bar.close()
    return merges


def train_bpe(texts: Iterable[str], vocab_size: int, pretokenizer: str = "qwen",
              total: int | None = None) -> "Tokenizer":
    """Train on documents: 4 control tokens, 256 bytes, vocab_size - 260 merges; `total` as in count_chunks.

    Raises UserError if the text runs out of pairs before vocab_size is reached.
    """
    first = len(CONTROL) + 256
    if isinstance(texts, str):
        raise UserError("train_bpe takes a list of documents, not one string: write train_bpe([text], ...).")
    if pretokenizer not in PATTERNS:
        raise UserError(f"there is no pre-tokenizer {pretokenizer!r}: choose one of {', '.join(PATTERNS)}.")
    if vocab_size < first:
        raise UserError(f"a vocabulary of {vocab_size} does not hold the {len(CONTROL)} control tokens and "
                        f"256 bytes: use --vocab-size {first} or more.")
    pattern = PATTERNS[pretokenizer]
    merges = bpe_merges(count_chunks(texts, pattern, total), vocab_size - first)
    if first + len(merges) < vocab_size:
        raise UserError(f"the text has pairs for only {first + len(merges)} tokens, not {vocab_size}: "
                        f"use --vocab-size {first + len(merges)} or give more text.")
    tokens = [bytes([b]) for b in range(256)] + [left + right for left, right in merges]
    ranks = {token: len(CONTROL) + i for i, token in enumerate(tokens)}
    assert len(ranks) == len(tokens), "two merges spell the same token"
    return Tokenizer(pattern, ranks, merges, {name: i for i, name in enumerate(CONTROL)})


# ----- the tokenizer ---------------------------------------------------------------------------------------

class Tokenizer:
    """Text to ids and back; made by `train_bpe` or `Tokenizer.load`.

    pattern: pre-tokenizer expression       ranks: token bytes -> id; a lower id is an earlier merge
    merges: (left, right) bytes, in order   special: control token -> id, never produced from text
    vocab_size: largest id + 1              token_bytes: bytes of text per id, 0 for control tokens
    eos_id: opens and ends a document       pad_id: never eos_id; None if a loaded file has no pad token
    nfc: text is NFC-normalised before encoding (Qwen's files ask for it), so decoding returns normalised text

    A loaded vocabulary may lack bytes that text hardly holds (SmolLM2's lacks 21); those are dropped, as
    Hugging Face does. Ours never drop anything.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]] | None,
                 special: dict[str, int], nfc: bool = False):
        self.pattern, self.ranks, self.special, self.nfc = pattern, ranks, special, nfc
        self._bytes = {i: token for token, i in ranks.items()}
        self._bytes |= {i: utf8(name) for name, i in special.items()}
        self.vocab_size = 1 + max(self._bytes)
        self.token_bytes = [0] * self.vocab_size
        for token, i in ranks.items():
            self.token_bytes[i] = len(token)
        eos = next((special[name] for name in EOS_NAMES if name in special), None)
        if eos is None:
            raise UserError(f"it has no end-of-text token, one of {', '.join(EOS_NAMES)}.")
        self.eos_id: int = eos
        self.pad_id: int | None = next((special[name] for name in PAD_NAMES if name in special), None)
        # tiktoken merges by rank. Where ids are no ranks (ids that do not follow the merges, or a byte that is
        # missing, which tiktoken cannot do without) its ids are places in `order`, and _ids maps them to ours.
        order = sorted(ranks, key=ranks.__getitem__)
        self._follows = merges is None or all(
            ranks[a + b] <= ranks[c + d] for (a, b), (c, d) in zip(merges, merges[1:]))
        if not self._follows:
            order = list(dict.fromkeys([t for t in order if len(t) == 1] + [a + b for a, b in merges] + order))
            if recover_merges({token: i for i, token in enumerate(order)}) != merges:
                raise UserError("its merges say something else than the order of its tokens")
        order += [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        self._ids = None
        if len(order) > len(ranks) or not self._follows:
            self._ids = [ranks.get(token, -1) for token in order]  # -1: dropped
            ranks = {token: i for i, token in enumerate(order)}
        self._merges = merges
        self._bpe = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        if self._merges is None:  # tiktoken's vocabularies come without them
            self._merges = recover_merges(self.ranks)
        return self._merges

    @property
    def hash(self) -> str:
        """sha256 (hex) of all that decides ids: expression, normalisation, control tokens, tokens by id."""
        content = [self.pattern, self.nfc, sorted((i, name) for name, i in self.special.items()),
                   sorted((i, token.hex()) for token, i in self.ranks.items())]
        if not self._follows:
            content.append([(a.hex(), b.hex()) for a, b in self.merges])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def control(self, name: str) -> int:
        """The id of a control token, and the only way to one; UserError for a name this tokenizer lacks."""
        if name not in self.special:
            raise UserError(f"the tokenizer has no control token {name!r}: it has {', '.join(self.special)}.")
        return self.special[name]

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; adds no EOS, and strings such as "<|endoftext|>" stay text.

        A block of MAX_SPACE characters that is all white space starts a new piece; only there can ids differ
        from Hugging Face's. decode(encode(text)) == text, except that lone surrogates become U+FFFD.
        """
        first, *rest = self._parts(text)
        ids = self._bpe.encode_ordinary(first)
        for part in rest:
            ids += self._bpe.encode_ordinary(part)
        return ids if self._ids is None else [self._ids[i] for i in ids if self._ids[i] >= 0]

    def encode_array(self, text: str):
        """The same ids as a numpy array (uint32)."""
        import numpy as np

        return np.frombuffer(array("I", self.encode(text)), np.uint32)  # twice as fast as np.array of a list

    def _parts(self, text: str) -> list[str]:
        """The text normalised, and cut inside absurd runs of white space."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        starts = range(0, len(text) - MAX_SPACE + 1, MAX_SPACE)
        cuts = [0, *(i for i in starts if text[i:i + MAX_SPACE].isspace()), len(text)]
        return [text[a:b] for a, b in zip(cuts, cuts[1:])] if len(cuts) > 2 else [text]

    def encode_batch(self, texts: list[str], threads: int = os.cpu_count() or 1) -> list[list[int]]:
        """encode() of each text on several threads; tiktoken releases the GIL."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, control tokens as their names; UserError for an id outside the vocabulary."""
        try:
            return b"".join([self._bytes[int(i)] for i in ids])
        except KeyError as error:
            raise UserError(f"id {error} is not in this tokenizer's vocabulary of {self.vocab_size}: "
                            "take the tokenizer that made the ids, and mask a padded model head.") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> Callable[..., str]:
        """A function push(ids, final=False) -> text, to print while generating: the bytes of a character not
        yet complete are held back; push([], final=True) flushes them. The pieces join to decode(all ids)."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda ids, final=False: decoder.decode(self.decode_bytes(ids), final)

    def encode_chat(self, messages: list[dict[str, str]],
                    add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """ChatML, as in Qwen and SmolLM3: <|im_start|>role\\ncontent<|im_end|>\\n per {"role", "content"}.

        Returns (ids, mask) of equal length; mask is 1 on what the assistant has to produce: its content and
        the closing <|im_end|>, without which a model never learns to stop. add_generation_prompt opens a
        reply. Header and content are encoded apart: training sees exactly the prompt that generation uses.
        """
        start, end, newline = self.control("<|im_start|>"), self.control("<|im_end|>"), self.encode("\n")
        parts = []  # (ids, mask)
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or not isinstance(content, str):
                raise UserError(f'a chat message must be {{"role": text, "content": text}}, not {message!r}.')
            parts += [([start, *self.encode(role + "\n")], 0),
                      ([*self.encode(content), end], int(role == "assistant")), (newline, 0)]
        if add_generation_prompt:
            parts.append(([start, *self.encode("assistant\n")], 0))
        return [i for ids, _ in parts for i in ids], [mask for ids, mask in parts for _ in ids]

    def save(self, path: str | Path) -> Path:
        """Write DIR/tokenizer.json (or a .json file) in Hugging Face's format, a line per token or merge."""
        path = Path(path) if Path(path).suffix == ".json" else Path(path) / "tokenizer.json"
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        special = sorted(self.special.items(), key=lambda item: item[1])
        vocab = special + [(visible(token), i) for token, i in self.ranks.items()]
        vocab = dict(sorted(vocab, key=lambda item: item[1]))
        spec = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": name, **flags} for name, i in special],
            "normalizer": {"type": "NFC"} if self.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": None, "decoder": level,
            # ignore_merges: a chunk that is itself a token becomes that token at once, as in tiktoken
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": True, "vocab": vocab, "merges": []},
        }
        text = json.dumps(spec, ensure_ascii=False, indent=1)
        merges = ",\n".join(json.dumps([visible(a), visible(b)], ensure_ascii=False) for a, b in self.merges)
        text = text.replace('"merges": []', f'"merges": [\n{merges}\n]')  # each pair on one line
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text + "\n", encoding="utf-8", newline="\n")
        os.replace(partial, path)  # a reader sees the old file or the new one, never half of one
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer from one of

            a folder, ours or of a Hugging Face model: its tokenizer.json, or else its tiktoken.model (Kimi, Moonlight)
            a tokenizer.json; any byte-level BPE, such as GPT-2's, Llama 3's, Qwen's and SmolLM's
            FILE:PRETOKENIZER, a file of base64 tokens and ranks as tiktoken writes them, and how it cuts text
            hf:ORG/NAME, downloaded; a tiktoken encoding such as cl100k_base, downloaded once by tiktoken
            bytes: every byte a token, no merges, the baseline without a tokenizer

        Post-processors (BOS) are not applied. UserError for anything else; nothing is executed or unpickled.
        """
        if str(path) == "bytes":
            return train_bpe([], len(CONTROL) + 256)
        if not Path(path).exists() and str(path) in tiktoken.list_encoding_names():
            return from_tiktoken(str(path))
        file, pretokenizer = find_tokenizer_file(path)
        try:
            if pretokenizer:
                return cls(PATTERNS[pretokenizer], *parse_tiktoken(file))
            spec = json.loads(file.read_bytes().decode("utf-8"))
        except UserError as error:
            problem = str(error).rstrip(".")
        except (ValueError, RecursionError) as error:
            problem = f"it is not JSON ({error})"
        else:
            try:
                return cls(*parse_tokenizer_json(spec))
            except UserError as error:
                problem = str(error).rstrip(".")
            except (KeyError, TypeError, AttributeError, ValueError, regex.error) as error:
                problem = f"it is not built like a tokenizer.json ({type(error).__name__}: {error})"
        raise UserError(f"cannot load the tokenizer {file}: {' '.join(problem.split())}; give a byte-level "
                        "BPE tokenizer.json, or make one with `python tokenizer.py train`.")


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind tiktoken's ranks: BPE with the ranks below a token's own leaves it in two pieces."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts, rank = [token[i:i + 1] for i in range(len(token))], ranks[token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            if pairs[i] >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def from_tiktoken(name: str) -> "Tokenizer":
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # requests' own errors, and tiktoken's ValueError for a damaged cache
        raise UserError(f"tiktoken cannot fetch {name} ({type(error).__name__}): run it once with network (tiktoken "
                        "keeps a copy in $TIKTOKEN_CACHE_DIR), or give a local file.") from None
    return Tokenizer(encoding._pat_str, encoding._mergeable_ranks, None, encoding._special_tokens)


def parse_tiktoken(file: Path) -> tuple:
    """ranks, no merges and the control tokens of a file of base64 tokens and ranks. Control tokens are those of
    the tokenizer_config.json beside it, with Moonshot's reserved names in the gaps; without one,
    CONTROL behind the last rank."""
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise UserError(f"it is not a file of base64 tokens and ranks ({error})") from None
    if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([b]) in ranks for b in range(256)):
        raise UserError("its ranks are not 0, 1, 2, ... or it lacks some bytes")
    config = file.with_name("tokenizer_config.json")
    if not config.exists():
        return ranks, None, {name: len(ranks) + i for i, name in enumerate(CONTROL)}
    try:
        added = json.loads(config.read_text("utf-8")).get("added_tokens_decoder", {})
        named = {int(i): token["content"] for i, token in added.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config} is not built like a tokenizer_config.json ({error})") from None
    ids = range(len(ranks), len(ranks) + 256)
    return ranks, None, {named.get(i, f"<|reserved_token_{i}|>"): i for i in ids}


def find_tokenizer_file(path: str | Path) -> tuple[Path, str]:
    """(the file, the pre-tokenizer of a tiktoken file or "" for a tokenizer.json)."""
    if str(path).startswith("hf:"):
        try:
            from huggingface_hub import hf_hub_download
        except ImportError:
            raise UserError(f"{path} needs a package that is missing: pip install huggingface_hub.") from None
        try:
            return Path(hf_hub_download(str(path)[3:], "tokenizer.json")), ""
        except Exception as error:  # the client raises its own, its HTTP library's and OS errors
            raise UserError(f"cannot download {path} ({type(error).__name__}): check the name and the "
                            "network, or give a local folder.") from None
    name, _, pretokenizer = str(path).rpartition(":")
    if pretokenizer in PATTERNS and Path(name).is_file():
        return Path(name), pretokenizer
    if Path(path).is_dir() and not (Path(path) / "tokenizer.json").exists() and (Path(path) / "tiktoken.model").is_file():
        return Path(path) / "tiktoken.model", "kimi"
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"there is no tokenizer at {file}: give a folder that holds tokenizer.json, or make "
                        "one with `python tokenizer.py train PATH --vocab-size N --out DIR`.")
    if file.suffix in (".tiktoken", ".model"):
        raise UserError(f"{file} does not say how it cuts text: write {file}:PRETOKENIZER, one of {', '.join(PATTERNS)}.")
    return file, ""


def parse_tokenizer_json(spec: dict) -> tuple:
    """The arguments of Tokenizer() from the content of a tokenizer.json, checked strictly.

    Raises UserError; KeyError, TypeError and the like on alien structure.
    """
    def check(ok: bool, problem: str) -> None:
        if not ok:
            raise UserError(problem)

    model, normalizer = spec["model"], spec.get("normalizer")
    check(model.get("type") == "BPE", f"its model is {model.get('type')!r}, not BPE")
    check(normalizer in (None, {"type": "NFC"}), f"its normalizer is {normalizer}, not NFC or none")
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        check(not model.get(key), f"it sets {key}, so it is not a byte-level BPE")

    vocab, special = model["vocab"], {token["content"]: token["id"] for token in spec["added_tokens"]}
    for name, i in [*vocab.items(), *special.items()]:  # the bound: a damaged id must not ask for terabytes
        check(type(i) is int and 0 <= i < 1 << 22, f"the id of {name!r} is {i!r}, not in 0..{(1 << 22) - 1}")
    for name, i in special.items():
        check(vocab.get(name, i) == i, f"the control token {name!r} has two ids, {i} and {vocab.get(name)}")
    check(len(set((vocab | special).values())) == len(vocab | special), "two of its tokens have the same id")

    ranks = {}
    for token, i in vocab.items():
        if token not in special:
            check(token != "" and CHAR_TO_BYTE.keys() >= set(token), f"its token {token!r} is not byte-level")
            ranks[bytes(CHAR_TO_BYTE[c] for c in token)] = i
    made = {bytes([b]) for b in range(256)}
    check(all(bytes([b]) in ranks for b in range(32, 127)), "its vocabulary lacks some ASCII characters")
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge  # older files write "left right"
        for token in (left, right, left + right):
            known = token in vocab and token not in special
            check(known, f"its merge {merge} needs {token!r}, which is not in its vocabulary")
        merges.append((bytes(CHAR_TO_BYTE[c] for c in left), bytes(CHAR_TO_BYTE[c] for c in right)))
        made.add(merges[-1][0] + merges[-1][1])
    orphans = [] if model.get("ignore_merges") else sorted(ranks.keys() - made)
    check(not orphans, f"no merge makes its token {visible(b''.join(orphans[:1]))!r}")
    return parse_pattern(spec["pre_tokenizer"]), ranks, merges, special, normalizer is not None


def parse_pattern(pre_tokenizer: dict) -> str:
    """The one expression equal to a pre_tokenizer in GPT-2's, SmolLM2's or (as ours) Llama 3's form."""
    match (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return PATTERNS["gpt2"]
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return PATTERNS["smollm2"]
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            probe = "It's 2024,\r\n\té漢 👍  "
            cut = [match.group() for match in compiled(pattern).finditer(probe)]
            if "" in cut or "".join(cut) != probe:
                raise UserError(f"its pre_tokenizer expression {pattern!r} loses text")
            return pattern
    raise UserError("its pre_tokenizer is not ByteLevel, Digits + ByteLevel or Split + ByteLevel")


# ----- reading text ----------------------------------------------------------------------------------------

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
        while offset > 1 and (block := stream.read(min(BLOCK, offset - 1))):  # without the line's own end
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


# ----- fertility, command line ----------------------------------------------------------------------

def fertility(tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """fertility: tokens per word; pcw: proportion of continued words (>= 2 tokens); words; bytes_per_token.

    Words are split at white space and tokenised in isolation, with no leading space, as the playbook's code
    does (measures after Rust et al. 2021, arXiv 2012.15613); bytes_per_token is that of the whole text.
    """
    words = Counter(text.split())
    if not words:
        raise UserError("fertility is undefined for a text without words: give more text.")
    tokens = {word: len(tokenizer.encode(word)) for word in words}
    return {"fertility": sum(n * tokens[word] for word, n in words.items()) / words.total(),
            "pcw": sum(n for word, n in words.items() if tokens[word] >= 2) / words.total(),
            "words": words.total(), "bytes_per_token": len(utf8(text)) / len(tokenizer.encode(text))}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a sentence; flags are never guessed from their beginnings."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str):
        raise UserError(f"{message}; see `python {self.prog} --help`")


def advise_vocabulary(parameters: float, languages: int) -> tuple[int, str]:
    """A vocabulary size for a model of so many parameters, and why.

    The playbook: about 50k for English, 100k+ for many languages, in a multiple of 128 (SmolLM2 49,152, SmolLM3
    and Llama 3 128,256, Qwen3 151,936). Ours: the tied embedding takes at most half of the parameters, which binds
    below some 50M; the width is estimated at 64 per layer, so that 12 x layers x width^2 are the rest.
    """
    size = 49_152 if languages == 1 else 128_256
    width = max(64, round((parameters * 64 / 12) ** (1 / 3) / 64) * 64)
    fits = int(parameters / 2 / width) // 128 * 128
    kind = "English or another single language" if languages == 1 else f"{languages} languages"
    if fits < size:
        return max(512, fits), (f"at most half of {parameters:,.0f} parameters for a tied embedding about {width} wide; "
                                f"{kind} would take {size:,} in a larger model")
    return size, (f"{kind}; a tied embedding about {width} wide then takes {size * width / parameters:.0%} of the "
                  "parameters (the brief's own rule for 1-3B: 50-60k, twice that for many languages)")


def main(argv: list[str] | None = None) -> None:
    raw, argv = argparse.RawDescriptionHelpFormatter, sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | fertility | advise")
    train = commands.add_parser("train", help="train a tokenizer on text and save it")
    train.add_argument("paths", nargs="+", metavar="PATH", help="file, data set, folder or hf:DATASET[:CONFIG[:SPLIT]]")
    train.add_argument("--vocab-size", type=int, required=True, help="4 control tokens, 256 bytes, merges")
    train.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json")
    train.add_argument("--pretokenizer", default="qwen", help=f"{', '.join(PATTERNS)} (default: qwen)")
    train.add_argument("--sample-bytes", type=float, default=2e8,
                       help="read at most this, the same share from the start of each file (default: 2e8)")
    train.add_argument("--text-key", default="text", help="the field of a data set that holds the text")
    table = commands.add_parser("fertility", help="tokens per word: a line a path, for several tokenizers at once")
    table.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="folder, file, hf:ORG/NAME, cl100k_base, bytes")
    table.add_argument("--text-key", default="text", help="the field of a data set that holds the text")
    advice = commands.add_parser("advise", help="a vocabulary size from the model's size and the languages")
    advice.add_argument("--parameters", type=float, required=True)
    advice.add_argument("--languages", type=int, default=1)
    cut = argv.index("--") if "--" in argv and argv[:1] == ["fertility"] else len(argv)
    args, paths = parser.parse_args(argv[:cut]), argv[cut + 1:]

    if args.command == "advise":
        if not 1 <= args.parameters <= 1e15:
            raise UserError(f"--parameters {args.parameters:g} is not between 1 and 1e15")
        print("{:,}: {}".format(*advise_vocabulary(args.parameters, max(1, args.languages))))
    elif args.command == "train":
        if not 0 < args.sample_bytes < float("inf"):
            raise UserError(f"--sample-bytes {args.sample_bytes:g} is no amount of text; give a number such as 2e8")
        start, sources = time.time(), [Source(path, args.text_key) for path in args.paths]
        size = sum(source.size for source in sources) or args.sample_bytes
        texts = (text for source in sources for text in
                 source.sample(args.sample_bytes * (source.size / size if source.size else 1 / len(sources))))
        trained = train_bpe(texts, args.vocab_size, args.pretokenizer, min(size, args.sample_bytes))
        file = trained.save(args.out)
        seconds = time.time() - start
        print(f"{trained.vocab_size} tokens from {min(size, args.sample_bytes) / 1e6:.1f} MB in {seconds:.1f} s -> {file}")
    else:
        names, paths = (args.tokenizers, paths) if paths else (args.tokenizers[:1], args.tokenizers[1:])
        if not paths:
            raise UserError("fertility needs text: write `python tokenizer.py fertility TOKENIZER... -- PATH...`")
        tokenizers = [Tokenizer.load(name) for name in names]
        print(f"{'words':>9}" + "".join(f"{'fertility':>11}{'PCW':>8}{'bytes/token':>13}" for _ in names) + "  path")
        if len(names) > 1:
            print(" " * 9 + "".join(f"{name[-30:]:>32}" for name in names))
        for path in paths:
            text = "".join(Source(path, args.text_key).sample(5e7))
            rows = [fertility(tokenizer, text) for tokenizer in tokenizers]
            print(f"{rows[0]['words']:>9}" + "".join(
                f"{row['fertility']:>11.3f}{row['pcw']:>8.3f}{row['bytes_per_token']:>13.2f}" for row in rows) + f"  {path}")


def run(main: Callable[[], None], *errors: type[Exception]) -> None:
    """Runs a command line: a user's mistake (UserError, OSError or one of `errors`) ends it in a sentence on
    stderr and exit code 2, Ctrl-C in exit code 130; any other exception is a bug and shows its traceback."""
    try:
        main()
    except BrokenPipeError:  # the reader, `head` for one, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError, *errors) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main)
