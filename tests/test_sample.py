"""sample.py: filters by hand and against transformers, batches, streaming, chats, bad input."""

import io
import json
import os

import pytest
import torch

import sample
from checkpoint import save_pretrained
from conftest import call
from model import GPT, KVCache, ModelConfig
from sample import continue_all, filter_logits, generate
from test_model import VARIANTS, build
from tokenizer import UserError, train_bpe

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))


def kept(**options) -> list[int]:
    return torch.isfinite(filter_logits(LOGITS, **options))[0].nonzero().flatten().tolist()


def test_filters_by_hand():
    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.5) == [0] and kept(top_p=0.51) == [0, 1] and kept(top_p=1e-9) == [0]
    assert kept(min_p=0.25) == [0, 1, 2] and kept(min_p=1.0) == [0]
    torch.testing.assert_close(filter_logits(LOGITS, temperature=0.5).softmax(-1), (LOGITS * 2).softmax(-1))


@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 0.8, 0.05), (20, 0.9, 0.02), (7, 0.6, 0.1), (0, 0.5, 0.3),
                                                 (3, 1.0, 0.5)])
def test_filters_together_keep_what_transformers_keeps(top_k, top_p, min_p):
    """FAULTS A18: the same sets, so the same order."""
    transformers = pytest.importorskip("transformers")
    logits, kept = 3 * torch.randn(50, 200), filter_logits
    expected = transformers.TemperatureLogitsWarper(0.7)(None, logits)
    for warper, value, off in ((transformers.TopKLogitsWarper, top_k, 0), (transformers.TopPLogitsWarper, top_p, 1),
                               (transformers.MinPLogitsWarper, min_p, 0)):
        expected = expected if value == off else warper(value)(None, expected)
    ours = kept(logits, 0.7, top_k, top_p, min_p)
    assert torch.equal(ours.isfinite(), expected.isfinite())
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


def test_filters_work_row_by_row():
    logits = torch.tensor([[0.0, 5.0, 1.0], [5.0, 1.0, 0.0]])
    assert torch.isfinite(filter_logits(logits, top_p=0.5)).tolist() == [[False, True, False], [True, False, False]]


def test_greedy_equals_the_uncached_argmax():
    model, ids = GPT(ModelConfig(61, 32, 32, 2, 2, 1)).eval(), [3, 4, 5]
    made = [step[0] for step in generate(model, ids, 20, temperature=0)]
    for id in made:
        assert id == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids = [*ids, id]


def test_seed_decides_and_samples_differ():
    model = GPT(ModelConfig(61, 32, 32, 2, 2, 1)).eval()
    a, b = (list(generate(model, [1], 10, 3, seed=7)) for _ in range(2))
    assert a == b and a != list(generate(model, [1], 10, 3, seed=8))
    assert len({tuple(sample) for sample in zip(*a)}) == 3


def test_samples_follow_the_probabilities():
    """2000 first tokens against softmax of the logits: chi-squared under its 99.9 % quantile for 60 degrees."""
    model = GPT(ModelConfig(61, 32, 32, 2, 2, 1, initializer_range=0.2)).eval()
    drawn = torch.tensor(next(generate(model, [1, 2], 1, 2000, temperature=1.0)))
    expected = 2000 * model(torch.tensor([[1, 2]]))[0, -1].softmax(-1)
    observed = torch.bincount(drawn, minlength=61)
    assert ((observed - expected) ** 2 / expected).sum() < 99.6


@pytest.mark.cuda
def test_tokens_are_drawn_deterministically_on_cuda():
    """GPU.md 7: no float cumsum, which raises there; the same chi-squared."""
    probabilities = torch.randn(61, device="cuda").softmax(-1).expand(2000, -1)
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (sample.draw_tokens(probabilities, torch.Generator("cuda").manual_seed(1)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    expected, observed = 2000 * probabilities[0], torch.bincount(one[:, 0], minlength=61)
    assert torch.equal(one, two) and ((observed - expected) ** 2 / expected).sum() < 99.6


def test_generation_can_be_followed_by_training():
    """GPU.md 4: nothing that generation leaves behind is an inference tensor."""
    model = GPT(ModelConfig(61, 32, 32, 2, 2, 1))
    list(generate(model, [1, 2], 5))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])


