"""Reading real corpora: pages of parquet, data sets on the Hub, broken files, bounded memory, what a user does next."""

import gzip
import io
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import data as d
import tokenizer as T
from conftest import ROOT, call
from test_data import some_documents, texts_of
from data import Source
from tokenizer import Tokenizer, UserError, train_bpe

DOCUMENTS = [text for _, text in some_documents(60)]


def write_lines(file, texts) -> None:
    with (gzip.open if file.suffix == ".gz" else open)(file, "wt", encoding="utf-8") as out:
        out.write("".join(json.dumps({"text": text}) + "\n" for text in texts))


def read(source) -> list[str]:
    return [document.text for document in source.read()]


# ---- pages of parquet


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "lz4", "brotli"])
@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("missing", [0, 0.2])
def test_pages_read_here_equal_arrows(tmp_path, monkeypatch, version, compression, dictionary, missing):
    """Too large for Arrow is, with this limit, any page: the same texts must come, from any position. The headers lead from
    page to page exactly to the chunk's end."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng, file = random.Random(0), tmp_path / "a.parquet"
    texts = ["".join(rng.choice("abcdé漢 ") for _ in range(rng.randint(0, 2000))) for _ in range(800)]
    texts = [None if rng.random() < missing else text for text in rng.choices(texts, k=2000)] + ["x" * 300_000]
    kind = arrow.field("text", arrow.string(), nullable=bool(missing))
    table = arrow.table([list(range(len(texts))), texts], arrow.schema([arrow.field("id", arrow.int64()), kind]))
    parquet.write_table(table, file, data_page_version=version, compression=compression, use_dictionary=dictionary,
                        data_page_size=10_000, write_batch_size=64, row_group_size=700, write_page_checksum=True)
    with open(file, "rb") as stream, parquet.ParquetFile(file) as opened:
        for i in range(opened.metadata.num_row_groups):
            chunk = opened.metadata.row_group(i).column(1)
            pages = list(d.page_headers(stream, chunk))
            (header, begin), first = pages[-1], chunk.dictionary_page_offset or chunk.data_page_offset
            assert begin + header[3] == first + chunk.total_compressed_size
            assert pages[0][0][1] == 2 if dictionary else len(pages) > 5  # type 2: a dictionary
    expected = [text or "" for text in texts]
    assert read(Source(file)) == expected  # by Arrow
    monkeypatch.setattr(T, "LARGEST_PAGE", 0)
    monkeypatch.setattr(T, "arrow_values", None)
    whole = list(Source(file).read())
    assert [document.text for document in whole] == expected
    for i in (0, 699, 700, 1234, len(whole) - 1):
        assert [later.text for later in Source(file).read(whole[i].position)] == expected[i + 1:]


def test_odd_pages(tmp_path, monkeypatch):
    """A row group without rows; one long run of packed bits; a page that holds less than it says."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table, file = arrow.table({"text": DOCUMENTS[:10]}), tmp_path / "a.parquet"
    with parquet.ParquetWriter(file, table.schema, use_dictionary=False) as writer:
        for part in (table, table.slice(0, 0), table):
            writer.write_table(part)
    assert read(Source(file)) == DOCUMENTS[:10] * 2
    monkeypatch.setattr(T, "LARGEST_PAGE", 0)
    assert read(Source(file)) == DOCUMENTS[:10] * 2
    values = [random.Random(i).randrange(4096) for i in range(100_000)]
    packed = sum(value << 12 * i for i, value in enumerate(values[:8])).to_bytes(12, "little")
    assert d.hybrid_values(memoryview(b"\x03" + packed), 12, 8) == values[:8]
    groups = b"".join(sum(value << 12 * i for i, value in enumerate(values[at:at + 8])).to_bytes(12, "little")
                      for at in range(0, len(values), 8))
    head = (len(values) // 8) << 1 | 1
    head = bytes([head & 127 | 128, head >> 7 & 127 | 128, head >> 14])
    assert d.hybrid_values(memoryview(head + groups), 12, 100_000) == values
    with pytest.raises(ValueError, match="ends before"):
        d.hybrid_values(memoryview(b"\xff\xff\xff\xff\x07" + packed), 12, 10)
    short = tmp_path / "short.parquet"
    parquet.write_table(arrow.table({"text": ["a", "bb", "ccc"]}), short, use_dictionary=False, compression="none")
    content = short.read_bytes()
    short.write_bytes(content.replace(b"\2\0\0\0bb", b"\x09\0\0\0bb", 1))  # swallows the third
    with pytest.raises(UserError, match="short.parquet cannot be read"):
        read(Source(short))


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_monstrous_value_goes_alone(tmp_path, monkeypatch, capsys, dictionary):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = DOCUMENTS[:25] + ["x" * 9000] + DOCUMENTS[25:]
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10, use_dictionary=dictionary)
    for limit in (5000, 50_000):  # read here, and by Arrow
        monkeypatch.setattr(T, "LARGEST_PAGE", limit)
        monkeypatch.setattr(T, "LONGEST_LINE", 6000)
        source = Source(tmp_path / "a.parquet")
        assert read(source) == DOCUMENTS and source.dropped == {"documents over 16 MB": 1}
        assert "row 26 of" in capsys.readouterr().err


