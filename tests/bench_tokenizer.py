"""Training speed against the `tokenizers` library on the same text and pattern: both times and their ratio. Then the
speed of `data.py prepare`, reading and writing included, against tiktoken's own encode_ordinary_batch on the same text.

    python tests/bench_tokenizer.py [VOCAB_SIZE]        # default 32768; needs: pip install tokenizers
    python tests/bench_tokenizer.py encode [MB]         # the second part alone, on so much text (default 60)

The text is every UTF-8 .py file of the standard library with its tests, about 31 MB.
"""

import json
import os
import resource
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import Source
from tokenizer import CONTROL, PATTERNS, train_bpe


def standard_library() -> list[str]:
    texts, root = [], Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if "site-packages" not in file.parts:
            try:
                texts.append(file.read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                pass
    return texts


def train_hf(texts: list[str], vocab_size: int):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["qwen"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=CONTROL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def bench_training(vocab_size: int) -> None:
    texts = standard_library()
    print(f"{len(texts)} files, {sum(len(t.encode()) for t in texts) / 1e6:.1f} MB, vocabulary {vocab_size}")
    ours, theirs = [], []
    for _ in range(2):  # the faster of two each, taken in turn: other work on the machine slows single runs
        start = time.perf_counter()
        tokenizer = train_bpe(texts, vocab_size)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        reference = train_hf(texts, vocab_size)
        theirs.append(time.perf_counter() - start)
    ratio = min(ours) / min(theirs)
    print(
        f"tokenizer.py {min(ours):.2f} s, tokenizers {min(theirs):.2f} s, ratio {ratio:.2f}, "
        f"peak memory of both {peak_memory():.2f} GiB"
    )
    sample = texts[::20]
    n = sum(len(tokenizer.encode(text)) for text in sample)
    m = sum(len(encoding.ids) for encoding in reference.encode_batch(sample))
    print(f"tokens of every 20th file: {n} and {m}, ratio {n / m:.4f}")


def peak_memory() -> float:
    """GiB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (30 if sys.platform == "darwin" else 20))


def bench_encoding(megabytes: float) -> None:
    texts = standard_library()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_bpe(texts[::8], 16384)
        file, size, documents = Path(folder) / "in.jsonl", 0, []
        with open(file, "w", encoding="utf-8") as out:
            while size < megabytes * 1e6:
                for text in texts:  # in documents of web pages' size; the number makes each a new one
                    for i in range(0, len(text), 3000):
                        document = f"{size} {text[i : i + 3000]}"
                        size += len(document.encode())
                        if size < 60e6:
                            documents.append(document)
                        out.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                    if size >= megabytes * 1e6:
                        break
        part = sum(len(document.encode()) for document in documents)
        threads, theirs, ours = os.cpu_count() or 1, [], []
        for i in range(2 if megabytes <= 100 else 1):
            start, work = time.perf_counter(), time.process_time()
            data.prepare({"x": Source(file)}, Path(folder) / f"out{i}", tokenizer)
            ours.append((size / (time.perf_counter() - start), size / (time.process_time() - work)))
            peak = peak_memory()
            start, work = time.perf_counter(), time.process_time()
            tokenizer._bpe.encode_ordinary_batch(documents, num_threads=threads)
            theirs.append((part / (time.perf_counter() - start), part / (time.process_time() - work)))
        (wall, core), (their_wall, their_core) = max(ours), max(theirs)
        print(
            f"{size / 1e6:.0f} MB of jsonl, {threads} cores: prepare {wall / 1e6:.1f} MB/s, encode_ordinary_batch "
            f"{their_wall / 1e6:.1f} MB/s, ratio {wall / their_wall:.2f}; a second of one core's time {core / 1e6:.1f} "
            f"and "
            f"{their_core / 1e6:.1f} MB, ratio {core / their_core:.2f}; peak memory after prepare {peak:.2f} GiB"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["encode"]:
        bench_encoding(float(sys.argv[2]) if len(sys.argv) > 2 else 60)
    else:
        bench_training(int(sys.argv[1]) if len(sys.argv) > 1 else 32768)
        bench_encoding(60)
