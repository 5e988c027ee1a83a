"""Every command of README.md and docs/workshop.md: what takes seconds is run on a tiny run, the rest is parsed."""

import ast
import contextlib
import io
import math
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ablate
import checkpoint
import cost
import data
import evals
import model
import posttrain
import sample
import schedule
import tokenizer
import train
from conftest import ROOT, call
from exercise import EXERCISES, find
from test_train import TINY, corpus, hasten, quick  # noqa: F401 (fixtures)

PAGES = "".join((ROOT / page).read_text("utf-8") for page in ("README.md", "docs/workshop.md"))
PLACES = re.findall(r"`([^`\n]+)`", PAGES) + [line for block in re.findall(r"```\w*\n(.*?)```", PAGES, re.DOTALL)
                                             for line in block.splitlines()]
COMMANDS = sorted({match[1].strip() for place in PLACES if (match := re.search(
    r"(?:^|&& |until )(?:python|torchrun [-\w= ]*?) ?(\w+\.py\b[^#;]*)", place))})
FILES = {file.__name__: file for file in (ablate, checkpoint, cost, data, evals, model, posttrain, sample, schedule,
                                          tokenizer, train)}
TEXT, PACKED, N = " ".join(PAGES.split()), "mean square of lengths\nconcat .*\nbest-fit ", r"(\d[\d,]*\.?\d*)"
SHOWS = {  # what a command prints on the tiny run; its groups are figures, which the pages state where SAYS looks
    "checkpoint.py export runs/laptop exported": "^exported is written",
    "cost.py plan --budget 100k": f"model .*tokens .*batch .* rate .*time .*H100-hours .*bill .*, {N}% more .* 100,000",
    "cost.py published": f"bill +{N} H100-hours, {N}% .*At {N} to {N} USD an hour: {N} to {N} million",
    "data.py prepare my.txt notes/ --out data/mine": r"my .*notes .* held out .*dropped \d exact dup.*\nPrepared",
    "data.py show data/laptop": PACKED, "data.py show data/mine": PACKED,
    "data.py show data/laptop --context 128": f"sequences of 128\n.*{PACKED}",
    "evals.py runs/laptop": r"bits per byte/left +[\d.]+ ± [\d.]+",
    "model.py": "laptop +1,836,160 .*KV cache .*\nlaptop +128 ",
    "sample.py --prompt \"Once\"": "^Once.", "sample.py --temperature 0": r"^.+\n\(runs/\w+ is the newest run",
    "sample.py runs/laptop-sft --chat --prompt \"What is 12 + 30?\"": "^.+was never trained on chats",
    "schedule.py": "wsd linear .* cosine .*\n  39 ", "schedule.py 3B 11T": r"3e\+09 parameters .* 1.1e\+13 tokens",
    "tokenizer.py fertility bytes -- README.md": r"([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+ +README.md, bytes",
    "tokenizer.py fertility bytes data/laptop -- README.md": r"README.md, bytes\n.* README.md, data/laptop",
    "train.py --help": "--learning_rate .*--hidden_act "}
SAYS = {
    "cost.py plan --budget 100k": f"with the {N} % that ablations",
    "cost.py published": f": {N} GPU-hours, {N} % more than the main run; at {N} to {N} USD an hour {N} to {N} million",
    "tokenizer.py fertility bytes -- README.md": f"{N} with bytes"}
HOPS = {  # what stands in the body of each function that README's "Start with" names
    "dense_attention": (r"where\(visible", r"\.softmax\(-1\)"), "visible_keys": ("distance >= 0", "<= positions"),
    "losses_and_slope": (r"logits\.logsumexp\(-1", "nats"), "Curriculum": (r"def batch\(", r"def locate\("),
    "train": (r"update\(run, losses_of\(",), "update": (r"world\.size\)\.backward\(\)", r"world\.sum\("),
    "load_checkpoint": (r"set_model_state_dict\(", r"set_optimizer_state_dict\(", "'step'")}


def agree(said, found):
    """The figures that the pages state at one place are the `found` ones, rounded as there."""
    place, = re.finditer(said, TEXT)
    for figure, value in zip(place.groups(), found, strict=True):
        figure = {"eleven": "11", "eighteen": "18"}.get(figure, figure).replace(",", "")
        value = float(str(value).replace(",", ""))
        assert round(value, len(figure.partition(".")[2])) == float(figure), (place[0], value)


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory) -> Path:  # noqa: F811
    """A folder with data/laptop, runs/laptop, my.txt and README.md."""
    folder = tmp_path_factory.mktemp("place")
    data_folder = folder / "data"
    data_folder.mkdir()
    for name in ("laptop", "mine"):
        (data_folder / name).symlink_to(corpus / "data/tiny")
    for name in ("my.txt", "README.md", "notes/a.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text((ROOT / "README.md").read_text("utf-8") if name == "README.md" else
                                   "".join(f"{name} has line {i}.\n" for i in range(2000)))
    (folder / "notes/b.txt").write_text((folder / "notes/a.txt").read_text())  # a duplicate
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        patch.chdir(folder)
        recipe = train.parse([*TINY, "--tokens", "2560", "--data", "data/laptop"])[1]
        train.pretrain(recipe, Path("runs/laptop"))
    return folder