def test_a_row_group_with_a_huge_page_is_left_out(tmp_path, monkeypatch, capsys):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = DOCUMENTS[:25] + ["x" * 9000] + DOCUMENTS[25:]
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10)
    monkeypatch.setattr(T, "LARGEST_PAGE", 2000)
    monkeypatch.setattr(T, "LARGEST_BLOCK", 5000)
    source, expected = Source(tmp_path / "a.parquet"), texts[:20] + texts[30:]
    whole = list(source.read())
    assert [document.text for document in whole] == expected
    assert source.dropped == {"documents in huge parquet pages": 10}
    assert "rows 21 to 30" in capsys.readouterr().err
    for i, document in enumerate(whole):
        assert [later.text for later in source.read(document.position)] == expected[i + 1:]


@pytest.mark.parametrize("damage", [b"\0" * 12, b"\x1c" * 300, b"\xff" * 30, b"\x15\x04\x15\x0d\x15\x0d\0"])
def test_a_damaged_page_header_is_one_sentence(tmp_path, monkeypatch, damage):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": DOCUMENTS}), file, use_dictionary=False)
    at = parquet.ParquetFile(file).metadata.row_group(0).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[at:at + len(damage)] = damage
    file.write_bytes(content)
    monkeypatch.setattr(T, "LARGEST_PAGE", 0)
    with pytest.raises(UserError, match="a.parquet cannot be read behind row 0") as error:
        read(Source(file))
    assert "\n" not in str(error.value)


