"""data.py: token files and their errors, packing, order, mixtures."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import data as d
from conftest import ROOT
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
            assert split.tokens[a] == tokenizer.eos_id and tokenizer.eos_id not in split.tokens[a + 1:b]
            texts.append(tokenizer.decode(split.tokens[a + 1:b].tolist()))
            size += len(texts[-1].encode())
        assert size == split.bytes
    assert sorted(texts) == sorted(text for _, text in some_documents(300))
    assert 1 <= len(splits["val"].starts) - 1 <= 30


def test_the_same_key_is_always_on_the_same_side(tokenizer):
    both = d.hold_out("x", [(f"k{i % 40}", f"text {i}") for i in range(400)])
    train, val = ({int(t.split()[1]) % 40 for t in both[s]} for s in ("train", "val"))
    assert train and val and not train & val


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage, words", [
    (lambda f: flip(f / "train.bin", 101), "sha256"),
    (lambda f: flip(f / "val.starts", 9), "sha256"),
    (lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-7]), "truncated"),
    (lambda f: (f / "val.bin").unlink(), "missing"),
    (lambda f: (f / "meta.json").write_text("{"), "damaged"),
    (lambda f: (f / "meta.json").write_text(json.dumps({"format": 99})), "format 99"),
])
def test_damaged_files_are_refused_in_a_sentence(prepared, tokenizer, damage, words):
    damage(prepared / "words")
    with pytest.raises(UserError, match=words) as error:
        d.load_source(prepared / "words", tokenizer)
    assert "\n" not in str(error.value) and "prepare" in str(error.value)


def test_wrong_tokenizer_is_refused(prepared, tokenizer):
    with pytest.raises(UserError, match="another tokenizer"):
        d.load_source(prepared / "words", train_bpe(["other text " * 50, "and more"], 270))


@pytest.mark.parametrize("content, words", [(b"", "empty"), (b" \n", "empty"), (b"\x89PNG\0\1\2", "not UTF-8"),
                                            ("latin \u00e9".encode("latin-1"), "not UTF-8"), (b"short text", "document")])
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, content, words):
    (tmp_path / "my.txt").write_bytes(content)
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), "prepare", "my.txt", "--vocab-size", "300"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["my.txt"]


def test_a_users_file_becomes_data(tmp_path):
    text = "\n\n".join(text for _, text in some_documents(800))
    (tmp_path / "my.txt").write_text(text)
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), "prepare", "my.txt", "--vocab-size", "300"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python train.py --data data/my" in done.stdout
    tokenizer = Tokenizer.load(tmp_path / "data/my")
    splits = d.load_source(tmp_path / "data/my/my", tokenizer)
    assert splits["train"].bytes + splits["val"].bytes == len(text.encode())
    shown = subprocess.run([sys.executable, str(ROOT / "data.py"), "show", "data/my"], cwd=tmp_path,
                           capture_output=True, text=True)
    assert shown.returncode == 0 and "documents" in shown.stdout


def test_jsonl_and_folders(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n\n{"body": "two\u2028"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    assert [t for _, t in d.read_documents(tmp_path, "body")] == ["one", "two\u2028"]
    assert "left out" in capsys.readouterr().err
    for bad in ('{"body": null}', '{"body": 5}', '["one"]', "nonsense"):
        (tmp_path / "a.jsonl").write_text(bad)
        with pytest.raises(UserError, match="line 1"):
            list(d.read_documents(tmp_path / "a.jsonl", "body"))


def test_what_exists_is_never_overwritten(tmp_path, prepared, tokenizer):
    """A folder of the user's own, and data prepared before: both stay as they are."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("mine " * 5000)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for out in (tmp_path, notes, prepared):
        with pytest.raises(UserError, match="exists already"):
            d.prepare({"notes": d.read_documents(notes)}, out, tokenizer)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_interrupted_preparation_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        d.prepare({"words": some_documents(50)}, tmp_path / "set", tokenizer)
    assert not list(tmp_path.iterdir())


def test_long_files_are_cut_without_losing_a_character():
    text = "\n\n".join("word " * 200 for _ in range(200)) + "x" * 40_000
    pieces = [t for _, t in d._cut("k", text)]
    assert "".join(pieces) == text and max(map(len, pieces)) <= d.LONGEST_PIECE and len(pieces) > 10


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
    sums = {side: {tuple(sorted(pair)) for text in texts for pair in re.findall(r"What is (\d+) \+ (\d+)\?", text)}
            for side, texts in d.hold_out("math", documents).items()}
    assert sums["train"] and sums["val"] and not sums["train"] & sums["val"]


