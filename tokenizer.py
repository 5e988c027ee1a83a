"""Chapter 1: the tokenizer, a byte-level BPE trained from scratch in pure Python.

1. Cut the text into chunks with a regular expression (pre-tokenization) and count each distinct chunk once.
2. Merge the most frequent pair of neighbouring tokens into a new token; repeat up to the vocabulary size.
3. Encode with tiktoken (the same merges at Rust speed); "<|endoftext|>" in a text stays ordinary characters.
4. Save one file, Hugging Face's tokenizer.json.

The playbook: take an existing tokenizer if it covers your languages and domain; train one for low-resource languages or
an unusual mix. About 50k tokens are enough for English (SmolLM2 49,152), 100k or more for many languages (SmolLM3
128,256), in a multiple of 128; a small model's embedding should take at most half of its parameters. Judge by fertility
(tokens per word) and PCW (share of words continued in a second token), lower is better. English: Llama 3 1.48 and .322,
Gemma 3 1.41 and .260, Mistral Small 1.59 and .368, Qwen3 1.54 and .328. Most modern tokenizers split numbers into
single digits, Llama 3 into groups of up to three.

    python data.py tokenizer PATH... --vocab-size 4096 --out DIR      # trains one on text of any kind
    python tokenizer.py fertility DIR hf:ORG/NAME bytes -- text/*     # compares tokenizers on each path

A word stands between white space; in scripts without it (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) it is
a character and its marks. `fertility` counts with any tokenizer.json; unknown tokens flatter all its other numbers.
"""

import argparse
import base64
import codecs
import contextlib
import difflib
import hashlib
import heapq
import importlib
import json
import math
import os
import signal
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import field, fields
from functools import cached_property, partial
from glob import glob
from pathlib import Path
from types import SimpleNamespace

if Path(sys.argv[0]).stem in "ablate checkpoint cost data evals model posttrain sample schedule train tokenizer":
    if Path(sys.argv[0]).resolve().parent == Path(__file__).parent:  # one of our commands: until `run`, Ctrl-C ends it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback; so each file imports this one before torch

import regex  # a dependency of tiktoken; unlike `re` it knows \p{L} (letters) and \p{N} (digits)
import tiktoken
from tqdm import tqdm

# How text is cut before BPE; merges never cross a cut. Written so that `regex` (training), tiktoken (encoding) and
# Oniguruma (Hugging Face's tokenizers) read them alike, without possessive quantifiers and the like.
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = (rf"[{kind}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kind in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # symbols and the newlines after them, white space
PATTERNS = {
    # openai/gpt-2 encoder.py: contractions, then runs of letters, of digits, of other symbols after one space
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3's tokenizer.json and OpenAI's cl100k: any one symbol may lead letters, up to three digits
    "llama3": ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + OTHERS,
    # Qwen2's and Qwen3's tokenizer.json: the same with single digits
    "qwen": ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + OTHERS,
    # Kimi K2's and Moonlight's tokenization_*.py: Chinese apart, then as o200k, where a word starts anew at a capital
    "kimi": r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+" + ENDINGS
            + r"?|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*" + ENDINGS + r"?|\p{N}{1,3}" + OTHERS,
    # SmolLM2's tokenizer.json: cut out single digits, then gpt2 on the text between them, as one expression
    "smollm2": r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
# Ids 0..3, before the 256 bytes and the merges, so that a larger vocabulary extends a smaller one id for id.
CONTROL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
EOS_NAMES = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>", "<|im_end|>",
             "<|eot_id|>", "<|return|>", "<end_of_turn>"]  # the first present wins
PAD_NAMES = ["<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<|fim_pad|>"]
BLOCK = 1 << 20  # training: characters pre-tokenized at a time, which bounds the list of chunks in memory
MAX_CHUNK = 128  # training: longer chunks (base64, DNA) are cut here, or every merge would rescan them
MAX_SPACE = 100_000  # encoding: tiktoken's regex engine overflows its stack at 1,000,000 white spaces
MAX_ID = 1 << 22  # loading: a damaged id must not ask for terabytes

# GPT-2's byte alphabet: every byte as one visible character, so that tokens can stand in a JSON file.
BYTE_TO_CHAR = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - BYTE_TO_CHAR.keys()))}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}
SINGLE = [bytes([b]) for b in range(256)]
compiled = partial(regex.compile, flags=regex.V1)  # version 1 knows the set operation &&
progress = partial(tqdm, delay=1, mininterval=1, leave=False)


def visible(token):
    return "".join(BYTE_TO_CHAR[b] for b in token)


