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

    python tokenizer.py train PATH... --vocab-size 4096 --out DIR    # PATH: text file, source code, folder
    python tokenizer.py train PATH... --vocab-size 32768 --out DIR --pretokenizer llama3
    python tokenizer.py fertility DIR PATH...                        # a line per PATH; DIR or hf:ORG/NAME
"""

import argparse
import codecs
import hashlib
import heapq
import json
import os
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
    # SmolLM2's tokenizer.json: cut out single digits, then gpt2 on what lies between, as one expression
    "smollm2": r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
# Ids 0..3, before the 256 bytes and the merges, so that a larger vocabulary extends a smaller one id for id.
CONTROL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
EOS_NAMES = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>"]  # the first present wins
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


def utf8(text: str) -> bytes:
    """UTF-8 bytes; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD as it does in tiktoken."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


# ----- training --------------------------------------------------------------------------------------------

def count_chunks(texts: Iterable[str], pattern: str, total: int | None = None) -> Counter[bytes]:
    """Distinct pre-token chunks (UTF-8) with their counts; `total` characters, if known, give an ETA."""
    findall, chunks, counts = regex.compile(pattern).findall, Counter(), Counter()
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

    def __init__(self, pattern: str, ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]],
                 special: dict[str, int], nfc: bool = False):
        self.pattern, self.ranks, self.merges, self.special, self.nfc = pattern, ranks, merges, special, nfc
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
        # tiktoken cannot do without a byte: what is missing gets an id past the end, which encode removes
        self._missing = {bytes([b]): self.vocab_size + b for b in range(256) if bytes([b]) not in ranks}
        ranks = ranks | self._missing
        self._bpe = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @property
    def hash(self) -> str:
        """sha256 (hex) of all that decides ids: expression, normalisation, control tokens, tokens by id."""
        content = [self.pattern, self.nfc, sorted((i, name) for name, i in self.special.items()),
                   sorted((i, token.hex()) for token, i in self.ranks.items())]
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
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        starts = range(0, len(text) - MAX_SPACE + 1, MAX_SPACE)
        cuts = [0, *(i for i in starts if text[i:i + MAX_SPACE].isspace()), len(text)]
        if len(cuts) == 2 and not self._missing:
            return self._bpe.encode_ordinary(text)
        ids = (i for start, end in zip(cuts, cuts[1:]) for i in self._bpe.encode_ordinary(text[start:end]))
        return [i for i in ids if i < self.vocab_size]

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
        """Read DIR/tokenizer.json, a .json file, or hf:ORG/NAME (downloaded): ours, or any byte-level BPE
        whose ids follow its merges, such as GPT-2's, Llama 3's, Qwen's and SmolLM's. Post-processors (BOS)
        are not applied. UserError for anything else; nothing in the file is executed or unpickled.
        """
        file = find_tokenizer_file(path)
        try:
            spec = json.loads(file.read_bytes().decode("utf-8"))
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


def find_tokenizer_file(path: str | Path) -> Path:
    if str(path).startswith("hf:"):
        try:
            from huggingface_hub import hf_hub_download
        except ImportError:
            raise UserError(f"{path} needs a package that is missing: pip install huggingface_hub.") from None
        try:
            return Path(hf_hub_download(str(path)[3:], "tokenizer.json"))
        except Exception as error:  # the client raises its own, its HTTP library's and OS errors
            raise UserError(f"cannot download {path} ({type(error).__name__}): check the name and the "
                            "network, or give a local folder.") from None
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"there is no tokenizer at {file}: give a folder that holds tokenizer.json, or make "
                        "one with `python tokenizer.py train PATH --vocab-size N --out DIR`.")
    return file


