"""Training speed against the `tokenizers` library on the same text and pattern: both times and their ratio.

    python tests/bench_tokenizer.py [VOCAB_SIZE]        # default 32768; needs: pip install tokenizers

The text is every UTF-8 .py file of the standard library with its tests, about 31 MB.
"""

import resource
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERNS["qwen"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=CONTROL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


if __name__ == "__main__":
    vocab_size = int(sys.argv[1]) if len(sys.argv) > 1 else 32768
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    peak /= 1 << (30 if sys.platform == "darwin" else 20)
    ratio = min(ours) / min(theirs)
    print(f"tokenizer.py {min(ours):.2f} s, tokenizers {min(theirs):.2f} s, ratio {ratio:.2f}, "
          f"peak memory of both {peak:.2f} GiB")
    sample = texts[::20]
    n = sum(map(len, tokenizer.encode_batch(sample)))
    m = sum(len(encoding.ids) for encoding in reference.encode_batch(sample))
    print(f"tokens of every 20th file: {n} and {m}, ratio {n / m:.4f}")