def test_batches_of_prompts_of_any_length_equal_one_at_a_time():
    model, prompts = GPT(ModelConfig(61, 32, 32, 2, 2, 1, initializer_range=0.3)).eval(), []
    for length in (2, 3, 5, 2, 5, 3, 3, 2, 2):
        prompts.append(torch.randint(1, 61, (length,)).tolist())
    made = continue_all(model, prompts, 12, 2, temperature=0, stop={7}, at_once=4)
    for prompt, samples in zip(prompts, made):
        expected = [id for (id,) in generate(model, prompt, 12, temperature=0, stop={7})]
        assert samples == [expected, expected]
    drawn = continue_all(model, [[1, 2]] * 4, 12, 3, temperature=1.0, at_once=3)
    assert len({tuple(ids) for samples in drawn for ids in samples}) == 12  # no batch repeats another's draws


def test_a_sample_ends_at_stop_and_the_others_go_on():
    model = GPT(ModelConfig(5, 32, 32, 2, 2, 1)).eval()
    steps = list(generate(model, [1], 40, 4, stop={0}, temperature=1.0))
    for drawn in zip(*steps):
        ended = drawn.index(None) if None in drawn else len(drawn)
        assert 0 not in drawn and all(id is None for id in drawn[ended:])
    assert all(any(id is not None for id in step) for step in steps)


def test_padded_rows_of_the_vocabulary_are_never_drawn():
    model = GPT(ModelConfig(61, 32, 32, 2, 2, 1)).eval()
    assert max(id for step in generate(model, [1], 20, 8, vocab_size=5) for id in step) < 5


