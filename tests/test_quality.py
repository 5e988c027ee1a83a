"""What `prepare` drops on demand (near-duplicates, poor web text, quotes of evaluations), and hard-wrapped text."""

import json
import random
import textwrap

import numpy as np
import pytest

import data as d
from conftest import call
from data import DataOptions, Source
from test_data import texts_of
from test_sources import same_from_any_position
from tokenizer import Tokenizer, UserError

VOCABULARY = [a + b + c for a in "bdfgklmnprst" for b in ("a", "en", "i", "or", "u") for c in ("ba", "del", "mo", "s")]


def random_text(rng, words: int = 200) -> list[str]:
    return rng.choices(VOCABULARY, k=words)


def changed(rng, words: list[str], count: int = 1) -> list[str]:
    words = list(words)
    for i in rng.sample(range(len(words)), count):
        words[i] = "elsewhere"
    return words


def prepared_texts(tmp_path, texts, **options) -> tuple[dict[str, list[str]], dict]:
    """The texts on each side, and meta.json."""
    tokenizer = Tokenizer.load("bytes")
    d.prepare({"a": [(text, text) for text in texts]}, tmp_path / "set", tokenizer, DataOptions(**options))
    return texts_of(tmp_path / "set/a", tokenizer), json.loads((tmp_path / "set/a/meta.json").read_text())


# ---- near-duplicates


@pytest.mark.parametrize("on", [True, False])
def test_one_of_each_planted_pair_is_kept(tmp_path, monkeypatch, on):
    """60 pairs that differ in 1 word of 200 among 60 unrelated documents. Without the filter a twin of a held-out
    document is in train."""
    monkeypatch.setattr(d, "JOB_BYTES", 5000)  # the two of a pair in different jobs
    rng = random.Random(0)
    firsts = [" ".join(random_text(rng)) for _ in range(60)]
    twins = [" ".join(changed(rng, text.split())) for text in firsts]
    unrelated = [" ".join(random_text(rng)) for _ in range(60)]
    short = ["too short to compare", "too short to contrast"]
    jar = firsts + twins + unrelated + short
    rng.shuffle(jar)
    sides, meta = prepared_texts(tmp_path, jar, near_duplicates=on)
    kept = sides["train"] + sides["val"]
    assert len(kept) == len(set(kept)) and {*unrelated, *short} <= {*kept}
    pairs = [(jar.index(a) > jar.index(b), a, b) for a, b in zip(firsts, twins)]
    if on:
        assert {*kept} == {*unrelated, *short, *(b if later else a for later, a, b in pairs)}
        assert meta["dropped"] == {"near duplicates": 60} and any(
            text.startswith(meta["examples"]["near duplicates"]) for text in jar)
        shown = call(d.main, "show", str(tmp_path / "set"), "--context", "64").stdout
        assert f"60 near duplicates, such as {meta['examples']['near duplicates']!r}\n" in shown
    else:
        assert len(kept) == len(jar) and meta["dropped"] == {}
        assert any((a in sides["val"]) != (b in sides["val"]) for _, a, b in pairs)


@pytest.mark.parametrize("replaced", [2, 4, 8])
def test_shared_bands_follow_the_jaccard_similarity(replaced):
    """By brute force: a band is shared with the probability similarity**8, the similarity that of the sets of runs."""
    rng, expected, variance, found = random.Random(replaced), 0.0, 0.0, 0
    for _ in range(300):
        first = random_text(rng)
        texts = first, changed(rng, first, replaced)
        a, b = ({tuple(words[i:i + 5]) for i in range(196)} for words in texts)
        chance = (len(a & b) / len(a | b)) ** 8
        expected += 14 * chance
        variance += 14 * chance * (1 - chance)
        found += int((np.equal(*(d.band_hashes(" ".join(words)) for words in texts))).sum())
    assert abs(found - expected) < 4 * variance**0.5


