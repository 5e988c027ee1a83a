"""Our checkpoints: what is saved comes back, whoever reads it; kills, full disks and damage cost little."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import (Saver, check_manifest, find_checkpoint, from_pretrained, load_checkpoint, load_config,
                        save_weights)
from conftest import ROOT, torchrun
from model import GPT, ModelConfig
from tokenizer import UserError, train_bpe

TINY = ModelConfig(61, 32, 24, 2, 2, 1)
STATE = {"guard": {"losses": [2.5, 2.25], "spike": None}}


class Two:
    """Two optimizers as one, as schedule.py's with Muon."""

    def __init__(self, model):
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
        self.optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2, eps=1e-3)]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def one(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)  # no signs of rounding errors


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()


def made(seed, build=one):
    torch.manual_seed(seed)
    model = GPT(TINY)
    return model, build(model)


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat"], 261)


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run folder with the checkpoints of steps 0 to 3, and the saver."""
    saver, (model, optimizer) = Saver(tmp_path / "run", tokenizer, keep=9), made(0)
    for step in range(4):
        assert saver.save(step, model, optimizer, STATE) == ""
        train(model, optimizer, 1, step)
    assert saver.finish() == ""
    return tmp_path / "run", saver


def steps(folder):
    return sorted(int(path.name[5:]) for path in Path(folder).glob("checkpoints/step-????????"))


def resign(folder):
    """The manifest of what is now in a checkpoint."""
    (folder / "manifest.json").unlink()
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "files": files}))


@pytest.mark.parametrize("build", [one, Two])
def test_what_is_saved_resumes_bit_for_bit_and_is_the_copy_of_its_step(tmp_path, tokenizer, build, monkeypatch):
    """Training goes on while the thread writes; what it wrote is the state at the call."""
    write = checkpoint._write_checkpoint
    monkeypatch.setattr(checkpoint, "_write_checkpoint", lambda *content: (time.sleep(0.2), write(*content)))
    model, optimizer = made(0, build)
    train(model, optimizer, 3)
    saver, state = Saver(tmp_path, tokenizer), {"losses": [1.0]}
    saver.save(3, model, optimizer, state)
    state["losses"].append(2.0)
    train(model, optimizer, 3, 3)
    assert saver.finish() == ""
    other, again = made(1, build)
    assert load_checkpoint(find_checkpoint(tmp_path), other, again) == {"step": 3, "losses": [1.0]}
    train(other, again, 3, 3)
    assert_same(model.state_dict(), other.state_dict())
    folder = tmp_path / "checkpoints/step-00000003"
    assert set(path.name for path in folder.iterdir()) == {"model.pt", "optimizer.pt", "config.json", "training.json",
                                                           "tokenizer.json", "manifest.json"}
    assert json.loads((folder / "manifest.json").read_text())["format"] == 2 and load_config(folder) == TINY


def test_before_the_first_update_there_are_no_moments(run):
    folder, _ = run
    first = folder / "checkpoints/step-00000000"
    assert not (first / "optimizer.pt").exists()
    model, optimizer = made(1)
    train(model, optimizer, 2)
    assert load_checkpoint(first, model, optimizer)["step"] == 0 and not optimizer.state
    assert_same(model.state_dict(), from_pretrained(first).state_dict())


def test_which_checkpoints_stay(tmp_path, tokenizer):
    """The newest, keepers, multiples of keep_every, the newest before a running spike; later ones are not touched."""
    saver, (model, optimizer) = Saver(tmp_path, tokenizer, keep=2, keep_every=5, keepers=(3,)), made(0)
    for step in range(1, 10):
        saver.save(step, model, optimizer, STATE, must=True, protect=8 if step > 7 else None)
    assert steps(tmp_path) == [3, 5, 7, 8, 9]
    saver.save(6, model, optimizer, STATE, must=True)  # 7 to 9 are damaged ones that a resume skipped
    assert steps(tmp_path) == [3, 5, 6, 7, 8, 9]
    for step in range(10, 14):
        saver.save(step, model, optimizer, STATE, must=True, protect=8)
    assert steps(tmp_path) == [3, 5, 7, 10, 12, 13]


def test_damaged_checkpoints_are_named_and_the_one_before_is_taken(run, capsys):
    folder, _ = run
    torn, altered, good = (folder / f"checkpoints/step-{step:08d}" for step in (3, 2, 1))
    raw = bytearray((altered / "optimizer.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (altered / "optimizer.pt").write_bytes(raw)
    (torn / "manifest.json").unlink()
    assert find_checkpoint(folder) == good
    said = capsys.readouterr().err
    assert str(torn) in said and f"{altered / 'optimizer.pt'} is not what was saved" in said and "skipped" in said
    assert isinstance(from_pretrained(folder), GPT)
    with pytest.raises(UserError, match="sha256"):
        from_pretrained(altered)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="no whole checkpoint"):
        find_checkpoint(folder)


def test_a_checkpoint_of_the_first_shape_is_one_sentence(run, capsys):
    folder, _ = run
    for step in steps(folder):
        (folder / f"checkpoints/step-{step:08d}/guard.json").write_text("{}")
    for what in (folder, folder / "checkpoints/step-00000002"):
        with pytest.raises(UserError, match="first version; export it with that"):
            from_pretrained(what)
    assert not capsys.readouterr().err


def test_other_sizes_and_other_optimizers_are_refused(run):
    folder, _ = run
    model, optimizer = made(0)
    wide = GPT(TINY.change(intermediate_size=25))
    with pytest.raises(UserError, match="model.pt is of a model of other sizes"):
        load_checkpoint(find_checkpoint(folder), wide, one(wide))
    with pytest.raises(UserError, match="optimizer.pt is of .* another optimizer"):
        load_checkpoint(find_checkpoint(folder), model, Two(model))


def test_weights_alone_are_a_checkpoint_that_training_can_start_from(tmp_path, tokenizer):
    model, optimizer = made(0)
    save_weights(model, tokenizer, tmp_path / "merged", tmp_path)
    check_manifest(tmp_path / "merged")
    other, again = made(1)
    assert load_checkpoint(tmp_path / "merged", other, again)["step"] == 0
    assert_same(model.state_dict(), from_pretrained(tmp_path / "merged").state_dict())
    assert from_pretrained(tmp_path / "merged", torch.bfloat16).model.embed_tokens.weight.dtype == torch.bfloat16


def test_damage_under_a_matching_manifest_is_one_sentence(run):
    """Contents of other types and sizes, missing parts, archives of code."""
    folder = find_checkpoint(run[0])
    model, optimizer = made(0)
    weights, moments = (torch.load(folder / name, weights_only=True) for name in ("model.pt", "optimizer.pt"))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script := folder.parent.parent / "script.pt")
    name = next(iter(moments))
    config = json.loads((folder / "config.json").read_text())
    cases = [("model.pt", value) for value in (
        {}, 7, [weights], b"x", script.read_bytes(), {k: v for k, v in weights.items() if k != name},
        *(weights | change for change in ({name: torch.ones(3)}, {"more": torch.ones(1)}, {name: 3},
                                          {name: weights[name].int()})))]
    cases += [("optimizer.pt", value) for value in (
        {}, 7, b"", {k: v for k, v in moments.items() if k != name}, moments | {name: {}},
        moments | {name: {"exp_avg": torch.ones(2)}}, moments | {name: moments[name] | {"step": torch.ones(2)}})]
    cases += [("training.json", value) for value in (b"[]", b"{}", b"\xff", b"3", b"{")]
    cases += [("config.json", json.dumps(config | change).encode()) for change in (
        {"vocab_size": 62}, {"vocab_size": 2**40}, {"num_hidden_layers": 10**9}, {"num_attention_heads": 10**9},
        {"extra": 1}, {"hidden_size": "x"}, {"num_hidden_layers": None})]
    for file, content in cases:
        shutil.copytree(folder, bad := folder.parent / "bad")
        if isinstance(content, bytes):
            (bad / file).write_bytes(content)
        else:
            torch.save(content, bad / file)
        resign(bad)
        with pytest.raises(UserError) as error:
            from_pretrained(bad)
            load_checkpoint(bad, model, optimizer)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
        shutil.rmtree(bad)
    for content in (b"[]", b"{}", b'{"files": 3}', b'{"files": {}}', b"\xff", b'{"files": {"../x": "y"}}'):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(UserError):
            check_manifest(folder)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path):
    """A limit on the size of files breaks the writing (a real short write): the next call says so in one sentence,
    nothing is left of it, and the checkpoint before it stays; with must=True it is an error."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import resource