@pytest.mark.parametrize("flags, words", [([], "python train.py"), (["runs/none"], "does not exist"),
                                          (["--top-p", "7"], "7.0"), (["--max-tokens", "0"], "0"),
                                          (["--topp", "1"], "--top_p")])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    done = call(sample.main, *flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


TOKENIZER = train_bpe(["the cat sat on the mat, and the dog sat on the cat"] * 3, 275)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights with a context of 64, as a Hugging Face folder without a chat template."""
    pytest.importorskip("safetensors")
    root = tmp_path_factory.mktemp("sample")
    TOKENIZER.save(root / "run")
    model = GPT(ModelConfig(TOKENIZER.vocab_size, 32, 32, 2, 2, 1, max_position_embeddings=64, initializer_range=0.3))
    save_pretrained(model, root / "model", root / "run")
    config = json.loads((root / "model/tokenizer_config.json").read_text())
    (root / "model/tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    (root / "model/chat_template.jinja").unlink(missing_ok=True)
    return root / "model"


def test_a_space_at_the_end_of_a_prompt_becomes_that_of_the_next_word(folder):
    """NEWCOMER 1: "the " continues as "the" does where a word follows, and never within the word."""
    model, tokenizer = sample.load(folder, "cpu")
    for seed in range(5):
        done = call(sample.main, folder, "--prompt", "the ", "--max-tokens", "3", "--seed", seed)
        assert done.stdout.startswith("the ") and not done.stderr
    text, first = sample.split_prompt(tokenizer, "the ")
    assert text == "the" and all(tokenizer.decode([id]).startswith(" ") for id in first)
    assert {" ", *(f" {word}" for word in ("cat", "sat", "on"))} <= set(map(tokenizer.decode, ([id] for id in first)))
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.eos_id, *tokenizer.encode("the")]]))[0, -1]
    best = max(first, key=lambda id: logits[id])
    spaced, = sample.complete(model, tokenizer, "the ", 1, temperature=0)
    assert " " + spaced == tokenizer.decode([best])
    assert sample.split_prompt(tokenizer, "the") == ("the", [])


def test_samples_are_numbered_and_a_full_context_is_named(folder):
    done = call(sample.main, folder, "--prompt", "the", "--samples", "3", "--temperature", "0", "--max-tokens", "500")
    assert [line for line in done.stdout.splitlines() if line.startswith("---")] == ["--- 1", "--- 2", "--- 3"]
    assert done.returncode == 0 and "context of 64 tokens is full" in done.stderr
    longer = call(sample.main, folder, "--prompt", "the", "--context", "100", "--max-tokens", "90", "--temperature=0")
    assert longer.returncode == 0 and "is full" not in longer.stderr
    full = call(sample.main, folder, "--prompt", "the cat " * 64)
    assert full.returncode == 2 and "shorten it" in full.stderr


def test_the_newest_run_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("new", "old"):  # written last, whatever the name
        (tmp_path / f"runs/{run}/checkpoints/step-00000001").mkdir(parents=True)
        (tmp_path / f"runs/{run}/checkpoints/step-00000001/manifest.json").write_text("{}")
        written = 2e9 if run == "old" else 1e9
        os.utime(tmp_path / f"runs/{run}/checkpoints/step-00000001/manifest.json", (written, written))
    model, names = sample.load(folder, "cpu"), []
    monkeypatch.setattr(sample, "load", lambda name: (names.append(name), model)[1])
    done = call(sample.main, "--prompt", "the", "--max-tokens", "3")
    assert done.returncode == 0 and str(names[0]) == "runs/old" and "(runs/old is the newest run)" in done.stderr


def test_a_chat_drops_its_oldest_turns_and_warns_on_a_base_model(folder, monkeypatch):
    """NEWCOMER 10: eight questions fit into a context of 64 tokens, one after the other."""
    seen, prompt = [], sample.ChatFormat.prompt
    monkeypatch.setattr(sample.ChatFormat, "prompt", lambda *args: seen.append(list(args[1])) or prompt(*args))
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat?\n\n" * 8))
    done = call(sample.main, folder, "--chat", "--max-tokens", "5")
    assert done.returncode == 0 and done.stdout.count("> ") == 17, done.stderr
    assert "never trained on chats" in done.stderr and "oldest turn is dropped" in done.stderr
    assert all(messages[0]["role"] == "user" for messages in seen) and max(map(len, seen)) > 1
    once = call(sample.main, folder, "--chat", "--prompt", "the cat?", "--max-tokens", "5")
    assert once.returncode == 0 and "> " not in once.stdout
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    try:
        assert "never" not in call(sample.main, folder, "--prompt", "the", "--chat", "--max-tokens", "5").stderr
    finally:
        (folder / "chat_template.jinja").unlink()


def test_samples_end_at_every_stop_that_a_folder_names(folder):
    """FAULTS A5: generation_config.json of a tuned base names the end of a turn beside EOS; one sample and several."""
    model, tokenizer = sample.load(folder, "cpu")
    prompt = [*sample.ChatFormat(folder, tokenizer).text("the cat")]
    made = [id for (id,) in generate(model, prompt, 20, temperature=0, vocab_size=tokenizer.vocab_size)]
    at = next(i for i in range(1, 20) if made[i] not in made[:i])
    before = (folder / "generation_config.json").read_text()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, made[at]]}))
    try:
        for samples in ("1", "2"):
            done = call(sample.main, folder, "--prompt", "the cat", "--temperature", "0", "--max-tokens", "20",
                        "--samples", samples)
            ended = "the cat" + tokenizer.decode(made[:at]) + "\n"
            assert done.stdout == (ended if samples == "1" else f"--- 1\n{ended}--- 2\n{ended}")
    finally:
        (folder / "generation_config.json").write_text(before)


def test_a_damaged_recipe_is_named(tmp_path):
    (tmp_path / "recipe.json").write_bytes(b'{"method": "\xe2"')
    with pytest.raises(UserError, match="recipe.json cannot be read"):
        sample.recipe_of(tmp_path)


@pytest.mark.parametrize("name", ["gqa-rnope", "mqa", "sliding-1", "llama-4", "sinks", "mla", "learned", "relative",
                                  "alibi-chunked", "dual-chunk", "deltanet", "moe"])
def test_compiled_sampling_is_one_graph_with_the_same_greedy_ids(name, monkeypatch, capsys):
    """Prompts of several lengths, tokens beyond windows and chunks, several prompts at once: other numbers of rows."""
    import torch._dynamo as dynamo
    import torch._dynamo.testing

    dynamo.reset()
    counter, compile = dynamo.testing.CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile(f, backend=counter, **options))
    model = build(VARIANTS[name].change(initializer_range=0.3)).eval()
    prompts = ([1, 2, 3], [*range(4, 13)], [1], [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    for number, prompt in enumerate(prompts):
        plain, made = (list(generate(model, prompt, 30, temperature=0, compile=way)) for way in (False, True))
        assert made == plain
        assert counter.frame_count == (0 if "moe" in name else 1 + (number == 3))
    said = capsys.readouterr().err
    assert said.count("experts need bfloat16") == ("moe" in name) and said.count("\n") == ("moe" in name)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_static_cache_gives_the_same_greedy_ids(name, monkeypatch):
    """For every architecture, with the step called as it is."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    model = build(VARIANTS[name].change(initializer_range=0.3)).eval()
    for prompt in [1, 2, 3], [*range(4, 13)], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]:
        plain, made = (list(generate(model, prompt, 30, temperature=0, compile=way)) for way in (False, True))
        assert made == plain