def test_punctuation_and_case_are_not_compared():
    words = random_text(random.Random(0), 40)
    assert (d.band_hashes(" ".join(words)) == d.band_hashes(", ".join(words).upper() + "!\n")).all()
    assert not np.isin(d.band_hashes(" ".join(words)), d.band_hashes(" ".join(words[::-1]))).any()
    assert all(len(d.band_hashes(text)) == 0 for text in ("", "one two three four", "?! " * 50))


def test_text_without_spaces_is_compared_character_by_character(tmp_path):
    """60 Chinese pairs that differ in 1 character of 400, and a document that quotes 13 characters of an evaluation."""
    rng, letters = random.Random(0), [chr(c) for c in range(0x4E00, 0x5200)]
    firsts = [rng.choices(letters, k=400) for _ in range(60)]
    twins = ["".join(changed(rng, text)).replace("elsewhere", "龜") for text in firsts]
    jar = list(map("".join, firsts)) + twins
    _, meta = prepared_texts(tmp_path / "near", jar, near_duplicates=True)
    assert meta["dropped"] == {"near duplicates": 60}
    (tmp_path / "task.jsonl").write_text(json.dumps({"q": "".join(firsts[0][:13]) + "？"}))
    _, meta = prepared_texts(tmp_path / "quote", jar, decontaminate=str(tmp_path / "task.jsonl"))
    assert meta["dropped"]["quotes of evaluations"] >= 1
    assert d.words_of("Die Straße, 東京都。 ひら ที่ 2024年") == ["die", "straße", *"東京都ひらท", "2024", "年"]


def test_bands_are_remembered_in_bounded_memory():
    table, rng, found = np.zeros(1401, np.int64), np.random.default_rng(0), 0
    for _ in range(5000):
        bands, others = rng.integers(-2**63, 2**63, (2, 14))
        assert d.add_bands(table, bands) and d.add_bands(table, others)
        found += not d.add_bands(table, bands)
    assert found == 5000 and table.shape == (1401,) and d.add_bands(table, np.zeros(0, np.int64))


# ---- rules for web text


LINES = ["The river bends around the old mill and then runs down to the sea.",
         "People have walked along that bank with their dogs for a hundred years.",
         "In spring the water is high, and of the path there is little to see.",
         "A boat that was left there in autumn will be gone by the end of March.",
         "Nobody can say for certain where it goes, and nobody seems to mind."]
GOOD = "\n".join(LINES)
NO_STOPS = "Rivers bend around mills, while boats drift slowly past every bank; people walk their dogs alongside them."


@pytest.mark.parametrize("text, reason", [
    (GOOD, ""),
    (" ".join(GOOD.split()[:50]) + ".", ""),
    (" ".join(GOOD.split()[:49]) + ".", "too short or too long"),
    (" ".join(f"{GOOD} {i}" for i in range(1600)), "too short or too long"),
    (GOOD + " a I" * 400 + ".", "odd word lengths"),
    (GOOD + " " + "Donaudampfschiffahrtsgesellschaft " * 60 + ".", "odd word lengths"),
    (GOOD + " #hill" * 9 + ".", "many # or ellipses"),
    (GOOD + " so..." * 9 + " he said.", "many # or ellipses"),
    (GOOD + " so…" * 9 + " he said.", "many # or ellipses"),
    (GOOD + " so…" * 7 + " he said.", ""),
    ("\n".join(f"- {line}" for line in LINES), "bullet lists"),
    ("\n".join(f"• {line}" for line in LINES[:4]) + "\n" + LINES[4], ""),
    ("\n".join(line[:-1] + "..." if i < 2 else line for i, line in enumerate(LINES)), "lines cut by ellipses"),
    ("\n".join(line[:-1] + "…" if i < 1 else line for i, line in enumerate(LINES)), ""),
    (GOOD + " 1234" * 20 + ".", "words without letters"),
    ("\n".join(NO_STOPS.replace("Rivers", name) for name in ("Rivers", "Streams", "Roads", "Paths")),
     "no English stop words"),
    ("\n".join(line[:-1] for line in LINES), "few sentence ends"),
    ("\n".join([*LINES, LINES[0]]), "repeated lines"),
    ("\n".join([*LINES, "A mill."]), ""),
    ("\n".join([*LINES, *(f"The bank of mill {i}." for i in range(11))]), "short lines"),
    (GOOD + " { }", "curly brackets"),
])
def test_each_rule_drops_what_breaks_it(text, reason):
    assert d.quality(text) == reason


