"""data.py: token files and their errors, packing, order, mixtures."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import data as d
from conftest import ROOT, call
from data import HELD_OUT, Source, uniform
from tokenizer import Tokenizer, UserError, train_bpe

WORDS = "the cat sat on a mat and then it ran to see what was there all day long".split()


def some_documents(n: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    return [(f"doc{i}", " ".join(rng.choice(WORDS, rng.integers(3, 80))) + f" {i}") for i in range(n)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([text for _, text in some_documents(50)], 300)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    d.prepare({"words": some_documents(300), "more": some_documents(200, 1)}, tmp_path / "set", tokenizer)
    return tmp_path / "set"


def texts_of(folder, tokenizer) -> dict[str, list[str]]:
    """What the token files of a source say, document by document."""
    return {side: [tokenizer.decode(split.tokens[a + 1:b].tolist()) for a, b in zip(split.starts, split.starts[1:])]
            for side, split in d.load_source(folder, tokenizer).items()}


def load(prepared, tokenizer):
    return [d.load_source(f, tokenizer) for f in d.source_folders(str(prepared))]


# ---- token files


def test_every_document_is_stored_once_on_one_side(prepared, tokenizer):
    splits = d.load_source(prepared / "words", tokenizer)
    texts = []
    for split in splits.values():
        assert split.starts[0] == 0 and split.starts[-1] == len(split.tokens)
        size = 0
        for a, b in zip(split.starts, split.starts[1:]):
            assert split.tokens[a:a + 1] == tokenizer.eos_id and tokenizer.eos_id not in split.tokens[a + 1:b]
            texts.append(tokenizer.decode(split.tokens[a + 1:b].tolist()))
            size += len(texts[-1].encode())
        assert size == split.bytes
    assert sorted(texts) == sorted(text for _, text in some_documents(300))
    assert 1 <= len(splits["val"].starts) - 1 <= 30


def test_the_same_key_is_always_on_the_same_side(tmp_path, tokenizer):
    d.prepare({"x": [(f"k{i % 40}", f"text {i}") for i in range(400)]}, tmp_path / "set", tokenizer)
    train, val = ({int(t.split()[1]) % 40 for t in texts} for texts in texts_of(tmp_path / "set/x", tokenizer).values())
    assert train and val and not train & val


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def change_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("damage, words", [
    (lambda f: flip(f / "train.bin", 101), "sha256"),
    (lambda f: flip(f / "val.starts", 9), "sha256"),
    (lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-7]), "sha256"),
    (lambda f: (f / "val.bin").unlink(), "cannot be read .*val.bin"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json cannot be read"),
    (lambda f: (f / "meta.json").write_bytes(b"\xff\xfe\0"), "meta.json cannot be read"),
    (lambda f: (f / "meta.json").write_text("[" * 100_000), "meta.json cannot be read"),
    (lambda f: (f / "meta.json").write_text(json.dumps({"format": 99})), "format 99"),
    (lambda f: change_meta(f, lambda meta: meta["val"].pop("sha256")), "cannot be read"),  # unfinished
])
def test_damaged_files_are_refused_in_a_sentence(prepared, tokenizer, damage, words):
    damage(prepared / "words")
    with pytest.raises(UserError, match=words) as error:
        d.load_source(prepared / "words", tokenizer)
    assert "\n" not in str(error.value)


def test_ids_beyond_the_vocabulary_are_refused_although_the_sha256_is_right(prepared, tokenizer):
    file = prepared / "words/val.bin"
    ids = np.fromfile(file, d.token_dtype(tokenizer))
    ids[3] = tokenizer.vocab_size
    ids.tofile(file)
    change_meta(prepared / "words", lambda meta: meta["val"]["sha256"].__setitem__(0, d.file_sha256(file)))
    with pytest.raises(UserError, match="val.bin has ids beyond the vocabulary"):
        d.load_source(prepared / "words", tokenizer)


@pytest.mark.parametrize("verify", [True, False])
def test_damaged_document_starts_are_refused_although_the_sha256_is_right(prepared, tokenizer, verify):
    file = prepared / "words/train.starts"
    starts = np.fromfile(file, np.int64)
    starts[2] = 2**40
    starts.tofile(file)
    change_meta(prepared / "words", lambda meta: meta["train"]["sha256"].__setitem__(1, d.file_sha256(file)))
    with pytest.raises(UserError, match="train.starts is damaged"):
        d.load_source(prepared / "words", tokenizer, verify)


def test_a_truncated_file_is_seen_without_reading_it(prepared, tokenizer):
    file = prepared / "words/train.bin"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="words cannot be read"):
        d.load_source(prepared / "words", tokenizer, verify=False)


def test_any_meta_json_is_a_sentence_or_is_read(prepared, tokenizer):
    """Every value of meta.json replaced by every kind of value, one at a time."""
    file = prepared / "words/meta.json"
    original = json.loads(file.read_text())

    def places(value, path=()):
        yield path
        for key in value if isinstance(value, dict) else ():
            yield from places(value[key], (*path, key))

    kinds = (None, -1, 10**30, 1.5, "x", [], {}, [[0]], {"a": []}, True)
    for path, value in itertools.product(places(original), kinds):
        damaged = json.loads(json.dumps(original))
        parent = damaged
        for key in path[:-1]:
            parent = parent[key]
        if path:
            parent[path[-1]] = value
        file.write_text(json.dumps(damaged if path else value))
        for verify in (True, False):
            try:
                d.load_source(prepared / "words", tokenizer, verify)
                d.summary(str(prepared / "words"))
            except UserError as error:
                assert "\n" not in str(error)


def test_wrong_tokenizer_is_refused(prepared, tokenizer):
    with pytest.raises(UserError, match="another tokenizer"):
        d.load_source(prepared / "words", train_bpe(["other text " * 50, "and more"], 270))


@pytest.mark.parametrize("content, words", [
    (b"", "give more"), (b" \n", "give more"), (b"\x89PNG\0\1\2", "not UTF-8"), (b"short text", "give more"),
    ("latin \u00e9".encode("latin-1"), "not UTF-8"), ("text".encode("utf-16"), "UTF-16"),
    ("text".encode("utf-16-le"), "UTF-16")])
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_bytes(content)
    done = call(d.main, "prepare", "my.txt", "--vocab-size", "300")
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["my.txt"]


def test_a_users_file_becomes_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(text for _, text in some_documents(800))
    (tmp_path / "my.txt").write_text(text)
    done = call(d.main, "prepare", "my.txt", "--vocab-size", "300")
    assert done.returncode == 0 and "python train.py --data data/my" in done.stdout, done.stderr
    tokenizer = Tokenizer.load("data/my")
    splits = d.load_source("data/my/my", tokenizer)
    assert splits["train"].bytes + splits["val"].bytes == len(text.encode())
    sides = texts_of("data/my/my", tokenizer)
    assert len(sides["val"]) == 1 and text.endswith(sides["val"][0])  # the end of the file: one seam
    assert 0.02 < splits["val"].bytes / len(text.encode()) < 0.04
    shown = call(d.main, "show", "--context", "64", "data/my")  # flags may stand before names
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("documents", *d.PACKINGS, "mean square", "tokens per"))


def test_errors_about_the_data_do_not_cost_the_text(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night. " * 2000)
    for find in (d.load_data, d.source_folders):
        for name, words in (("novel.txt", "run `python data.py prepare novel.txt`"), ("nowhere", "does not exist")):
            with pytest.raises(UserError, match=words):
                find(name)
    with pytest.raises(UserError, match="novel.txt exists already and is left as it is") as error:
        d.prepare({"a": some_documents(50)}, "novel.txt", tokenizer)
    assert "remove" not in str(error.value)
    d.prepare({"a": some_documents(50)}, "first", tokenizer)
    d.prepare({"b": some_documents(50)}, "second", train_bpe(["other text " * 50, "and more"], 270))
    with pytest.raises(UserError, match="second/b was encoded with another tokenizer.*`--tokenizer first`"):
        d.load_data("first,second")


def write_sources(folder) -> dict[str, list[str]]:
    """The same documents in every form that needs no package; what each has to give back."""
    documents = [text for _, text in some_documents(40)] + ["two\u2028lines", "mañana 漢字 👍"]
    folder.mkdir()
    lines = "".join(json.dumps({"body": text, "id": i}) + "\n" for i, text in enumerate(documents))
    (folder / "a.jsonl").write_text(lines)
    for suffix, module in (("gz", gzip), ("bz2", bz2), ("xz", lzma)):
        with module.open(folder / f"b.ndjson.{suffix}", "wt", encoding="utf-8") as file:
            file.write(lines + "\n\n")
    (folder / "c.txt").write_text(documents[0])
    (folder / "d.py").write_text("import os\r\n", newline="")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / ".hidden").write_text("secret")
    return {"a.jsonl": documents, "b.ndjson.bz2": documents, "b.ndjson.gz": documents, "b.ndjson.xz": documents,
            "c.txt": documents[:1], "d.py": ["import os\n"]}


# ---- what is dropped


def test_duplicates_are_found_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(d, "REMEMBERED", 1000)
    seen, rng = set(), random.Random(0)
    keys = [rng.randrange(900) for _ in range(3000)]
    assert [d.add_new(seen, key) for key in keys] == [key not in keys[:i] for i, key in enumerate(keys)]
    for key in range(10_000):
        d.add_new(seen, key)
        assert len(seen) <= 1000 and not d.add_new(seen, key)


def test_repeated_spans_equal_brute_force():
    def brute_force(ids: list[int]) -> bool:
        return any(ids[i:i + n] * 32 == ids[i:i + 32 * n] for n in range(1, 14) for i in range(len(ids) - 32 * n + 1))

    rng = random.Random(0)
    documents = []
    for n in range(1, 16):  # 14 and 15 are too long to count
        for times in (31, 32, 40):
            span = [rng.randrange(50) for _ in range(n)]
            rest = [rng.randrange(50) for _ in range(rng.randint(0, 9))]
            documents.append([7] * rng.randint(0, 9) + span * times + rest)
    documents += [[rng.randrange(2) for _ in range(400)] for _ in range(50)] + [[], [1], [5] * 31, [5] * 32]
    documents += [[], [6], [5, 6], list(range(12))] * 40 + [[6]] * 40 + [[]] * 40  # equal documents in a row
    arrays = [np.array([99, *ids], np.uint16) for ids in documents]  # 99: EOS
    assert d.repeats_spans(arrays).tolist() == [brute_force(ids) for ids in documents]


def test_duplicates_and_repeats_are_dropped_and_counted(tmp_path, tokenizer, capsys):
    documents = [text for _, text in some_documents(200)]
    repeated = "cat sat on " * 40
    jar = [(text, text) for text in documents + documents[:17] + [repeated, " \n", documents[3]]]
    random.Random(0).shuffle(jar)
    other = [(text, text) for text in documents[:50] + ["new " + text for text in documents]]
    d.prepare({"a": jar, "b": other}, tmp_path / "set",
              train_bpe([text for _, text in itertools.islice(d.modules("python"), 20)], 600))
    sides = texts_of(tmp_path / "set/a", Tokenizer.load(tmp_path / "set"))
    assert sorted(sides["train"] + sides["val"]) == sorted(documents)
    dropped = json.loads((tmp_path / "set/a/meta.json").read_text())["dropped"]
    assert dropped == {"exact duplicates": 18, "repeated spans": 1, "empty documents": 1}
    dropped = json.loads((tmp_path / "set/b/meta.json").read_text())["dropped"]
    assert dropped == {"exact duplicates": 50}  # of the other source
    d.summary(str(tmp_path / "set"))
    assert "18 exact duplicates" in capsys.readouterr().out


# ---- shards, and what may happen to them


def prepare_command(folder, *flags, sources=("in",), **options) -> subprocess.Popen:
    """`prepare` of in/ (and other sources) in many small shards."""
    code = ("import sys, data, tokenizer; sys.path.insert(0, ''); data.SHARD_TOKENS, data.JOB_BYTES = 4000, 3000; "
            f"sys.argv = ['data.py', 'prepare', *{sources}, '--out', 'set', '--vocab-size', '300', '--text-key', "
            f"'body', *{list(flags)}]; tokenizer.run(data.main)")
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def shards_in(partial) -> int:
    """How many shards of an unfinished preparation are complete."""
    return sum(json.loads(file.read_text())["shards"] for file in partial.glob("*/meta.json"))


def files_of(folder) -> dict[str, bytes]:
    """Without what a kill right after the folder got its name leaves there, and nothing reads."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and p.name not in ("task.json", "hashes", "hashes.near")}


