"""evals.py: likelihoods against a loop over single sequences, scores by hand, lm_eval's own numbers, bad input."""

import json
import math
import pathlib
import random
import re
import sys

import numpy as np
import pytest
import torch

import data as d
import evals
from checkpoint import save_pretrained
from conftest import call
from data import HELD_OUT, uniform
from evals import Example, Score
from model import GPT, ModelConfig
from sample import generate
from tokenizer import UserError, train_bpe

TEXT = "The quick brown fox jumps over the lazy dog. " * 5
TOKENIZER = train_bpe([TEXT], 290)
EOS = TOKENIZER.eos_id


def small(**changes) -> GPT:
    torch.manual_seed(1)
    config = ModelConfig(290, 32, 48, 2, 2, 1, max_position_embeddings=64, initializer_range=0.3)
    return GPT(config.change(**changes)).eval()


def alone(model: GPT, before: list[int], after: list[int]) -> tuple[float, bool]:
    """log p(after | before), one token at a time."""
    total, greedy = 0.0, True
    for i, id in enumerate(after):
        with torch.no_grad():
            logits = model(torch.tensor([before + after[:i]]))[0, -1]
        total += logits.log_softmax(-1)[id].item()
        greedy &= logits.argmax().item() == id
    return total, greedy


def ragged(n: int, longest: int) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(0)
    ids = lambda low, high: [rng.randrange(290) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [(ids(1, longest), ids(1, 6)) for _ in range(n)]


@pytest.mark.parametrize("changes", [{}, {"layer_types": "sliding,full", "sliding_window": 8}, {"position": "learned"}])
def test_likelihoods_in_batches_equal_one_sequence_at_a_time(changes, monkeypatch):
    model, pairs = small(**changes), ragged(40, 50)
    before, _ = pairs[0]
    greedy = [step[0] for step in generate(model, before, 4, temperature=0)]
    pairs.append((before, greedy))  # random continuations are never the most likely
    found = evals.log_likelihoods(model, pairs)
    for (score, exact), pair in zip(found, pairs):
        expected, likely = alone(model, *pair)
        assert abs(score - expected) < 1e-4 and exact == likely
    assert found[-1][1] and not found[1][1] and evals.log_likelihoods(model, []) == []
    monkeypatch.setattr(evals, "AT_ONCE", 1)  # one row at a time
    for one, other in zip(evals.log_likelihoods(model, pairs[::-1])[::-1], found):
        assert one == pytest.approx(other, rel=1e-5)


def test_what_is_too_long_loses_its_beginning():
    model, ids = small(), random.Random(3).choices(range(290), k=90)
    (score, _), = evals.log_likelihoods(model, [(ids[:85], ids[85:])])
    assert score == pytest.approx(alone(model, ids[90 - 65:85], ids[85:])[0], abs=1e-4)
    with pytest.raises(UserError, match="more than the context of 64"):
        evals.log_likelihoods(model, [([1], ids)])


def write_task(folder, examples: list[Example]):
    lines = [json.dumps({"context": e.context, "choices": e.choices, "answer": e.answer}) for e in examples]
    (folder / "my.jsonl").write_text("\n".join(lines))
    return folder / "my.jsonl"


def test_cloze_letters_and_exact_by_hand(tmp_path):
    """The choice with the largest log-likelihood per character; shown as letters, the most likely letter; the right one
    written by greedy sampling."""
    model = small()
    written = TOKENIZER.decode([id for (id,) in generate(model, [EOS, *TOKENIZER.encode("The")], 2, temperature=0)])
    examples = [Example(f"The {a}", (b, "lazy dog and fox", "over"), 1)
                for a in ("quick", "lazy") for b in ("fox", "dog.")]
    path = write_task(tmp_path, [*examples, Example("The", (written, "y"), 0)])
    tasks = evals.tasks_of(f"{path},{path}:exact", "")  # a file without a form is asked in both ways
    assert [name for name, _ in tasks] == [str(path), f"{path}:letters", f"{path}:exact"]
    assert [name for name, _ in evals.tasks_of(f"{path}:cloze", "")] == [f"{path}:cloze"]
    scores = evals.evaluate(model, TOKENIZER, [(name, found[:4]) for name, found in tasks])
    right, letters = [], []
    for e in examples:
        sums = [alone(model, [EOS, *TOKENIZER.encode(e.context)], TOKENIZER.encode(" " + c))[0] / len(c)
                for c in e.choices]
        right.append(float(np.argmax(sums) == 1))
        shown = e.context + "".join(f"\n{letter}. {c}" for letter, c in zip("ABC", e.choices)) + "\nAnswer:"
        sums = [alone(model, [EOS, *TOKENIZER.encode(shown)], TOKENIZER.encode(" " + letter))[0] for letter in "ABC"]
        letters.append(float(np.argmax(sums) == 1))
    cloze, lettered, exact = scores.values()
    assert cloze.mean == np.mean(right) and lettered.mean == np.mean(letters)
    assert cloze.chance == lettered.chance == pytest.approx(1 / 3) and cloze.n == 4
    assert cloze.stderr == pytest.approx(Score.of(right, groups=[e.context for e in examples]).stderr)
    assert exact[:1] == (0,) and exact.chance == 0  # a random model writes none of these
    whole, = evals.evaluate(model, TOKENIZER, tasks[2:]).values()
    same = TOKENIZER.encode("The" + written) == [*TOKENIZER.encode("The"), *TOKENIZER.encode(written)]
    assert whole.mean == (0.2 if same and written[:1].isspace() else 0)
    assert evals.as_letters(Example("Question: Why?\nAnswer:", ("a", "b"), 0)).context == (
        "Question: Why?\nA. a\nB. b\nAnswer:")


def test_standard_errors_by_hand():
    assert Score.of([1, 0, 0, 1])[:3] == pytest.approx((0.5, math.sqrt((4 * 0.25 / 3) / 4), 4))
    assert math.isnan(Score.of([0.5]).stderr)
    twice = Score.of([1, 1, 0, 0, 0, 0, 1, 1], groups=list("aabbccdd"))  # every question asked in two wordings
    assert twice.stderr == pytest.approx(Score.of([1, 0, 0, 1]).stderr) and twice.n == 8
    distinct = Score.of([1, 0] * 20)
    assert Score.of([1, 0] * 20, groups=["same"] * 40) == distinct  # a single thing tells nothing of a spread


@pytest.mark.parametrize("right, n", [(0, 100), (100, 100), (1, 100), (0, 5)])
def test_scores_near_0_and_1_are_not_certain(right, n):
    """Two errors around the mean reach the end of Wilson's 95 % interval, or nearly."""
    score = Score.of([1] * right + [0] * (n - right))
    p, z = right / n, 1.96
    middle = (p + z * z / 2 / n) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    far = max(abs(middle + half - p), abs(middle - half - p))
    assert 0.6 * far < 2 * score.stderr < 1.2 * far
    grouped = Score.of([0] * 100, groups=[str(i // 10) for i in range(100)])  # ten things, not a hundred
    assert grouped.stderr == pytest.approx(Score.of([0] * 10).stderr)


def test_questions_with_an_empty_context_are_distinct(tmp_path):
    """FAULTS A19: 40 questions without a context, with white space for one, and with one and the same."""
    for contexts in ([""], ["", " "], ["Which is right?"]):
        path = write_task(tmp_path, [Example(contexts[i % len(contexts)], (f"the cat sits {i}", f"the cat sit {i}"),
                                             int(i % 5 > 2)) for i in range(40)])
        evals.tasks_of.cache_clear()
        score, = evals.evaluate(small(), TOKENIZER, evals.tasks_of(f"{path}:cloze", "")).values()
        assert score.n == 40 and 0.2 < score.mean < 0.8
        assert score.stderr == pytest.approx(math.sqrt(score.mean * (1 - score.mean) / 39))


def split_of(texts: list[str]) -> d.Split:
    ids = [[EOS, *TOKENIZER.encode(text)] for text in texts]
    tokens = np.concatenate([np.array(i, np.uint16) for i in ids])
    return d.Split("it", tokens, np.cumsum([0, *map(len, ids)]), sum(map(len, texts)), "")


class Process:
    """One of `size` processes in turn: what the others add is kept in `sums`."""

    def __init__(self, rank: int, size: int, sums: list):
        self.rank, self.size, self.sums = rank, size, sums

    def sum(self, tensor):
        self.sums.append(tensor)
        return sum(self.sums)


def test_bits_per_byte_and_its_error_by_hand_whatever_the_batch():
    """Sums over documents one at a time; the error is that of leaving one sequence out at a time (the jackknife)."""
    model, rng = small(), random.Random(0)
    split = split_of(["".join(rng.choice(TEXT) for _ in range(rng.randint(20, 90))) for _ in range(40)])
    whole = torch.tensor(split.tokens[:].astype("int64"))
    count, nats, size = 12, [0.0] * 12, [0] * 12
    for a, b in zip(split.starts, split.starts[1:]):
        for row in range(a // 64, min(count, (b - 1) // 64 + 1)):  # its pieces in rows of 64
            start, end = max(a, row * 64), min(b, row * 64 + 64)
            logits = model(whole[None, start:end])[0].log_softmax(-1)
            for i, target in enumerate(whole[start + 1:end + 1].tolist()):
                nats[row] -= logits[i, target].item()
                size[row] += TOKENIZER.token_bytes[target]
    scores = [evals.bits_per_byte(model, TOKENIZER, split, 64 * count, rows) for rows in (1, 5, 12)]
    again = evals.encode_documents("it", [TOKENIZER.decode(split.tokens[a + 1:b].tolist())
                                 for a, b in zip(split.starts, split.starts[1:])], TOKENIZER)  # as another tokenizer's
    sums = []
    _, shared = (evals.bits_per_byte(model, TOKENIZER, split, 64 * count, 5, world=Process(rank, 2, sums))
                 for rank in (0, 1))
    for score in [*scores, evals.bits_per_byte(model, TOKENIZER, again, 64 * count), shared]:
        assert score.mean == pytest.approx(sum(nats) / math.log(2) / sum(size), rel=1e-5)
        assert score == pytest.approx(scores[0], rel=1e-5, nan_ok=True)
    left = [(sum(nats) - a) / math.log(2) / (sum(size) - b) for a, b in zip(nats, size)]
    jackknife = math.sqrt((count - 1) / count * sum((x - np.mean(left)) ** 2 for x in left))
    assert scores[0].stderr == pytest.approx(jackknife, rel=0.1) and scores[0].n == count


def test_criteria_by_hand():
    def rank(*runs: list[float]) -> dict:
        return evals.criteria([{i: Score(mean, 0.01, 100, 0.25) for i, mean in enumerate(run)} for run in runs])

    expected = 1 - 6 * 2 / (4 * 15)  # Spearman: 1 - 6 sum d^2 / n(n^2-1)
    assert rank([10, 30, 20, 40])["monotonic"] == pytest.approx(expected) and rank([3, 2, 1])["monotonic"] == -1
    assert rank([1, 1, 2])["monotonic"] == pytest.approx(math.sqrt(3) / 2)
    four = rank([1, 1], [2, 3], [3, 2], [4, 4])  # Kendall: five pairs in the same order, one in the opposite
    assert four["order"] == pytest.approx((5 - 1) / 6)
    run = {1: Score(0.25, 0.02, 100, 0.25), 2: Score(0.4, 0.02, 100, 0.25), 3: Score(0.5, 0.02, 100, 0.25)}
    one = evals.criteria([run])
    assert one["monotonic"] == pytest.approx(1) and one["noise"] == pytest.approx(25) and math.isnan(one["order"])
    assert one["above"] == pytest.approx(12.5) and one["early signal"]
    chance = {step: Score(0.25 + 0.001 * step, 0.02, 100, 0.25) for step in (1, 2, 3)}
    assert not evals.criteria([chance])["early signal"]
    flat = evals.criteria([{step: Score(0.5, 0.02, 100, 0.25) for step in (1, 2, 3)}])
    assert math.isnan(flat["monotonic"]) and not flat["early signal"]
    other = {1: Score(0.3, 0.02, 100, 0.25), 2: Score(0.3, 0.02, 100, 0.25), 3: Score(0.52, 0.02, 100, 0.25)}
    both = evals.criteria([run, other])  # they change places, and change back; deviation of .50 and .52
    assert both["order"] == -1 and both["noise"] == pytest.approx(0.51 / (0.02 / math.sqrt(2)))
    assert both["above"] == pytest.approx((0.52 - 0.25) / (0.02 / math.sqrt(2)))


def test_criteria_read_the_logs_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, means in (("a", (0.2, 0.4, 0.6)), ("b", (0.3, 0.5, 0.7))):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": i, "tasks": {"my": [mean, 0.01, 100, 0.25]}}) for i, mean in enumerate(means)]
        (tmp_path / name / "log.jsonl").write_text("\n".join([*lines, '{"step": 3, "loss": 1}', '{"step"']))  # killed
    done = call(evals.main, "criteria", "a", "b", "--json")
    found = json.loads(done.stdout)
    assert found["my"]["monotonic"] == pytest.approx(1) and found["my"]["order"] == 1 and "0, 1, 2:" in done.stderr
    found = json.loads(call(evals.main, "criteria", "a", "--json").stdout)
    assert found["my"]["order"] is None and found["my"]["early signal"] is True
    (tmp_path / "b/log.jsonl").write_text(lines[0])
    few = call(evals.main, "criteria", "a", "b")
    assert few.returncode == 2 and "criteria need three scores" in few.stderr
    (tmp_path / "b/log.jsonl").write_text('{"step": 1, "tasks": {"my": 3}}')
    damaged = call(evals.main, "criteria", "a", "b")
    assert damaged.returncode == 2 and "b/log.jsonl cannot be read" in damaged.stderr


def test_what_evaluations_ask_was_never_trained_on(monkeypatch):
    """Pairs of lookups, the text around them and sums: no evaluation shares one with the training side."""
    docs = [(f"module{i}", f"line {i} of text\n" * 4) for i in range(300)]
    monkeypatch.setattr(d, "embedded_prose", lambda: docs)
    made, trained, asked = list(d.generated_recall(600, 400, seed=3)), set(), set()
    around = {False: set(), True: set()}
    for key, text in made:
        side = uniform(key) < HELD_OUT  # as data.prepare decides
        notes = [line[6:-1] for line in text.splitlines() if line.startswith("Note: ")]
        answers = [line[8:-1] for line in text.splitlines() if line.startswith("Answer: ")]
        assert sorted(notes) == sorted(answers) and len(notes) >= 2
        (asked if side else trained).update(notes)
        around[side].update(re.findall(r"line (\d+) of text", text))
    assert trained and asked and not trained & asked and not around[True] & around[False]
    questions = evals.lookup("", 200)
    pairs = {(e.context.split()[-1], e.choices[e.answer]) for e in questions}
    assert not {" ".join(pair) for pair in pairs} & trained and {e.answer for e in questions} == {0, 1, 2, 3}
    for e in questions:
        assert f"Note: {e.context.split()[-1]} {e.choices[e.answer]}." in e.context and len(set(e.choices)) == 4
    split = {False: set(), True: set()}
    for key, text in d.generated_math():
        split[uniform(key) < HELD_OUT].add(text.split("Answer:")[0])
    problems = {q.removesuffix("Answer:") for q, *_ in evals.held_out_problems("+-*")}
    assert problems and not problems & split[False]
    for e in evals.carry("", 100):
        *_, a, b = e.context.removesuffix(" =").rpartition("So ")[2].split(" + ")
        assert int(e.choices[e.answer]) == int(a) + int(b)
    for e in evals.arithmetic("", 100):
        assert len(set(e.choices)) == 4 and e.about
        problem, result = re.search(r"(\d+ [-+*] \d+) = (\d+)\.$", e.choices[e.answer]).groups()
        assert eval(problem) == int(result)


def test_continuations_come_from_other_documents(monkeypatch):
    texts = {"a": [f"{i} " * 600 for i in range(5)], "short": ["none"]}
    monkeypatch.setattr(evals, "held_out_texts", lambda data: texts)
    examples = evals.continuation("", 12)
    assert len(examples) == 12
    for e in examples:
        assert (len(e.context), *map(len, e.choices)) == (240, 120, 120, 120, 120) and len(set(e.choices)) == 4
        assert set(e.choices[e.answer].split()) == set(e.context.split())
    monkeypatch.setattr(evals, "held_out_texts", lambda data: {"a": ["x" * 500]})
    with pytest.raises(UserError, match="continuation finds no questions"):
        evals.tasks_of("continuation", "few")


class Reader(GPT):
    """Writes the value that the text notes for the key it ends with."""

    def forward(self, tokens, cu_seqlens=None, cache=None, last_only=False, **others):
        logits = torch.zeros(*tokens.shape, self.config.vocab_size)
        for r, row in enumerate(tokens.tolist()):
            text = self.tokenizer.decode(row)
            key = re.findall(r"Answer: (\w+)", text)[-1]
            right = self.tokenizer.encode(" " + re.search(f"Note: {key} (\\w+)\\.", text)[1])
            self.depths.append(re.search(f"Note: {key} ", text).start() / len(text))
            self.lengths.add(len(row) + 1)
            logits[r, range(-len(right), 0), right] = 1
        return logits


def test_recall_places_the_note_and_scores_it():
    tokenizer = train_bpe(["".join(d.note(k, v) + d.note_question(k) for k, v in zip(d.KEYS, d.VALUES))] * 3, 700)
    config = ModelConfig(tokenizer.vocab_size, 32, 32, 1, 2, 1, max_position_embeddings=400)
    texts = {"it": ["some words\nto hide in\nand more words"]}
    model = Reader(config)
    model.tokenizer, model.depths, model.lengths = tokenizer, [], set()
    perfect = evals.recall(model, tokenizer, texts, 320, [tokenizer.eos_id])
    assert perfect.shape == (5, 20) and perfect.all() and model.lengths == {320}
    low, *_, high = np.sort(model.depths).reshape(5, 20).mean(1)
    assert low < 0.1 and high > 0.7
    blind = evals.recall(GPT(config).eval(), tokenizer, texts, 160, [tokenizer.eos_id])
    assert not blind.any()
    with pytest.raises(UserError, match="more than 40 tokens"):
        evals.recall(model, tokenizer, texts, 40, [])


def test_loss_by_position_by_hand():
    model = small(max_position_embeddings=128)
    texts = {"it": [TEXT * 3, "short", TEXT[7:] * 3]}
    found = dict(evals.loss_by_position(model, TOKENIZER, texts, 128, [EOS]))
    rows = [([EOS] + TOKENIZER.encode(text))[:129] for text in (TEXT * 3, TEXT[7:] * 3)]
    expected = [[-alone(model, row[:i], row[i:i + 1])[0] for i in range(1, 129)] for row in rows if len(row) == 129]
    assert list(found) == [f"nats per token/{span}" for span in ("0-15", "16-31", "32-63", "64-127")]
    for (a, b), score in zip([(0, 16), (16, 32), (32, 64), (64, 128)], found.values()):
        assert score.mean == pytest.approx(np.mean([e[a:b] for e in expected]), rel=1e-5)
    with pytest.raises(UserError, match="position needs"):
        dict(evals.loss_by_position(model, TOKENIZER, {"it": ["short"]}, 128, [EOS]))


@pytest.mark.parametrize("line", ["{", "[]", "[" * 100_000, b"\xff\xfe{", '{"context": "a", "choices": ["b"]}',
                                  '{"context": "a", "choices": ["b", "c"], "answer": 2}',
                                  '{"context": "a", "choices": "bc", "answer": 0}',
                                  '{"context": "a", "choices": ["b", " "], "answer": 0}',
                                  '{"context": 1, "choices": ["b", "c"], "answer": 0}'])
def test_malformed_questions_name_file_and_line(tmp_path, line):
    good = json.dumps({"context": "a", "choices": ["b", "c"], "answer": 1})
    line = line.encode() if isinstance(line, str) else line
    (tmp_path / "my.jsonl").write_bytes(good.encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match="my.jsonl line 3") as caught:
        evals.read_task(tmp_path / "my.jsonl")
    assert "\n" not in str(caught.value)


def test_a_task_file_may_begin_with_a_byte_order_mark(tmp_path):
    """FAULTS B4: what Windows editors write, also two such files joined."""
    lines = [json.dumps({"context": f"The number after {i} is", "choices": [str(i + 1), "7"], "answer": 0})
             for i in range(3)]
    whole = b"\xef\xbb\xbf" + "\r\n".join(lines).encode()
    for content in (whole, whole + b"\r\n" + whole):
        (tmp_path / "my.jsonl").write_bytes(content)
        found = [e.choices for e in evals.read_task(tmp_path / "my.jsonl")]
        assert found[:3] == found[-3:] == [("1", "7"), ("2", "7"), ("3", "7")]


@pytest.mark.parametrize("flags, words", [(["runs/none"], "does not exist"), (["a", "b"], "one model at a time"),
                                          (["criteria", "runs/none"], "log.jsonl of runs/none"),
                                          (["x", "--limit", "0"], "--limit"), (["x", "--extend", "y"], "dual_chunk")])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    done = call(evals.main, *flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    with pytest.raises(UserError, match="there is no task"):
        evals.tasks_of("my:louder", "")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of random weights and prepared data."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("run")
    rng = random.Random(0)
    prose = [(str(i), " ".join(rng.choice(TEXT.split()) for _ in range(400))) for i in range(300)]
    d.prepare({"prose": prose}, folder / "data", TOKENIZER)
    save_pretrained(small(max_position_embeddings=256), folder / "model", folder / "data")
    return folder


def test_the_command_line_measures_everything(run, tmp_path):
    """Bits per byte, a built-in task, recall and position of a folder; also through another tokenizer's data."""
    flags = ["--tasks", "bpb,lookup,recall,position", "--limit", "10", "--tokens", "2k", "--context", "320", "--data"]
    done = call(evals.main, run / "model", *flags, run / "data", "--json")
    found = json.loads(done.stdout)
    assert list(found) == ["bits per byte/prose", "lookup", "recall/256", "recall/320", "nats per token/0-39",
                           "nats per token/40-79", "nats per token/80-159", "nats per token/160-319"]
    assert found["lookup"]["chance"] == 0.25 and found["bits per byte/prose"]["chance"] is None
    assert found["recall/256"]["n"] == 100 and found["recall/256"]["stderr"] > 0
    assert "recall/256 by depth (0.0, 0.25" in done.stderr
    other = train_bpe([TEXT], 280)
    texts = [(str(i), f"{TEXT} number {i}") for i in range(300)]
    d.prepare({"prose": texts}, tmp_path / "data", other)
    done = call(evals.main, run / "model", "--tasks", "bpb", "--data", tmp_path / "data")
    assert done.returncode == 0 and "bits per byte/prose" in done.stdout, done.stderr


ACTIVITY = {"activity_label": "Cleaning", "ctx_a": "[header] A man [title] sits.", "ctx_b": "he  takes", "ind": 1,
            "endings": ["a [substeps] cloth.", "two", "three [title] four", "five"], "split": "val", "source_id": "x",
            "split_type": "indomain", "ctx": "A man sits. he takes"}
ROWS = {"hellaswag": [ACTIVITY | {"label": str(i % 4), "ind": i} for i in range(1003)],
        "arc_easy": [{"id": "1", "question": "Which is hot?", "answerKey": "2",
                      "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]}}],
        "piqa": [{"goal": "Open a jar", "sol1": "twist it", "sol2": "eat it", "label": 0}],
        "winogrande": [{"sentence": "Ann met Bea because _ was late.", "option1": "Ann", "option2": "Bea",
                        "answer": "1"}],
        "commonsense_qa": [{"id": "1", "question": "Where is a bed?", "question_concept": "bed", "answerKey": "A",
                            "choices": {"text": ["room", "sea", "sky", "cup", "hat"], "label": list("ABCDE")}}]}


def test_standard_tasks_are_fetched_as_the_harness_reads_them(tmp_path, monkeypatch):
    """Local rows in the form of the data sets on the Hub. HellaSwag's marks are gone and its parts joined, by hand."""
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval import tasks

    root, kinds = pathlib.Path(tasks.__file__).parent, ("hellaswag", "arc", "piqa", "winogrande", "commonsense_qa")
    manager = tasks.TaskManager(include_path=[str(root / kind) for kind in kinds], include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda: manager)  # looking through all of them takes seconds
    places = {"Rowan/hellaswag": "hellaswag", "allenai/ai2_arc": "arc_easy", "baber/piqa": "piqa",
              "allenai/winogrande": "winogrande", "tau/commonsense_qa": "commonsense_qa"}
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    load_dataset = datasets.load_dataset

    def local(path, name=None, **options):
        file = str(tmp_path / f"{places[path]}.jsonl")
        return load_dataset("json", data_files=dict.fromkeys(["train", "validation", "test"], file),
                            cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    done = call(evals.main, "fetch", "hellaswag,arc_easy,piqa", "--out", tmp_path / "tasks")
    assert done.returncode == 0 and f"{tmp_path}/tasks/hellaswag.jsonl: 1000 questions" in done.stdout, done.stderr
    found = {name: evals.read_task(tmp_path / f"tasks/{name}.jsonl") for name in ("hellaswag", "arc_easy", "piqa")}
    assert found["hellaswag"][0].context == "Cleaning: A man. sits. He takes"
    assert found["hellaswag"][0].choices == ("a cloth.", "two", "three. four", "five")
    assert {e.answer for e in found["hellaswag"]} == {0, 1, 2, 3} and len(found["hellaswag"]) == 1000
    assert [e[:3] for e in found["arc_easy"]] == [("Question: Which is hot?\nAnswer:", ("ice", "fire", "snow"), 1)]
    assert [e[:3] for e in found["piqa"]] == [("Question: Open a jar\nAnswer:", ("twist it", "eat it"), 0)]
    scores = evals.evaluate(small(max_position_embeddings=256), TOKENIZER,
                            evals.tasks_of(f"{tmp_path}/tasks/arc_easy.jsonl", ""))
    assert [name.rpartition(".jsonl")[2] for name in scores] == ["", ":letters"]
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    for name, words in (("winogrande", "fetch winogrande"), ("commonsense_qa", "as :letters does"),
                        ("nonesuch", "lm_eval ls tasks"), ("piqa", "fetch piqa cannot be read (Couldn't reach")):
        if name == "piqa":
            monkeypatch.setattr(datasets, "load_dataset", offline)
            (tmp_path / "tasks/piqa.jsonl").unlink()
        done = call(evals.main, "fetch", name, "--out", tmp_path / "tasks")
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("error:") == 1, done.stderr
        assert not (tmp_path / f"tasks/{name}.jsonl").exists() and "pip install" not in done.stderr


@pytest.mark.parametrize("words", [("fetch", "piqa"), ("runs/any", "--harness", "piqa")])
def test_without_the_harness_the_advice_is_to_install_it(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    done = call(evals.main, *words)
    assert done.returncode == 2 and 'pip install "lm_eval[hf]"' in done.stderr and not list(tmp_path.iterdir())


def test_the_harness_scores_an_export(run, tmp_path, monkeypatch):
    """Local tasks through lm_eval's own model: its likelihoods, greedy texts and rolling windows (FAULTS A10) are ours,
    of one sequence at a time."""
    pytest.importorskip("lm_eval"), pytest.importorskip("accelerate"), pytest.importorskip("datasets")
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    model, hf = small(max_position_embeddings=256), AutoTokenizer.from_pretrained(run / "model")
    opening = hf("")["input_ids"]
    questions = [{"q": f"The {word} ", "choices": ["fox", "lazy dog", "over"], "gold": i % 3}  # a space too many
                 for i, word in enumerate(TEXT.split()[:9])]
    for i, question in enumerate(questions):
        prompt = opening + TOKENIZER.encode(question["q"])
        question["written"] = TOKENIZER.decode([id for (id,) in generate(model, prompt, 3, temperature=0, stop={EOS})])
        question["page"] = (question["q"] + TEXT) * i  # none, part of a window, whole windows and a rest
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, questions)))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/my.jsonl}}}}\ntest_split: test\n"
    tasks = {"my": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc_norm}]
""", "written": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: [], max_gen_toks: 3, do_sample: false, temperature: 1}
metric_list: [{metric: exact_match}]
""", "wiki": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""}
    for name, task in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{common}{task}")
    options = {"bootstrap_iters": 0, "task_manager": TaskManager(include_path=str(tmp_path), include_defaults=False)}
    scores = dict(evals.harness(run / "model", "my,written,wiki", limit=8, **options))
    examples = [Example(q["q"], tuple(q["choices"]), q["gold"]) for q in questions[:8]]
    ours = evals.evaluate(model, TOKENIZER, [("my", examples)], opening)
    assert scores["my/acc_norm"].mean == pytest.approx(ours["my"].mean) and scores["my/acc_norm"].n == 8
    assert scores["written/exact_match"].mean == 1  # greedy and three tokens, whatever the temperature says
    pages = [question["page"] for question in questions[:8]]
    windows = [([EOS, *ids[:a]], ids[a:a + 256]) for ids in (hf(page)["input_ids"] for page in pages)
               for a in range(0, len(ids), 256)]
    assert len(windows) > 10
    nats = -sum(score for score, _ in evals.log_likelihoods(model, windows))
    expected = nats / math.log(2) / sum(len(page.encode()) for page in pages)
    assert scores["wiki/bits_per_byte"].mean == pytest.approx(expected, rel=1e-5)
    words = math.exp(nats / sum(len(re.split(r"\s+", page)) for page in pages))
    assert scores["wiki/word_perplexity"].mean == pytest.approx(words, rel=1e-4)
    monkeypatch.setattr(evals, "is_hugging_face", lambda folder: False)  # a run is exported first
    exported = dict(evals.harness(run / "model", "wiki", limit=8, **options))
    assert exported["wiki/bits_per_byte"].mean == pytest.approx(expected, rel=1e-5)
    chat = dict(evals.harness(run / "model", "written", limit=8, apply_chat_template=True, **options))
    assert chat["written/exact_match"].mean < 1
    with pytest.raises(UserError, match="none_such") as caught:
        dict(evals.harness(run / "model", "none_such", **options))
    assert "\n" not in str(caught.value)