def test_rules_are_off_until_wanted_and_counted_apart(tmp_path):
    bullets, code = "\n".join(f"- {line}" for line in LINES), GOOD + "\nint main() { return 0; }"
    jar = [f"{GOOD} It is {i} miles." for i in range(50)] + [bullets, bullets + " More.", code]
    sides, meta = prepared_texts(tmp_path / "web", jar, quality="web")
    assert sorted(sides["train"] + sides["val"]) == sorted(jar[:50])
    assert meta["dropped"] == {"bullet lists": 2, "curly brackets": 1}
    assert meta["examples"]["curly brackets"] == code[:80]
    sides, meta = prepared_texts(tmp_path / "all", jar)
    assert sorted(sides["train"] + sides["val"]) == sorted(jar) and not meta["dropped"]


def test_too_few_documents_are_a_sentence_of_words(tmp_path):
    bullets = ["- a\n- b", "- c\n- d"]
    for name, jar, words in (("a", bullets, "Dropped: 2 too short or too long$"), ("b", ["one"], "Dropped: nothing$")):
        with pytest.raises(UserError, match=words) as error:
            prepared_texts(tmp_path / name, jar, quality="web" if name == "a" else "")
        assert "{" not in str(error.value)


def test_a_single_short_text_can_be_prepared(tmp_path):
    text = "\n".join(f"{line} {i}" for i in range(9) for line in LINES) + "\n"
    (tmp_path / "note.txt").write_text(text)
    done = call(d.main, "prepare", tmp_path / "note.txt", "--out", tmp_path / "set", "--tokenizer", "bytes")
    assert done.returncode == 0, done.stderr
    sides = texts_of(tmp_path / "set/note", Tokenizer.load("bytes"))
    assert sides["train"][0] + sides["val"][0] == text and len(sides["val"][0]) <= 0.03 * len(text) + 90
    same_from_any_position(lambda: Source(tmp_path / "note.txt"), sides["train"] + sides["val"])


# ---- evaluations


def test_documents_that_quote_an_evaluation_are_dropped(tmp_path):
    rng = random.Random(1)
    long, short, tiny = (random_text(rng, n) for n in (30, 9, 7))
    rows = [{"context": "Q: " + " ".join(long), "choices": [" ".join(short), "no"], "answer": 0}, {"note": {"x": [
        f"\"{' '.join(tiny)}\"\n"]}}]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def around(words):
        return " ".join([*random_text(rng, 40), *words, *random_text(rng, 40)])

    clean = [around([]) for _ in range(40)] + [around(long[4:16]), around(short[1:]), around(tiny), around(long[::-1])]
    quoting = [around(long[17:]), around(long), ", ".join(long[:13]).upper() + "?", around(short)]
    sides, meta = prepared_texts(tmp_path, clean + quoting, decontaminate=str(tmp_path / "task.jsonl"))
    assert sorted(sides["train"] + sides["val"]) == sorted(clean)
    assert meta["dropped"] == {"quotes of evaluations": 4}
    assert meta["examples"]["quotes of evaluations"] == quoting[0][:80]


