"""Reading real corpora: every kind of file, data sets, broken files, bounded memory, and the errors a user meets."""

import gzip
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data as d
from conftest import ROOT, call
from data import LONGEST_PIECE, Source
from test_data import shards_in, some_documents, texts_of, write_sources
from tokenizer import Tokenizer, UserError, train_bpe

DOCUMENTS = [text for _, text in some_documents(60)]


def write_lines(file, texts) -> None:
    with (gzip.open if file.suffix == ".gz" else open)(file, "wt", encoding="utf-8") as out:
        out.write("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_table(file, texts, **options) -> None:
    """A parquet, csv, tsv, arrow or json file of the texts, with a column of numbers beside them."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file, **options)
    elif file.suffix == ".arrow":
        with pyarrow.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    elif file.suffix == ".json":
        file.write_text(json.dumps(table.to_pylist(), indent=1))
    else:
        table.to_pandas().to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")


def read(source) -> list[str]:
    return [document.text for document in source.read()]


def same_from_any_position(make, texts, step=1) -> None:
    whole = list(make().read())
    assert [document.text for document in whole] == texts
    for i in range(0, len(whole), step):  # a position means the same to a new Source, also from JSON
        position = json.loads(json.dumps(whole[i].position))
        assert [later.text for later in make().read(position)] == texts[i + 1:]


# ---- files


def test_every_kind_of_source_is_read_from_any_position(tmp_path, capsys):
    expected = write_sources(tmp_path / "in")
    same_from_any_position(lambda: Source(tmp_path / "in", "body"), sum(expected.values(), []))
    assert "picture.png" in capsys.readouterr().err
    for name, texts in expected.items():
        assert read(Source(tmp_path / "in" / name, "body")) == texts
    for bad in ('{"text": "one"}', '{"body": 5}', '["one"]', "nonsense", "[" * 100_000):
        (tmp_path / "bad.jsonl").write_text('{"body": "fine"}\n' + bad + "\n")
        with pytest.raises(UserError, match="bad.jsonl line 2"):
            list(Source(tmp_path / "bad.jsonl", "body").read())


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "arrow", "json"])
def test_tables_are_read_from_any_position(tmp_path, suffix):
    texts = ["NA", "null", "two\nlines, and \"more\"", "mañana 漢字 👍", "#"] + DOCUMENTS[:20]
    file = tmp_path / f"a[1] *.{suffix}"  # no pattern
    write_table(file, texts, **{"row_group_size": 7} if suffix == "parquet" else {})
    same_from_any_position(lambda: Source(file), texts)
    for name in ("prose", "id"):
        with pytest.raises(UserError, match=f"no text in a field {name}: choose one of text, id with") as error:
            read(Source(file, name))
        assert "\n" not in str(error.value) and file.name in str(error.value)
    (tmp_path / "b.jsonl").write_text('{"text": "last"}\n')
    assert read(Source(tmp_path)) == texts + ["last"]


def test_zstd_is_read_or_its_package_named(tmp_path):
    if not importlib.util.find_spec("backports.zstd" if importlib.util.find_spec("backports") else "zstd"):
        (tmp_path / "a.jsonl.zst").write_bytes(b"(")
        with pytest.raises(UserError, match="pip install backports.zstd"):
            read(Source(tmp_path / "a.jsonl.zst"))
        return
    from backports import zstd

    frames = [zstd.compress(json.dumps({"text": text}).encode() + b"\n") for text in DOCUMENTS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "b.txt.zst").write_bytes(zstd.compress("word ".encode() * 9000))
    same_from_any_position(lambda: Source(tmp_path / "a.jsonl.zst"), DOCUMENTS, 7)
    assert "".join(read(Source(tmp_path / "b.txt.zst"))) == "word " * 9000


@pytest.mark.parametrize("ending", ["\n\n", "\n", " ", "", "é"])
def test_long_files_are_cut_without_losing_a_character(tmp_path, ending):
    rng = random.Random(ending)
    text = "\ufeff" + "".join("wörd" * rng.randint(1, 500) + ending for _ in range(400))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    whole = list(Source(tmp_path / "long.txt").read())
    assert "".join(document.text for document in whole) == text[1:]
    assert max(len(document.text) for document in whole) <= LONGEST_PIECE and len(whole) > 10
    if ending in ("\n\n", "\n", " "):
        assert all(document.text.endswith(ending) for document in whole)
    for i in range(0, len(whole), 7):
        rest = [later.text for later in Source(tmp_path / "long.txt").read(whole[i].position)]
        assert rest == [document.text for document in whole[i + 1:]]
    sides = [document.held < 0.03 for document in whole]
    held = sum(len(document.text) for document, side in zip(whole, sides) if side)
    assert sides == sorted(sides) and 0 < held < 0.03 * len(text) + LONGEST_PIECE


def test_a_folder_behind_links_is_read_once(tmp_path):
    real, project = tmp_path / "real", tmp_path / "project"
    real.mkdir(), project.mkdir()
    for i in range(20):
        (real / f"{i}.txt").write_text(f"real {i}")
    (project / "own.txt").write_text("own")
    for link, target in (("2025", "../real"), ("again", "../real"), ("self", "."), ("up", "..")):
        os.symlink(target, project / link)
    assert sorted(read(Source(project))) == sorted(["own", *(f"real {i}" for i in range(20))])


# ---- data sets


def test_a_local_data_set_is_read_from_any_position(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(3):
        write_table(tmp_path / f"set/train-{i}.parquet", DOCUMENTS[20 * i:20 * i + 20], row_group_size=7)
    same_from_any_position(lambda: Source(f"hf:{tmp_path}/set"), DOCUMENTS, 7)
    assert sorted(Source(f"hf:{tmp_path}/set::train").sample(1e9)) == sorted(DOCUMENTS)
    beginnings = [text[:8] for text in Source(f"hf:{tmp_path}/set").sample(30)]
    assert beginnings == [DOCUMENTS[i][:8] for i in (0, 20, 40)]
    with pytest.raises(UserError, match="no text in a field prose: choose one of"):
        read(Source(f"hf:{tmp_path}/set", "prose"))


def test_a_data_set_that_fails_is_an_error(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(UserError, match="hf:nobody/nothing-like-this .check its name.* and the network") as error:
        Source("hf:nobody/nothing-like-this")
    assert "\n" not in str(error.value)

    class Rows:
        num_shards, column_names = 1, ["text"]

        def shard(self, *_):
            return self

        def state_dict(self):
            return {}

        def __iter__(self):
            yield {"text": "one"}
            raise ConnectionError("the line is down")

    (tmp_path / "set").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows())
    with pytest.raises(UserError, match="network. cannot be read .the line is down"):
        read(Source(f"hf:{tmp_path}/set"))


def test_a_preparation_resumes_at_its_revision(tmp_path, monkeypatch):
    """What was begun at one commit of the Hub is finished from it after the next."""
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(d, "SHARD_TOKENS", 4000)
    monkeypatch.setattr(d, "JOB_BYTES", 3000)
    texts, revision, load = [text for _, text in some_documents(800, 7)], ["old"], datasets.load_dataset
    for name, content in (("old", texts), ("new", texts[::-1])):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "train.jsonl", content)
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=revision[0]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, revision, **options: load(
        str(tmp_path / revision), config, **options))
    tokenizer, write = train_bpe(DOCUMENTS, 300), d.write_shard

    def interrupted(folder, meta, documents):
        write(folder, meta, documents)
        if meta["shards"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(d, "write_shard", interrupted)
        d.prepare({"a": Source("hf:some/set")}, tmp_path / "set", tokenizer)
    revision[0] = "new"
    d.prepare({"a": Source("hf:some/set")}, tmp_path / "set", tokenizer)
    revision[0] = "old"
    d.prepare({"a": Source("hf:some/set")}, tmp_path / "straight", tokenizer)
    assert texts_of(tmp_path / "set/a", tokenizer) == texts_of(tmp_path / "straight/a", tokenizer)


def test_a_preparation_that_stops_early_exits(tmp_path):
    """A half-read parquet iterator must not keep the process from ending."""
    write_table(tmp_path / "a.parquet", [f"{i} {text}" for i in range(100) for text in DOCUMENTS], row_group_size=1000)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data, tokenizer; data.JOB_BYTES = 5000; sys.argv = "
            "['data.py', 'prepare', 'a.parquet', '--out', 'set', '--tokenizer', 'bytes', '--max-tokens', '30k']; "
            "tokenizer.run(data.main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Prepared set" in done.stdout, done.stderr


# ---- broken files


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 9999)[:-30], "cannot be read .*ended before"),
    ("a.jsonl.gz", b"no gzip at all", "cannot be read .*gzip"),
    ("a.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8"),
    ("a.jsonl", '{"text": "one"}\n'.encode("utf-16"), "line 1 is not UTF-8 text, but perhaps UTF-16"),
    ("a.parquet", b"PAR1 and no footer", "cannot be read"),
    ("a.csv", "text,id\nmañana,1\n".encode("utf-16"), "not UTF-8 text, but perhaps UTF-16"),
    ("a.csv", "text,id\nmañana,1\n".encode("latin-1"), "not UTF-8 text"),
    ("a.json", b'[{"text": "one"}, {"te', "cannot be read"),
    ("a.txt", b"words " * 9000 + b"caf\xe9", "not UTF-8 text, but perhaps WINDOWS-1252"),
    ("a.txt", "words ".encode("utf-16") * 9000, "perhaps UTF-16"),
    ("a.txt", "words ".encode("utf-16-le") * 9000, "binary or UTF-16"),
])
def test_broken_files_are_one_sentence(tmp_path, name, content, words):
    if name.endswith(("parquet", "csv", "json")):
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read(Source(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_tables_without_datasets_name_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.csv").write_text("text\none\n")
    for where in (tmp_path / "a.csv", "hf:some/set"):
        with pytest.raises(UserError, match="pip install datasets"):
            read(Source(where))


def test_a_monstrous_value_is_left_out_and_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(d, "LONGEST_VALUE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "' + "x" * 5500 + '"}\n{"text": "two"}\n')
    same_from_any_position(lambda: Source(tmp_path / "a.jsonl"), ["one", "two"])
    source = Source(tmp_path / "a.jsonl")
    assert read(source) == ["one", "two"] and source.dropped == {"documents over 16 MB": 1}
    assert "a.jsonl line 2 is longer" in capsys.readouterr().err
    assert list(Source(tmp_path / "a.jsonl").sample(1e6)) == ["one", "two"]
    write_table(tmp_path / "a.parquet", ["one", "x" * 5500, None, "two"])
    source = Source(tmp_path / "a.parquet")
    assert read(source) == ["one", "", "two"] and source.dropped == {"documents over 16 MB": 1}


def test_a_bad_line_does_not_cost_the_rest_of_a_folders_file(tmp_path, capsys):
    inside = tmp_path / "in"
    inside.mkdir()
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    for at, bad in ((50, "[1]"), (40, '{"text": "cut'), (30, '{"body": "x"}'), (20, '{"text": 3}'), (9, "}")):
        lines.insert(at, bad)
    (inside / "a.jsonl").write_text("\n".join(lines) + "\n")
    (inside / "b.jsonl").write_text('{"prose": "another field"}\n' * 5)
    source = Source(inside)
    assert read(source) == DOCUMENTS and source.dropped == {"unreadable lines": 10}
    said = capsys.readouterr().err
    assert said.count("left out") == 1 and "a.jsonl line 10 cannot be read" in said
    assert read(Source(inside, "body")) == ["x"] and "choose one of text" in capsys.readouterr().err
    with pytest.raises(UserError, match="a.jsonl line 10 cannot be read"):
        read(Source(inside / "a.jsonl"))


def test_what_comes_behind_the_last_document_is_counted_once(tmp_path, monkeypatch):
    """Also if the work is stopped between the last shard and the end."""
    monkeypatch.setattr(d, "JOB_BYTES", 300)
    inside, tokenizer = tmp_path / "in", train_bpe(DOCUMENTS, 300)
    inside.mkdir()
    write_lines(inside / "a.jsonl", [*DOCUMENTS, "x" * 300])  # which fills a job
    for i in range(5):
        (inside / f"z{i}.png").write_bytes(b"\x89PNG\0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(d, "file_sha256", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        d.prepare({"in": Source(inside)}, tmp_path / "set", tokenizer)
    d.prepare({"in": Source(inside)}, tmp_path / "set", tokenizer)
    meta = json.loads((tmp_path / "set/in/meta.json").read_text())
    assert meta["dropped"] == {"unreadable files": 5}


def test_what_is_left_out_is_said_once_however_long_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(d, "JOB_BYTES", 300)
    inside = tmp_path / "in"
    inside.mkdir()
    for i in range(30):
        write_lines(inside / f"{i:02}.jsonl", DOCUMENTS[2 * i:2 * i + 2])
        (inside / f"{i:02}.png").write_bytes(b"\x89PNG\0")
    d.prepare({"in": Source(inside)}, tmp_path / "set", train_bpe(DOCUMENTS, 300))
    assert capsys.readouterr().err.count("left out") == 1
    assert json.loads((tmp_path / "set/in/meta.json").read_text())["dropped"]["unreadable files"] == 30


@pytest.mark.parametrize("name", ["z.jsonl.gz", "z.jsonl", "z.parquet"])
def test_after_a_repair_the_same_command_resumes(tmp_path, monkeypatch, capsys, name):
    """Documents finished before the broken place stay, and in the end all are there, once."""
    monkeypatch.setattr(d, "SHARD_TOKENS", 20_000)
    monkeypatch.setattr(d, "JOB_BYTES", 8_000)
    rng, tokenizer, file = random.Random(0), train_bpe(DOCUMENTS, 300), tmp_path / name
    documents = [f"{text} {rng.randbytes(20).hex()}" for _, text in some_documents(3000, 3)]
    if name.endswith("parquet"):
        write_table(file, documents, row_group_size=100, compression="none", use_dictionary=False)
    else:
        write_lines(file, documents)
    whole = file.read_bytes()
    broken = bytearray(whole[:-100] if name.endswith("gz") else whole)
    if name == "z.jsonl":
        at = broken.index(b"\n", len(broken) * 9 // 10)
        broken[at + 1:at + 3] = b"]["
    elif name.endswith("parquet"):
        at = broken.index(documents[2850].encode())
        broken[at - 4:at] = b"\xff\xff\xff\x7f"  # a text's length
    file.write_bytes(broken)
    with pytest.raises(UserError, match=name) as error:
        d.prepare({"z": Source(file)}, tmp_path / "set", tokenizer)
    assert "\n" not in str(error.value) and "finished parts are in" in capsys.readouterr().err
    assert shards_in(tmp_path / "set.partial") > 5
    file.write_bytes(whole)
    d.prepare({"z": Source(file)}, tmp_path / "set", tokenizer)
    d.prepare({"z": Source(file)}, tmp_path / "straight", tokenizer)
    sides, straight = texts_of(tmp_path / "set/z", tokenizer), texts_of(tmp_path / "straight/z", tokenizer)
    assert Counter(sides["train"] + sides["val"]) == Counter(set(documents)) and sides == straight


def test_a_full_disk_at_the_very_end(tmp_path):
    """The document starts of all shards are more than the limit of one file, which stands in for the disk."""
    resource = pytest.importorskip("resource")
    import signal

    write_lines(tmp_path / "a.jsonl", [f"{i:06}" for i in range(9000)])
    tokenizer = Tokenizer.load("bytes")
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data, tokenizer; "
            "data.SHARD_TOKENS = data.JOB_BYTES = 3000; tokenizer.run(data.main)")
    command = [sys.executable, "-c", code, "prepare", "a.jsonl", "--out", "set", "--tokenizer", "bytes"]

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    full = subprocess.run(command, cwd=tmp_path, preexec_fn=small_disk, capture_output=True, text=True)
    assert full.returncode == 2 and "File too large" in full.stderr and "run the same command again" in full.stderr
    assert "Traceback" not in full.stderr and shards_in(tmp_path / "set.partial") > 5
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    sides = texts_of(tmp_path / "set/a", tokenizer)
    assert sorted(sides["train"] + sides["val"]) == [f"{i:06}" for i in range(9000)]


# ---- memory


MEMORY = """
import os, sys; sys.path.insert(0, {root!r}); os.cpu_count = lambda: 8  # as on a larger machine
import data, tokenizer
list(data.Source("few" + {suffix!r}).read())  # imports what reading needs
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
data.LONGEST_VALUE, data.JOB_BYTES, data.SHARD_TOKENS = 1_600_000, 2**17, 2**21  # a tenth of the real ones
before = peak()
data.prepare({{"big": data.Source({where!r})}}, "out", tokenizer.Tokenizer.load("bytes"))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("kind", ["parquet of many row groups", "jsonl of one long line", "txt of one line",
                                  "jsonl, 1.5 MB each"])
def test_memory_is_bounded(tmp_path, kind):
    """At a tenth of the real sizes, where preparation may take 150 MB more than the imports."""
    small, file = DOCUMENTS[:10], tmp_path / f"in.{kind.split()[0].strip(',')}"
    if "each" in kind:  # four bytes per character in Python's memory, because of the emoji: 144 MB
        write_lines(file, small + [f"{i} 👍 " + "lorem ipsum " * 120_000 for i in range(25)] + DOCUMENTS[10:])
    elif "parquet" in kind:
        write_table(file, small + ["lorem ipsum " * 250] * 3000 + DOCUMENTS[10:], row_group_size=300,
                    use_dictionary=False)
    elif "txt" in kind:
        file.write_text("lorem ipsum " * 500_000)
    else:
        with open(file, "w") as out:
            out.write("".join(json.dumps({"text": text}) + "\n" for text in small) + '{"text": "')
            out.writelines(["lorem ipsum " * 100_000] * 200)
            out.write('"}\n' + "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[10:]))
    (write_table if "parquet" in kind else write_lines)(tmp_path / f"few{file.suffix}", small)
    done = subprocess.run([sys.executable, "-c", MEMORY.format(root=str(ROOT), where=str(file), suffix=file.suffix)],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    more = int(done.stdout.split()[-1]) * 1024
    print(f"{kind}: {more / 1e6:.0f} MB")
    assert more < 1.5e8
    meta = json.loads((tmp_path / "out/big/meta.json").read_text())
    stored = meta["train"]["documents"] + meta["val"]["documents"]
    expected = {"parquet": (61, {"exact duplicates": 2999}), "txt": (0, {})}.get(
        file.suffix[1:], (85, {}) if "each" in kind else (60, {"documents over 16 MB": 1}))
    assert file.suffix == ".txt" or (stored, meta["dropped"]) == expected


# ---- command line


def test_progress_has_a_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(d, "tqdm", lambda real=d.tqdm, **options: real(**options | {"delay": 0, "mininterval": 0}))
    bars = io.StringIO()
    monkeypatch.setattr(sys, "stderr", bars)
    d.prepare({"words": [(text, text) for text in DOCUMENTS]}, tmp_path / "set", Tokenizer.load("bytes"))
    assert "tokenize words" in bars.getvalue() and "B/s" in bars.getvalue()


def test_a_tokenizer_is_trained_on_any_source(tmp_path):
    write_lines(tmp_path / "a.jsonl.gz", DOCUMENTS)
    (tmp_path / "b.txt").write_text("plain text " * 50)
    done = call(d.main, "tokenizer", tmp_path / "a.jsonl.gz", tmp_path / "b.txt", "--vocab-size", "320", "--out",
                tmp_path / "t", "--pretokenizer", "llama3", "--sample-bytes", "1M")
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.load(tmp_path / "t")
    assert tokenizer.vocab_size == 320 and tokenizer.decode(tokenizer.encode(DOCUMENTS[0])) == DOCUMENTS[0]
    few = call(d.main, "tokenizer", tmp_path / "a.jsonl.gz", "--vocab-size", "4000", "--out", tmp_path / "few",
               "--sample-bytes", "50")
    assert few.returncode == 2 and "give more text" in few.stderr and not (tmp_path / "few").exists()


def test_a_sample_takes_a_share_of_every_file(tmp_path):
    for i in range(5):
        write_lines(tmp_path / f"{i}.jsonl", [f"{i} " * 50] * (10 if i else 40))
    taken = Counter("".join(Source(tmp_path).sample(1000)).split())
    assert sum(len(text) for text in Source(tmp_path).sample(1000)) == pytest.approx(1000, abs=10)
    assert set(taken) == set("01234") and taken["0"] == pytest.approx(4 * taken["1"], rel=0.2)


def test_show_prints_lengths_and_marks_boundaries(tmp_path):
    tokenizer = train_bpe(DOCUMENTS, 300)
    d.prepare({"words": [(text, text) for text in DOCUMENTS]}, tmp_path / "set", tokenizer)
    shown = call(d.main, "show", str(tmp_path / "set"), "--context", "64")
    split = d.load_source(tmp_path / "set/words", tokenizer)["train"]
    first, second, third = split.starts[:3].tolist()
    beginning = tokenizer.decode(split.tokens[first + 1:min(second, first + 60)].tolist())
    assert f"--- tokens {first:,} to {second:,}, a document of {second - first:,}\n{beginning}\n" in shown.stdout
    assert f"--- tokens {second:,} to {third:,}" in shown.stdout
    lengths = sorted(b - a for a, b in zip(split.starts.tolist(), split.starts.tolist()[1:]))
    assert f"half up to {np.median(lengths):,.0f}, " in shown.stdout and f"all up to {lengths[-1]:,}\n" in shown.stdout


@pytest.mark.parametrize("flags, words", [(["--pretokenizer", "bert"], "is not one of gpt2, llama3"),
                                          (["--vocab-siz", "300"], "did you mean --vocab_size?")])
def test_wrong_flags_are_a_sentence(tmp_path, flags, words):
    (tmp_path / "b.txt").write_text("plain text " * 50)
    done = call(d.main, "tokenizer", *flags, tmp_path / "b.txt", "--out", tmp_path / "t")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr


@pytest.mark.parametrize("flags", [["--sample-bytes", "nan"], ["--max-tokens", "-1"], ["--sample-bytes", "0"]])
def test_absurd_amounts_are_a_sentence(tmp_path, flags):
    write_lines(tmp_path / "a.jsonl", DOCUMENTS)
    done = call(d.main, "prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "set"), *flags)
    assert done.returncode == 2 and flags[0].replace("-", "_")[2:] in done.stderr and not (tmp_path / "set").exists()
    assert len(done.stderr.strip().splitlines()) == 1


def test_names_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", DOCUMENTS)
    named = d.named_sources(["a.jsonl", "web=a.jsonl"], d.DataOptions())
    assert {name: source.where for name, source in named.items()} == {"a": "a.jsonl", "web": "a.jsonl"}
    for words in (["a.jsonl", "a.jsonl"], ["b c=a.jsonl"], ["=a.jsonl"]):
        with pytest.raises(UserError, match="NAME=PATH"):
            d.named_sources(words, d.DataOptions())
    with pytest.raises(UserError, match="nothing to read at nowhere"):
        d.named_sources(["nowhere"], d.DataOptions())