FILTERS = "--near-duplicates true --quality web --decontaminate task.jsonl --unwrap true".split()


@pytest.mark.parametrize("flags", [[], FILTERS], ids=["plain", "filters"])
def test_killed_at_any_point_it_goes_on_to_the_same_files(tmp_path, flags):
    """kill -9 at random moments: no document is lost or comes twice; every byte is that of the uninterrupted run."""
    texts = [text for _, text in some_documents(3000, 5)]
    if flags:  # sentences, every third with a twin much later, every hundredth quoting the evaluation
        texts = [f"{text} {'and so on to the end it goes' * (i % 100 == 0)}." for i, text in enumerate(texts)]
        texts += [f"{text[:-1]}again." for text in texts[::3]]
    for folder in (tmp_path / "straight", tmp_path / "killed"):
        folder.mkdir()
        write_sources(folder / "in")
        (folder / "task.jsonl").write_text(json.dumps({"question": "And so on to the end it goes?"}))
        with gzip.open(folder / "in/f.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps({"body": text}) + "\n" for text in texts))
        (folder / "in/g.txt").write_text("\n\n".join(text for _, text in some_documents(1500, 6)))
    straight = prepare_command(tmp_path / "straight", *flags)
    assert straight.wait() == 0, straight.stderr.read()
    assert not [*(tmp_path / "straight/set").rglob("hashes*"), *(tmp_path / "straight/set").glob("task.json")]
    rng, kills, partial = random.Random(0), 0, tmp_path / "killed/set.partial"
    for _ in range(6):  # killed a moment after some more shards are there, whatever it is doing then
        process, wanted = prepare_command(tmp_path / "killed", *flags), shards_in(partial) + rng.randint(1, 8)
        while process.poll() is None and shards_in(partial) < wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        kills += process.wait() != 0
    last = prepare_command(tmp_path / "killed", *flags)
    last.wait()
    assert (tmp_path / "killed/set").exists(), last.stderr.read()
    assert kills >= 2
    assert files_of(tmp_path / "killed/set") == files_of(tmp_path / "straight/set")
    tokenizer = Tokenizer.load(tmp_path / "killed/set")
    sides = texts_of(tmp_path / "killed/set/in", tokenizer)
    if flags:
        meta = json.loads((tmp_path / "killed/set/in/meta.json").read_text())
        assert meta == json.loads((tmp_path / "straight/set/in/meta.json").read_text())
        assert min(meta["dropped"][reason] for reason in ("near duplicates", "quotes of evaluations")) > 10
        return
    wanted = {document.text for document in Source(tmp_path / "killed/in", "body").read() if document.text}
    assert Counter(sides["train"] + sides["val"]) == Counter(wanted)


@pytest.mark.parametrize("flags", [[], ["--max-tokens", "60000"]])
def test_killed_between_two_sources(tmp_path, flags):
    """Duplicates of the first source are known when the second resumes; --max-tokens counts what was stored before."""
    texts = [text for _, text in some_documents(4000, 5)]
    for folder in (tmp_path / "straight", tmp_path / "killed"):
        (folder / "in").mkdir(parents=True)
        for name, part in (("in", texts[:2500]), ("other", texts[1500:])):
            file = folder / ("in/a.jsonl" if name == "in" else "other.jsonl")
            file.write_text("".join(json.dumps({"body": text}) + "\n" for text in part))
    straight = prepare_command(tmp_path / "straight", *flags, sources=("in", "other.jsonl"))
    assert straight.wait() == 0, straight.stderr.read()
    rng, kills = random.Random(1), 0
    for _ in range(4):
        process = prepare_command(tmp_path / "killed", *flags, sources=("in", "other.jsonl"))
        partial = tmp_path / "killed/set.partial"
        wanted = shards_in(partial) + rng.randint(2, 9)
        while process.poll() is None and shards_in(partial) < wanted:
            time.sleep(0.001)
        process.kill()
        kills += process.wait() != 0
    last = prepare_command(tmp_path / "killed", *flags, sources=("in", "other.jsonl"))
    last.wait()
    assert kills >= 2 and (tmp_path / "killed/set").exists(), last.stderr.read()
    assert files_of(tmp_path / "killed/set") == files_of(tmp_path / "straight/set")
    tokenizer = Tokenizer.load(tmp_path / "killed/set")
    stored = [text for name in ("in", "other") for side in texts_of(tmp_path / "killed/set" / name, tokenizer).values()
              for text in side]
    assert len(stored) == len(set(stored)) and (flags or len(stored) == len(set(texts)))


def test_every_interrupted_shard_goes_on(tmp_path, tokenizer, monkeypatch):
    """The same inside one process, stopped after each single file that is written."""
    monkeypatch.setattr(d, "SHARD_TOKENS", 2000)
    monkeypatch.setattr(d, "JOB_BYTES", 1500)
    sources = {"words": some_documents(300), "more": some_documents(200, 1)}
    d.prepare(sources, tmp_path / "straight", tokenizer)
    stop = [0]
    for name in ("append", "write_json"):
        def interrupted(*parts, write=getattr(d, name)):
            stop[0] -= 1
            if stop[0] == 1:  # written, but not known
                write(*parts)
            if stop[0] <= 1:
                raise KeyboardInterrupt
            return write(*parts)

        monkeypatch.setattr(d, name, interrupted)
    for at in range(1, 100):
        stop[0] = at % 7 + 6
        try:
            d.prepare(sources, tmp_path / "stopped", tokenizer)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "stopped").exists()
    assert at > 5 and files_of(tmp_path / "stopped") == files_of(tmp_path / "straight")


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_is_one_sentence_and_what_was_finished_stays(tmp_path, tokenizer):
    """A limit on file size stands in for the full disk: the write fails in the same place."""
    import resource

    (tmp_path / "in").mkdir()
    lines = [json.dumps({"body": text}) + "\n" for _, text in some_documents(400)]
    lines.insert(300, json.dumps({"body": " ".join(str(i) for i in range(20_000))}) + "\n")  # makes one large shard
    (tmp_path / "in/a.jsonl").write_text("".join(lines))
    tokenizer.save(tmp_path / "tokenizer")

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    full = prepare_command(tmp_path, "--tokenizer", "tokenizer", preexec_fn=small_disk)
    _, errors = full.communicate()
    assert full.returncode == 2 and "File too large" in errors and "run the same command again" in errors
    assert len([line for line in errors.splitlines() if line.startswith("error")]) == 1 and "Traceback" not in errors
    assert shards_in(tmp_path / "set.partial") >= 1
    again = prepare_command(tmp_path, "--tokenizer", "tokenizer")
    output, errors = again.communicate()
    assert again.returncode == 0 and "resuming set.partial" in output, errors
    assert len(sum(texts_of(tmp_path / "set/in", tokenizer).values(), [])) == 401