def parse_tokenizer_json(spec: dict) -> tuple:
    """The arguments of Tokenizer() from the content of a tokenizer.json, checked strictly.

    tiktoken takes a token's id for its merge priority, Hugging Face the merge's place in the list: they agree
    only if ids grow along the merges. Raises UserError; KeyError, TypeError and the like on alien structure.
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
    made, last = {bytes([b]) for b in range(256)}, -1
    check(all(bytes([b]) in ranks for b in range(32, 127)), "its vocabulary lacks some ASCII characters")
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge  # older files write "left right"
        for token in (left, right, left + right):
            known = token in vocab and token not in special
            check(known, f"its merge {merge} needs {token!r}, which is not in its vocabulary")
        check(vocab[left + right] >= last, f"the id of its merge {merge} is not in merge order")
        last = vocab[left + right]
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
            cut = [match.group() for match in regex.finditer(pattern, probe)]
            if "" in cut or "".join(cut) != probe:
                raise UserError(f"its pre_tokenizer expression {pattern!r} loses text")
            return pattern
    raise UserError("its pre_tokenizer is not ByteLevel, Digits + ByteLevel or Split + ByteLevel")


# ----- fertility, files, command line ----------------------------------------------------------------------

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


TEXT_SUFFIXES = set(".txt .md .rst .tex .html .css .csv .json .toml .yaml .yml .sql .sh .py .pyi .js .ts .c "
                    ".h .cc .cpp .hpp .cu .cs .java .kt .scala .go .rs .rb .php .pl .jl .lua .swift".split())


def text_problem(file: Path) -> str | None:
    """Why a file is not text, or None; asked of every file before any long work starts."""
    if file.suffix in (".jsonl", ".gz", ".parquet"):
        return "is a data set, not plain text"
    if file.stat().st_size == 0:
        return "is empty"
    try:
        with open(file, encoding="utf-8") as handle:
            has_nul = any("\0" in block for block in iter(lambda: handle.read(BLOCK), ""))
            return "is binary" if has_nul else None
    except UnicodeDecodeError:
        return "is not UTF-8 text"


def text_files(path: Path) -> list[Path]:
    """The file, or a folder's text files by suffix, sorted. A file named outright must be text; in a folder,
    those that are not are left out, and stderr says so."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give text files or folders of them.")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    problems = {file: problem for file in files if (problem := text_problem(file))}
    good = [file for file in files if file not in problems]
    if not good:
        file, problem = next(iter(problems.items()), (path, "holds no text files"))
        raise UserError(f"{file} {problem}: give UTF-8 text (.txt, .md, source code) or folders of it.")
    for file, problem in list(problems.items())[:1]:
        print(f"{path}: left out {len(problems)} of {len(files)} files; {file} {problem}", file=sys.stderr)
    return good


def read_text(files: list[Path], max_bytes: float) -> Iterator[str]:
    """The text in blocks; if the files exceed max_bytes together, the same share from the start of each."""
    share = min(1.0, max_bytes / sum(file.stat().st_size for file in files))
    for file in files:
        left = max(1, int(file.stat().st_size * share))
        with open(file, encoding="utf-8", newline="") as handle:
            while left > 0 and (block := handle.read(min(BLOCK, left))):
                left -= len(block)
                yield block


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a sentence; flags are never guessed from their beginnings."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str):
        raise UserError(f"{message}; see `python {self.prog} --help`")


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | fertility")
    train = commands.add_parser("train", help="train a tokenizer on text and save it")
    train.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="text file or folder of them")
    train.add_argument("--vocab-size", type=int, required=True, help="4 control tokens, 256 bytes, merges")
    train.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json")
    train.add_argument("--pretokenizer", default="qwen", help=f"{', '.join(PATTERNS)} (default: qwen)")
    train.add_argument("--max-mb", type=int, default=1000, help="read at most this, evenly (default: 1000)")
    table = commands.add_parser("fertility", help="tokens per word of a text")
    table.add_argument("tokenizer", metavar="TOKENIZER", help="folder, tokenizer.json or hf:ORG/NAME")
    table.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="one line of the table each")
    args = parser.parse_args(argv)

    if args.command == "train":
        start, files = time.time(), [file for path in args.paths for file in text_files(path)]
        total = min(sum(file.stat().st_size for file in files), args.max_mb * 1_000_000)
        trained = train_bpe(read_text(files, args.max_mb * 1e6), args.vocab_size, args.pretokenizer, total)
        file = trained.save(args.out)
        seconds = time.time() - start
        print(f"{trained.vocab_size} tokens from {total / 1e6:.1f} MB in {seconds:.1f} s -> {file}")
    else:
        tokenizer = Tokenizer.load(args.tokenizer)
        print(f"{'words':>10}{'fertility':>11}{'PCW':>8}{'bytes/token':>13}  path")
        for path in args.paths:
            row = fertility(tokenizer, "".join(read_text(text_files(path), 1e9)))
            print(f"{row['words']:>10}{row['fertility']:>11.3f}{row['pcw']:>8.3f}"
                  f"{row['bytes_per_token']:>13.2f}  {path}")


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
