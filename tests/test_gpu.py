"""What a GPU would do, as far as a CPU can show it: fake CUDA tensors, two gloo processes, a counting compiler; and
the miniature of tests/gpu_check.py. The faults are those that a review found before anything had run on a GPU."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cost
import data as d
import gpu_check
import model as model_
import posttrain as p
import sample
import train
from checkpoint import Saver, save_weights
from conftest import ROOT, torchrun
from model import GPT, PRESETS, Layout, ModelConfig, attention, dense_attention
from tokenizer import UserError, train_bpe

EVERYTHING = ModelConfig(64, 64, 128, 2, 4, 2, 0, 64, layer_types="linear,full", attention_sinks=True, num_experts=4,
                         mlp_bias=True)
TOKENIZER = train_bpe(["What is the sum of these two small numbers? a number def f(a, b): return a + b"], 280)


# ---- fake CUDA ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fake_cuda(config):
    """A model of tensors on CUDA that have no numbers; what is made inside is such a tensor too."""
    with FakeTensorMode():
        model = GPT(config)
        with torch.device("cuda"):
            for part in model.modules():
                for name, tensor in [*part.named_parameters(recurse=False)]:
                    setattr(part, name, torch.nn.Parameter(torch.empty(tensor.shape)))
                for name, tensor in [*part.named_buffers(recurse=False)]:
                    setattr(part, name, torch.empty(tensor.shape))
            yield model


class Refusals(TorchDispatchMode):
    """The calls that CUDA refuses when deterministic (the documentation of torch.use_deterministic_algorithms)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("bincount", "histc", "put", "median") or name == "cumsum" and args[0].is_floating_point():
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_training_and_sampling_call_nothing_that_cuda_refuses_when_deterministic(monkeypatch):
    """A model on the CPU, which computes by the same calls; tokens are drawn on CUDA in a way of their own."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self)  # fake tensors have no numbers
    model, tokens = GPT(EVERYTHING), torch.zeros(2, 64, dtype=torch.int64)
    with Refusals() as refusals:
        (model(tokens, targets=tokens)[0] + model.routing_loss()).backward()
        sample.filter_logits(model(tokens)[:, -1], 0.8, min_p=0.05)
        with FakeTensorMode():
            assert sample.draw_tokens(torch.empty(2, 64, device="cuda"), None).device.type == "cuda"
    assert not refusals.found


def test_fp32_on_cuda_asks_for_the_kernel_that_keeps_no_scores():
    """That kernel wants as many KV heads as query heads; else 4,096 tokens make scores of [B, H, T, T]."""
    asked, masked = [], []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.scaled_dot_product_attention:
                asked.append([x.shape[1] for x in args[:3]])
                masked.append(args[3] is not None)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        q, k, v = (torch.empty(2, 4096, heads, 64, device="cuda") for heads in (8, 2, 2))
        attention(q, k, v, Layout(4096, None, None, None, None, None))
        visible = torch.empty(1, 1, 4096, 4096, dtype=torch.bool, device="cuda")
        dense_attention(q, k, v, visible)  # what documents take in fp32
        q, k, v, at = torch.empty(1, 64, 8, 16), *torch.empty(2, 1, 64, 2, 16), torch.zeros(1, 64, dtype=torch.int64)
        cu_seqlens = torch.zeros(5, dtype=torch.int32)  # documents, where no flash kernel takes them
        attention(*(x.to("meta") for x in (q, k, v)), Layout(64, at.to("meta"), None, cu_seqlens, None, None))
    assert asked == [[8, 8, 8]] * 3 and masked == [False, True, True]


def test_the_thread_that_saves_sees_no_device(tmp_path, monkeypatch):
    """Its current device would be GPU 0, whatever the process's own is."""
    seen = []
    monkeypatch.setattr(Saver, "_write", lambda self, step, protect, config, weights, moments, state: seen.append(
        {tensor.device.type for tensor in torch.utils._pytree.tree_leaves((weights, moments))
         if isinstance(tensor, torch.Tensor)}))
    with fake_cuda(ModelConfig(64, 64, 128, 1, 2, 1)) as model:
        optimizer = torch.optim.AdamW(model.parameters(), fused=False, foreach=False)
        for parameter in model.parameters():
            optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter]["step"] = torch.zeros(())
        saver = Saver(tmp_path, TOKENIZER)
        saver.save(1, model, optimizer, {})
        saver.finish()
    assert seen == [{"cpu"}]


