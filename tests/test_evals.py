"""evals.py: likelihoods against a loop over single sequences, scores by hand, bad input."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch

import data as d
import evals
from conftest import call
from evals import Example, Score, Task
from model import GPT, ModelConfig
from sample import continue_all, generate
from data import HELD_OUT, uniform
from tokenizer import UserError, train_bpe

TEXT = "The quick brown fox jumps over the lazy dog. " * 5
TOKENIZER = train_bpe([TEXT], 290)


def small(**changes) -> GPT:
    torch.manual_seed(1)
    return GPT(ModelConfig(290, 32, 48, 2, 2, 1, max_position_embeddings=64, initializer_range=0.3).change(**changes)).eval()


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
def test_packed_likelihoods_equal_one_sequence_at_a_time(changes):
    model, pairs = small(**changes), ragged(40, 50)
    before, _ = pairs[0]
    greedy = [step[0] for step in generate(model, before, 4, temperature=0)]
    pairs.append((before, greedy))  # random continuations are never the likeliest
    found = evals.log_likelihoods(model, pairs)
    for (score, exact), pair in zip(found, pairs):
        expected, likeliest = alone(model, *pair)
        assert abs(score - expected) < 1e-4 and exact == likeliest
    assert found[-1][1] and not found[1][1]


def test_a_likelihood_does_not_depend_on_the_batch(monkeypatch):
    model, pairs = small(), ragged(30, 50)
    together = evals.log_likelihoods(model, pairs)
    monkeypatch.setitem(evals.LOGITS, "cpu", 1)  # one row at a time
    for one, other in zip(evals.log_likelihoods(model, pairs[::-1])[::-1], together):
        assert one == pytest.approx(other, rel=1e-5)
    assert evals.log_likelihoods(model, []) == []


def test_what_is_too_long_loses_its_beginning():
    model, ids = small(), random.Random(3).choices(range(290), k=90)
    (score, _), = evals.log_likelihoods(model, [(ids[:85], ids[85:])])
    assert score == pytest.approx(alone(model, ids[90 - 65:85], ids[85:])[0], abs=1e-4)
    with pytest.raises(UserError, match="nothing to score"):
        evals.log_likelihoods(model, [([1], [])])


def test_cloze_and_letters_by_hand():
    """The choice with the largest log-likelihood by character, and, shown as letters, the likeliest letter."""
    model, eos = small(), TOKENIZER.eos_id
    examples = [Example(f"The {a}", (b, "lazy dog and fox", "over"), 1) for a in ("quick", "lazy") for b in ("fox", "dog.")]
    scores = evals.evaluate(model, TOKENIZER, [Task("cloze", examples), Task("letters", examples, "letters")])
    right, letters = [], []
    for e in examples:
        sums = [alone(model, [eos, *TOKENIZER.encode(e.context)], TOKENIZER.encode(" " + c))[0] / len(c) for c in e.choices]
        right.append(float(np.argmax(sums) == 1))
        shown = e.context + "".join(f"\n{letter}. {c}" for letter, c in zip("ABC", e.choices)) + "\nAnswer:"
        sums = [alone(model, [eos, *TOKENIZER.encode(shown)], TOKENIZER.encode(" " + letter))[0] for letter in "ABC"]
        letters.append(float(np.argmax(sums) == 1))
    assert scores["cloze"].mean == np.mean(right) and scores["letters"].mean == np.mean(letters)
    assert scores["cloze"].chance == pytest.approx(1 / 3) and scores["cloze"].n == 4
    assert evals.as_letters(Example("Question: Why?\nAnswer:", ("a", "b"), 0)).context == (
        "Question: Why?\nA. a\nB. b\nAnswer:")


def test_standard_errors_by_hand():
    assert Score.of([1, 0, 0, 1])[:3] == pytest.approx((0.5, math.sqrt((4 * 0.25 / 3) / 4), 4))
    assert math.isnan(Score.of([1]).stderr)
    twice = Score.of([1, 1, 0, 0, 0, 0, 1, 1], groups=list("aabbccdd"))  # every question asked in two wordings
    assert twice.stderr == pytest.approx(Score.of([1, 0, 0, 1]).stderr) and twice.n == 8


def test_batches_of_prompts_of_any_length_equal_one_at_a_time():
    model, rng = small(), random.Random(0)
    prompts = [[rng.randrange(1, 290) for _ in range(rng.choice([2, 3, 5]))] for _ in range(9)]
    made = continue_all(model, prompts, 12, 2, temperature=0, stop=7, at_once=4)
    for prompt, samples in zip(prompts, made):
        expected = [id for (id,) in generate(model, prompt, 12, temperature=0, stop=7)]
        assert samples == [expected, expected]
    drawn = continue_all(model, [[1, 2]] * 4, 12, 3, temperature=1.0, at_once=3)
    assert len({tuple(ids) for samples in drawn for ids in samples}) == 12  # no batch repeats another's draws
    texts = {i: TOKENIZER.decode(samples[0]) for i, samples in enumerate(made)}
    seen = {}
    score = evals.generation_accuracy(model, TOKENIZER, prompts, lambda i, text: seen.setdefault(i, text) == text and i % 2,
                                      12, stop=[7])
    assert seen == texts and score.mean == pytest.approx(4 / 9) and score.n == 9


def split_of(texts: list[str]) -> d.Split:
    ids = [[TOKENIZER.eos_id, *TOKENIZER.encode(text)] for text in texts]
    tokens = np.concatenate([np.array(i, np.uint16) for i in ids])
    return d.Split("it", d.Tokens([tokens]), np.cumsum([0, *map(len, ids)]), sum(map(len, texts)), "")


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
    again = evals.encoded("it", [TOKENIZER.decode(split.tokens[a + 1:b].tolist())
                                 for a, b in zip(split.starts, split.starts[1:])], TOKENIZER)  # what another tokenizer gets
    for score in [*scores, evals.bits_per_byte(model, TOKENIZER, again, 64 * count)]:
        assert score.mean == pytest.approx(sum(nats) / math.log(2) / sum(size), rel=1e-5)
        assert score == pytest.approx(scores[0], rel=1e-5, nan_ok=True)
    left = [(sum(nats) - a) / math.log(2) / (sum(size) - b) for a, b in zip(nats, size)]
    jackknife = math.sqrt((count - 1) / count * sum((x - np.mean(left)) ** 2 for x in left))
    assert scores[0].stderr == pytest.approx(jackknife, rel=0.1) and scores[0].n == count


def test_criteria_by_hand():
    assert evals.spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum d^2 / n(n^2-1)
    assert evals.spearman([1, 2, 3], [3, 2, 1]) == -1 and math.isnan(evals.spearman([1, 2], [5, 5]))
    assert evals.spearman([1, 2, 3], [1, 1, 2]) == pytest.approx(math.sqrt(3) / 2)
    assert evals.ranks([3, 1, 3]).tolist() == [1.5, 0, 1.5]
    assert evals.kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx((5 - 1) / 6)
    run = {1: Score(0.25, 0.02, 100, 0.25), 2: Score(0.4, 0.02, 100, 0.25), 3: Score(0.5, 0.02, 100, 0.25)}
    alone = evals.criteria([run])
    assert alone["monotonic"] == pytest.approx(1) and alone["noise"] == pytest.approx(25) and math.isnan(alone["order"])
    assert alone["above"] == pytest.approx(12.5) and alone["early signal"]
    chance = {step: Score(0.25 + 0.001 * step, 0.02, 100, 0.25) for step in (1, 2, 3)}
    assert not evals.criteria([chance])["early signal"]
    other = {1: Score(0.3, 0.02, 100, 0.25), 2: Score(0.3, 0.02, 100, 0.25), 3: Score(0.52, 0.02, 100, 0.25)}
    both = evals.criteria([run, other])  # they change places, and change back; deviation of .50 and .52
    assert both["order"] == -1 and both["noise"] == pytest.approx(0.51 / (0.02 / math.sqrt(2)))
    assert both["above"] == pytest.approx((0.52 - 0.25) / (0.02 / math.sqrt(2)))


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
    questions = evals.lookup({}, 200)
    pairs = {(e.context.split()[-1], e.choices[e.answer]) for e in questions}
    assert not {" ".join(pair) for pair in pairs} & trained
    for e in questions:
        assert f"Note: {e.context.split()[-1]} {e.choices[e.answer]}." in e.context and len(set(e.choices)) == 4
    split = {uniform(key) < HELD_OUT: set() for key in "ab"} | {True: set(), False: set()}
    for key, text in d.generated_math():
        split[uniform(key) < HELD_OUT].add(text.split("Answer:")[0])
    problems = {q.removesuffix("Answer:") for q, *_ in evals.held_out_problems("+-*")}
    assert problems and not problems & split[False]
    for e in evals.carry({}, 100):
        *_, a, b = e.context.removesuffix(" =").rpartition("So ")[2].split(" + ")
        assert int(e.choices[e.answer]) == int(a) + int(b)
    for e in evals.arithmetic({}, 100):
        assert len(set(e.choices)) == 4


class Reader(GPT):
    """Writes the value that the text notes for the key it ends with."""

    def forward(self, tokens, cu_seqlens=None, cache=None, last_only=False):
        step = len(cache.layers)
        cache.layers[step] = tokens
        logits = torch.zeros(len(tokens), 1, self.config.vocab_size)
        for r, row in enumerate(cache.layers[0].tolist()):
            text = self.tokenizer.decode(row)
            key = text.rpartition("Answer: ")[2]
            right = re.search(f"Note: {key} (\\w+)\\.", text)[1]
            self.asked += step == 0
            answer = self.tokenizer.encode(f" {right}.") + [0] * 9
            logits[r, 0, answer[step]] = 1
        return logits


def test_recall_places_the_note_and_scores_it(tmp_path):
    rng, lines = random.Random(0), [[1, 2, 3], [4, 5], [6]]
    for depth in (0.0, 0.5, 1.0):
        ids = evals.haystack(rng, lines, 60, [[100, 101], [102]], depth)
        assert len(ids) == 60 and sorted(set(ids) - {1, 2, 3, 4, 5, 6}) == [100, 101, 102]
        assert abs(ids.index(100) - depth * 58) <= 3 and ids[ids.index(100) + 1] == 101
    tokenizer = train_bpe(["".join(d.note(k, v) + d.note_question(k) for k, v in zip(d.KEYS, d.VALUES))] * 3, 700)
    config = ModelConfig(tokenizer.vocab_size, 32, 32, 1, 2, 1, max_position_embeddings=400)
    texts = {"it": ["some words\nto hide in\nand more words"]}
    model = Reader(config)
    model.tokenizer, model.asked = tokenizer, 0
    perfect = evals.recall(model, tokenizer, texts, [160, 320], questions=4)
    assert [s.mean for row in perfect.values() for s in row.values()] == [1.0] * 10 and model.asked == 40
    blind = evals.recall(GPT(config).eval(), tokenizer, texts, [160], questions=4)
    assert [s.mean for s in blind[160].values()] == [0.0] * 5 and blind[160][0.5].chance == 0.25
    pytest.importorskip("matplotlib")
    assert evals.draw_recall(perfect, tmp_path / "recall.png", "it") and (tmp_path / "recall.png").stat().st_size > 1000


def test_loss_by_position_by_hand():
    model = small(max_position_embeddings=128)
    texts = {"it": [TEXT * 3, "short", TEXT[7:] * 3]}
    found = evals.loss_by_position(model, TOKENIZER, texts, 128)
    rows = [([TOKENIZER.eos_id] + TOKENIZER.encode(text))[:129] for text in (TEXT * 3, TEXT[7:] * 3)]
    expected = [[-alone(model, row[:i], row[i:i + 1])[0] for i in range(1, 129)] for row in rows if len(row) == 129]
    assert list(found) == ["0-63", "64-127"]
    assert found["0-63"].mean == pytest.approx(np.mean([e[:64] for e in expected]), rel=1e-5)
    assert found["64-127"].mean == pytest.approx(np.mean([e[64:] for e in expected]), rel=1e-5)


@pytest.mark.parametrize("line", ["{", '{"context": "a", "choices": ["b", "c"], "answer": 2}',
                                  '{"context": "a", "choices": ["b"]}', '{"context": "a", "choices": "bc", "answer": 0}', "[]",
                                  '{"context": "a", "choices": ["b", " "], "answer": 0}'])
def test_malformed_questions_name_file_and_line(tmp_path, line):
    good = json.dumps({"context": "a", "choices": ["b", "c"], "answer": 1})
    (tmp_path / "my.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UserError, match="my.jsonl line 3"):
        evals.read_task(tmp_path / "my.jsonl")
    (tmp_path / "my.jsonl").write_text(good)
    task, = evals.find_tasks([f"{tmp_path}/my.jsonl:letters"], {})
    assert task.kind == "letters" and task.examples == [Example("a", ("b", "c"), 1)]


@pytest.mark.parametrize("flags, words", [(["runs/none"], "does not exist"), (["a", "b"], "one model at a time"),
                                          (["criteria", "runs/none"], "0 checkpoint(s)"),
                                          (["x", "--limit", "0"], "--limit")])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    done = call(evals.main, *flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_harness_gets_our_likelihoods(tmp_path):
    """Requests and a local task through lm-evaluation-harness give the numbers of a loop over single sequences."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    model = small(max_position_embeddings=256)
    TOKENIZER.save(tmp_path)
    prompter = evals.ChatFormat(tmp_path, TOKENIZER)
    adapter, eos = evals.harness_model(model, TOKENIZER, prompter), TOKENIZER.eos_id
    pairs = [("The quick", " brown fox"), ("", "over the lazy"), ("jumps ", "over")]
    found = adapter.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, after), (score, greedy) in zip(pairs, found):
        whole = [eos, *TOKENIZER.encode(context + after)]
        cut = next((i for i, (a, b) in enumerate(zip(whole, [eos, *TOKENIZER.encode(context)])) if a != b),
                   1 + len(TOKENIZER.encode(context)))
        assert (score, greedy) == pytest.approx(alone(model, whole[:cut], whole[cut:]), rel=1e-4)
    text = TEXT[:40]
    rolled, = adapter.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert rolled == pytest.approx(alone(model, [eos], TOKENIZER.encode(text))[0], rel=1e-4)
    written, = adapter.generate_until([Instance("generate_until", {}, ("The", {"until": ["x"], "max_gen_toks": 8}), 0)])
    assert "x" not in written
    questions = [{"q": f"The {word}", "choices": ["fox", "lazy dog", "over"], "gold": i % 3}
                 for i, word in enumerate(TEXT.split()[:9])]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "my.yaml").write_text(f"""task: my
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/my.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc_norm
""")
    scores = evals.harness(model, TOKENIZER, prompter, ["my"], bootstrap_iters=0,
                           task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    examples = [Example(q["q"], tuple(q["choices"]), q["gold"]) for q in questions]
    ours = evals.evaluate(model, TOKENIZER, [Task("my", examples)])
    assert scores["my/acc_norm"].mean == pytest.approx(ours["my"].mean) and scores["my/acc_norm"].n == 9