def test_columns_of_other_kinds(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    categories = arrow.array(DOCUMENTS[:3] * 5).dictionary_encode()
    parquet.write_table(arrow.table({"text": categories, "a.b": DOCUMENTS[:15], "list": [["x"]] * 15, "id": range(15)}),
                        tmp_path / "a.parquet")
    for limit in (d.LARGEST_PAGE, 0):
        monkeypatch.setattr(T, "LARGEST_PAGE", limit)
        assert read(Source(tmp_path / "a.parquet")) == DOCUMENTS[:3] * 5
        assert read(Source(tmp_path / "a.parquet", "a.b")) == DOCUMENTS[:15]
        for name in ("list", "id"):
            with pytest.raises(UserError, match=f"the column {name} of .* is no text"):
                read(Source(tmp_path / "a.parquet", name))


MEMORY = """
import os, sys; sys.path.insert(0, {root!r}); os.cpu_count = lambda: 8  # as on a larger machine
import data, tokenizer
data.prepare({{"big": tokenizer.Source({where!r})}}, "out", tokenizer.Tokenizer.load("bytes"))
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("kind", ["parquet, one value", "parquet, one row group", "hf: parquet", "hf: jsonl, one line",
                                  "jsonl.gz, one line", "txt of one line", "jsonl, 15 MB each", "parquet, dictionary"])
def test_memory_stays_under_1_gb(tmp_path, kind):
    """600 MB, in one value or in one row group, and long documents that are kept. Most of it repeats itself: the time is not
    that of encoding."""
    small = DOCUMENTS[:10]
    inside = tmp_path / "in"
    inside.mkdir()
    if kind == "jsonl, 15 MB each":  # four bytes a character in Python's memory, for one of them needs it
        write_lines(inside / "train.jsonl", small + [f"{i} 👍 " + "lorem ipsum " * 1_200_000 for i in range(9)] + DOCUMENTS[10:])
    elif "parquet" in kind:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        big = ["lorem ipsum " * 50_000_000] if "value" in kind else ["lorem ipsum " * 250] * 200_000
        if "dictionary" in kind:  # of a file of 1 MB
            big = ["lorem ipsum " * 1_000_000] * 60
        parquet.write_table(arrow.table({"text": arrow.array(small + big + DOCUMENTS[10:], arrow.large_string())}),
                            inside / "train.parquet", use_dictionary="dictionary" in kind)
    elif kind.startswith("txt"):
        with open(inside / "train.txt", "w") as file:
            file.writelines(["lorem ipsum " * 1000] * 2000)  # 24 MB: all of it is encoded
    else:
        name = "train.jsonl" if "hf" in kind else "train.jsonl.gz"
        with (gzip.open(inside / name, "wt", compresslevel=1) if "gz" in kind else open(inside / name, "w")) as file:
            file.write("".join(json.dumps({"text": text}) + "\n" for text in small) + '{"text": "')
            file.writelines(["lorem ipsum " * 100_000] * 500)
            file.write('"}\n' + "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[10:]))
    if "hf" in kind:
        pytest.importorskip("datasets")
    where = f"hf:{inside}" if "hf" in kind else str(next(inside.iterdir()))
    done = subprocess.run([sys.executable, "-c", MEMORY.format(root=str(ROOT), where=where)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1]) * 1024
    print(f"{kind}: {peak / 1e6:.0f} MB")
    assert peak < 1e9
    meta = json.loads((tmp_path / "out/big/meta.json").read_text())
    stored = meta["train"]["documents"] + meta["val"]["documents"]
    if kind == "jsonl, 15 MB each":
        assert stored == 69 and not meta["dropped"]
        assert re.search(r"tokenize big:.*\[\d\d:\d\d<\d\d:\d\d, .*MB/s\]", done.stderr)  # speed and time left
    elif "parquet" in kind and "value" not in kind:
        assert stored == 61 and meta["dropped"] == {"exact duplicates": 59 if "dictionary" in kind else 199_999}
    elif not kind.startswith("txt"):
        assert stored == 60 and meta["dropped"] == {"documents over 16 MB": 1}


# ---- data sets


def test_files_of_a_data_set_are_read_where_they_are(tmp_path, monkeypatch):
    """URLs, as of the Hub, through fsspec; its file system in memory stands for the network."""
    fsspec, datasets = pytest.importorskip("fsspec"), pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    packed, lines = io.BytesIO(), "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[30:]).encode()
    parquet.write_table(arrow.table({"text": DOCUMENTS[:30]}), packed, row_group_size=7)
    contents = {"memory://set/a.parquet": packed.getvalue(), "memory://set/b.jsonl.gz": gzip.compress(lines)}
    for url, content in contents.items():
        with fsspec.open(url, "wb") as file:
            file.write(content)
    asked = []

    def builder(path, config):
        asked.append((path, config))
        return SimpleNamespace(config=SimpleNamespace(data_files={"test": list(contents)}))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    source = Source("hf:someone/something:small:test")
    assert asked == [("someone/something", "small")] and source.size == sum(map(len, contents.values()))
    whole = list(source.read())
    assert [document.text for document in whole] == DOCUMENTS and source.done == source.size
    for i in (0, 10, 29, 30, 59):
        assert [later.text for later in source.read(whole[i].position)] == DOCUMENTS[i + 1:]
    assert set(source.sample(1e9)) == set(DOCUMENTS)
    fsspec.filesystem("memory").rm("/set/b.jsonl.gz")
    with pytest.raises(T.Unreachable, match="b.jsonl.gz cannot be read .* check the network") as error:
        read(source)
    assert "\n" not in str(error.value)
    with fsspec.open("memory://set/b.jsonl.gz", "wb") as file:  # a damaged file, where one cannot mend it
        file.write(gzip.compress(lines)[:-20])
    assert read(source)[:30] == DOCUMENTS[:30] and source.dropped == {"unreadable files": 1}
    contents.pop("memory://set/a.parquet")
    with fsspec.open("memory://set/b.jsonl.gz", "wb") as file:
        file.write(b"no gzip")
    with pytest.raises(UserError, match="b.jsonl.gz cannot be read to its end"):  # the first is no accident
        read(Source("hf:someone/something:small:test"))


@pytest.mark.parametrize("name, lines", [("a.ndjson", True), ("blank.json", True), ("A.JSONL", True), ("a.json", True), ("a.json.gz", True),
                                         ("list.json", False), ("one.json", False)])
def test_lines_of_json_under_other_names(tmp_path, name, lines):
    if name == "list.json":
        (tmp_path / name).write_text(json.dumps([{"text": text} for text in DOCUMENTS], indent=1))
    elif name == "one.json":
        (tmp_path / name).write_text(json.dumps({"name": "a setting"}) + "\n")
    else:
        write_lines(tmp_path / name, DOCUMENTS)
        if name == "blank.json":
            (tmp_path / name).write_text("\n" + (tmp_path / name).read_text())
    assert (read(Source(tmp_path / name)) == DOCUMENTS) == lines
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / name).rename(tmp_path / "set" / name.replace("a.", "train.").lower())
    if name != "one.json":  # a list of objects streams through `datasets`
        assert read(Source(f"hf:{tmp_path}/set")) == DOCUMENTS


def test_a_preparation_goes_on_at_its_revision(tmp_path, monkeypatch, capsys):
    """The Hub's URLs name a commit: after another one, what was begun is finished from the old."""
    fsspec, datasets = pytest.importorskip("fsspec"), pytest.importorskip("datasets")
    monkeypatch.setattr(d, "SHARD_TOKENS", 4000)
    monkeypatch.setattr(d, "JOB_BYTES", 3000)
    texts, revision = [text for _, text in some_documents(12_000, 7)], ["old"]
    for name, content in (("old", texts), ("new", texts[::-1])):
        with fsspec.open(f"memory://{name}/train.jsonl", "wt") as file:
            file.write("".join(json.dumps({"text": text}) + "\n" for text in content))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: SimpleNamespace(
        config=SimpleNamespace(data_files={"train": [f"memory://{revision[0]}/train.jsonl"]})))
    tokenizer, write = train_bpe(DOCUMENTS, 300), d._write

    def interrupted(path, parts):
        if path.name == "shard-00005.json":
            raise KeyboardInterrupt
        return write(path, parts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(d, "_write", interrupted)
        d.prepare({"a": Source("hf:some/set")}, tmp_path / "set", tokenizer)
    revision[0] = "new"
    d.prepare({"a": Source("hf:some/set")}, tmp_path / "set", tokenizer)
    revision[0] = "old"
    d.prepare({"a": Source("hf:some/set")}, tmp_path / "straight", tokenizer)
    assert texts_of(tmp_path / "set/a", tokenizer) == texts_of(tmp_path / "straight/a", tokenizer)
    assert max(path.stat().st_size for path in (tmp_path / "set/a").glob("*.bin")) < 2 * 4000 * 2.5  # bounded shards


def test_other_formats_of_data_sets_stream(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.csv").write_text("text,id\n" + "".join(f"{text},{i}\n" for i, text in enumerate(DOCUMENTS)))
    source = Source(f"hf:{tmp_path}/set")
    whole = list(source.read())
    assert [document.text for document in whole] == DOCUMENTS and source.size == 0
    assert [later.text for later in source.read(whole[10].position)] == DOCUMENTS[11:]
    with pytest.raises(UserError, match="no column prose: choose one of text, id"):
        read(Source(f"hf:{tmp_path}/set", "prose"))


def test_a_sample_of_many_remote_files_opens_few(monkeypatch):
    source = Source.__new__(Source)
    source.__dict__ = {"hub": True, "files": {f"f{i}": f"f{i}" for i in range(1000)}, "done": 0, "where": "hf:x", "folder": False,
                       "sizes": dict.fromkeys((f"f{i}" for i in range(1000)), 5000), "size": 5_000_000}
    opened = []

    def content(self, name, offset):
        opened.append(name)
        yield "word " * 1000, 0.5, 1, 5000

    monkeypatch.setattr(Source, "open", content)
    assert sum(map(len, source.sample(63_000))) == pytest.approx(63_000, abs=100)
    assert 30 <= len(opened) <= T.SAMPLED_FILES and len({int(b[1:]) - int(a[1:]) for a, b in zip(opened, opened[1:])}) == 1


# ---- broken files


def test_a_bad_line_does_not_cost_the_rest_of_a_folders_file(tmp_path, capsys):
    inside = tmp_path / "in"
    inside.mkdir()
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    for at, bad in ((50, "[1]"), (40, '{"text": "cut'), (30, '{"body": "x"}'), (20, '{"text": 3}'), (10, "\ud800"), (9, "}")):
        lines.insert(at, bad)
    (inside / "a.jsonl").write_text("\n".join(lines) + "\n", errors="surrogatepass")
    (inside / "b.jsonl").write_text('{"prose": "another field"}\n' * 5)
    source = Source(inside)
    assert read(source) == DOCUMENTS and source.dropped == {"unreadable lines": 6, "unreadable files": 1}
    said = capsys.readouterr().err
    assert said.count("left out") == 4 and "has no field text: choose one of prose" in said  # three lines and a file
    with pytest.raises(UserError, match="line 10 is not JSON"):
        read(Source(inside / "a.jsonl"))


def test_what_comes_behind_the_last_document_is_counted_once(tmp_path, monkeypatch):
    """Also where the work is stopped between the last shard and the end."""
    monkeypatch.setattr(d, "JOB_BYTES", 300)
    inside, tokenizer = tmp_path / "in", train_bpe(DOCUMENTS, 300)
    inside.mkdir()
    write_lines(inside / "a.jsonl", [*DOCUMENTS, "x" * 300])  # which fills a job
    for i in range(5):
        (inside / f"z{i}.png").write_bytes(b"\x89PNG\0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(d, "finish_source", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        d.prepare({"in": Source(inside)}, tmp_path / "set", tokenizer)
    d.prepare({"in": Source(inside)}, tmp_path / "set", tokenizer)
    meta = json.loads((tmp_path / "set/in/meta.json").read_text())
    assert meta["dropped"] == {"unreadable files": 5}


def test_what_is_left_out_is_said_three_times_however_long_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(d, "JOB_BYTES", 300)
    inside = tmp_path / "in"
    inside.mkdir()
    for i in range(30):
        write_lines(inside / f"{i:02}.jsonl", DOCUMENTS[2 * i:2 * i + 2])
        (inside / f"{i:02}.png").write_bytes(b"\x89PNG\0")
    d.prepare({"in": Source(inside)}, tmp_path / "set", train_bpe(DOCUMENTS, 300))
    assert capsys.readouterr().err.count("left out") == 3
    assert json.loads((tmp_path / "set/in/meta.json").read_text())["dropped"]["unreadable files"] == 30


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_named(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes('{"text": "größer"}\n'.encode(encoding))
    with pytest.raises(UserError, match="line 1 is not UTF-8 text: convert the file"):
        read(Source(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_bytes('{"text": "größer"}\n'.encode("utf-8-sig"))
    assert read(Source(tmp_path / "b.jsonl")) == ["größer"]


def test_parquet_that_is_not_utf8_is_one_sentence(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = arrow.array([b"fine", b"caf\xe9"], arrow.binary())
    parquet.write_table(arrow.table({"text": raw.view(arrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="cannot be read behind row") as error:
        read(Source(tmp_path / "a.parquet"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["z.jsonl.gz", "z.jsonl", "z.parquet"])
def test_after_a_repair_the_same_command_goes_on(tmp_path, monkeypatch, name):
    """What was finished before the broken place stays, and in the end all is there, once."""
    monkeypatch.setattr(d, "SHARD_TOKENS", 50_000)
    monkeypatch.setattr(d, "JOB_BYTES", 20_000)
    rng, tokenizer, file = random.Random(0), train_bpe(DOCUMENTS, 300), tmp_path / name
    documents = [f"{text} {rng.randbytes(100).hex()}" for _, text in some_documents(9000, 3)]  # over 1 MB also when packed
    if name.endswith("parquet"):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": documents}), file, row_group_size=100, compression="none", use_dictionary=False)
    else:
        write_lines(file, documents)
    whole = file.read_bytes()
    broken = bytearray(whole[:-100] if name.endswith("gz") else whole)
    if name == "z.jsonl":
        at = broken.index(b"\n", len(broken) * 9 // 10)
        broken[at + 1:at + 3] = b"]["
    elif name.endswith("parquet"):
        at = broken.index(documents[8500].encode())
        broken[at - 4:at] = b"\xff\xff\xff\x7f"  # a text's length
    file.write_bytes(broken)
    with pytest.raises(UserError, match=f"{name}.*what was finished is in .*set.partial") as error:
        d.prepare({"z": Source(file)}, tmp_path / "set", tokenizer)
    assert "\n" not in str(error.value)
    assert len(list((tmp_path / "set.partial/z").glob("shard-*.json"))) > 5
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
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data, tokenizer; data.SHARD_TOKENS = data.JOB_BYTES = 3000; "
            "sys.argv = ['data.py', 'prepare', 'a.jsonl', '--out', 'set', '--tokenizer', 'bytes']; tokenizer.run(data.main)")

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    full = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, preexec_fn=small_disk, capture_output=True, text=True)
    assert full.returncode == 2 and "train.starts" in full.stderr and "run the same command again" in full.stderr
    assert "Traceback" not in full.stderr and not list((tmp_path / "set.partial").rglob("*.partial"))
    again = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    sides = texts_of(tmp_path / "set/a", tokenizer)
    assert sorted(sides["train"] + sides["val"]) == [f"{i:06}" for i in range(9000)]


# ---- what is said


@pytest.mark.parametrize("name, tokens", [("a.jsonl", 0), ("a.jsonl.gz", 0), ("many.jsonl.gz", 0), ("many.jsonl", 300_000)])
def test_the_disk_that_is_foretold_suffices(tmp_path, name, tokens, capsys, monkeypatch):
    monkeypatch.setattr(d, "JOB_BYTES", 10_000)
    documents = [text for _, text in some_documents(60_000 if name.startswith("many") else 600)]
    write_lines(tmp_path / name, documents)
    largest, unlink = [0], Path.unlink

    def weighed(path, **options):  # what lies there when the leftovers begin to go
        largest[0] = max(largest[0], sum(p.stat().st_size for p in (tmp_path / "set").rglob("*") if p.is_file()))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", weighed)
    d.prepare({"a": Source(tmp_path / name)}, tmp_path / "set", train_bpe(documents[:300], 300),
              max_tokens=tokens)
    out = capsys.readouterr().out
    foretold = float(out.split("need about ")[1].split(" MB")[0]) * 1e6
    assert "repeated spans are not looked for: a vocabulary of 300" in out
    assert 0.8 * largest[0] - 1e5 < foretold < 1.3 * largest[0] + 1e5


def test_show_draws_lengths_and_marks_boundaries(tmp_path):
    tokenizer = train_bpe(DOCUMENTS, 300)
    d.prepare({"words": [(text, text) for text in DOCUMENTS]}, tmp_path / "set", tokenizer)
    shown = call(d.main, "show", str(tmp_path / "set"), "--context", "64")
    split = d.load_source(tmp_path / "set/words", tokenizer)["train"]
    first, second, third = split.starts[:3].tolist()
    beginning = tokenizer.decode(split.tokens[first + 1:min(second, first + 60)].tolist())
    assert f"--- tokens {first:,} to {second:,}, a document of {second - first:,}\n{beginning}\n" in shown.stdout
    assert f"--- tokens {second:,} to {third:,}" in shown.stdout
    pytest.importorskip("matplotlib")
    picture = tmp_path / "set/document-lengths.png"
    assert str(picture) in shown.stdout and picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


@pytest.mark.parametrize("flags", [["--sample-bytes", "nan"], ["--max-tokens", "-1"], ["--sample-bytes", "0"]])
def test_absurd_amounts_are_a_sentence(tmp_path, flags):
    write_lines(tmp_path / "a.jsonl", DOCUMENTS)
    done = call(d.main, "prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "set"), *flags)
    assert done.returncode == 2 and "--sample-bytes and --max-tokens" in done.stderr and not (tmp_path / "set").exists()
