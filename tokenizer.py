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
import difflib
import hashlib
import heapq
import json
import math
import os
import re
import sys
import time
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field, fields
from pathlib import Path

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


# ----- chats -----------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None


BEGIN, END = "\ue002", "\ue003"  # around what the assistant says, in a rendered template


class ChatFormat:
    """How text and chats begin and end for the model of a folder, ours or Hugging Face's."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer):
        self.tokenizer, folder = tokenizer, Path(folder)
        control = map(re.escape, sorted(tokenizer.special, key=len, reverse=True))
        self.control = re.compile("|".join(control) or "(?!)")  # the text of any control token
        self.settings: dict = {}  # tokenizer_config.json; empty for our runs
        self.template: str | None = None
        self.opening = [tokenizer.eos_id]  # our documents open with EOS
        self.stop = {tokenizer.eos_id} | {id for name, id in tokenizer.special.items() if name == "<|im_end|>"}
        if "model_type" not in _read_json(folder / "config.json") and not (folder / "tokenizer_config.json").exists():
            return  # a run of ours that did not begin from such a folder
        self.settings = _read_json(folder / "tokenizer_config.json")
        if (folder / "chat_template.jinja").exists():
            self.template = (folder / "chat_template.jinja").read_text("utf-8")
        elif isinstance(self.settings.get("chat_template"), str):
            self.template = self.settings["chat_template"]
        bos = self.name("bos_token")
        opens = self.settings.get("add_bos_token") or f'"id": "{bos}"' in json.dumps(
            _read_json(folder / "tokenizer.json").get("post_processor"))  # a TemplateProcessing that writes it
        self.opening = [tokenizer.control(bos)] if bos and opens else []
        ends = (_read_json(folder / "generation_config.json").get("eos_token_id")
                or _read_json(folder / "config.json").get("eos_token_id"))
        if ends is not None:
            self.stop = set(ends) if isinstance(ends, list) else {ends}

    def name(self, role: str) -> str | None:
        """The text of the token with a role, such as bos_token, of a Hugging Face tokenizer."""
        token = self.settings.get(role)
        return token.get("content") if isinstance(token, dict) else token

    def text(self, prompt: str) -> list[int]:
        """ids of a text to continue."""
        return [*self.opening, *self.tokenizer.encode(prompt)] or [self.tokenizer.eos_id]

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """ids of a conversation of {"role", "content"} up to where the assistant speaks; ChatML for our own models.

        A template's control tokens become control tokens, and so do the model's own; what looks like one in a message of
        the user stays ordinary text.
        """
        if self.template is None:
            return [*self.opening, *self.tokenizer.encode_chat(messages, add_generation_prompt=True)[0]]
        return self.encode(self.render(messages, True).replace(BEGIN, "").replace(END, ""))

    def samples(self, messages: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
        """(ids, mask) of a whole conversation to train on; mask is 1 on what the assistant has to produce, the token that
        ends its turn included.

        With a template: what stands between its {% generation %} tags, or, without them, what a reply adds to the prompt
        before it. Prompt and reply are encoded apart, as they are when the model answers.
        """
        if self.template is None:
            ids, mask = self.tokenizer.encode_chat(messages)
            return [([*self.opening, *ids], [0] * len(self.opening) + mask)]
        text = self.render(messages, False)
        pieces = re.split(f"[{BEGIN}{END}]", text)  # in turn outside and inside
        if len(pieces) == 1:
            cuts = [0]
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    before, after = self.render(messages[:i], True), self.render(messages[:i + 1], False)
                    if not (after.startswith(before) and text.startswith(after)):
                        raise UserError("the model's chat template changes a turn when others follow it, so that what the "
                                        "assistant says cannot be told; put {% generation %} and {% endgeneration %} around "
                                        "it in chat_template.jinja")
                    ends = [m.end() for m in self.control.finditer(after, len(before))]
                    cuts += [len(before), ends[-1] if ends else len(after)]  # white space behind the end is no reply
            pieces = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)])]
        parts = [self.encode(piece) for piece in pieces]
        return [([i for ids in parts for i in ids], [n % 2 for n, ids in enumerate(parts) for _ in ids])]

    def encode(self, text: str) -> list[int]:
        """ids of what a template rendered."""
        names, ids, start = list(self.tokenizer.special), [], 0
        for found in [*self.control.finditer(text), None]:
            piece = text[start:found.start() if found else len(text)]
            ids += self.tokenizer.encode(re.sub("\ue000(\\d+)\ue001", lambda m: names[int(m[1])], piece))
            if found:
                ids.append(self.tokenizer.control(found[0]))
                start = found.end()
        return ids

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The template's text, with BEGIN and END where it has {% generation %} and {% endgeneration %}, and what looks like
        a control token in a message of the user hidden."""
        try:
            from jinja2 import TemplateError, nodes
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UserError("the chat template of this model needs the package jinja2: pip install jinja2") from None

        def refuse(message):
            raise TemplateError(message)

        names = list(self.tokenizer.special)

        def hide(text):
            return self.control.sub(lambda found: f"\ue000{names.index(found[0])}\ue001", text)

        hidden = [{**m, "content": m["content"] if m["role"] == "assistant" else hide(m["content"])} for m in messages]

        class Generation(Extension):  # {% generation %} marks, for training, what the assistant says
            tags = {"generation"}

            def parse(self, parser):
                next(parser.stream)
                body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
                begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
                return [begin, *body, end]

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[loopcontrols, Generation])
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: __import__("time").strftime(form)}
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            return environment.from_string(self.template).render(
                messages=hidden, add_generation_prompt=add_generation_prompt, tools=None,
                bos_token=self.name("bos_token") or "", eos_token=self.name("eos_token") or "",
                pad_token=self.name("pad_token") or "")
        except Exception as error:  # a template is a program, and can fail in every way
            raise UserError(f"the model's chat template refuses this ({type(error).__name__}: {error})") from None


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