def test_wrong_evaluation_files_are_a_sentence_and_nothing_is_written(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text('{"context": "2 + 2 =", "answer": "4"}\n')
    (tmp_path / "good.jsonl").write_text(json.dumps({"context": " ".join(random_text(random.Random(0), 20))}))
    for name, words in (("empty.jsonl", "no text of 8 words"), ("nowhere.jsonl", "cannot be read"),
                        (f"good.jsonl,{tmp_path}/empty.jsonl", "empty.jsonl has no text of 8 words")):
        with pytest.raises(UserError, match=words) as error:
            prepared_texts(tmp_path, ["a text"] * 50, decontaminate=str(tmp_path / name))
        assert "\n" not in str(error.value) and not (tmp_path / "set.partial").exists()
    (tmp_path / "task.jsonl").write_text(json.dumps({"context": " ".join(random_text(random.Random(0), 20))}))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        prepared_texts(tmp_path, list(map(str, range(50))), decontaminate=str(tmp_path / "task.jsonl"))
    (tmp_path / "task.jsonl").write_text(json.dumps({"context": " ".join(random_text(random.Random(1), 20))}))
    with pytest.raises(UserError, match="unfinished work of another command"):
        prepared_texts(tmp_path, list(map(str, range(50))), decontaminate=str(tmp_path / "task.jsonl"))


# ---- hard-wrapped text


def novel(seed: int, paragraphs: int = 12) -> list[str]:
    """Paragraphs of 1 to 7 sentences of 5 to 25 words."""
    rng = random.Random(seed)

    def sentence():
        return " ".join(random_text(rng, rng.randint(5, 25))).capitalize() + "."

    return [" ".join(sentence() for _ in range(rng.randint(1, 7))) for _ in range(paragraphs)]


@pytest.mark.parametrize("width", [50, 65, 72, 80, 90])
def test_paragraphs_come_back_from_hard_wrapped_text(width):
    """What the standard library wrapped is joined again; verse, lists, tables and indented lines stay."""
    paragraphs = novel(width)
    wrapped = "\n\n".join(textwrap.fill(text, width) for text in paragraphs)
    assert d.unwrapped(wrapped) == "\n\n".join(paragraphs)
    verse = "\n".join(f"{line[:33]}" for line in LINES)
    apart = "\n".join(["- " + "an item of a list that fills the whole line "[:width - 2]] * 3
                      + ["    " + "indented text of a program or a quotation"[:width - 4]] * 3 + ["| a | b |"] * 3)
    joined = d.unwrapped(f"{wrapped}\n\n{verse}\n\n{apart}\n\n{wrapped}")
    assert joined == "\n\n".join([*paragraphs, verse, apart, *paragraphs])


@pytest.mark.parametrize("text", [
    "\n".join(LINES * 9), "\n".join(line[:35].lower() for line in LINES * 9), "\n\n".join(novel(0)), "", "one line",
    "\n".join("    return the value of the longest of all the lines" for _ in range(40)),
    "\n".join(" ".join(map(str, range(i, i + 12))) for i in range(1000, 1040))])
def test_text_that_is_not_hard_wrapped_stays(text):
    """Sentences of a line each, verse, whole paragraphs, code, tables of numbers."""
    assert d.unwrapped(text) == text


def test_unwrapping_keeps_positions_and_the_seam(tmp_path, capsys):
    paragraphs = novel(3, 400)
    text = "\n\n".join(textwrap.fill(paragraph, 70) for paragraph in paragraphs)
    (tmp_path / "book.txt").write_text(text)
    plain = list(Source(tmp_path / "book.txt").read())
    said = capsys.readouterr().err
    assert said.count("looks hard-wrapped") == 1 and "book.txt" in said and "--unwrap true" in said
    assert "".join(document.text for document in plain) == text
    joined = list(Source(tmp_path / "book.txt", unwrap=True).read())
    assert capsys.readouterr().err == ""
    assert [document[1:] for document in joined] == [document[1:] for document in plain]  # same sides and positions
    assert "".join(document.text for document in joined).split("\n\n")[:300] == paragraphs[:300]
    same_from_any_position(lambda: Source(tmp_path / "book.txt", unwrap=True), [document.text for document in joined])
    (tmp_path / "code.py").write_text(text)
    assert "".join(document.text for document in Source(tmp_path / "code.py", unwrap=True).read()) == text
    done = call(d.main, "prepare", tmp_path / "book.txt", "--out", tmp_path / "set", "--tokenizer", "bytes", "--unwrap",
                "true")
    assert done.returncode == 0 and "hard-wrapped" not in done.stderr
    assert texts_of(tmp_path / "set/book", Tokenizer.load("bytes"))["val"] == [
        document.text for document in joined if document.held < d.HELD_OUT]