def test_prose_and_code_of_a_module_are_on_the_same_side():
    prose, code = (set(key for key, _ in source()) for source in (d.embedded_prose, d.embedded_code))
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
    far = d.permute(np.array([0, 1, n // 2, n - 1]), n, [3])
    assert len(set(far.tolist())) == 4 and (far < n).all() and (far >= 0).all()


@pytest.mark.parametrize("shares", [[0.45, 0.45, 0.1], [0.7, 0.2, 0.1], [1.0], [0.5, 0.0, 0.5], [1 / 3] * 3,
                                    [0.001, 0.333, 0.666], [0.1, 0.2, 0.7, 0.0], [0.0, 1.0]])
def test_interleave_deals_each_sequence_once_in_exact_shares(shares):
    index = np.arange(30_000)
    source, rank = d.interleave(index, shares)
    for s, share in enumerate(shares):
        assert rank[source == s].tolist() == list(range((source == s).sum()))  # none missed, none twice
        taken = np.cumsum(source == s)
        assert np.abs(taken - (index + 1) * share).max() <= len(shares)
        for begin in (0, 1234, 20_000):  # over any 10,000 sequences within 0.1 %
            assert abs((source[begin:begin + 10_000] == s).mean() - share) <= 0.001
    far = np.arange(10**10, 10**10 + 50)
    assert d.interleave(far, shares)[0].shape == (50,)


def make(splits, rows=6, context=16, tokens=6 * 16 * 40, mixture=None, seed=0):
    return d.Curriculum([s["train"] for s in splits], [d.Stage("a", tokens, mixture or {}),
                                                       d.Stage("b", tokens / 2, {"words": 1.0})], context, rows, seed)


def test_each_token_once_in_an_epoch_whatever_the_number_of_processes(prepared, tokenizer):
    split = d.load_source(prepared / "words", tokenizer)["train"]
    for context, world in ((16, 1), (16, 2), (17, 3), (31, 1)):
        rows = 6
        sequences = split.sequences(context)
        steps = -(-sequences // rows)
        curriculum = d.Curriculum([split], [d.Stage("a", steps * rows * context, {})], context, rows)
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
        n = split["train"].sequences(16)
        taken = sequence[source == s]
        for epoch in range(0, len(taken), n):
            part = taken[epoch:epoch + n]
            assert len(set(part.tolist())) == len(part)
    assert (source[-6:] == 1).all()  # the second stage is all `words`, which sorts behind `more`


def test_epochs_are_counted(prepared, tokenizer):
    curriculum = make(load(prepared, tokenizer))
    counted = curriculum.epochs()
    source = np.concatenate([curriculum.locate(step, 0, 6)[0] for step in range(curriculum.steps)])
    for s, split in enumerate(curriculum.sources):
        assert counted[split.name] == pytest.approx((source == s).sum() / split.sequences(16))


def test_boundaries_in_a_batch_are_the_documents(prepared, tokenizer):
    curriculum = make(load(prepared, tokenizer))
    batch = curriculum.batch(2)
    rows, context = batch.tokens.shape
    expected = sorted({row * context for row in range(rows)}
                      | {int(i) for i in np.flatnonzero(batch.tokens.flatten() == tokenizer.eos_id)})
    starts = batch.cu_seqlens[batch.cu_seqlens < rows * context].tolist()
    assert starts == expected and batch.cu_seqlens[-1] == rows * context
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()


def test_padded_tail_opens_no_document(prepared, tokenizer):
    split = d.load_source(prepared / "words", tokenizer)["train"]
    context = 37
    last = split.sequences(context) - 1
    tokens, targets, starts = d.cut_sequences(split, np.array([last]), context)
    real = (len(split.tokens) - 1) - last * context
    assert (targets[0, :real] == split.tokens[last * context + 1:]).all() and (targets[0, real:] == -100).all()
    assert starts[0].max() < max(real, 1)


def test_cu_seqlens_have_one_length(prepared, tokenizer):
    curriculum = make(load(prepared, tokenizer))
    assert len({len(curriculum.batch(step).cu_seqlens) for step in range(20)}) == 1


def test_validation_slice_does_not_depend_on_the_batch_size(prepared, tokenizer):
    split = d.load_source(prepared / "words", tokenizer)["val"]
    a, b = (np.concatenate([x.targets for x in d.validation_batches(split, 16, rows, 9, 8)]) for rows in (2, 5))
    a, b = (x[(x >= 0).any(1)] for x in (a, b))  # without the rows that fill up the last batch
    assert (a == b).all() and len(a) == min(9, split.sequences(16))


def test_too_little_data_is_a_sentence(prepared, tokenizer):
    with pytest.raises(UserError, match="fewer than one sequence"):
        make(load(prepared, tokenizer), context=10**6)
    with pytest.raises(UserError, match="wants poems"):
        make(load(prepared, tokenizer), mixture={"poems": 1.0})