def text_files(paths: list[str]) -> list[Path]:
    """The files of paths, folders opened; UserError for one that is not plain text or not there."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist: give a text file or a folder of them")
        files += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return files


def read_text(file: Path, most: float) -> Iterator[str]:
    """The first `most` bytes of a UTF-8 text file, in blocks of 1 MB."""
    try:
        with open(file, encoding="utf-8") as stream:
            while most > 0 and (block := stream.read(min(BLOCK, max(1, int(most))))):
                most -= len(block)
                yield block
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}): convert it with `iconv -t UTF-8`") from None


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
    table = commands.add_parser("fertility", help="tokens per word: a line a path, for several tokenizers at once")
    table.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="folder, file, hf:ORG/NAME, cl100k_base, bytes")
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
        start, files = time.time(), text_files(args.paths)
        size = sum(file.stat().st_size for file in files)
        texts = (block for file in files for block in read_text(file, args.sample_bytes * file.stat().st_size / max(1, size)))
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
            text = "".join(block for file in text_files([path]) for block in read_text(file, 5e7))
            rows = [fertility(tokenizer, text) for tokenizer in tokenizers]
            print(f"{rows[0]['words']:>9}" + "".join(
                f"{row['fertility']:>11.3f}{row['pcw']:>8.3f}{row['bytes_per_token']:>13.2f}" for row in rows) + f"  {path}")


def number(text: str) -> float:
    """1000, 1e6, 2M, 1.5B or 100k."""
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:], 1.0)
    return float(text if scale == 1.0 else text[:-1]) * scale


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"


def whole(text: str) -> int:
    if (value := number(text)) != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(value)


def option(default, help: str, low: float | None = None, high: float = math.inf, choices: tuple = ()):
    """A dataclass field with all that its flag, its help and its check need. `low` and `high` are allowed values."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def check_options(config) -> None:
    """UserError where a field of a dataclass made of `option`s is of the wrong type, out of bounds or no choice."""
    for f in fields(config):
        value, about, kind = getattr(config, f.name), f.metadata, {"int": int, "float": (int, float)}.get(
            getattr(f.type, "__name__", f.type), f.type)
        if not about:
            continue
        if isinstance(kind, (type, tuple)) and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise UserError(f"{f.name} {value!r} is not of the type {getattr(f.type, '__name__', f.type)}")
        if about["choices"] and value not in about["choices"]:
            raise UserError(f"--{f.name} {value} is not one of {', '.join(map(str, about['choices']))}")
        if about["low"] is not None and not about["low"] <= value <= about["high"]:
            raise UserError(f"--{f.name} {value} is not between {about['low']:g} and {about['high']:g}")


def add_options(parser: argparse.ArgumentParser, *classes: type, without: Iterable[str] = ()) -> None:
    """A flag for each option of dataclasses; `None` where it is not given."""
    kinds = {bool: truth, int: whole, float: number, str: str}
    for f in {f.name: f for kind in classes for f in fields(kind) if f.metadata and f.name not in set(without)}.values():
        parser.add_argument(f"--{f.name}", type=kinds[f.type], default=None, metavar=f.type.__name__,
                            help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"))


def parse_options(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The command line; dashes and underscores in flags are the same. UserError names the nearest flag to an unknown one."""
    words = [word.partition("=") for word in argv]
    args, unknown = parser.parse_known_args(
        [(flag.replace("-", "_").replace("__", "--", 1) if flag.startswith("--") else flag) + equals + value
         for flag, equals, value in words])
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], vars(args), 1)
        raise UserError(f"there is no flag {unknown[0]}; "
                        + (f"did you mean --{near[0]}?" if near else f"see `python {parser.prog} --help`"))
    return args


def given_options(args: argparse.Namespace, *classes: type) -> dict:
    """The options of dataclasses that a command line gives."""
    return {f.name: value for kind in classes for f in fields(kind)
            if f.metadata and (value := getattr(args, f.name, None)) is not None}


@contextlib.contextmanager
def reading(path):
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{path} cannot be read ({reason}); it is damaged or not what its name says") from None


def draw(path: str | Path, paint: Callable, columns: int = 1, size: tuple[float, float] = (8, 4)) -> bool:
    """Saves what `paint(axes)` draws (a list of axes where there are several columns); False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained")
    paint(axes)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def run(main: Callable[[], None]) -> None:
    """Runs a command line: a user's mistake (UserError, OSError) ends it in a sentence on stderr and exit status 2,
    Ctrl-C in status 130; any other exception is a bug and shows its traceback."""
    try:
        main()
    except BrokenPipeError:  # the reader, `head` for one, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main)