def any_of(names):
    """Finds the names in text, the longest first."""
    return compiled("|".join(map(regex.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def split_by(cut, text):
    """What an expression matches and the text between its matches, in order."""
    edges = [0, *(edge for match in cut.finditer(text) for edge in match.span()), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:]) if a < b]


def utf8(text):
    """UTF-8 bytes; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD as it does in tiktoken."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# ----- BPE training ----------------------------------------------------------------------------------------
def count_chunks(texts, pattern):
    """Distinct pre-token chunks (UTF-8) with their counts."""
    findall, chunks, counts = compiled(pattern).findall, Counter(), Counter()
    for text in progress(texts, desc="counting"):
        for start in range(0, len(text), BLOCK):
            chunks.update(findall(text[start:start + BLOCK]))
    for chunk, n in chunks.items():  # to bytes only here, once per distinct chunk
        for start in range(0, len(chunk), MAX_CHUNK):
            counts[utf8(chunk[start:start + MAX_CHUNK])] += n
    return counts


def bpe_merges(chunk_counts, num_merges):
    """The first `num_merges` merges [(left, right)], fewer if no pair is left (Sennrich et al. 2016, arXiv 1508.07909).
    Rule: merge the most frequent pair of neighbouring tokens, left to right without overlap ("aaa" -> "aa" "a"); of
    equally frequent pairs, the one whose (left bytes, right bytes) sort first. Every position counts: "aaa" has (a, a)
    twice. A merge visits only the chunks that hold its pair. The heap is lazy: once a pair is there its count only
    falls, so an entry is an upper bound, and an outdated one is replaced when it comes to the top."""
    tokens, merges = SINGLE.copy(), []
    chunks, counts = [*map(list, chunk_counts)], [*chunk_counts.values()]  # a chunk: indices into `tokens`
    pair_count, pair_chunks = defaultdict(int), defaultdict(set)  # by (left, right); chunks that hold or held it
    for c, ids in enumerate(chunks):
        for pair in zip(ids, ids[1:]):
            pair_count[pair] += counts[c]
            pair_chunks[pair].add(c)

    def entry(pair):
        return -pair_count[pair], tokens[pair[0]], tokens[pair[1]], pair
    heap = sorted(map(entry, pair_count))  # a sorted list is a heap
    for new in progress(range(256, 256 + num_merges), desc="merging"):
        while heap and heap[0] != (now := entry(heap[0][3])):
            heapq.heapreplace(heap, now)
        if not heap or heap[0][0] == 0:
            break
        _, left, right, (a, b) = heapq.heappop(heap)
        tokens.append(left + right)
        merges.append((left, right))
        created = set()
        for c in pair_chunks.pop((a, b)):
            ids, n = chunks[c], counts[c]
            i, last = 0, len(ids) - 1
            while i < last:
                if ids[i] == a and ids[i + 1] == b:
                    ids[i:i + 2] = [new]
                    last -= 1
                    changes = [((ids[i - 1], a), (ids[i - 1], new))] if i > 0 else []
                    if i < last:
                        changes.append(((b, ids[i + 1]), (new, ids[i + 1])))
                    for old, made in changes:
                        pair_count[old] -= n
                        pair_count[made] += n
                        pair_chunks[made].add(c)
                        created.add(made)
                i += 1
        for pair in created:
            heapq.heappush(heap, entry(pair))
    return merges


def train_bpe(texts, vocab_size, pretokenizer="qwen"):
    """A Tokenizer of 4 control tokens, 256 bytes and vocab_size - 260 merges; UserError if the text has too few."""
    pattern, first = PATTERNS[pretokenizer], len(CONTROL) + 256
    merges = bpe_merges(count_chunks(texts, pattern), vocab_size - first)
    if (made := first + len(merges)) != vocab_size:
        raise UserError(f"control tokens, bytes and the text's pairs make {made} tokens, not {vocab_size}: "
                        f"use --vocab-size {made} or give more text.")
    tokens = SINGLE + [left + right for left, right in merges]
    return Tokenizer(pattern, dict(zip(tokens, range(len(CONTROL), vocab_size))), merges, dict(zip(CONTROL, range(4))))


# ----- the tokenizer ---------------------------------------------------------------------------------------
class Tokenizer:
    """Text to ids and back; made by `train_bpe` or `Tokenizer.load`. A loaded one drops bytes that it lacks.
    pattern: pre-tokenizer expression       cuts: expressions that cut the text before it (DeepSeek-V3 has two)
    ranks: token bytes -> id                merges: (left, right) bytes, in order; [] if they follow from the ranks
    added: tokens that a file adds and does not call special (Qwen3's <think>): found in text, as in transformers
    special: control token -> id            nfc: text is NFC-normalised before encoding, as Qwen's files ask for
    vocab_size: largest id + 1              token_bytes: bytes of text per id, 0 for control tokens
    eos_id: opens and ends a document       pad_id: never eos_id; None if a loaded file has no pad token"""
    unknown = None  # id of the unknown token; byte-level BPE has none
    def __init__(self, pattern, ranks, merges, special, nfc=False, added={}, cuts=()):
        self.pattern, self.ranks, self.merges, self.special = pattern, ranks, merges, special
        self.nfc, self.added, self.cuts, names = nfc, added, list(cuts), special | added
        known = {*ranks.items(), *((utf8(name), i) for name, i in names.items())}
        self._bytes = {i: token for token, i in known}
        if len(self._bytes) < len(known) or not all(0 <= i < MAX_ID for i in self._bytes):
            raise ValueError(f"the ids of its tokens are not distinct numbers in 0..{MAX_ID - 1}")
        if not set(SINGLE[32:127]) <= ranks.keys():
            raise ValueError("its vocabulary lacks some ASCII characters")
        self.vocab_size = 1 + max(self._bytes)
        controls = set(special.values())
        self.token_bytes = [len(self._bytes.get(i, b"")) * (i not in controls) for i in range(self.vocab_size)]
        self.eos_id, self.pad_id = (next((names[name] for name in usual if name in names), None)
                                    for usual in (EOS_NAMES, PAD_NAMES))
        if self.eos_id is None:
            raise ValueError(f"it has no end-of-text token, one of {', '.join(EOS_NAMES)}")
        self._added = any_of(added)
        # The last cut ends a piece after MAX_SPACE white spaces, counted from where they or the search begin (\G).
        self._cuts = [compiled(cut) for cut in (*cuts, r"(?:(?<!\s)|\G)\s{%d}" % MAX_SPACE)]
        made = [ranks[a + b] for a, b in merges]
        if made != sorted(made):
            raise ValueError("its ids do not follow the order of its merges, as tiktoken needs it")
        missing = [byte for byte in SINGLE if byte not in ranks]  # tiktoken needs them all; `encode` drops these
        self._drops, ranks = bool(missing), ranks | dict(zip(missing, range(self.vocab_size, MAX_ID + 256)))
        if pattern not in PATTERNS.values():  # text that it does not match is a chunk too, as in Hugging Face's Split
            pattern = rf"{pattern}|(?:(?!{pattern})[\s\S])+"
        self._bpe = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @property
    def hash(self):
        """sha256 (hex) of all that decides ids: expressions, normalisation, control tokens, tokens by id."""
        content = [self.pattern, self.nfc, sorted(zip(self.special.values(), self.special)),
                   sorted((i, token.hex()) for token, i in self.ranks.items())]
        content += filter(None, (sorted(self.added.items()), self.cuts))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def control(self, name):
        """The id of a control token, and the only way to one; UserError for a name this tokenizer lacks."""
        if name not in self.special:
            raise UserError(f"the tokenizer has no control token {name!r}: it has {', '.join(self.special)}.")
        return self.special[name]

    def encode(self, text):
        """Ids of text without EOS; "<|endoftext|>" in it stays text. decode(encode(text)) == text, except for lone
        surrogates (U+FFFD) and NFC. Ids can differ from Hugging Face's only after 100,000 white spaces in a row."""
        ids, text = [], unicodedata.normalize("NFC", text) if self.nfc else text
        for part in split_by(self._added, text) if self.added else [text]:
            if part in self.added:
                ids.append(self.added[part])
                continue
            pieces = [part]
            for cut in self._cuts if len(text) >= MAX_SPACE else self._cuts[:-1]:
                pieces = [new for piece in pieces for new in split_by(cut, piece)]
            for piece in pieces:
                ids += self._bpe.encode_ordinary(piece)
        return [i for i in ids if i < self.vocab_size] if self._drops else ids

    def decode_bytes(self, ids):
        """The bytes of the ids, control tokens as their names; UserError for an id outside the vocabulary."""
        try:
            return b"".join([self._bytes[int(i)] for i in ids])
        except KeyError as error:
            raise UserError(f"id {error} is not in this tokenizer's vocabulary of {self.vocab_size}: "
                            "take the tokenizer that made the ids, and mask a padded model head.") from None

    def decode(self, ids):
        """Text of the ids; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def stream(self):
        """A function push(ids, final=False) -> text: half a character is held back; push([], final=True) flushes it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda ids, final=False: decoder.decode(self.decode_bytes(ids), final)

    def save(self, folder):
        """Writes FOLDER/tokenizer.json in Hugging Face's format, one line per token and per merge; returns its path."""
        flags = dict.fromkeys(["single_word", "lstrip", "rstrip"], False)
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        names = self.special | self.added
        spec = {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": name, **flags, "normalized": name in self.added,
                              "special": name in self.special} for name, i in names.items()],
            "normalizer": {"type": "NFC"} if self.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                *({"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
                  for cut in (*self.cuts, self.pattern)), level]},
            "decoder": level,
            # ignore_merges: a chunk that is itself a token becomes that token at once, as in tiktoken
            "model": {"type": "BPE", "ignore_merges": True,
                      "vocab": names | {visible(token): i for token, i in self.ranks.items()},
                      "merges": [f"{visible(a)} {visible(b)}" for a, b in self.merges or recover_merges(self.ranks)]},
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        return write_text(Path(folder, "tokenizer.json"), json.dumps(spec, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path):
        """Reads a tokenizer; nothing is executed or unpickled, no BOS is added. UserError unless `path` is
        a folder, ours or of a Hugging Face model, with tokenizer.json, or else tiktoken.model (Kimi, Moonlight),
        a tokenizer.json of any byte-level BPE, such as GPT-2's, Llama 3's, Qwen's, DeepSeek-V3's and SmolLM's,
        FILE:PRETOKENIZER, a file of base64 tokens and ranks as tiktoken writes them, and how it cuts text,
        hf:ORG/NAME, downloaded, a tiktoken encoding such as cl100k_base, downloaded once, or "bytes"."""
        path = str(path)
        if path == "bytes":
            return train_bpe([], len(CONTROL) + 256)
        if path in tiktoken.list_encoding_names() and not Path(path).exists():
            with reading(path, "run it once with network (tiktoken keeps a copy in $TIKTOKEN_CACHE_DIR)."):
                encoding = tiktoken.get_encoding(path)
            return cls(encoding._pat_str, encoding._mergeable_ranks, [], encoding._special_tokens)
        path = downloaded(path)
        name, _, last = path.rpartition(":")
        pattern = PATTERNS.get(last) if name else None
        file = Path(name if pattern else path)
        if file.is_dir():
            file, model = file / "tokenizer.json", file / "tiktoken.model"
            if model.exists() and not file.exists():
                file, pattern = model, PATTERNS["kimi"]
        if not file.is_file() or file.suffix in (".tiktoken", ".model") and not pattern:
            raise UserError(f"there is no tokenizer at {file}: give a folder with tokenizer.json, FILE:PRETOKENIZER ("
                            f"{', '.join(PATTERNS)}), or make one with `python data.py tokenizer PATH --out DIR`.")
        with reading(file):
            return cls(pattern, *parse_tiktoken(file)) if pattern else cls(*parse_tokenizer_json(file))


def downloaded(path):
    """A path as it is, or the tokenizer.json of hf:ORG/NAME."""
    if not path.startswith("hf:"):
        return path
    with reading(path, "check name and network, `pip install huggingface_hub`, or give a local folder."):
        from huggingface_hub import hf_hub_download
        return hf_hub_download(path[3:], "tokenizer.json")


def recover_merges(ranks):
    """The merges behind tiktoken's ranks: BPE with the ranks below a token's own leaves it in two pieces."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2 and min(pairs := [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]) < rank:
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges += [tuple(parts)] * (len(parts) == 2)
    return merges


def parse_tiktoken(file):
    """(ranks, no merges, control tokens) of a file of base64 tokens and ranks. The control tokens are those of
    tokenizer_config.json beside it, with Moonshot's reserved names in the gaps; without it, CONTROL after the ranks."""
    lines = [line.split() for line in file.read_bytes().splitlines()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    first, config, names = len(ranks), file.with_name("tokenizer_config.json"), CONTROL
    if config.exists():
        names = [f"<|reserved_token_{i}|>" for i in range(first, first + 256)]
        for i, token in json.loads(config.read_bytes())["added_tokens_decoder"].items():
            names[int(i) - first] = token["content"]
    return ranks, [], dict(zip(names, range(first, MAX_ID)))


def parse_tokenizer_json(file):
    """The arguments of Tokenizer() from a tokenizer.json; any error means that it cannot be used."""
    spec = json.loads(file.read_bytes())
    model, normalizer = spec["model"], spec.get("normalizer") or {"normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step != {"type": "NFC"} for step in steps):
        raise ValueError(f"its normalizer is {normalizer}, not NFC or nothing")
    special, added = {}, {}
    for token in spec["added_tokens"]:
        (special if token["special"] else added)[token["content"]] = token["id"]
        if not token["special"] and any(map(token.get, ("single_word", "lstrip", "rstrip"))):
            raise ValueError(f"its token {token} looks at the characters beside it")

    def raw(token):  # KeyError for a token that is not byte-level
        return bytes(CHAR_TO_BYTE[c] for c in token)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    names = special.keys() | added.keys() - CHAR_TO_BYTE.keys() - {a + b for a, b in pairs}  # added may be merged too
    ranks = {raw(token): i for token, i in model["vocab"].items() if token not in names}
    merges = [(raw(a), raw(b)) for a, b in pairs]
    if not model.get("ignore_merges") and ranks.keys() - {a + b for a, b in merges} - set(SINGLE):
        raise ValueError("its merges and its vocabulary do not fit together")
    *cuts, pattern = parse_cuts(spec["pre_tokenizer"])
    return pattern, ranks, merges, special, bool(steps), added, cuts


# In a tokenizer.json: each digit apart; what an expression matches and what is between; only what it matches (gpt-4o).
KNOWN_CUTS = [{"type": "Digits", "individual_digits": True}, {"type": "Split", "behavior": "Isolated", "invert": False},
              {"type": "Split", "behavior": "Removed", "invert": True}]


def parse_cuts(pre_tokenizer):
    """The expressions by which a pre_tokenizer cuts text, one after another; ValueError for other ways to cut."""
    *steps, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise ValueError("its pre_tokenizer does not end in ByteLevel without a prefix space")
    cuts, probe = [], "It's 2024,\r\n\té漢 👍\0  "
    for step in steps:
        cut = step.pop("pattern", {"Regex": r"\p{N}"})["Regex"]
        drops = step.get("invert") and "".join(compiled(cut).findall(probe)) != probe  # what it does not match
        if step not in KNOWN_CUTS or drops or compiled(cut).match(""):
            raise ValueError(f"its pre_tokenizer cuts text by {cut!r} in a way that is unknown or loses text: {step}")
        cuts.append(cut)
    cuts += [PATTERNS["gpt2"]] * last.get("use_regex", True)
    return [PATTERNS["smollm2"]] if cuts == [r"\p{N}", PATTERNS["gpt2"]] else cuts  # the same in one expression


# ----- chats -----------------------------------------------------------------------------------------------
# Our own format, as in Qwen and SmolLM3; what the assistant must learn to write is inside {% generation %}.
CHATML = ("{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
          "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
          "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


class ChatFormat:
    """How texts and chats begin and end for the model of a folder, ours or Hugging Face's. opening: ids that begin a
    text; stop: ids that end a reply; template: jinja, None for our own CHATML."""
    def __init__(self, folder, tokenizer):
        self.tokenizer, self.folder, self.control = tokenizer, Path(folder), any_of(tokenizer.special)
        self.template, self.opening = None, [tokenizer.eos_id]  # our documents open with EOS
        self.stop = {tokenizer.eos_id, tokenizer.special.get("<|im_end|>", tokenizer.eos_id)}
        self.names = {"bos_token": tokenizer.decode(self.opening)}
        config, settings = self.content("config.json"), self.content("tokenizer_config.json")
        if "model_type" not in config and not settings:
            return  # a run of ours that did not begin from such a folder
        with reading(self.folder):
            self.names = {role: token["content"] if isinstance(token, dict) else token  # bos_token and others
                          for role, token in settings.items() if token and role.endswith("_token")}
            bos = self.names.get("bos_token")
            writes = json.dumps(self.content("tokenizer.json").get("post_processor"), ensure_ascii=False)
            opens = settings.get("add_bos_token") or f'"id": "{bos}"' in writes  # a TemplateProcessing that writes it
            self.opening = [tokenizer.special[bos]] if bos and opens else []
            ends = self.content("generation_config.json").get("eos_token_id", config.get("eos_token_id"))
            if ends is not None:
                self.stop = {*map(int, ends if isinstance(ends, list) else [ends])}
            self.template, file = settings.get("chat_template"), self.folder / "chat_template.jinja"
            if file.exists():
                self.template = file.read_text("utf-8")
            elif isinstance(self.template, list):  # several by name, such as default, tool_use and rag
                self.template = {one["name"]: one["template"] for one in self.template}["default"]

    def content(self, name):
        file = self.folder / name
        return read_json(file) if file.exists() else {}

    def text(self, prompt):
        """ids of a text to continue."""
        return [*self.opening, *self.tokenizer.encode(prompt)] or [self.tokenizer.eos_id]

    def prompt(self, messages, tools=None):
        """ids of a conversation of {"role", "content"} up to where the assistant speaks; only it has control tokens."""
        text, _, outline = self.render(messages, tools, True)
        return self.encode(text, [], outline)[0]

    def samples(self, messages, tools=None):
        """[(ids, mask)] to train on; mask is 1 on what the assistant must produce, with the token that ends its turn:
        without it a model never learns to stop. One sample for the whole conversation; or, where the template changes
        earlier turns (Qwen3 drops their thinking), one per assistant turn, as at inference. The assistant's part is in
        {% generation %} tags, or else what a reply adds to the prompt before it: an opening greeting has none."""
        whole, tags, outline = self.render(messages, tools)
        turns, seen = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0 and not tags:
                continue
            text, said, shape = self.render(messages[:i + 1], tools)
            said, seen = said[seen:], len(said)
            if not tags:
                before = self.render(messages[:i], tools, True)[0]
                if not text.startswith(before):
                    raise UserError("the model's chat template does not continue its own prompt with the reply: put "
                                    "{% generation %} and {% endgeneration %} around it in chat_template.jinja")
                ends = [match.end() for match in self.control.finditer(shape, len(before))] or [len(text)]
                said = [(len(before), ends[-1])]  # white space after the end is no reply
            turns.append((text, said, shape))
        if all(whole.startswith(text) for text, *_ in turns):
            turns = [(whole, [span for _, said, _ in turns for span in said], outline)]
        return [self.encode(*turn) for turn in turns]

    def encode(self, text, said, outline):
        """(ids, mask) of what `render` returned; mask is 1 inside the spans `said`."""
        control = [edge for name in self.control.finditer(outline) for edge in name.span()]
        edges, ids, mask = sorted({0, len(text), *sum(said, ()), *control}), [], []
        for start, end in zip(edges, edges[1:]):
            id = self.tokenizer.special.get(outline[start:end])
            ids += self.tokenizer.encode(text[start:end]) if id is None else [id]
            mask += [int(any(a <= start < b for a, b in said))] * (len(ids) - len(mask))
        return ids, mask

    def render(self, messages, tools=None, add_generation_prompt=False):
        """(text, the spans inside {% generation %} tags, outline): the outline is the text with x for each character of
        a control token's name that the user, a tool or the system wrote. UserError for what the format cannot show."""
        def hidden(value):
            return json.loads(self.control.sub(lambda name: "x" * len(name[0]), json.dumps(value, ensure_ascii=False)))
        with reading("this conversation", "the model's chat format refuses it."):
            for name, given in ("tools", tools), ("tool_calls", any(m.get("tool_calls") for m in messages)):
                if given and name not in (self.template or CHATML):
                    raise ValueError(f"it does not show {name}; leave such conversations out or take another model")
            if not self.template:
                self.tokenizer.control("<|im_start|>")
            others = [m if m["role"] == "assistant" else hidden(m) for m in messages]
            text, spans = self.program(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
            outline, _ = self.program(messages=others, tools=hidden(tools), add_generation_prompt=add_generation_prompt)
            if len(outline) != len(text):
                raise ValueError("the template changes the name of a control token in a message")
        return text, spans, outline

    @cached_property
    def program(self):
        """The compiled template: (messages, tools, add_generation_prompt) -> text, spans of {% generation %} blocks,
        counted while the text is written, as in transformers; no character of the text marks them."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox  # which torch brings
        written, said = [], []  # pieces of text so far; (start, text) of each block

        def generation(caller):
            said.append((sum(map(len, written)), caller()))
            return said[-1][1]

        def refuse(message):
            raise ValueError(message)

        def write(**conversation):
            written.clear(), said.clear()
            for piece in template.generate(self.names | conversation):
                written.append(piece)
            text = "".join(written)
            if not all(text.startswith(words, start) for start, words in said):
                refuse("it has {% generation %} inside a macro or a {% set %}")
            return text, [(start, start + len(words)) for start, words in said]
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime, "generation": generation}
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        source = regex.sub(r"(\{%[-+]?\s*)generation\b", r"\1call generation()", self.template or CHATML)
        template = environment.from_string(regex.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endcall", source))
        return write


UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
WORDS = regex.compile(rf"[{UNSPACED}][\p{{M}}\p{{P}}]*|[^\s{UNSPACED}]+")


def load_any(name):
    """A tokenizer to count with: ours or, for a tokenizer.json of another kind (Unigram, WordPiece, BPE of characters
    with byte fallback), the `tokenizers` library's, with ids without control tokens. `encode` and `unknown` only."""
    try:
        return Tokenizer.load(name)
    except UserError:
        file = Path(downloaded(str(name)))
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.exists():
            raise
    theirs = installed("tokenizers", f"{file}, no byte-level BPE of a known kind,")
    with reading(file):
        theirs, model = theirs.Tokenizer.from_file(str(file)), read_json(file)["model"]
    return SimpleNamespace(unknown=model.get("unk_id", theirs.token_to_id(model.get("unk_token") or "")),
                           encode=lambda text: theirs.encode(text, add_special_tokens=False).ids)


def fertility(tokenizer, text):
    """words; fertility: tokens per word; pcw: share of continued words (2 tokens or more); of all text, bytes_per_token
    and the share of unknown tokens. Words are encoded alone, without a space, like the playbook's (Rust 2012.15613)."""
    words = Counter(WORDS.findall(text))
    if not words:
        raise UserError("fertility is undefined for a text without words: give more text.")
    total, ids = words.total(), tokenizer.encode(text) or [0]
    counts = [(n, len(tokenizer.encode(word))) for word, n in words.items()]
    return {"words": total, "fertility": sum(n * size for n, size in counts) / total,
            "pcw": sum(n for n, size in counts if size >= 2) / total,
            "bytes_per_token": len(utf8(text)) / len(ids), "unknown": ids.count(tokenizer.unknown) / len(ids)}


# ----- what every command line shares -----------------------------------------------------------------------
class UserError(Exception):
    """A mistake the user can correct: the message is one sentence that says what is wrong and what to do instead."""

@contextlib.contextmanager
def reading(path, advice="it is damaged, incomplete or in another format; make it or download it again."):
    """Whatever goes wrong inside, while a file is read and understood, becomes a UserError with its name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
        raise UserError(f"{path} cannot be read ({' '.join(reason.split())[:300]}): {advice}") from None


def installed(module, what="this", package=""):
    """An optional module, which `what` needs; `package`: its name for pip, if it is another."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what} needs a package that is missing: pip install {package or module}") from None


def write_text(path, text):
    """Replaces a small file: the whole of it, on the disk, or nothing."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return partial.replace(path)


def read_json(path, *advice):
    with reading(path, *advice):
        return dict(json.loads(path.read_bytes()))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1))


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def number(text):
    """1000, 1e6, 2M, 1.5B or 100k."""
    return float(text.translate(str.maketrans({"k": "e3", "M": "e6", "B": "e9", "T": "e12"})))


def whole_number(text):
    if (value := number(text)) % 1:  # nan for inf and nan
        raise ValueError
    return int(value)


def true_or_false(text):
    return bool(["false", "true"].index(text.lower()))


def option(default, help, low=None, high=math.inf, choices=(), group=""):
    """A dataclass field with all that its flag, help and check need. A `group` in --help begins with this option."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices, "group": group})


def options_of(cls):
    """name: (type, help and bounds) of each option of a dataclass."""
    return {f.name: (f.type, f.metadata) for f in fields(cls) if f.metadata}


def check_options(config):
    """UserError where an option has the wrong type (JSON may give any), is out of bounds or is none of the choices."""
    for name, (kind, rule) in options_of(type(config)).items():
        value, low, high, choices = getattr(config, name), rule["low"], rule["high"], rule["choices"]
        typed = type(value) in ((int, float) if kind is float else (kind,))
        if not typed or choices and value not in choices or low is not None and not low <= value <= high:
            wanted = (f"one of {', '.join(filter(None, choices))}" if choices else f"between {low:g} and {high:g}"
                      if typed else f"of the type {kind.__name__}")
            raise UserError(f"--{name} {value!r} is not {wanted}")


def add_options(parser, *classes, without=()):
    """A flag for each option of dataclasses or instances, whose values --help then shows; None if not given."""
    kinds, group = {bool: true_or_false, int: whole_number, float: number, str: str}, parser
    for cls in classes:
        for name, (kind, rule) in options_of(cls).items():
            group = parser.add_argument_group(rule["group"]) if rule["group"] else group
            if name not in without:
                value = getattr(cls, name)
                text = rule["help"] + f" (default: {value})" * (value != "")
                group.add_argument(f"--{name}", type=kinds[kind], help=text.replace("%", "%%"),
                                   metavar="|".join(filter(None, rule["choices"])) or kind.__name__)


def parse_options(parser, argv, intermixed=False):
    """The command line, `intermixed`: flags may stand between names; UserError names the flag nearest to an unknown."""
    args, unknown = (parser.parse_known_intermixed_args if intermixed else parser.parse_known_args)(argv)
    if unknown:
        name = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, vars(args), 1)
        hint = f"did you mean --{near[0]}?" if near else f"see `python {parser.prog} --help`"
        hint = f"give it without --{name}" if name in vars(args) else hint
        raise UserError(f"{unknown[0]} is not understood; {parser.aliases.get(name, hint)}")
    return args


def given_options(args, cls):
    return {name: value for name, value in vars(args).items() if value is not None and name in options_of(cls)}


class Parser(argparse.ArgumentParser):
    """Help as the file's docstring has it; dashes and underscores in flags are the same; no flag is guessed. aliases:
    {other names: the flag that means the same, or a sentence that says what to type instead}."""
    def __init__(self, description="", aliases={}, **more):
        self.aliases = {name: means for names, means in aliases.items() for name in names.split()}
        super().__init__(description=description, allow_abbrev=False, formatter_class=partial(
            argparse.RawDescriptionHelpFormatter, width=120, max_help_position=36), **more)

    def parse_known_args(self, args=None, namespace=None):
        names = [action.metavar or action.dest for action in self._get_positional_actions()]
        self.usage = " ".join(["python %(prog)s", *map(str.upper, names), "[--FLAG VALUE ...]"])  # not all 90 flags
        flags = self._option_string_actions
        flags |= {f"--{name}": flags[f"--{ours}"] for name, ours in self.aliases.items() if f"--{ours}" in flags}
        for flag, action in [*flags.items()]:
            flags |= {flag[:2] + flag[2:].replace(*pair): action for pair in ("_-", "-_")}
        return super().parse_known_args(args, namespace)

    def error(self, message):
        hint = "; a number is 1000, 1e6 or 2M, a switch true or false" * (
            "argument --" in message and "choice" not in message)
        raise UserError(f"{message}{hint}; see `python {self.prog} --help`")


def draw(path, paint, columns=1, size=(8, 4)):
    """Saves what `paint(axes)` draws (a list of axes where there are several columns); None without matplotlib."""
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure
        figure = Figure(size, dpi=120, layout="constrained")
        paint(figure.subplots(1, columns))
        figure.savefig(path)
        return True


def run(main):
    """Runs a command line. A user's mistake ends it in one sentence and status 2; any other exception is a bug."""
    if hasattr(sys.stdout, "reconfigure"):  # a redirected Windows console, for one, cannot hold every character
        sys.stdout.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except BrokenPipeError:  # the reader, `head` for one, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# ----- command line ----------------------------------------------------------------------------------------
def plain_texts(path):
    """The texts of the files at a path, folders opened, hidden files left out; UserError for what is a data set."""
    inside = [Path(path, name) for name in glob("**", root_dir=path, recursive=True)]
    files = sorted(file for file in inside if file.is_file()) or [Path(path)]
    if path.startswith("hf:") or {file.suffix for file in files} & {*".jsonl .parquet .arrow .csv .gz .zst".split()}:
        raise UserError(f"{path} is a data set, not plain text: write its texts into a file of their own")
    for file in files:
        with reading(file):
            yield file.read_text("utf-8-sig")


def main():
    words = sys.argv[1:]
    cut = (words + ["--"]).index("--")
    parser = Parser(__doc__)
    parser.add_argument("command", choices=["fertility"])
    parser.add_argument("names", nargs="+", metavar="TOKENIZER or PATH")
    names, paths = parser.parse_args(words[:cut]).names, words[cut + 1:]
    if not paths:
        names, paths = names[:1], names[1:]
    if not paths:
        raise UserError("fertility needs text: write `python tokenizer.py fertility TOKENIZER... -- PATH...`")
    tokenizers = [(name, load_any(name)) for name in names]
    print("    words  fertility     PCW  bytes/token  unknown  path, tokenizer")
    for path in paths:
        text = "\n".join(plain_texts(path))
        for name, tokenizer in tokenizers:
            print("{:9}{:11.3f}{:8.3f}{:13.2f}{:9.3f} ".format(*fertility(tokenizer, text).values()), f"{path}, {name}")


if __name__ == "__main__":
    run(main)
