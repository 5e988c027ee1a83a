"""Tests of tokenizer.py: python -m pytest tests/test_tokenizer.py

The references are independent: BPE that recounts everything after each merge, results worked by hand, and
Hugging Face's `tokenizers` library.
"""

import base64
import json
import os
import random
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import tokenizer as T
from tokenizer import PATTERNS, Tokenizer, UserError, bpe_merges, count_chunks, train_bpe

PROSE = (ROOT / "tokenizer.py").read_text(encoding="utf-8")
UNICODE = ("naïve café, Größe 1234567890; 漢字かな交じり文 한국어; العربية مرحبا;"
           " हिन्दी; 👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈\u0301\r\n\t x\u00a0y \x00\x1c \U0010ffff")
SPECIAL_TEXT = "a<|endoftext|><|im_start|>user\nhi<|im_end|><|pad|> </s>b"


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train_bpe([PROSE, UNICODE * 3], 1024)


def one_sentence(error) -> str:
    message = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in message and message.endswith(".") and ": " in message, message
    return message


# ----- training --------------------------------------------------------------------------------------------

def brute_force_bpe(chunk_counts: dict[bytes, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """BPE straight from the definition: recount every pair of every chunk after each merge."""
    chunks = [([bytes([b]) for b in chunk], n) for chunk, n in chunk_counts.items()]
    merges = []
    while len(merges) < num_merges:
        pairs = Counter()
        for chunk, n in chunks:
            for pair in zip(chunk, chunk[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for chunk, _ in chunks:
            i = 0
            while i < len(chunk) - 1:
                if (chunk[i], chunk[i + 1]) == best:
                    chunk[i:i + 2] = [best[0] + best[1]]
                i += 1
    return merges


@pytest.mark.parametrize("alphabet", ["a", "ab", "abc", "aé漢 \n1'", "abcdefgh  \n"])
def test_merges_equal_brute_force(alphabet):
    rng = random.Random(alphabet)
    for _ in range(30):
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(rng.randint(1, 6))]
        chunks = count_chunks(texts, PATTERNS["qwen"])
        assert bpe_merges(chunks, 60) == brute_force_bpe(chunks, 60), texts


def test_merges_equal_brute_force_on_real_text():
    chunks = count_chunks([PROSE[:6000]], PATTERNS["gpt2"])
    assert bpe_merges(chunks, 150) == brute_force_bpe(chunks, 150)


def test_merges_by_hand():
    # Wikipedia's example: aaabdaaabac -> ZabdZabac -> ZYdZYac -> XdXac with Z = aa, Y = ab, X = ZY. The tie
    # of (a, b) and (aa, a), twice each, goes to (a, b): b"a" sorts before b"aa".
    assert bpe_merges({b"aaabdaaabac": 1}, 3) == [(b"a", b"a"), (b"a", b"b"), (b"aa", b"ab")]
    # overlapping repeats: aaaaa -> aa aa a; then (aa, a) and (aa, aa) once each, and b"a" sorts first
    assert bpe_merges({b"aaaaa": 1}, 9) == [(b"a", b"a"), (b"aa", b"a"), (b"aa", b"aaa")]
    # (a, a) is counted at every position, 3 in aaaa, so it beats bc seen twice
    assert bpe_merges({b"aaaa": 1, b"bc": 2}, 2) == [(b"a", b"a"), (b"b", b"c")]
    # counts weigh the chunks
    assert bpe_merges({b"xy": 5, b"ab": 4}, 1) == [(b"x", b"y")]


def test_chunks_by_hand():
    text = "It's I'LL  2024!!\n\n x"
    assert count_chunks([text], PATTERNS["gpt2"]) == Counter(
        [b"It", b"'s", b" I", b"'", b"LL", b" ", b" 2024", b"!!", b"\n\n", b" x"])
    llama = [b"It", b"'s", b" I", b"'LL", b" ", b" ", b"!!\n\n", b" x"]
    assert count_chunks([text], PATTERNS["llama3"]) == Counter(llama + [b"202", b"4"])
    assert count_chunks([text], PATTERNS["qwen"]) == Counter(llama + [b"2", b"0", b"2", b"4"])
    assert count_chunks(["ab", "ab"], PATTERNS["qwen"]) == Counter({b"ab": 2})


def test_long_texts_and_long_chunks_are_cut_without_loss(monkeypatch):
    e = "é".encode()
    assert count_chunks(["é" * 300], PATTERNS["qwen"]) == Counter({e * 128: 2, e * 44: 1})
    monkeypatch.setattr(T, "BLOCK", 7)
    chunks = count_chunks([PROSE[:1000]], PATTERNS["qwen"])
    assert sum(len(chunk) * n for chunk, n in chunks.items()) == len(PROSE[:1000].encode())
    assert max(map(len, chunks)) <= 7


def test_larger_vocabulary_extends_smaller():
    small, large = train_bpe([PROSE], 400), train_bpe([PROSE], 700)
    assert small.vocab_size == 400 and large.vocab_size == 700
    assert large.merges[:140] == small.merges and small.special == large.special
    assert all(large.ranks[token] == i for token, i in small.ranks.items())
    assert small.hash != large.hash


def test_merges_depend_on_neither_hash_seed_nor_order():
    code = ("import sys, tokenizer; parts = open('tokenizer.py', encoding='utf-8').read().split('\\n\\n')\n"
            "print(tokenizer.train_bpe(parts[::int(sys.argv[1])], 900).hash)")
    outputs = []
    for seed, step in (("0", "1"), ("1", "1"), ("2", "-1")):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.append(subprocess.run([sys.executable, "-c", code, step], cwd=ROOT, env=environment,
                                      capture_output=True, text=True, check=True).stdout)
    assert len(outputs[0].strip()) == 64 and len(set(outputs)) == 1


def test_training_gives_the_same_everywhere():
    """The ids of a vocabulary trained on this text, wherever it runs: a changed hash would void every token file."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 9))) for _ in range(200)]
    text = " ".join(rng.choice(words) + rng.choice(["", ".", "\n", " 42"]) for _ in range(5000))
    assert train_bpe([text], 700, "gpt2").hash == "9dc3300771b10e12c61f34cbdb686a1c8c14ddf0c2003c2a72cf65e46e36d7df"


def test_too_little_text_says_how_much_was_reached():
    with pytest.raises(UserError) as error:
        train_bpe(["abcd"], 1000)
    assert "only 263 tokens, not 1000" in one_sentence(error) and "--vocab-size 263" in str(error.value)
    assert train_bpe(["abcd"], 263).decode([262]) == "abcd"


@pytest.mark.parametrize("arguments", [("text", 300), (["text"], 259), (["text"], 300, "bert")])
def test_training_mistakes(arguments):
    with pytest.raises(UserError) as error:
        train_bpe(*arguments)
    one_sentence(error)


def test_ids_are_laid_out_as_documented(tok):
    names = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert [tok.control(name) for name in names] == [0, 1, 2, 3]
    assert tok.decode_bytes(range(4, 260)) == bytes(range(256))
    assert tok.decode_bytes([260]) == b"".join(tok.merges[0])
    assert (tok.eos_id, tok.pad_id, tok.vocab_size) == (0, 1, 1024)
    assert len(tok.token_bytes) == 1024 and tok.token_bytes[:5] == [0, 0, 0, 0, 1]


# ----- encoding and decoding -------------------------------------------------------------------------------

HOSTILE = {
    "empty": "", "letters": "a" * 1_000_000, "digits": "7" * 1_000_000, "symbols": "!" * 1_000_000,
    "spaces": " " * 1_000_000, "spaces then letter": " " * 1_200_000 + "a", "newlines": "\n" * 1_000_000,
    "mixed white space": "a" + " \n\t\u00a0" * 300_000 + "b", "NULs": "\0" * 100_000,
    "accents": "e" + "\u0301" * 100_000,
    "emoji": "👨‍👩‍👧‍👦🏳️‍🌈" * 10_000, "CJK": "漢字" * 100_000, "unicode": UNICODE, "special": SPECIAL_TEXT * 100,
    "edge": "word " * 20_000 + "\n",
}


@pytest.mark.parametrize("pretokenizer", PATTERNS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_round_trips(name, pretokenizer):
    small = train_bpe([PROSE, "!!!!", " " * 40 + "\n" * 40], 330, pretokenizer)
    text = HOSTILE[name]
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert sum(small.token_bytes[i] for i in ids) == len(text.encode())


def test_random_text_round_trips(tok):
    rng = random.Random(0)
    for _ in range(200):
        points = [rng.randrange(rng.choice([0x80, 0x800, 0x110000])) for _ in range(50)]
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000) + rng.choice(["", SPECIAL_TEXT])
        assert tok.decode(tok.encode(text)) == text


def test_lone_surrogates_become_replacement_characters(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert train_bpe(["\udcff\udcff"], 261).merges == [(b"\xbf", b"\xbd")]  # U+FFFD is ef bf bd


def test_white_space_cuts_only_change_absurd_runs(tok):
    for text in ("word " * 20_000 + "\n\n" + " " * 99_990 + "x" + "word \n" * 50_000,
                 "word:" * 20_000 + "\n"):
        assert tok.encode(text) == tok._bpe.encode_ordinary(text)
    ids = tok.encode("a" + " " * 350_000 + "b")
    assert tok.decode(ids) == "a" + " " * 350_000 + "b"


def test_special_strings_in_text_stay_ordinary(tok):
    ids = tok.encode(SPECIAL_TEXT)
    assert not set(ids) & set(tok.special.values()) and tok.decode(ids) == SPECIAL_TEXT
    assert tok.decode([tok.control("<|im_end|>")]) == "<|im_end|>"
    with pytest.raises(UserError) as error:
        tok.control("<|nothing|>")
    one_sentence(error)


@pytest.mark.parametrize("name", HOSTILE)
def test_arrays_hold_the_same_ids(name, tok):
    text = HOSTILE[name] + "\ud800"
    assert tok.encode_array(text).tolist() == tok.encode(text)


def test_encode_batch_equals_encode(tok):
    texts = [PROSE, "", UNICODE, SPECIAL_TEXT, " " * 200_001] * 3
    expected = [tok.encode(text) for text in texts]
    assert tok.encode_batch(texts, threads=3) == expected == tok.encode_batch(texts)


@pytest.mark.parametrize("bad", [1024, -1, 10**12])
def test_decoding_an_unknown_id_is_an_error(tok, bad):
    with pytest.raises(UserError) as error:
        tok.decode([5, bad])
    assert str(bad) in one_sentence(error)


def test_stream_never_prints_half_a_character(tok):
    text = "é 👍 漢"
    ids = [4 + byte for byte in text.encode()]  # byte by byte, the hardest case
    push, pieces = tok.stream(), []
    for i in ids:
        pieces.append(push([i]))
        assert "\ufffd" not in pieces[-1]
    assert [piece for piece in pieces if piece] == list(text) and push([], final=True) == ""
    push = tok.stream()
    assert push(ids[:1]) == "" and push([], final=True) == "\ufffd" == tok.decode(ids[:1])
    push, mixed = tok.stream(), [ids[0], 0, *ids[1:5], 3]  # a control token in the middle of a character
    assert "".join(push([i]) for i in mixed) + push([], final=True) == tok.decode(mixed)


# ----- chat and fertility ----------------------------------------------------------------------------------

def test_chat_ids_and_mask(tok):
    start, end, e = tok.control("<|im_start|>"), tok.control("<|im_end|>"), tok.encode
    messages = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Yes."}]
    ids, mask = tok.encode_chat(messages)
    question, answer = e("Hi <|im_end|>"), e("Yes.")
    assert ids == [start, *e("user\n"), *question, end, *e("\n"),
                   start, *e("assistant\n"), *answer, end, *e("\n")]
    assert mask == [0] * (len(ids) - len(answer) - 2) + [1] * (len(answer) + 1) + [0]
    assert ids.count(end) == 2  # the one in the user's text is ordinary text
    prompt, prompt_mask = tok.encode_chat(messages[:1], add_generation_prompt=True)
    assert prompt == ids[:len(prompt)] and prompt[-len(e("assistant\n")):] == e("assistant\n")
    assert not any(prompt_mask) and len(prompt_mask) == len(prompt)
    assert tok.encode_chat([]) == ([], [])
    with pytest.raises(UserError) as error:
        tok.encode_chat([{"role": "user"}])
    one_sentence(error)


def test_fertility_by_hand():
    small = train_bpe(["ab ab ab"], 261)  # one merge: ab
    assert small.merges == [(b"a", b"b")]
    # words ab (1 token), ab (1), abc (2), xyz (3): 7 tokens / 4 words; 2 words of >= 2 tokens; the whole text
    # is 13 bytes in ab, space, ab, newline, ab, c, space, x, y, z = 10 tokens
    row = T.fertility(small, "ab ab\nabc xyz")
    assert row == {"fertility": 7 / 4, "pcw": 2 / 4, "words": 4, "bytes_per_token": 13 / 10}
    assert T.fertility(small, "é")["bytes_per_token"] == 1  # bytes, not characters
    with pytest.raises(UserError) as error:
        T.fertility(small, " \n")
    one_sentence(error)


# ----- files -----------------------------------------------------------------------------------------------

def test_save_and_load(tok, tmp_path):
    file = tok.save(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / "tokenizer.json" and [*file.parent.iterdir()] == [file]
    for path in (file, file.parent, str(file.parent)):
        again = Tokenizer.load(path)
        assert (again.hash, again.merges, again.special) == (tok.hash, tok.merges, tok.special)
        assert again.encode(PROSE + UNICODE) == tok.encode(PROSE + UNICODE)
    assert again.save(tmp_path / "other.json").read_bytes() == file.read_bytes()
    lines = file.read_text(encoding="utf-8").splitlines()
    left, right = map(T.visible, tok.merges[0])
    assert f"{json.dumps([left, right], ensure_ascii=False)}," in lines  # a merge a line
    assert any(line.strip() == f"{json.dumps(left + right, ensure_ascii=False)}: 260," for line in lines)


def test_hash_covers_all_that_decides_ids(tok):
    parts = dict(pattern=tok.pattern, ranks=tok.ranks, merges=tok.merges, special=tok.special, nfc=False)
    assert Tokenizer(**parts).hash == tok.hash
    swapped = dict(tok.ranks)
    swapped[b"a"], swapped[b"b"] = swapped[b"b"], swapped[b"a"]
    changes = dict(pattern=PATTERNS["gpt2"], ranks=swapped, special={**tok.special, "<|x|>": 2000}, nfc=True)
    hashes = {Tokenizer(**{**parts, key: value}).hash for key, value in changes.items()}
    assert len(hashes | {tok.hash}) == 5


def remove_byte(spec):
    vocab = spec["model"]["vocab"]
    spec["model"]["merges"] = []
    spec["model"]["vocab"] = {t: i for t, i in vocab.items() if i < 260 and t != "a"}


def set_expression(spec, expression):
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = expression


def reverse_merges(spec):
    spec["model"]["merges"].reverse()


CORRUPTIONS = {  # name: (change of the parsed file, words of the message)
    "no model": (lambda s: s.pop("model"), "not built like"),
    "model a list": (lambda s: s.update(model=[1]), "not built like"),
    "no vocab": (lambda s: s["model"].pop("vocab"), "'vocab'"),
    "no merges": (lambda s: s["model"].pop("merges"), "'merges'"),
    "no added tokens": (lambda s: s.pop("added_tokens"), "'added_tokens'"),
    "word piece": (lambda s: s["model"].update(type="WordPiece"), "'WordPiece', not BPE"),
    "sentence piece": (lambda s: s["model"].update(byte_fallback=True), "byte_fallback"),
    "merge part unknown": (lambda s: s["model"]["merges"].append(["zzzq", "a"]), "'zzzq', which is not in"),
    "merge result unknown": (lambda s: s["model"]["merges"].append(["Ā", "ā"]), "'Āā', which is not in"),
    "merge not a pair": (lambda s: s["model"]["merges"].append(["a"]), "not built like"),
    "merge with a line end": (lambda s: s["model"]["merges"].append("z\nz q"), "which is not in"),
    "merge of numbers": (lambda s: s["model"]["merges"].append([1, 2]), "not in"),
    "merge order": (reverse_merges, "something else than the order"),
    "merge missing": (lambda s: (s["model"]["merges"].pop(), s["model"].pop("ignore_merges")), "no merge"),
    "two ids alike": (lambda s: s["model"]["vocab"].update(a=s["model"]["vocab"]["b"]), "same id"),
    "id a string": (lambda s: s["model"]["vocab"].update(a="5"), "'5', not in"),
    "id negative": (lambda s: s["model"]["vocab"].update(a=-1), "-1, not in"),
    "id enormous": (lambda s: s["model"]["vocab"].update(a=10**12), "not in 0.."),
    "byte missing": (remove_byte, "lacks some ASCII"),
    "control token with two ids": (lambda s: s["added_tokens"][0].update(id=99), "two ids"),
    "not byte-level": (lambda s: s["model"]["vocab"].update({"▁the": 5000}), "'▁the' is not byte-level"),
    "lower-casing": (lambda s: s.update(normalizer={"type": "Lowercase"}), "normalizer"),
    "white-space words": (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
    "no pre-tokenizer": (lambda s: s.update(pre_tokenizer=None), "pre_tokenizer"),
    "bad expression": (lambda s: set_expression(s, "("), "not built like"),
    "empty expression": (lambda s: set_expression(s, ""), "loses text"),
    "expression for letters only": (lambda s: set_expression(s, r"\p{L}+"), "loses text"),
    "no end of text": (lambda s: [s.update(added_tokens=[]), s["model"]["vocab"].pop("<|endoftext|>"),
                                  *[s["model"]["vocab"].pop(n) for n in T.CONTROL[1:]]], "end-of-text"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_damaged_file_is_one_sentence(name, tok, tmp_path):
    change, words = CORRUPTIONS[name]
    file = tok.save(tmp_path)
    spec = json.loads(file.read_text(encoding="utf-8"))
    change(spec)
    file.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path)
    assert words in one_sentence(error) and str(file) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b"null", b"[" * 100_000,
                                     b"\x80\x04\x95K\x00."], ids=str)
def test_file_that_is_not_a_tokenizer(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path)
    one_sentence(error)


def test_truncated_file_and_missing_file(tok, tmp_path):
    file = tok.save(tmp_path / "t")
    file.write_bytes(file.read_bytes()[:-400])
    for path in (file, tmp_path, tmp_path / "none", tmp_path / "none.json"):
        with pytest.raises(UserError) as error:
            Tokenizer.load(path)
        one_sentence(error)


def test_hub_names(tok, tmp_path, monkeypatch):
    file = tok.save(tmp_path)
    calls = []
    hub = types.SimpleNamespace(hf_hub_download=lambda *names: calls.append(names) or str(file))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert Tokenizer.load("hf:org/name").hash == tok.hash and calls == [("org/name", "tokenizer.json")]
    hub.hf_hub_download = lambda *names: (_ for _ in ()).throw(LookupError("line 1\nline 2"))
    with pytest.raises(UserError) as error:
        Tokenizer.load("hf:org/name")
    assert "LookupError" in one_sentence(error)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError) as error:
        Tokenizer.load("hf:org/name")
    assert "pip install huggingface_hub" in one_sentence(error)


# ----- against Hugging Face's tokenizers library -----------------------------------------------------------

def sample_texts() -> list[str]:
    rng = random.Random(1)
    pieces = ["a", "b", " ", "  ", "\n", "\r\n", "12", "3", "'s", "'LL", "don't", "é", "漢", "!!", "\t",
              "the ", "x_y", "🙂"]
    return [PROSE, UNICODE, SPECIAL_TEXT, ""] + ["".join(rng.choices(pieces, k=30)) for _ in range(300)]


@pytest.mark.parametrize("pretokenizer", PATTERNS)
def test_ids_equal_hugging_face(pretokenizer, tmp_path):
    hf = pytest.importorskip("tokenizers")
    ours = train_bpe([PROSE, UNICODE * 3], 900, pretokenizer)
    theirs = hf.Tokenizer.from_file(str(ours.save(tmp_path)))
    theirs.encode_special_tokens = True  # text stays text there too
    assert theirs.get_vocab_size() == ours.vocab_size and theirs.token_to_id("<|im_end|>") == 3
    for text in sample_texts():
        assert theirs.encode(text).ids == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text
    if pretokenizer in ("gpt2", "smollm2"):  # the library's own step says the same as our expression
        level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = hf.pre_tokenizers.Digits(individual_digits=True)
        steps = [level] if pretokenizer == "gpt2" else [digits, level]
        theirs.pre_tokenizer = hf.pre_tokenizers.Sequence(steps)
        for text in sample_texts():
            assert theirs.encode(text).ids == ours.encode(text), text


def hugging_face_trained(hf, pre_tokenizer, vocab_size, special, alphabet=None):
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizer, hf.decoders.ByteLevel()
    theirs.train_from_iterator([PROSE, UNICODE], hf.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=special,
        initial_alphabet=alphabet or hf.pre_tokenizers.ByteLevel.alphabet()))
    theirs.encode_special_tokens = True
    return theirs


def test_compression_equals_hugging_face(tok):
    hf = pytest.importorskip("tokenizers")
    pre = hf.pre_tokenizers
    steps = [pre.Split(hf.Regex(PATTERNS["qwen"]), "isolated"), pre.ByteLevel(False, use_regex=False)]
    theirs = hugging_face_trained(hf, pre.Sequence(steps), 1024, T.CONTROL)
    ours = train_bpe([PROSE, UNICODE], 1024)
    n, m = len(ours.encode(PROSE)), len(theirs.encode(PROSE).ids)
    assert abs(n / m - 1) < 0.01, (n, m)


@pytest.mark.parametrize("form", ["gpt2", "smollm2", "llama3", "qwen"])
def test_loads_hugging_face_files(form, tmp_path):
    hf = pytest.importorskip("tokenizers")
    pre = hf.pre_tokenizers
    level = pre.ByteLevel(add_prefix_space=False, use_regex=form in ("gpt2", "smollm2"))
    first = (pre.Digits(individual_digits=True) if form == "smollm2"
             else pre.Split(hf.Regex(PATTERNS[form]), "isolated"))
    theirs = hugging_face_trained(hf, level if form == "gpt2" else pre.Sequence([first, level]), 800, [])
    theirs.add_special_tokens(["<|endoftext|>"] if form == "gpt2" else ["<|end_of_text|>", "<pad>"])
    if form == "qwen":
        theirs.normalizer = hf.normalizers.NFC()
    spec = json.loads(theirs.to_str())
    if form == "gpt2":  # older files write a merge as one string
        spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    ours = Tokenizer.load(file)
    assert (ours.eos_id, ours.pad_id) == (800, None if form == "gpt2" else 801)
    assert ours.nfc == (form == "qwen")
    for text in sample_texts() + ["e\u0301"]:
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=False)
    assert Tokenizer.load(ours.save(tmp_path / "again")).hash == ours.hash


def test_loads_a_file_that_lacks_bytes(tmp_path):
    """SmolLM2's vocabulary was trained without the full byte alphabet: 235 of 256 bytes."""
    hf = pytest.importorskip("tokenizers")
    ascii = [chr(b) for b in range(33, 127)]
    theirs = hugging_face_trained(hf, hf.pre_tokenizers.ByteLevel(False), 600, ["<|endoftext|>"], ascii)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    assert b"\xff" not in ours.ranks and ours.vocab_size == 600 and ours.decode(ours.encode(PROSE)) == PROSE
    for text in (PROSE, "a \x01 b \x02\x03 c", "\x7f", ""):
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode("a \x01 b" + " " * 200_000)) == "a  b" + " " * 200_000


def shuffled_ids(spec: dict, seed: int) -> dict:
    """The same tokenizer with other ids: merges stay where they are in the list."""
    vocab = spec["model"]["vocab"]
    ids = list(vocab.values())
    random.Random(seed).shuffle(ids)
    spec["model"]["vocab"] = dict(zip(vocab, ids))
    for token in spec["added_tokens"]:
        token["id"] = spec["model"]["vocab"].get(token["content"], token["id"])
    return spec


@pytest.mark.parametrize("pretokenizer", ["gpt2", "llama3"])
def test_ids_that_do_not_follow_the_merges(pretokenizer, tmp_path):
    hf = pytest.importorskip("tokenizers")
    file = train_bpe([PROSE, UNICODE * 3], 900, pretokenizer).save(tmp_path)
    file.write_text(json.dumps(shuffled_ids(json.loads(file.read_text("utf-8")), 3)), "utf-8")
    ours, theirs = Tokenizer.load(tmp_path), hf.Tokenizer.from_file(str(file))
    theirs.encode_special_tokens = True
    for text in [*sample_texts(), *(text[:20_000] for text in HOSTILE.values())]:
        assert ours.encode(text) == theirs.encode(text).ids == ours.encode_array(text).tolist(), text[:100]
        assert ours.decode(ours.encode(text)) == text
    again = Tokenizer.load(ours.save(tmp_path / "again"))
    assert again.hash == ours.hash and again.encode(PROSE) == ours.encode(PROSE)
    assert ours.hash != train_bpe([PROSE, UNICODE * 3], 900, pretokenizer).hash


# ----- tiktoken's encodings and files ----------------------------------------------------------------------

# The expressions of tiktoken's own encodings (tiktoken_ext/openai_public.py) and of Moonshot's tokenization_kimi.py.
CL100K = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
          r"""|\s*[\r\n]|\s+(?!\S)|\s""")
KIMI = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])


