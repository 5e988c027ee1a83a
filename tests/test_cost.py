"""cost.py against hand-worked numbers and a count of what torch executes."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cost
from conftest import ROOT
from model import GPT, PRESETS, ModelConfig, cross_entropy


def test_flops_equal_what_torch_counts():
    """Matrix products of a forward and backward pass, attention as a full square, counted by torch."""
    config = ModelConfig(100, 64, 96, 3, 4, 4, head_dim=16, tie_word_embeddings=False)
    model, tokens = GPT(config), torch.randint(100, (2, 32))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        cross_entropy(model(tokens), tokens).backward()
    expected = cost.flops_per_token(config, 32, "full") * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_conventions_by_hand():
    """SmolLM3 at 4096 tokens (FACTS: 14k tok/s on an H100 are 26.1 % by 6N, 31.2 % full, 28.6 % causal)."""
    config = PRESETS["smollm3-3b"]
    share = {counted: 14_000 * cost.flops_per_token(config, 4096, counted) / 989.4e12 for counted in ("6N", "full", "causal")}
    assert share["6N"] == pytest.approx(0.261, abs=0.001)
    assert share["full"] == pytest.approx(0.312, abs=0.001)
    assert share["causal"] == pytest.approx(0.286, abs=0.001)


def test_attention_in_documents_goes_as_their_length():
    config = PRESETS["laptop"]
    assert cost.attention_flops_per_token(config, 128) == cost.attention_flops_per_token(config, 256) / 2


def test_training_memory_of_weights_and_optimizer():
    memory = cost.training_memory(PRESETS["llama-3.2-1b"], 1, 4096)
    assert memory["weights"] + memory["gradients"] + memory["optimizer"] == 16 * 1_235_814_400


def test_machine_is_found_and_says_why():
    machine = cost.find_machine()
    assert machine.peak_flops > 1e9 and machine.device in machine.reason or "cuda" in machine.device
    assert cost.find_machine("cpu", "float32", "false").dtype == torch.float32


@pytest.mark.parametrize("flags", [["plan", "smollm3-3b", "--tokens", "11.1e12", "--gpus", "384"],
                                   ["measure", "laptop", "--seconds", "0.1", "--rows", "2"]])
def test_commands_run(flags):
    done = subprocess.run([sys.executable, str(ROOT / "cost.py"), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "H100-hours" in done.stdout or "tokens/s" in done.stdout


def test_unknown_preset_is_one_sentence():
    done = subprocess.run([sys.executable, str(ROOT / "cost.py"), "measure", "gpt9"], capture_output=True, text=True)
    assert done.returncode == 2 and "laptop" in done.stderr and len(done.stderr.splitlines()) == 1