def test_every_way_to_a_device_turns_cudnn_attention_off(tmp_path):
    """cuDNN makes a plan for each length of the cache: seconds a token."""
    save_weights(GPT(ModelConfig(TOKENIZER.vocab_size, 32, 48, 1, 2, 1)), TOKENIZER, tmp_path / "base", tmp_path)
    for work in (lambda: cost.find_machine("cpu", "float32"), lambda: sample.load(tmp_path / "base", "cpu")):
        torch.backends.cuda.enable_cudnn_sdp(True)
        work()
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_gpu_that_is_not_there_is_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="^cuda with auto failed .* try --device cpu --dtype float32$"):
        cost.find_machine("cuda")


def test_a_micro_batch_fills_85_percent_of_a_gpu(monkeypatch):
    recipe = replace(train.Recipe(), model=PRESETS["smollm2-135m"], dtype="bfloat16")
    needs = cost.recipe_memory(recipe, 16, 2048, 1, "cuda")["total"]
    for memory, fit in ((needs / 0.84, True), (needs / 0.86, False)):
        monkeypatch.setattr(cost, "machine_memory", lambda device: memory)
        assert cost.fits(recipe, 16, 2048, 1, "cuda") == fit


def test_the_cache_of_answers_takes_a_tenth_of_a_gpu(monkeypatch):
    """SmolLM3 keeps 73,728 bytes a token, so 302 MB for 4,096: 26 rows in a tenth of 80 GB; 16 as a power of 2."""
    monkeypatch.setattr(cost, "machine_memory", lambda device: 80e9)
    recipe = replace(p.PostRecipe(), model=PRESETS["smollm3-3b"].change(max_position_embeddings=4096), device="cuda")
    assert cost.rows_at_once(recipe) == 16
    assert cost.rows_at_once(replace(recipe, device="cpu")) == 256


# ---- compiling ------------------------------------------------------------------------------------------------


def counted(monkeypatch):
    """Counts the graphs of models that are compiled from here on."""
    from functools import partialmethod
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(GPT, "compile_blocks", partialmethod(GPT.compile_blocks, backend=counter))
    return counter