def tiktoken_ranks(pretokenizer: str) -> dict[bytes, int]:
    """A vocabulary as tiktoken keeps it: ranks from 0 on, no control tokens."""
    trained = train_bpe([PROSE, UNICODE * 3], 1000, pretokenizer)
    return {token: i - 4 for token, i in trained.ranks.items()}


def write_tiktoken(file: Path, ranks: dict[bytes, int]) -> None:
    file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))


def hostile_texts() -> list[str]:
    return [*sample_texts(), *(text[:20_000] for text in HOSTILE.values())]


def test_tiktoken_encodings_by_name(monkeypatch, tmp_path):
    ranks, special = tiktoken_ranks("llama3"), {"<|endoftext|>": 1005, "<|fim_prefix|>": 1006}
    encoding = tiktoken.Encoding("cl100k_base", pat_str=CL100K, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", {"cl100k_base": encoding}.__getitem__)
    ours = Tokenizer.load("cl100k_base")
    assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (1005, None, 1007)
    for text in hostile_texts():
        assert ours.encode(text) == encoding.encode_ordinary(text) == ours.encode_array(text).tolist()
        assert ours.decode(ours.encode(text)) == text
    trained = train_bpe([PROSE, UNICODE * 3], 1000, "llama3")
    assert ours.merges == trained.merges  # found again from the ranks alone
    again = Tokenizer.load(ours.save(tmp_path))
    assert again.hash == ours.hash and again.encode(PROSE) == ours.encode(PROSE)
    assert trained.encode(PROSE + UNICODE) == [i + 4 for i in ours.encode(PROSE + UNICODE)]  # "llama3" is cl100k
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(ConnectionError("no\nnetwork")))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as error:
        Tokenizer.load("o200k_base")
    one_sentence(error)