def test_a_compiled_step_sees_weights_that_change_and_groups_experts(monkeypatch):
    """In bf16, where experts compile; rounding may change an id, so the logits are compared."""
    compile, seen = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile(f, backend="eager", **options))
    for config in (VARIANTS["mha"], VARIANTS["mha"].change(num_experts=4, moe_intermediate_size=16)):
        torch._dynamo.reset()
        model = build(config).eval()
        model.compute_dtype = torch.bfloat16
        for _ in range(2):
            list(generate(model, [1, 2], 3, temperature=0, compile=True))
            cache = model.cache
            with torch.inference_mode():
                cache.length = 0
                ids, plain = torch.tensor([[5, 6, 7]]), KVCache(9)
                model(ids, cache=cache), model(ids, cache=plain)
                pair = [sample.compiled_step(model, ids[:, :1], cache, True), model(ids[:, :1], cache=plain)]
            torch.testing.assert_close(*pair, atol=2e-2, rtol=2e-2)
            assert model.step is not False
            seen.append(pair[0])
            with torch.no_grad():
                model.model.embed_tokens.weight.mul_(-2)
        assert not torch.allclose(seen[-1], seen[-2], atol=0.1)


def test_one_static_cache_is_kept_and_learned_positions_end_in_a_sentence(monkeypatch):
    """A smaller request takes the cache that is there, a larger one replaces it; the ids are the plain path's."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile(f, backend="eager", **options))
    torch._dynamo.reset()
    model = build(VARIANTS["learned"].change(max_position_embeddings=200)).eval()
    sizes = []
    for prompt, tokens in (([[1, 2], [3, 4]], 5), ([1], 5), ([1], 150)):
        plain, made = (list(generate(model, prompt, tokens, temperature=0, compile=way)) for way in (False, True))
        assert made == plain
        sizes.append((model.cache.rows, model.cache.capacity))
    assert sizes == [(2, 128), (2, 128), (2, 256)]
    assert len(list(generate(model, [1], 200, compile=True))) == 200
    with pytest.raises(UserError, match="learned positions end at 200"):
        list(generate(model, [1], 201, compile=True))