def test_post_training_compiles_for_16_lengths_at_most(monkeypatch):
    """Whatever the answers' number and lengths, in a context that has twice as many multiples of 64."""
    counter = counted(monkeypatch)
    model = GPT(ModelConfig(64, 16, 16, 1, 1, 1, 0, 2048))
    model.compile_blocks()
    run = SimpleNamespace(model=model, machine=SimpleNamespace(compile=True, device="cpu"), rows=[2])
    for number, length in enumerate(range(70, 2048, 64)):
        p.logprobs(run, model, [([1] * length, [1] * length)] * (1 + number % 2))
    assert counter.frame_count <= 16 + 2  # the head's: one for the first length, one for all others


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = GPT(ModelConfig(TOKENIZER.vocab_size, 32, 48, 2, 2, 1, max_position_embeddings=64))
    save_weights(model, TOKENIZER, tmp_path / "base", tmp_path)
    rows = [{"prompt": f"What is {i}?", "chosen": "a number " * (1 + i % 3), "rejected": "no"} for i in range(40)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return p.read_words(["dpo", "base", "--data", "pairs.jsonl", "--pairs", "4", "--steps", "2", "--device", "cpu",
                         "--dtype", "float32", "--compile", "true", "--eval-problems", "4", "--micro-batch", "4"])[1]


def test_post_training_goes_on_without_a_compiler_that_fails(base, monkeypatch, capsys):
    from functools import partialmethod

    def fails(*_):
        raise RuntimeError("no C++ compiler was found")

    torch._dynamo.reset()
    monkeypatch.setattr(GPT, "compile_blocks", partialmethod(GPT.compile_blocks, backend=fails))
    p.post_train(base, Path("runs/dpo"))
    assert capsys.readouterr().out.count("compile   off: it failed here") == 1


def test_post_training_looks_at_few_models_before_it_starts(base, monkeypatch):
    counted(monkeypatch)
    made, init = [], GPT.__init__
    monkeypatch.setattr(GPT, "__init__", lambda self, config: made.append(config) or init(self, config))
    model_.count_parameters.cache_clear()
    p.prepare_run(base, Path("runs/x"), train.World(), False)
    assert len(made) <= 4  # the start, the trial of the machine, and the counts of two configs


# ---- two processes --------------------------------------------------------------------------------------------

TWO = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import sample, torch, torch._dynamo.testing, train
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from test_gpu import EVERYTHING, TOKENIZER
from model import GPT, Attention, GatedDeltaNet, ModelConfig, Router
from torch.nn.modules.module import register_module_forward_hook

world = train.World.join()
counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
GPT.compile_blocks = partialmethod(GPT.compile_blocks, backend=counter)


def updates(name, config, machine, look, **changes):
    recipe = replace(train.Recipe(), model=config, **changes)
    torch.manual_seed(0)
    run = train.connect(train.make_run(recipe, Path("runs") / name, world, machine, TOKENIZER, GPT(config), 3, None))
    tokens = torch.zeros(2, 32, dtype=torch.long)

    def loss_of(piece):
        loss = run.parallel(tokens, targets=tokens)[0] / tokens.numel() / 2
        if piece and run.step == 2:
            look(run)  # the gradients of the first piece exist
        return loss + run.model.routing_loss() / 2, loss

    list(sample.generate(run.model, [1, 2], 3))  # an evaluation of the start is FSDP's first forward pass
    for run.step in range(3):
        train.update(run, [lambda: loss_of(0), lambda: loss_of(1)], 1e-3)


def ddp(run):
    gradients = [w.grad for w in run.model.parameters()]
    held = {{g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in gradients}}
    world.leader and print("ddp", len(held), len(gradients), sum(held.values()), sum(4 * g.numel() for g in gradients))


def fsdp(run):
    whole, mine = 0, 0
    for part in run.model.modules():
        state = part._get_fsdp_state() if hasattr(part, "_get_fsdp_state") else None
        for w in state._fsdp_param_group.fsdp_params if state and state._fsdp_param_group else ():
            left = [w.unsharded_accumulated_grad, getattr(getattr(w, "_unsharded_param", None), "grad", None)]
            whole += sum(4 * g.numel() for g in left if g is not None)
            mine += 4 * w.sharded_param.grad.to_local().numel() if w.sharded_param.grad is not None else 0
    world.leader and print("fsdp", whole, mine, sum(4 * w.numel() for w in run.model.parameters()))


seen = set()


def note(part, *_):
    if isinstance(part, (Router, GatedDeltaNet, Attention)):
        own = dict(part.named_parameters(recurse=False))
        seen.update((name, str(w.dtype)) for name, w in own.items())


wide = ModelConfig(64, 256, 1024, 1, 4, 4, 0, 64)
machine = train.cost.Machine("cpu", torch.float32, True, 1.0, "")
updates("ddp", wide, machine, ddp)
world.leader and print("graphs", counter.frame_count)
hook = register_module_forward_hook(note)
updates("fsdp", EVERYTHING, replace(machine, dtype=torch.bfloat16, compile=False), fsdp, parallel="fsdp")
updates("both", EVERYTHING, replace(machine, dtype=torch.bfloat16), lambda run: None, parallel="fsdp")
world.leader and print("dtypes", *sorted(seen))
world.agree()
sys.stdout.flush()
os._exit(0)  # as train.command_line ends
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes printed, by the first word of a line."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(TWO)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = torchrun("two.py")
    assert done.returncode == 0, done.stderr[-3000:]
    return {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines()) if words}


def test_ddp_holds_gradients_once(two):
    """They are pieces of DDP's buckets while micro-batches add to them, so there is no second copy."""
    storages, gradients, held, needed = map(int, two["ddp"])
    assert storages < gradients and held == pytest.approx(needed, rel=0.01)


def test_fsdp_trains_after_sampling(two):
    """Under inference_mode FSDP's first forward pass would leave weights that cannot be trained."""
    assert two["dtypes"]  # what the script prints last