def test_tiktoken_files_with_a_chosen_expression(tmp_path):
    ranks, file = tiktoken_ranks("qwen"), tmp_path / "mine.tiktoken"
    write_tiktoken(file, ranks)
    reference = tiktoken.Encoding("x", pat_str=PATTERNS["qwen"], mergeable_ranks=tiktoken.load.load_tiktoken_bpe(str(file)),
                                  special_tokens={})
    ours = Tokenizer.load(f"{file}:qwen")
    assert ours.vocab_size == len(ranks) + 4 and ours.eos_id == len(ranks)
    for text in hostile_texts():
        assert ours.encode(text) == reference.encode_ordinary(text)
    with pytest.raises(UserError, match="mine.tiktoken:PRETOKENIZER") as error:
        Tokenizer.load(file)
    one_sentence(error)
    for content in (b"not base64 5", b"YQ== x", b"YQ== 7\n", b"\x80\x04"):
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            Tokenizer.load(f"{file}:qwen")
        one_sentence(error)


def test_a_model_folder_of_moonshot(tmp_path):
    """Kimi and Moonlight ship tiktoken.model and tokenizer_config.json; the gaps between control tokens are reserved names."""
    ranks = tiktoken_ranks("kimi")
    write_tiktoken(tmp_path / "tiktoken.model", ranks)
    n = len(ranks)
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 255: "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": {str(n + i): {"content": name, "special": True} for i, name in names.items()}}))
    ours = Tokenizer.load(tmp_path)
    reference = tiktoken.Encoding("kimi", pat_str=KIMI, mergeable_ranks=ranks, special_tokens={})
    assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (n + 1, n + 255, n + 256)
    assert ours.control("<|im_end|>") == n + 2 and ours.control(f"<|reserved_token_{n + 4}|>") == n + 4
    for text in [*hostile_texts(), "中文English混合", "北京市 Pascal", "HTMLParser's camelCase"]:
        assert ours.encode(text) == reference.encode_ordinary(text)
    assert Tokenizer.load(ours.save(tmp_path / "again")).encode(UNICODE) == ours.encode(UNICODE)