def test_another_task_does_not_go_on(tmp_path, tokenizer, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        d.prepare({"words": some_documents(50)}, tmp_path / "set", tokenizer)
    with pytest.raises(UserError, match="unfinished work of another command"):
        d.prepare({"words": some_documents(60)}, tmp_path / "set", tokenizer)


def test_what_exists_is_never_overwritten(tmp_path, prepared, tokenizer):
    """A folder of the user's own, and data prepared before: both stay as they are."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("mine " * 5000)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for out in (tmp_path, notes, prepared):
        with pytest.raises(UserError, match="exists already"):
            d.prepare({"notes": Source(notes)}, out, tokenizer)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_preparation_that_fails_at_once_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(d, "encode_job", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        d.prepare({"words": some_documents(50)}, tmp_path / "set", tokenizer)
    assert not list(tmp_path.iterdir())


def test_max_tokens_stops_a_source(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(d, "JOB_BYTES", 1500)
    d.prepare({"words": some_documents(3000)}, tmp_path / "set", tokenizer, d.DataOptions(max_tokens=20_000))
    tokens = sum(len(split.tokens) for split in d.load_source(tmp_path / "set/words", tokenizer).values())
    assert 20_000 <= tokens < 22_000


def test_what_is_read_ahead_of_max_tokens_is_no_duplicate(tmp_path, tokenizer, monkeypatch):
    """Two equal sources: the second stores what comes after the first's documents, none between them missing."""
    monkeypatch.setattr(d, "JOB_BYTES", 1500)
    documents = some_documents(3000)
    d.prepare({"one": documents, "two": documents}, tmp_path / "set", tokenizer, d.DataOptions(max_tokens=20_000))
    stored = []
    for name in ("one", "two"):
        for split in d.load_source(tmp_path / "set" / name, tokenizer).values():
            stored += [tokenizer.decode(split.tokens[a + 1:b].tolist()) for a, b in zip(split.starts, split.starts[1:])]
    assert len(stored) > 100 and sorted(stored) == sorted(text for _, text in documents[:len(stored)])


def test_max_tokens_of_one_long_text_holds_something_out(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(d, "JOB_BYTES", 1500)
    (tmp_path / "long.txt").write_text("\n\n".join(text for _, text in some_documents(9000)))
    d.prepare({"long": Source(tmp_path / "long.txt")}, tmp_path / "set", tokenizer, d.DataOptions(max_tokens=20_000))
    assert all(len(split.starts) > 1 for split in d.load_source(tmp_path / "set/long", tokenizer).values())


def test_nothing_finished_is_lost_at_the_very_end(tmp_path, tokenizer, monkeypatch):
    """Ctrl-C while leftovers are removed; a folder of that name made by someone else meanwhile."""
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            d.prepare({"words": some_documents(50)}, tmp_path / "set", tokenizer)
    assert d.load_source(tmp_path / "set/words", tokenizer)
    write = d.write_shard

    def meanwhile(*parts, **options):
        (tmp_path / "other").mkdir()
        (tmp_path / "other/file").write_text("theirs")
        write(*parts, **options)
    monkeypatch.setattr(d, "write_shard", meanwhile)
    with pytest.raises(OSError):
        d.prepare({"words": some_documents(50)}, tmp_path / "other", tokenizer)
    assert (tmp_path / "other/file").read_text() == "theirs" and shards_in(tmp_path / "other.partial")


def test_generated_math_is_right_and_held_out_problems_are_new():
    documents = list(d.generated_math(3000))
    assert documents == list(d.generated_math(3000))
    for _, text in documents:
        for equation in text.replace(".", ",").split("So ")[-1:]:
            left, _, right = equation.partition(" = ")
            if right and left.replace("+", "").replace("-", "").replace("*", "").replace(" ", "").isdigit():
                a, sign, b = left.split()
                result = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
                assert int(right.split(",")[0]) == result, text
    keys = {side: {key for key, _ in documents if (uniform(key) < HELD_OUT) == (side == "val")}
            for side in ("train", "val")}
    sums = {side: {tuple(sorted(pair)) for key, text in documents if key in keys[side]
                   for pair in re.findall(r"What is (\d+) \+ (\d+)\?", text)} for side in keys}
    assert sums["train"] and sums["val"] and not sums["train"] & sums["val"]


def test_prose_and_code_of_a_module_are_on_the_same_side():
    prose, code = ({key for key, _ in pairs} for pairs in (d.embedded_prose(), d.modules("python")))
    assert len(prose & code) > 100
    assert not any(key.startswith("python/test/") for key in code)


# ---- order


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_permutation(n):
    for key in ([0, 1], [5, 2]):
        assert sorted(d.permute(np.arange(n), n, key).tolist()) == list(range(n))


def test_permute_shuffles_and_needs_no_array_of_its_size():
    a, b = d.permute(np.arange(1000), 1000, [0]), d.permute(np.arange(1000), 1000, [1])
    assert (a != b).mean() > 0.98 and abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.1
    n = 10_000_000_000
    before = time.perf_counter()
    far = d.permute(np.array([0, 1, n // 2, n - 1]), n, [3])
    assert time.perf_counter() - before < 1  # of what would be 80 GB
    assert len(set(far.tolist())) == 4 and (far < n).all() and (far >= 0).all()


@pytest.mark.parametrize("shares", [[0.45, 0.45, 0.1], [0.7, 0.2, 0.1], [1.0], [0.5, 0.0, 0.5], [1 / 3] * 3,
                                    [0.001, 0.333, 0.666], [0.1, 0.2, 0.7, 0.0], [0.0, 1.0],
                                    [1 / 549] * 49 + [500 / 549]])
def test_interleave_deals_each_sequence_once_in_exact_shares(shares):
    def interleave(index):
        before = d.dealt(index, shares)
        source = (d.dealt(index + 1, shares) - before).argmax(0)
        return source, before[source, np.arange(len(index))]

    index = np.arange(30_000)
    source, rank = interleave(index)
    for s, share in enumerate(shares):
        assert rank[source == s].tolist() == list(range((source == s).sum()))  # none missed, none twice
        taken = np.cumsum(source == s)
        assert np.abs(taken - (index + 1) * share).max() <= 1 + np.log2(len(shares))
        windows = (taken[10_000:] - taken[:-10_000]) / 10_000  # over any 10,000 sequences
        assert np.abs(windows - share).max() <= 0.001
    assert interleave(np.arange(10**10, 10**10 + 50))[0].shape == (50,)


@pytest.mark.parametrize("rows", [[1, 2, 3], [3, 7, 11, 5, 1], [10**9 + 7, 3, 10**9 + 9], [49, 500], [0, 5, 0, 2]])
def test_whole_numbers_are_dealt_exactly_once_an_epoch(rows):
    """Also where floor(n * share) in floating point would be one too few: 49 / 549 * 549 < 49."""
    for epochs in (1, 2, 7, 10**4):
        assert d.dealt(epochs * sum(rows), rows).tolist() == [epochs * n for n in rows]
    assert (np.diff(d.dealt(np.arange(2000), rows)) >= 0).all()


def make(splits, batch=6 * 16, context=16, tokens=6 * 16 * 40, mixture=None, seed=0):
    return d.Curriculum([s["train"] for s in splits], [d.Stage("a", tokens, mixture or {}),
                                                       d.Stage("b", tokens / 2, {"words": 1.0})], context, batch, seed)


def test_each_token_once_in_an_epoch_whatever_the_number_of_processes(prepared, tokenizer):
    split = d.load_source(prepared / "words", tokenizer)["train"]
    for context, world in ((16, 1), (16, 2), (17, 3), (31, 1), (13, 8)):
        rows = 24
        sequences = d.Packing(split, context).count
        steps = -(-sequences // rows)
        curriculum = d.Curriculum([split], [d.Stage("a", steps * rows * context, {})], context, rows * context)
        seen, left = [], sequences
        for step in range(steps):
            for rank in range(world):
                part = curriculum.batch(step, rank * rows // world, rows // world)
                keep = max(0, min(len(part.targets), left - rank * rows // world))  # the last step starts epoch two
                seen += part.targets[:keep][part.targets[:keep] >= 0].tolist()
            left -= rows
        assert sorted(seen) == sorted(split.tokens[1:].tolist())


def test_batches_do_not_depend_on_how_they_are_asked_for(prepared, tokenizer):
    curriculum = make(load(prepared, tokenizer))
    for step in (0, 3, 39, 40, 59):
        whole = curriculum.batch(step)
        parts = [curriculum.batch(step, first, 2) for first in (0, 2, 4)]
        assert (np.concatenate([p.tokens for p in parts]) == whole.tokens).all()
        assert (make(load(prepared, tokenizer)).batch(step).tokens == whole.tokens).all()
    assert (make(load(prepared, tokenizer), seed=1).batch(0).tokens != curriculum.batch(0).tokens).any()


def test_stages_take_over_where_the_last_one_stopped(prepared, tokenizer):
    """Across a stage boundary no sequence of an epoch comes twice."""
    splits = load(prepared, tokenizer)
    curriculum = make(splits)
    source, sequence = zip(*(curriculum.locate(step, 0, 6) for step in range(curriculum.steps)))
    source, sequence = np.concatenate(source), np.concatenate(sequence)
    for s, split in enumerate(splits):
        n = d.Packing(split["train"], 16).count
        taken = sequence[source == s]
        for epoch in range(0, len(taken), n):
            part = taken[epoch:epoch + n]
            assert len(set(part.tolist())) == len(part)
    assert (source[-6:] == 1).all()  # the second stage is all `words`, which sorts behind `more`


def test_every_epoch_is_shuffled_anew(prepared, tokenizer):
    split = load(prepared, tokenizer)[1]["train"]
    n = d.Packing(split, 16).count
    curriculum = d.Curriculum([split], [d.Stage("a", 2 * n * 16, {})], 16, 16)
    order = [int(curriculum.locate(step, 0, 1)[1][0]) for step in range(2 * n)]
    assert sorted(order[:n]) == sorted(order[n:]) == list(range(n))
    assert np.mean(np.array(order[:n]) == np.array(order[n:])) < 0.02 and order[:n] != sorted(order[:n])


class Endless:
    """The length of a trillion tokens without them."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens


def test_any_step_of_ten_billion_sequences_is_found_at_once():
    sequences, context = 10**10, 4096
    splits = [d.Split(name, Endless(tokens), np.array([0, tokens]), 0, "") for name, tokens in (
        ("web", 3 * sequences // 4 * context), ("code", sequences // 4 * context))]
    stages = [d.Stage("a", sequences * context * 0.8, {"web": 0.7, "code": 0.3}),
              d.Stage("b", sequences * context * 0.4, {"web": 0.5, "code": 0.5})]
    curriculum = d.Curriculum(splits, stages, context, 512 * context)
    steps = [0, 1, curriculum.ends[0] - 1, curriculum.ends[0], curriculum.steps - 1]
    begin = time.perf_counter()
    found = [curriculum.locate(step, 0, 512) for step in steps]
    assert (time.perf_counter() - begin) / len(steps) < 0.05
    for step, (source, sequence) in zip(steps, found):
        assert (source == 0).mean() == pytest.approx(0.7 if step < curriculum.ends[0] else 0.5, abs=0.005)
        for s, split in enumerate(splits):
            mine = sequence[source == s]
            assert 0 <= mine.min() and mine.max() < len(split.tokens) // context
            assert len(set(mine.tolist())) == len(mine)
            assert mine.max() - mine.min() > 10**9  # from all over the source
        parts = [curriculum.locate(step, first, 64) for first in range(0, 512, 64)]
        assert (np.concatenate([part[1] for part in parts]) == sequence).all()


def test_a_source_without_a_share_may_be_short(tmp_path, tokenizer):
    d.prepare({"long": some_documents(300), "short": [("a", "cat"), ("b", "a mat")]}, tmp_path / "set", tokenizer)
    splits = [s["train"] for s in load(tmp_path / "set", tokenizer)]
    stage = d.Stage("a", 9600, {"long": 1.0})
    curriculum = d.Curriculum(splits, [stage], 16, 96)
    assert set(np.concatenate([curriculum.locate(i, 0, 6)[0] for i in range(20)]).tolist()) == {0}
    with pytest.raises(UserError, match="short .* fewer tokens than one sequence"):
        d.Curriculum(splits, [stage, d.Stage("b", 9600, {"short": 1.0})], 16, 96)


def test_a_stage_without_a_step_is_said(prepared, tokenizer):
    splits = [s["train"] for s in load(prepared, tokenizer)]
    stages = [d.Stage("base", 9600, {}), d.Stage("tiny", 40, {}), d.Stage("decay", 960, {})]
    curriculum = d.Curriculum(splits, stages, 16, 96)
    assert sum("stage tiny is left out: its 40 tokens" in line for line in curriculum.report()) == 1
    assert not any("tiny" in line for line in make(load(prepared, tokenizer)).report())


def test_epochs_are_counted(prepared, tokenizer):
    curriculum = make(load(prepared, tokenizer))
    counted = curriculum.epochs()
    source = np.concatenate([curriculum.locate(step, 0, 6)[0] for step in range(curriculum.steps)])
    for s, split in enumerate(curriculum.sources):
        assert counted[split.name] == pytest.approx((source == s).sum() / d.Packing(split, 16).count)


def test_boundaries_in_a_batch_are_the_documents(prepared, tokenizer):
    curriculum = make(load(prepared, tokenizer))
    batch = curriculum.batch(2)
    rows, context = batch.tokens.shape
    expected = sorted({row * context for row in range(rows)}
                      | {int(i) for i in np.flatnonzero(batch.tokens.flatten() == tokenizer.eos_id)})
    starts = batch.cu_seqlens[batch.cu_seqlens < rows * context].tolist()
    assert starts == expected and batch.cu_seqlens[-1] == rows * context
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()


def cut(made, rows) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Tokens, targets, and the document starts in each row."""
    batch, context = d.cut_batch([made], np.zeros(len(rows), int), np.array(rows)), made.context
    flat = batch.cu_seqlens[batch.cu_seqlens < len(rows) * context]
    return batch.tokens, batch.targets, [flat[flat // context == row] % context for row in range(len(rows))]


def test_padded_tail_opens_no_document(prepared, tokenizer):
    split = d.load_source(prepared / "words", tokenizer)["train"]
    context = 37
    last = d.Packing(split, context).count - 1
    tokens, targets, starts = cut(d.Packing(split, context), [last])
    real = (len(split.tokens) - 1) - last * context
    assert (targets[0, :real] == split.tokens[last * context + 1:]).all() and (targets[0, real:] == -100).all()
    assert starts[0].max() < max(real, 1)


@pytest.mark.parametrize("context", [16, 37, 200, 100_000])
def test_best_fit_by_brute_force(prepared, tokenizer, context):
    """What it promises, from the sequences that training sees."""
    split = d.load_source(prepared / "words", tokenizer)["train"]
    made = d.Packing(split, context, "best-fit")
    tokens, targets, starts = cut(made, range(made.count))
    assert (tokens[:, 0] == tokenizer.eos_id).any()
    seen, whole, squares = Counter(), set(), []
    for row in range(made.count):
        end = 0
        for begin, size in made.pieces(row):
            document = np.searchsorted(split.starts, begin, side="right") - 1
            assert begin + size <= split.starts[document + 1] and end in starts[row]  # one document, and marked
            part = split.tokens[begin:begin + size + 1]  # the very last token of the file has no target
            assert (tokens[row, end:end + len(part) - 1] == part[:-1]).all()
            assert (targets[row, end:end + len(part) - 1] == part[1:]).all()
            seen.update(range(begin, begin + size))
            squares.append(size**2)
            if size == split.starts[document + 1] - split.starts[document]:
                whole.add(int(document))
            end += size
        sizes = [size for _, size in made.pieces(row)]
        assert end <= context and starts[row].tolist() == [sum(sizes[:i]) for i in range(len(sizes))]
    assert max(seen.values()) == 1
    lengths = np.diff(split.starts)
    assert made.report() == pytest.approx((made.count, len(seen) / (made.count * context),
                                           1 - len(seen) / len(split.tokens), 1 - len(whole) / len(lengths),
                                           np.mean(squares)))
    assert len(seen) == len(split.tokens) and whole == set(np.flatnonzero(lengths <= context).tolist())


def test_best_fit_by_hand():
    # context 10, longest first: 7 -> row 0; 6 -> row 1; 4 fits row 1 only; 3 fits row 0; the next 3 opens row 2; 2 too
    rows, _, _ = d.pack_best_fit(np.cumsum([0, 3, 7, 4, 2, 6, 3]), 10)
    assert [sorted(np.flatnonzero(rows == r).tolist()) for r in range(3)] == [[0, 1], [2, 4], [3, 5]]


def test_concat_report_by_brute_force(prepared, tokenizer):
    split = d.load_source(prepared / "words", tokenizer)["train"]
    for context in (16, 50):
        (_, _, dropped, cut, mean_square), sizes, whole = d.Packing(split, context).report(), [], 0
        for a, b in zip(split.starts.tolist(), split.starts.tolist()[1:]):
            edges = [a, *(x for x in range(a + 1, b) if x % context == 0), b]
            sizes += [y - x for x, y in zip(edges, edges[1:])]
            whole += len(edges) == 2
        assert cut == pytest.approx(1 - whole / (len(split.starts) - 1)) and dropped == 0
        assert mean_square == pytest.approx(np.mean(np.square(sizes)))


def test_each_packing_trains(prepared, tokenizer):
    for packing in d.PACKINGS:
        splits = [s["train"] for s in load(prepared, tokenizer)]
        curriculum = d.Curriculum(splits, [d.Stage("a", 9600, {})], 16, 96, packing=packing)
        batch = curriculum.batch(3)
        assert batch.tokens.shape == (6, 16) and batch.cu_seqlens[0] == 0 and (np.diff(batch.cu_seqlens) >= 0).all()


def test_stages_of_another_context_and_ranks(prepared, tokenizer):
    """A longer context cuts the same batch into fewer rows, each sequence once an epoch, in one order for all ranks."""
    splits = [s["train"] for s in load(prepared, tokenizer)]
    stages = [d.Stage("short", 24 * 16 * 30, {}), d.Stage("long", 24 * 16 * 20, {"words": 1.0}, context=48)]
    curriculum = d.Curriculum(splits, stages, 16, 24 * 16)
    taken = []
    for step in range(curriculum.steps):
        whole = curriculum.batch(step)
        context = 16 if step < 30 else 48
        assert whole.tokens.shape == (24 * 16 // context, context)
        for world in (1, 2, 3, 8) if step in (0, 29, 30, 44) else ():
            if len(whole.tokens) % world == 0:
                n = len(whole.tokens) // world
                parts = [curriculum.batch(step, rank * n, n).tokens for rank in range(world)]
                assert (np.concatenate(parts) == whole.tokens).all()
        if step >= 30:
            taken += curriculum.locate(step, 0, 8)[1].tolist()
    n = d.Packing(splits[1], 48).count
    assert len(taken) == 160 and all(len(set(taken[i:i + n])) == len(taken[i:i + n]) for i in range(0, len(taken), n))


def test_weights_are_renormalised_and_said(prepared, tokenizer):
    curriculum = make(load(prepared, tokenizer), mixture={"words": 1.2, "more": 0.4})
    assert curriculum.shares[0] == pytest.approx([0.25, 0.75]) and "stage a sum to 1.6" in curriculum.report()[0]


def fake_split(name, lengths) -> d.Split:
    return d.Split(name, np.arange(sum(lengths)) % 60_000, np.cumsum([0, *lengths]), sum(lengths), name)


@pytest.mark.parametrize("packing", d.PACKINGS)
def test_an_epoch_reads_every_row_once(packing):
    """Rows, not tokens, are the shares of sources of a stage without a mixture: padding counts."""
    rng = np.random.default_rng(0)
    chats = [fake_split("chats", rng.integers(30, 80, 370).tolist())]
    many = [fake_split(f"s{i}", rng.integers(2, 90 - 20 * i, n).tolist()) for i, n in enumerate((49, 500, 7))]
    for splits, epochs in ((chats, 1), (many, 3)):
        counts = [d.Packing(split, 128, packing).count for split in splits]
        stages = [d.Stage("sft", epochs * sum(counts) * 128, {})]
        curriculum = d.Curriculum(splits, stages, 128, 128, packing=packing)
        assert curriculum.steps == epochs * sum(counts) and set(curriculum.epochs().values()) == {epochs}
        places = [curriculum.locate(step, 0, 1) for step in range(curriculum.steps)]
        rows = [(int(source[0]), int(sequence[0])) for source, sequence in places]
        everything = sorted((s, row) for s, n in enumerate(counts) for row in range(n))
        for epoch in range(epochs):
            assert sorted(rows[epoch * sum(counts):(epoch + 1) * sum(counts)]) == everything
        seen = sum(len(d.Packing(splits[s], 128, packing).pieces(row)) for s, row in everything)
        assert packing != "best-fit" or seen == sum(len(split.starts) - 1 for split in splits)


def test_a_stage_may_have_a_larger_batch(prepared, tokenizer):
    """A batch that grows is a list of stages: each sequence still comes once an epoch."""
    splits = [s["train"] for s in load(prepared, tokenizer)]
    mixture = {"words": 0.5, "more": 0.5}
    stages = [d.Stage("a", 96 * 10, mixture), d.Stage("b", 192 * 10, mixture, batch_tokens=192),
              d.Stage("c", 96 * 4, mixture)]
    curriculum = d.Curriculum(splits, stages, 16, 96)
    assert curriculum.ends == [10, 20, 24] and curriculum.batches == [96, 192, 96] and curriculum.contexts == [16] * 3
    assert [curriculum.rows(step) for step in (0, 9, 10, 19, 20, 23)] == [6, 6, 12, 12, 6, 6]
    assert [curriculum.tokens(step) for step in (0, 10, 11, 20, 24)] == [0, 960, 1152, 2880, 3264]
    assert curriculum.batch(10).tokens.shape == (12, 16) and curriculum.targets(10) == 12 * 16
    taken = [curriculum.locate(step, 0, curriculum.rows(step)) for step in range(24)]
    source, sequence = (np.concatenate(x) for x in zip(*taken))
    for s, split in enumerate(splits):
        n = d.Packing(split, 16).count
        first = sequence[source == s][:n]
        assert len(set(first.tolist())) == len(first)
    odd = d.Curriculum(splits, [d.Stage("a", 1000, {}), d.Stage("b", 2900, {}, batch_tokens=320)], 16, 96)
    assert odd.ends == [10, 19] and odd.tokens(19) == 10 * 96 + 9 * 320  # 1000 tokens make 10 steps; 3900 - 960 make 9


def test_a_new_packing_is_one_entry(prepared, tokenizer, monkeypatch):
    """One document a row, cut to the context: known to training and to `show` at once."""
    def alone(starts, context):
        return np.arange(len(starts) - 1), starts[:-1], np.minimum(context, np.diff(starts))

    monkeypatch.setitem(d.PACKINGS, "alone", alone)
    split = d.load_source(prepared / "words", tokenizer)["train"]
    batch = d.Curriculum([split], [d.Stage("a", 9600, {})], 16, 96, packing="alone").batch(3)
    assert (batch.tokens[:, 0] == tokenizer.eos_id).all()
    assert "\nalone " in call(d.main, "show", str(prepared / "words"), "--context", "16").stdout


def test_many_epochs_are_reported(prepared, tokenizer):
    splits = [s["train"] for s in load(prepared, tokenizer)]
    assert d.Curriculum(splits, [d.Stage("a", 9600, {"words": 0.9, "more": 0.1})], 16, 96).report() == []
    many = d.Curriculum(splits, [d.Stage("a", 200_000, {"words": 0.7, "more": 0.3})], 16, 96).report()
    assert len(many) == 2 and all("past about 4 epochs" in line for line in many)


def test_epochs_and_languages_are_reported(tmp_path, tokenizer):
    d.prepare({"english": some_documents(200), "multilingual-web": some_documents(100, 1)}, tmp_path / "set", tokenizer)
    splits = [s["train"] for s in load(tmp_path / "set", tokenizer)]
    few = d.Curriculum(splits, [d.Stage("a", 9600, {"english": 0.88, "multilingual-web": 0.12})], 16, 96).report()
    assert len(few) == 1 and "12.0% of a stage is multilingual" in few[0] and "kept" in few[0]
    many = d.Curriculum(splits, [d.Stage("a", 200_000, {"english": 0.7, "multilingual-web": 0.3})], 16, 96).report()
    assert sum("past about 4 epochs" in line for line in many) == 2 and "exceeded" in many[-1]
    late = [d.Stage("a", 9600, {"english": 1}), d.Stage("b", 960, {"english": 2, "multilingual-web": 1})]
    late = d.Curriculum(splits, late, 16, 96).report()  # 3 % of the whole, but a third of the last stage
    assert "33.3% of a stage" in late[-1] and "exceeded" in late[-1]


def test_a_mixture_from_the_command_line():
    """For all stages, for one by its name; nothing else of a stage changes. Mistakes are told before any data is read,
    but for a source, which is told when the data is known."""
    stages = (d.Stage("base", 90, {"a": 1.0}), d.Stage("decay", 10, {"b": 1.0}, context=32))
    assert d.with_mixture(stages, "") == stages
    both, = {tuple(stage.mixture.items()) for stage in d.with_mixture(stages, "a=.5,b=1.5")}
    assert both == (("a", 0.5), ("b", 1.5))
    base, decay = d.with_mixture(stages, "a=1,c-d=0.25;decay:b=2")
    assert base == d.Stage("base", 90, {"a": 1.0, "c-d": 0.25})
    assert decay == d.Stage("decay", 10, {"b": 2.0}, context=32)
    for text in ("a", "a=", "a=x", "a=-1,b=2", "a=nan", "a=inf", "a=0,b=.0", "a=.5;b", "a=1 b=1", "=1", "decay:"):
        with pytest.raises(UserError, match="write code=.5,prose=.5"):
            d.with_mixture(stages, text)
    with pytest.raises(UserError, match="--mixture late:a=1: the stages are base, decay"):
        d.with_mixture(stages, "late:a=1")
    with pytest.raises(UserError, match="the data has no b; it has a, c: change --mixture"):
        d.fit_stages(stages, ["a", "c"], strict=True)
    assert [stage.mixture for stage in d.fit_stages(stages, ["a", "b", "c"], strict=True)] == [{"a": 1.0}, {"b": 1.0}]


def test_cu_seqlens_are_padded_to_a_power_of_two():
    for documents, length in ((1, 16), (14, 16), (15, 16), (16, 32), (31, 32), (32, 64), (100, 128)):
        starts = np.append(np.arange(documents), 401)
        packing = d.Packing(d.Split("", np.zeros(401, np.uint16), starts, 0, ""), 400)
        cu_seqlens = d.cut_batch([packing], np.zeros(1, int), np.zeros(1, int)).cu_seqlens
        assert len(cu_seqlens) == length and cu_seqlens.dtype == np.int32
        assert (cu_seqlens[:documents] == np.arange(documents)).all() and cu_seqlens[-1] == 400


def test_validation_slice_does_not_depend_on_the_batch_size(prepared, tokenizer):
    split = d.load_source(prepared / "words", tokenizer)["val"]
    a, b = (np.concatenate([x.targets for x in d.held_out_batches(split, 16, rows, 9)]) for rows in (2, 5))
    a, b = (x[(x >= 0).any(1)] for x in (a, b))  # without the rows that fill up the last batch
    assert (a == b).all() and len(a) == min(9, d.Packing(split, 16).count)


def test_too_little_data_is_a_sentence(prepared, tokenizer):
    with pytest.raises(UserError, match="fewer tokens than one sequence"):
        make(load(prepared, tokenizer), batch=10**6, context=10**6)