def test_commands_are_found():
    assert len(COMMANDS) > 30 and {command.partition(".")[0] for command in COMMANDS} >= set(FILES)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_pages(command, place, monkeypatch):
    """A long training is parsed: the flags exist, their values fit. Everything else is run."""
    monkeypatch.chdir(place)
    name, words = command.partition(".")[0], shlex.split(command)[1:]
    if "runs/killed" in words or "runs/baseline-1b" in words or "runs/laptop-sft" in words:
        words = [re.sub("runs/(killed|baseline-1b|laptop-sft)", "runs/laptop", word) for word in words]
    if name == "train" and "--help" not in words:
        if "math" in words:
            words[words.index("math")] = "left"  # a source of the tiny run
        monkeypatch.setattr(train, "check_trackers", lambda names: None)  # which may not be installed
        assert train.parse(words)[1]
    elif name == "posttrain":
        assert posttrain.read_words(words)[1]
    elif name == "ablate":
        rest = re.sub(r"--(try|cause) \S+", "", " ".join(words[1:])).split()
        assert words[0] in ablate.COMMANDS and train.parse(rest)[1]
    elif "--minutes" in words:
        pytest.skip("it times this machine; test_cost.py plans from given speeds")
    else:
        if "export" in words:
            pytest.importorskip("safetensors")
        if "prepare" in words:  # data/mine is there
            words = [word.replace("data/mine", "data/new") for word in words] + ["--tokenizer", "bytes"]
        words += ["--tasks", "bpb"] * (name == "evals") + ["--context", "64"] * ("--chat" in words)
        done = call(FILES[name].main, *words)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
        said = f"{done.stdout}\n{done.stderr}"
        assert (found := re.search(SHOWS[command], said, re.DOTALL)), said
        if found.groups():
            agree(SAYS[command], found.groups())


def test_figures_that_follow_from_the_code():
    big, small, V = model.PRESETS["smollm3-3b"], model.PRESETS["laptop"], train.RECIPES["laptop"].model.vocab_size
    heads, count = (big.num_hidden_layers, big.num_key_value_heads, big.head_dim), model.count_parameters(small)
    token, tokens = model.cache_bytes(big, 1), sum(stage.tokens for stage in train.RECIPES["laptop"].stages)
    agree(r"as (\w+) flat Python files", [len([*ROOT.glob("*.py")])])
    agree(f"{N}M parameters that have read {N}M tokens", [count["total"] / 1e6, tokens / 1e6])
    agree(f"and holds out {N} %", [100 * data.HELD_OUT])
    agree(r"`list` names all (\w+)\.", [len(EXERCISES)])
    agree(f"ln {N} = {N}, and", [V, math.log(V)])
    agree(rf"\({N} layers x {N} KV heads x {N} x 2 .*? = {N} bytes; {N} GB.*? its {N} query heads",
          [*heads, token, model.cache_bytes(big, 2**16) / 1e9, big.num_attention_heads])
    agree(f"vocabulary of {N} has .*? {N}M parameters, beside {N}M in all",
          [big.vocab_size, big.vocab_size * small.hidden_size / 1e6, count["non_embedding"] / 1e6])
    assert sum(map(int, re.findall(r"^\| \d [^|]+\| (\d+) \|", PAGES, re.MULTILINE))) == 180  # three hours
    assert set(re.findall(r"`(?:\S+exercise\.py )?start ([a-z-]+)`", TEXT)) < set(EXERCISES)


def test_what_readme_starts_with_is_there():
    file, found = "", {}
    for name in re.findall(r"`([\w.]+)`", re.search("Start with .*?On disk", TEXT)[0]):
        file, found = (name, found) if name.endswith(".py") else (file, found | {name: file})
    assert set(found) == set(HOPS)
    for name, file in found.items():
        node = find((ROOT / file).read_text("utf-8"), name)
        body = "\n".join(map(ast.unparse, node.body[bool(ast.get_docstring(node)):]))
        assert all(re.search(thing, body) for thing in HOPS[name]), name