def test_fsdp_holds_its_share_of_the_gradients_between_micro_batches(two):
    whole, mine, everything = map(int, two["fsdp"])
    assert whole == 0 and mine == pytest.approx(everything / 2, rel=0.05)


def test_fsdp_gathers_in_fp32_what_is_computed_in_fp32(two):
    for name in ("A_log", "dt_bias", "sinks", "weight", "bias"):  # the last two are the router's
        assert f"('{name}', 'torch.float32')" in " ".join(two["dtypes"])
    assert "bfloat16" not in " ".join(two["dtypes"])


def test_ddp_splits_no_compiled_block(two):
    """DDPOptimizer would: the block's gradients are larger than its first bucket of 1 MB."""
    assert two["graphs"] == ["2"]  # the block, and the head's losses


# ---- the script for a GPU -------------------------------------------------------------------------------------

BASE = """--data data/tiny --hidden-size 32 --intermediate-size 48 --num-hidden-layers 2 --num-attention-heads 2
    --num-key-value-heads 1 --max-position-embeddings 64 --batch-tokens 256 --warmup-steps 3 --device cpu
    --dtype float32 --eval-tokens 128"""


@pytest.mark.parametrize("name, items", [("kernels", 5), ("speed", 5), ("training", 5)])
def test_every_item_of_the_gpu_check_runs(name, items, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = {source: [(f"{source}{i}", f"What is the {source} sum of {i} and {i * i}? a number " * (2 + i % 5))
                     for i in range(150)] for source in ("left", "right")}
    d.prepare(text, Path("data/tiny"), TOKENIZER)
    done = subprocess.run([sys.executable, str(ROOT / "tests/gpu_check.py"), name, "--dry", "--out", "results",
                           "--base", BASE], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(Path(f"results/gpu_check_{name}.json").read_text())
    assert found["about"]["torch"] == torch.__version__ and "peak" in found["about"]["mfu"]
    assert len({line["item"] for line in found["rows"]}) == items
    assert not [line for line in found["rows"] if line["good"] is False]
    assert [p.name for p in Path("results").iterdir()] == [f"gpu_check_{name}.json"]


@pytest.fixture
def dry(monkeypatch):
    """gpu_check as --dry sets it, in this process."""
    for name, value in {"DRY": True, "DEVICE": "cpu", "DTYPE": torch.float32}.items():
        monkeypatch.setattr(gpu_check, name, value, raising=False)
    monkeypatch.setattr(cost, "GPT", gpu_check.built)
    torch._dynamo.reset()


def test_gpu_check_calls_no_eager_figure_compiled(dry, monkeypatch):
    from functools import partial, partialmethod

    def fails(*_):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(GPT, "compile_blocks", partialmethod(GPT.compile_blocks, backend=fails))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails))
    training, tokens = [*gpu_check.measured("tiny", gpu_check.TINY, 2, 0)], [*gpu_check.decoding()]
    assert len(training) == 4 and all("not compiled" in line["case"] and line["good"] is False for line in training)
    assert ["not compiled" in line["case"] for line in tokens] == [False, False, True]
    assert [line["good"] for line in tokens] == [None, None, False]


def test_gpu_check_compiles_before_it_measures_tokens(dry, monkeypatch):
    """The compiled step is traced once, before the clock starts."""
    events, generate, clock = [], sample.generate, gpu_check.perf_counter
    monkeypatch.setattr(sample, "generate", lambda *words, **options: (
        events.append("token") or token for token in generate(*words, **options)))
    monkeypatch.setattr(gpu_check, "perf_counter", lambda: events.append("clock") or clock())
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *words, **options: (
        events.append("compiled") or call(*words, **options)))
    rows = [*gpu_check.decoding()]
    assert [line["case"].rsplit(", ")[-1] for line in rows] == ["cuDNN True", "cuDNN False", "compiled"]
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    eager, step = ["token"] * 4 + ["clock"] + ["token"] * 10 + ["clock"], ["compiled", "token"]
    assert events == 2 * eager + ["token"] + 3 * step + ["clock"] + 10 * step + ["clock"]
