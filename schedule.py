"""The optimizer and its schedules: AdamW, warmup, and when to let the learning rate fall.

The playbook's choices: AdamW with betas 0.9 / 0.95, weight decay 0.1 on everything but the embedding (with decay on
it 2.189, without 2.202: noise), gradients clipped at norm 1. Warmup-stable-decay (WSD) ends as low as cosine (2.204
both with a 10 % decay, 2.184 with 20 %), and its length need not be known beforehand: a longer run goes on from the
checkpoint before the decay, if one was kept. SmolLM3: 2e-4, 2000 steps of warmup, linear to zero over the last 11 %.

    python schedule.py                    # the shapes side by side

Every schedule is a function of the step alone. Step `total - 1`, the last, has exactly the final rate.
"""

import math

import torch
from torch import nn

DECAYS = {
    "linear": lambda t: 1 - t,
    "sqrt": lambda t: 1 - math.sqrt(t),  # "1-sqrt" (Haegele et al. 2024): quick at first, long at low rates
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}


def warmup(step: int, warmup_steps: int) -> float:
    """Share of the peak rate: (step + 1) / warmup_steps, never 0, and 1 from step warmup_steps - 1 on."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def wsd(step: int, total: int, warmup_steps: int, decay_steps: int, decay: str = "linear", final: float = 0.0) -> float:
    """Warmup-stable-decay (Hu et al. 2024): share of the peak rate at a step, `final` at step total - 1."""
    progress = max(0.0, (step + 1 - (total - decay_steps)) / max(1, decay_steps))  # 0 until the decay, 1 at the end
    return warmup(step, warmup_steps) * (final + (1 - final) * DECAYS[decay](min(1.0, progress)))


def cosine(step: int, total: int, warmup_steps: int, final: float = 0.1) -> float:
    """Warmup, then half a cosine down to `final` at step total - 1 (Loshchilov and Hutter 2017)."""
    return wsd(step, total, warmup_steps, total - warmup_steps, "cosine", final)


def multistep(step: int, total: int, warmup_steps: int) -> float:
    """DeepSeek LLM: 1 for 80 % of the steps, then sqrt(0.1) = 0.316 for 10 %, then 0.1 for the last 10 %."""
    drops = (step >= round(0.8 * total)) + (step >= round(0.9 * total))
    return warmup(step, warmup_steps) * 0.1 ** (drops / 2)


SCHEDULES = ("wsd", "cosine", "multistep")


def rate_share(schedule: str, step: int, total: int, warmup_steps: int, decay_steps: int, decay: str, final: float) -> float:
    """Share of the peak learning rate at a step under one of SCHEDULES."""
    if schedule == "wsd":
        return wsd(step, total, warmup_steps, decay_steps, decay, final)
    if schedule == "cosine":
        return cosine(step, total, warmup_steps, final)
    return multistep(step, total, warmup_steps)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Named AdamW groups: every parameter in exactly one.

    `embedding` is not decayed; `matrix` is; so is `gain` (RMSNorm weights), as in SmolLM3, whose rule excludes the
    embedding only. A tied output head is the embedding.
    """
    groups = {"embedding": [], "matrix": [], "gain": []}
    for name, parameter in model.named_parameters():  # names a shared parameter once
        if "embed_tokens" in name:
            groups["embedding"].append(parameter)
        else:
            groups["matrix" if parameter.ndim >= 2 else "gain"].append(parameter)
    decay = {"embedding": 0.0, "matrix": weight_decay, "gain": weight_decay}
    return [{"name": name, "params": params, "weight_decay": decay[name]} for name, params in groups.items() if params]


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float = 0.1,
                    betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> torch.optim.AdamW:
    """torch's fused AdamW (Loshchilov and Hutter 2019) over `parameter_groups`."""
    device = next(model.parameters()).device.type
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, eps=eps,
                             fused=device in ("cpu", "cuda", "mps"))


if __name__ == "__main__":
    total, warm = 40, 4
    print("step  " + "".join(f"{name:>14}" for name in ("wsd linear", "wsd 1-sqrt", "cosine", "multistep")))
    for step in [*range(0, total, 3)]:
        rows = (wsd(step, total, warm, 8), wsd(step, total, warm, 8, "sqrt"), cosine(step, total, warm), multistep(step, total, warm))
        print(f"{step:4}  " + "".join(f"{share:14.3f}" for share in rows))