from test_checkpoint import *
saver, (model, optimizer) = Saver("run", train_bpe(["a cat"], 261)), made(0)
train(model, optimizer, 1)
def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
saver.save(1, model, optimizer, STATE, must=True)
size = Path("run/checkpoints/step-00000001/optimizer.pt").stat().st_size
for limited in (100, size // 2, size - 1000):
    limit(limited)
    assert saver.save(2, model, optimizer, STATE) == ""
    saver.pending.exception()
    limit(resource.RLIM_INFINITY)
    said = saver.save(3, model, optimizer, STATE)
    assert "could not be written" in said and "make room" in said and chr(10) not in said, said
    assert saver.finish() == "" and steps("run") == [1, 3], steps("run")
    assert not list(Path("run/checkpoints").glob("*.partial"))
    shutil.rmtree("run/checkpoints/step-00000003")
limit(100)
try:
    saver.save(4, model, optimizer, STATE, must=True)
except UserError as error:
    limit(resource.RLIM_INFINITY)
    print("refused", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused a checkpoint could not be written") and not done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_loses_nothing_saved(tmp_path, tokenizer):
    """kill -9 while checkpoints are written one after another: what has its name is whole, and the saver goes on."""
    model, optimizer = made(0)
    train(model, optimizer, 1)
    Saver(tmp_path, tokenizer).save(done := 1, model, optimizer, STATE, must=True)
    for number in range(12):
        here, there = os.pipe()
        if (child := os.fork()) == 0:
            try:
                saver = Saver(tmp_path, tokenizer, keep=2)
                for step in range(done + 1, 10**6):
                    saver.save(step, model, optimizer, STATE)
                    os.write(there, f"{step - 1} ".encode())
            finally:
                os._exit(1)
        os.close(there)
        for _ in range(1 + number % 2):  # one save has begun; or one is over, even on a slow machine
            os.read(here, 10)
        time.sleep(0.007 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(here) as pipe:
            done = max([done, *map(int, pipe.read().split())])
        newest = find_checkpoint(tmp_path)
        assert newest.name >= f"step-{done:08d}"
        for path in tmp_path.glob("checkpoints/step-????????"):
            check_manifest(path)
            load_checkpoint(path, *made(1))
        done = int(newest.name[5:])
    assert done > 1


def test_any_number_of_processes_reads_any_checkpoint(tmp_path, tokenizer, monkeypatch):
    """One process, two that copy the model and two that shard it write the same tensors, and each continues from the
    other's."""
    monkeypatch.chdir(tmp_path)
    Path("code.py").write_text(f"""
import os, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_checkpoint import *
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
dist.init_process_group("gloo")
for build in (one, Two):
    for kind in ("ddp", "fsdp"):
        torch.manual_seed(dist.get_rank())  # what is loaded counts, not the start
        model = GPT(TINY)
        if kind == "fsdp":
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        optimizer = build(model)
        state = load_checkpoint(f"alone-{{build.__name__}}/checkpoints/step-00000002", model, optimizer)
        assert state["step"] == 2 and isinstance(model.model.norm.weight, DTensor) == (kind == "fsdp")
        saver = Saver(f"{{kind}}-{{build.__name__}}", train_bpe(["a cat"], 261), leader=dist.get_rank() == 0)
        saver.save(2, model, optimizer, STATE, must=True)
        train(model, optimizer, 2, 2)  # both on the same batch, so that gradients are equal
        saver.save(4, model, optimizer, STATE)
        assert saver.finish() == ""
        dist.barrier()
os._exit(0)  # as train.command_line ends
""")
    after = {}
    for build in (one, Two):
        model, optimizer = made(0, build)
        train(model, optimizer, 2)
        Saver(f"alone-{build.__name__}", tokenizer).save(2, model, optimizer, STATE, must=True)
        train(model, optimizer, 2, 2)
        after[build] = model.state_dict()
    done = torchrun("code.py")
    assert done.returncode == 0, done.stderr[-3000:]
    for build in (one, Two):
        for kind in ("ddp", "fsdp"):
            a, b = (Path(f"{run}-{build.__name__}/checkpoints/step-00000002") for run in ("alone", kind))
            assert_same(from_pretrained(a).state_dict(), from_pretrained(b).state_dict())
            a, b = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (a, b))
            assert a.keys() == b.keys()
            for name in a:
                assert_same(a[name], b[name])
            other, again = made(1, build)
            assert load_checkpoint(find_checkpoint(f"{kind}-{build.__name__}"), other, again)["step"] == 4
            loose = 1e-5 if build is one else 2e-3  # Muon computes in bf16
            for name, weight in after[build].items():
                torch.testing.assert_close(other.state_dict()[name], weight, atol=loose, rtol=loose)


def test_a_checkpoint_cannot_run_code(run):
    folder = find_checkpoint(run[0])

    class Evil:
        def __reduce__(self):
            return os.system, ("touch owned",)

    torch.save({"a": Evil()}, folder / "model.pt")
    resign(folder)
    with pytest.raises(UserError, match="model.pt holds something other than tensors"):
        from_pretrained(folder)
    assert not Path("owned").exists()


def test_json_is_whole_when_it_has_its_name(tmp_path):
    checkpoint.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