def test_python_blocks_of_the_workshop(place, monkeypatch):
    """Lab 3's prints 0 with the starts of documents and more without; lab 8's is a reward."""
    leak, reward = re.findall(r"```python\n(.*?)```", PAGES.partition("# A workshop")[2], re.DOTALL)
    monkeypatch.chdir(place)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(leak, {})
    with_starts, without = map(float, re.findall(r"tensor\((.*?)\)", out.getvalue()))
    assert with_starts == 0 < without and "0.0 with document starts" in TEXT
    Path("FILE.py").write_text(reward)
    run = posttrain.read_words(["grpo", "runs/laptop", "--reward", "FILE.py:reward"])[1].reward.rpartition(":")
    assert posttrain.reward_of(runpy.run_path(run[0])[run[2]], {}, "five!") == -0.05


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what a process has loaded")
@pytest.mark.parametrize("name", FILES)
def test_ctrl_c_during_imports(name):
    """It ends a command without a word, not with the traceback of whatever was being imported."""
    process = subprocess.Popen([sys.executable, f"{name}.py", "--help"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    maps = Path(f"/proc/{process.pid}/maps")
    while "/_regex" not in maps.read_text():  # what tokenizer.py imports first
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (-signal.SIGINT, "", "")


def test_try_your_own_idea(place, monkeypatch, tmp_path):
    """README's section as written: its line with one more activation, its field, then an ablation in miniature."""
    line, = re.findall(r"```python\n(ACTIVATIONS = .*)\n```", PAGES)
    field, = re.findall(r"`(my_idea: float = option\(.*?\))`", PAGES)
    for path in ROOT.glob("*.py"):
        source = path.read_text("utf-8")
        if path.name == "model.py":
            assert source.count(line) == 1
            source = source.replace(line, line.replace("}", ", \"relu3\": lambda x: F.relu(x) ** 3}", 1))
            source = source.replace("\n    def __post_init__", f"    {field}\n\n    def __post_init__", 1)
        (tmp_path / path.name).write_text(source)
    words = [*TINY, "--data", str(place / "data/laptop"), "--tokens", "2560", "--micro_batch", "8"]
    done = subprocess.run([sys.executable, "ablate.py", "change", *words, "--seeds", "2", "--try", "hidden_act=relu3",
                           "--try", "my_idea=0.5"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "hidden_act=relu3" in done.stdout and "exactly the same losses" in done.stdout  # nothing reads my_idea


def test_a_schedule_needs_one_line(monkeypatch):
    """What is added to SCHEDULES alone is what a run follows."""
    monkeypatch.setitem(schedule.SCHEDULES, "half", lambda *words: 0.5)
    recipe = train.parse([*TINY, "--schedule", "half", "--learning_rate", "0.2"])[1]

    class Whole:
        stages, begins, batches, stage = recipe.stages[:1], [0, 10], [recipe.batch_tokens], lambda self, step: 0

    assert train.learning_rate(recipe, Whole(), 3) == pytest.approx(0.1)


def test_nanogpts_flags(capsys):
    """Those with the same meaning work; each other one says what to type, with a flag that exists."""
    words = "--block-size 64 --n_layer=3 --n_head 2 --n-embd 64 --lr 1e-3 --eval_interval 7".split()
    recipe = train.parse(words)[1]
    found = recipe.model.max_position_embeddings, recipe.model.num_hidden_layers, recipe.model.hidden_size
    assert found == (64, 3, 64) and recipe.learning_rate == 1e-3 and recipe.eval_every == 7
    for flag in "--max_iters=2000", "--dropout=0.1", "--batch-size=12", "--wandb_log=True", "--out_dir=out":
        with pytest.raises(tokenizer.UserError, match=f"^{flag} is not understood; ") as error:
            train.parse([flag])
        assert "see `python" not in str(error.value)


def test_a_run_ends_with_what_to_compare_and_to_try(place, monkeypatch, capsys):
    """xz's figure is of the evaluated text, and each of the commands that it prints is understood."""
    import lzma

    monkeypatch.chdir(place)
    folder = Path("runs/end")
    train.pretrain(train.parse([*TINY, "--tokens", "2560", "--data", "data/laptop", "--eval_tokens", "512"])[1], folder)
    out = capsys.readouterr().out
    made, sources = data.load_data("data/laptop", verify=False)
    text = made.decode_bytes(id for id in sources[0]["val"].tokens[:512].tolist() if id != made.eos_id)
    needs = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert re.search(f"left: .* where xz -9e needs {needs:.3f} for the same text", out) and "nanoGPT" not in out
    assert out.partition("step 10")[2].count("  after ") == 3
    commands = re.findall(r"^  python (\w+)\.py ([^#\n]*)", out.partition("Try next")[2], re.MULTILINE)
    assert [name for name, _ in commands] == ["sample", "posttrain", "ablate"]
    assert call(sample.main, *shlex.split(commands[0][1])).returncode == 0
    assert posttrain.read_words(shlex.split(commands[1][1].partition(",")[0]))[1]