def test_plain_bytes():
    ours = Tokenizer.load("bytes")
    assert ours.vocab_size == 260 and ours.encode("aé") == [4 + b for b in "aé".encode()]
    for text in HOSTILE.values():
        assert ours.decode(ours.encode(text)) == text


def test_advice_on_the_vocabulary():
    sizes = {n: T.advise_vocabulary(n, 1)[0] for n in (2e6, 1e8, 1e9, 3e9)}
    assert sizes[1e9] == sizes[3e9] == 49_152 and T.advise_vocabulary(3e9, 6)[0] == 128_256  # SmolLM2, SmolLM3
    assert list(sizes.values()) == sorted(sizes.values()) and all(size % 128 == 0 for size in sizes.values())
    assert 512 <= sizes[2e6] < 16_384 and "half" in T.advise_vocabulary(2e6, 1)[1]


# ----- command line ----------------------------------------------------------------------------------------

def cli(*arguments, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "tokenizer.py"), *map(str, arguments)],
                          cwd=cwd, capture_output=True, text=True, encoding="utf-8")


def test_cli_trains_and_measures(tmp_path):
    corpus = tmp_path / "corpus" / "sub"
    corpus.mkdir(parents=True)
    (corpus / "b.txt").write_text(UNICODE[:60] + "\r\n", encoding="utf-8", newline="")
    (corpus / "a.py").write_text(PROSE, encoding="utf-8", newline="")
    (corpus / "empty.py").touch()
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "image.png").write_bytes(b"\x89PNG\0")
    (corpus / "nul.txt").write_bytes(b"a\0b")
    result = cli("train", "corpus", "--vocab-size", 500, "--out", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "500 tokens" in result.stdout and result.stderr.count("left out") == 3  # of six; then they are only counted
    assert Tokenizer.load(tmp_path / "out").hash == train_bpe([UNICODE[:60] + "\r\n", PROSE], 500).hash
    result = cli("fertility", "out", corpus / "a.py", "corpus", cwd=tmp_path)
    head, *rows = result.stdout.splitlines()
    expected = T.fertility(Tokenizer.load(tmp_path / "out"), PROSE)
    assert head.split() == ["words", "fertility", "PCW", "bytes/token", "path"] and len(rows) == 2
    assert rows[0].split()[:2] == [str(expected["words"]), f"{expected['fertility']:.3f}"]
    assert rows[0].split()[2:4] == [f"{expected['pcw']:.3f}", f"{expected['bytes_per_token']:.2f}"]


def test_fertility_of_several_tokenizers_at_once(tmp_path):
    texts = {"en.txt": "the cat sat on the mat " * 50, "de.txt": "Größe und Übermut, naïve " * 40}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    train_bpe([texts["en.txt"]], 270).save(tmp_path / "A")
    result = cli("fertility", "A", "bytes", "--", "en.txt", "de.txt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[-1]: line.split() for line in result.stdout.splitlines()[2:]}
    for name, text in texts.items():
        for column, tokenizer in ((1, Tokenizer.load(tmp_path / "A")), (4, Tokenizer.load("bytes"))):
            expected = T.fertility(tokenizer, text)
            assert rows[name][column] == f"{expected['fertility']:.3f}"
            assert rows[name][column + 2] == f"{expected['bytes_per_token']:.2f}"
    assert cli("fertility", "A", cwd=tmp_path).returncode == 2


def test_a_sample_is_an_even_share_of_each_file(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 3000)
    (tmp_path / "b.txt").write_text("b" * 1000)
    (tmp_path / "c.jsonl").write_text('{"text": "' + "c" * 980 + '"}\n' + '{"text": "' + "d" * 980 + '"}\n')
    source = data.Source(tmp_path)
    sampled = Counter("".join(source.sample(source.size / 2)))
    assert abs(sampled["a"] - 1500) <= 1 and abs(sampled["b"] - 500) <= 1 and 980 <= sampled["c"] + sampled["d"] <= 996
    assert Counter("".join(source.sample(1e9))) == Counter(a=3000, b=1000, c=980, d=980)
    result = cli("train", tmp_path, "--vocab-size", 300, "--out", "out", "--sample-bytes", 600, cwd=tmp_path)
    assert result.returncode == 2 and "--vocab-size" in result.stderr  # so little text has no 40 merges


def test_training_reads_data_sets(tmp_path):
    documents = [PROSE[i:i + 500] for i in range(0, 20_000, 500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    result = cli("train", "a.jsonl", "--text-key", "body", "--vocab-size", 400, "--out", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Tokenizer.load(tmp_path / "out").hash == train_bpe(documents, 400).hash


BAD_COMMANDS = {
    "missing": ("train", "nowhere.txt", "--vocab-size", 300, "--out", "out"),
    "binary": ("train", "binary.dat", "--vocab-size", 300, "--out", "out"),
    "latin": ("train", "good.txt", "latin.txt", "--vocab-size", 300, "--out", "out"),
    "empty": ("train", "empty.txt", "--vocab-size", 300, "--out", "out"),
    "jsonl": ("train", "data.jsonl", "--vocab-size", 300, "--out", "out", "--text-key", "body"),
    "empty folder": ("train", "folder", "--vocab-size", 300, "--out", "out"),
    "tiny vocabulary": ("train", "good.txt", "--vocab-size", 100, "--out", "out"),
    "huge vocabulary": ("train", "good.txt", "--vocab-size", 100_000, "--out", "out"),
    "not a number": ("train", "good.txt", "--vocab-size", "many", "--out", "out"),
    "pre-tokenizer": ("train", "good.txt", "--vocab-size", 300, "--out", "out", "--pretokenizer", "bert"),
    "unknown flag": ("train", "good.txt", "--vocab-size", 300, "--out", "out", "--vocab", 3),
    "no output": ("train", "good.txt", "--vocab-size", 300),
    "output in a file": ("train", "good.txt", "--vocab-size", 265, "--out", "good.txt/out"),
    "no tokenizer": ("fertility", "nowhere", "good.txt"),
    "no command": (),
    "unknown command": ("teach", "good.txt"),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_cli_mistake_is_one_line_and_writes_nothing(name, tmp_path):
    (tmp_path / "good.txt").write_text("some good text, enough for a few merges\n")
    (tmp_path / "binary.dat").write_bytes(b"abc\0def")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "data.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    result = cli(*BAD_COMMANDS[name], cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    for named in ("nowhere", "binary.dat", "latin.txt", "empty.txt", "data.jsonl", "folder"):
        if named in map(str, BAD_COMMANDS[name]):
            assert named in result.stderr


def test_help_shows_the_commands(tmp_path):
    result = cli("--help", cwd=tmp_path)
    assert result.returncode == 0 and "python tokenizer.py train PATH" in result.stdout
    assert "--pretokenizer" in cli("train", "--help", cwd=tmp_path).stdout


def test_import_is_light():
    code = "import sys, tokenizer; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
