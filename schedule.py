"""Hyperparameters: the optimizer, its schedules, how large a batch and how high a rate.

The playbook's choices: AdamW with betas 0.9 / 0.95, weight decay 0.1 on everything but the embedding (with decay on
it 2.189, without 2.202: noise), gradients clipped at norm 1. Warmup-stable-decay (WSD) ends as low as cosine (2.204
both with a 10 % decay, 2.184 with 20 %), and its length need not be known beforehand: a longer run goes on from the
checkpoint before the decay, if one was kept. SmolLM3: 2e-4, 2000 steps of warmup, linear to zero over the last 11 %.

    python schedule.py                    # the shapes side by side; what the laws say for 1B parameters, 45B tokens
    python schedule.py 3.08e9 11.1e12     # and for another size and length

Every schedule is a function of the step alone. Step `total - 1`, the last, has exactly the final rate. A law that is
asked outside the range it was fitted on answers, and warns (`Extrapolation`): there it is a place to start a search.
"""

import argparse
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# ---- the shape of the learning rate ---------------------------------------------------------------------------

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


def batch_multiple(step: int, doublings: list[int]) -> int:
    """Batch warm-up (Merrill et al. 2025): how many times the first batch an update takes, doubled at each of these
    steps. The critical batch size is near 0 at the start and grows, so a run that starts small wastes no tokens and
    can end large; their rule doubles as soon as the critical size is twice the batch, with the rate times sqrt(2)."""
    return 2 ** sum(step >= at for at in doublings)


# ---- the optimizer --------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Named groups: every parameter in exactly one.

    `embedding` is not decayed; `head` (an untied output head; a tied one is the embedding) and `matrix` are; so is
    `gain` (RMSNorm weights and other vectors), as in SmolLM3, whose rule excludes the embedding only.
    """
    groups = {"embedding": [], "head": [], "matrix": [], "gain": []}
    for name, parameter in model.named_parameters():  # names a shared parameter once
        kind = "embedding" if "embed_" in name else "head" if "lm_head" in name else "matrix"
        groups["gain" if parameter.ndim < 2 or "bias" in name else kind].append(parameter)
    decay = {"embedding": 0.0, "head": weight_decay, "matrix": weight_decay, "gain": weight_decay}
    return [{"name": name, "params": params, "weight_decay": decay[name]} for name, params in groups.items() if params]


class Both:
    """Two optimizers that step, save and load as one."""

    def __init__(self, **optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


class NoBfloat16(TorchFunctionMode):
    """Inside it, `tensor.bfloat16()` copies in fp32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0].float().clone() if function is torch.Tensor.bfloat16 else function(*args, **(kwargs or {}))


class Float32Muon(torch.optim.Muon):
    """torch's Muon takes its Newton-Schulz steps in bfloat16, which a CPU without it emulates at a hundredth of its speed
    (laptop model, 2 cores: 0.56 s a step of this optimizer, and 0.03 s in fp32, in which they stay here)."""

    def step(self, closure=None):
        with NoBfloat16():
            return super().step(closure)


OPTIMIZERS = ("adamw", "muon")


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float = 0.1,
                    betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                    name: str = "adamw", dtype: torch.dtype = torch.bfloat16) -> torch.optim.Optimizer | Both:
    """torch's fused AdamW (Loshchilov and Hutter 2019) over `parameter_groups`; or, with "muon", torch's Muon (Jordan
    et al. 2024) on the hidden matrices and AdamW on the rest: embedding, head, gains, and experts, which are stacked.

    Muon with Moonlight's settings (Liu et al. 2025), which the playbook takes: updates times 0.2 sqrt(max(rows,
    columns)), so that their size, and so the rate and the decay, are AdamW's; Nesterov momentum 0.95; 5 Newton-Schulz
    steps, in `dtype`. The playbook: better than AdamW when tuned at 1B, but diverged more often at 3B; AdamW stayed.
    """
    groups = parameter_groups(model, weight_decay)
    fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
    hidden = [p for group in groups if group["name"] == "matrix" for p in group["params"] if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [group | {"params": kept} for group in groups if (kept := [p for p in group["params"] if id(p) not in chosen])]
    muon = torch.optim.Muon if dtype == torch.bfloat16 else Float32Muon
    return Both(
        muon=muon([{"name": "hidden", "params": hidden}], lr=learning_rate, weight_decay=weight_decay,
                  momentum=0.95, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw"),
        adamw=torch.optim.AdamW(rest, lr=learning_rate, betas=betas, eps=eps, fused=fused))


# ---- laws of rate and batch -----------------------------------------------------------------------------------


class Extrapolation(UserWarning):
    """A law was asked outside the range that it was fitted on."""


def check_range(law: str, value: float, low: float, high: float, unit: str) -> None:
    """Warns, in a sentence, if low <= value <= high does not hold."""
    if not low <= value <= high:
        warnings.warn(f"{law} holds for {low:g} to {high:g} {unit}, not for {value:.3g}: a place to start a search",
                      Extrapolation, stacklevel=3)


def deepseek_rate(compute: float) -> float:
    """Peak rate 0.3118 C^-0.1250 (DeepSeek LLM 2024), C in non-embedding FLOPs, fitted on 1e17 to 2e19."""
    check_range("DeepSeek's rate", compute, 1e17, 2e19, "FLOPs")
    return 0.3118 * compute**-0.1250


def deepseek_batch(compute: float) -> float:
    """Batch in tokens, 0.2920 C^0.3271 (DeepSeek LLM 2024), C in non-embedding FLOPs, fitted on 1e17 to 2e19."""
    check_range("DeepSeek's batch", compute, 1e17, 2e19, "FLOPs")
    return 0.2920 * compute**0.3271


def step_law_rate(parameters: float, tokens: float) -> float:
    """Peak rate 1.79 N^-0.713 D^0.307 (Step Law, Li et al. 2025), N without embeddings; grid of 0.06 to 1.1B
    parameters and 2 to 100B tokens."""
    check_range("Step Law's rate", parameters, 0.06e9, 1.1e9, "parameters")
    check_range("Step Law's rate", tokens, 2e9, 100e9, "tokens")
    return 1.79 * parameters**-0.713 * tokens**0.307


def step_law_batch(tokens: float) -> float:
    """Batch in tokens, 0.58 D^0.571, whatever the size (Step Law, Li et al. 2025); grid of 2 to 100B tokens."""
    check_range("Step Law's batch", tokens, 2e9, 100e9, "tokens")
    return 0.58 * tokens**0.571


def scale_rate(rate: float, k: float) -> float:
    """The rate for a batch k times as large: sqrt(k) times as HIGH (playbook; many summaries invert it).

    The variance of an update goes as rate^2 / batch, so sqrt(k) keeps it. Holds while the batch stays below the
    critical size; a batch more than 16 times another's is hardly on the same side.
    """
    check_range("square-root scaling", k, 1 / 16, 16, "times the batch")
    return rate * math.sqrt(k)


def scale_adam(k: float, rate: float, beta1: float = 0.9, beta2: float = 0.95,
               eps: float = 1e-8) -> tuple[float, float, float, float]:
    """(rate, beta1, beta2, eps) of Adam for a batch k times as large (Malladi et al. 2022): sqrt(k) rate, 1 - beta
    times k, eps over sqrt(k). The betas then forget per token as before; a k at which they would turn negative is
    out of the rule's reach."""
    check_range("Adam's scaling", k * (1 - min(beta1, beta2)), 0, 0.5, "as k (1 - beta)")
    return rate * math.sqrt(k), max(0.0, 1 - k * (1 - beta1)), max(0.0, 1 - k * (1 - beta2)), eps / math.sqrt(k)


def decay_timescale(rate: float, weight_decay: float) -> float:
    """Steps over which AdamW's decay forgets a weight, 1 / (rate * decay) (Wang and Aitchison 2024)."""
    return 1 / (rate * weight_decay) if weight_decay else math.inf


def suggest_weight_decay(rate: float, steps: float) -> float:
    """0.1, as nearly all labs (playbook). It averages the weights over `decay_timescale` steps: below 1 % of a run it
    forgets most of what was read, above the whole run it does nothing (rule of thumb), and this warns."""
    check_range("weight decay 0.1", decay_timescale(rate, 0.1) / steps, 0.01, 1, "runs of timescale")
    return 0.1


def suggest_warmup(steps: int) -> int:
    """Steps of warmup: 2000, and 4 % of runs too short for that (playbook: 2000, or 1 to 5 % of short runs)."""
    check_range("the warmup", steps, 100, math.inf, "steps")
    return max(1, min(2000, round(0.04 * steps)))


# ---- laws of loss ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossLaw:
    """loss(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022), nats a token or bits a byte."""

    source: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    parameters: tuple[float, float] = (70e6, 16e9)  # fitted on this range
    tokens: tuple[float, float] = (5e9, 500e9)

    def loss(self, parameters: float, tokens: float) -> float:
        check_range(self.source, parameters, *self.parameters, "parameters")
        check_range(self.source, tokens, *self.tokens, "tokens")
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def covers(self, parameters: float, tokens: float) -> bool:
        """Whether the law was fitted there."""
        return self.parameters[0] <= parameters <= self.parameters[1] and self.tokens[0] <= tokens <= self.tokens[1]

    def optimum(self, compute: float) -> tuple[float, float]:
        """(parameters, tokens) of the lowest loss for C = 6ND FLOPs: where the last FLOP is worth as much in either."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = G * (compute / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, compute / 6 / parameters

    def tokens_for(self, parameters: float) -> float:
        """How many tokens make this size the optimum of its compute."""
        return (self.beta * self.B / (self.alpha * self.A) * parameters**self.alpha) ** (1 / self.beta)

    def parameters_for(self, tokens: float) -> float:
        """The size that is optimal for so many tokens."""
        return (self.alpha * self.A / (self.beta * self.B) * tokens**self.beta) ** (1 / self.alpha)

    def tokens_to_reach(self, loss: float, parameters: float) -> float:
        """Tokens with which a size reaches a loss; inf if it never does."""
        gap = loss - self.E - self.A * parameters**-self.alpha
        return (self.B / gap) ** (1 / self.beta) if gap > 0 else math.inf


# Besiroglu et al. (2024) corrected the fit of Hoffmann et al. (2022): about 20 tokens a parameter only follow from theirs.
HOFFMANN = LossLaw("Hoffmann et al. 2022", 1.69, 406.4, 410.7, 0.34, 0.28)
CHINCHILLA = LossLaw("Besiroglu et al. 2024", 1.8172, 482.01, 2085.43, 0.3478, 0.3658)
# Measured: `fit_law` on the runs of `python cost.py fit` from 0.2M tokens on, the laptop recipe, `train.py --minutes 5`, and
# width 64 at 2.7M tokens; within 1.7 % of each. Bits per byte of held-out prose and code.
LAPTOP_LAW = LossLaw("fitted to the laptop's runs", 0.745, 8368, 19.69, 0.825, 0.2, (0.15e6, 7e6), (0.1e6, 10e6))


def overtrain(law: LossLaw, compute: float, k: float) -> dict[str, float]:
    """A model k times smaller than the compute-optimal one, trained k times longer at equal compute (SmolLM3: about
    3,600 tokens a parameter): what it loses, what every token read or written later saves (2N FLOPs), and how much
    compute it would take to lose nothing (inf: no amount)."""
    parameters, tokens = law.optimum(compute)
    best = law.loss(parameters, tokens)
    needed = law.tokens_to_reach(best, parameters / k)
    return {"parameters": parameters / k, "tokens": tokens * k, "loss_penalty": law.loss(parameters / k, tokens * k) - best,
            "inference_saving": 1 - 1 / k, "compute_to_match": needed / (tokens * k),
            "fitted": law.covers(parameters / k, tokens * k)}


def fit_law(points: list[tuple[float, float, float]], source: str = "fit") -> LossLaw:
    """The law nearest, in least squares, to (parameters, tokens, loss) points of several sizes and lengths: for each
    pair of exponents on a grid the best E, A, B >= 0 are a linear problem."""
    N, D, L = (np.array(x, dtype=float) for x in zip(*points))
    best = None
    for alpha in np.arange(0.05, 1.21, 0.025):
        for beta in np.arange(0.05, 1.21, 0.025):
            columns = np.stack([np.ones(len(N)), N**-alpha, D**-beta], 1)
            scale = columns.max(0)
            solution = np.linalg.lstsq(columns / scale, L, rcond=None)[0] / scale
            error = float(((columns @ solution - L) ** 2).sum())
            if solution.min() >= 0 and (best is None or error < best[0]):
                best = (error, alpha, beta, *solution)
    if best is None:
        raise ValueError("no law whose loss falls with size and tokens fits these runs")
    _, alpha, beta, E, A, B = (float(x) for x in best)
    return LossLaw(source, E, A, B, alpha, beta, (N.min() / 2, N.max() * 2), (D.min() / 2, D.max() * 2))


# ---- the critical batch size, measured ------------------------------------------------------------------------


class NoiseScale:
    """The gradient noise scale tr(S) / |G|^2 in examples, the batch at which the gradient's noise equals its signal
    (McCandlish et al. 2018, appendix A.2), from the squared norms of gradients of two batch sizes.

    |G|^2 and tr(S) are averaged each on its own and divided last: single measurements are too noisy to divide. The default
    averages some 100 measurements: on a regression whose noise scale is known, 86 % of such averages are within 15 % of it
    (47 % with a memory of 0.95), and what grows is followed so much later. It stands in for the critical batch size, which
    Merrill et al. (2025) found far above it: branches measure that (`python ablate.py branch`).
    """

    def __init__(self, memory: float = 0.99):
        """`memory`: the share of the past in the averages after a measurement."""
        self.memory, self.signal, self.noise = memory, 0.0, 0.0

    @staticmethod
    def split(small_square: float, large_square: float, small: float, large: float) -> tuple[float, float]:
        """Unbiased (|G|^2, tr(S)) from the squared norms of mean gradients over `small` and `large` examples."""
        signal = (large * large_square - small * small_square) / (large - small)
        return signal, (small_square - large_square) / (1 / small - 1 / large)

    def add(self, signal: float, noise: float) -> float:
        """Takes in a measurement; returns the noise scale so far, nan while the averaged |G|^2 is not positive."""
        self.signal = self.memory * self.signal + (1 - self.memory) * signal  # both start at 0: it cancels
        self.noise = self.memory * self.noise + (1 - self.memory) * noise
        return self.noise / self.signal if self.signal > 0 else math.nan


def critical_multiple(losses: dict[int, float], epsilon: float) -> int:
    """The branch method's answer (Merrill et al. 2025): the largest k whose loss is within epsilon of every smaller k's.
    `losses`: of branches with k times the batch and sqrt(k) times the rate."""
    return max(k for k in losses if all(losses[k] <= loss + epsilon for smaller, loss in losses.items() if smaller < k))


# ---- the learning-rate range test -----------------------------------------------------------------------------


def range_test_rate(step: int, total: int, low: float, high: float) -> float:
    """From `low` at step 0 to `high` at step total - 1 by equal factors (Smith 2017)."""
    return low * (high / low) ** (step / max(1, total - 1))


def smoothed(losses: list[float], memory: float = 0.9) -> list[float]:
    """Exponential average, corrected for its start."""
    out, mean = [], 0.0
    for i, loss in enumerate(losses):
        mean = memory * mean + (1 - memory) * loss
        out.append(mean / (1 - memory ** (i + 1)))
    return out


def suggest_rates(rates: list[float], losses: list[float], width: int = 10) -> tuple[float, float]:
    """(where the smoothed loss falls fastest over `width` steps, a tenth of where it is lowest): a good peak lies about
    between them, since a whole run stays at its peak far longer than the test did (rule of thumb)."""
    smooth = smoothed(losses)
    width = min(width, len(smooth) - 1)
    fall = min(range(len(smooth) - width), key=lambda i: smooth[i + width] - smooth[i])
    return rates[fall + width // 2], rates[min(range(len(smooth)), key=smooth.__getitem__)] / 10


# ---- command line ---------------------------------------------------------------------------------------------


def print_shapes(total: int = 40, warm: int = 4) -> None:
    print("step  " + "".join(f"{name:>14}" for name in ("wsd linear", "wsd 1-sqrt", "cosine", "multistep")))
    for step in [*range(0, total, 3)]:
        row = (wsd(step, total, warm, 8), wsd(step, total, warm, 8, "sqrt"), cosine(step, total, warm),
               multistep(step, total, warm))
        print(f"{step:4}  " + "".join(f"{share:14.3f}" for share in row))


def print_laws(parameters: float, tokens: float) -> None:
    """What each law says, and where it is outside its range; DeepSeek's take 6ND here, attention's FLOPs left out."""
    compute = 6 * parameters * tokens
    rows = [("DeepSeek's rate", deepseek_rate, (compute,), "{:.2g}"),
            ("Step Law's rate", step_law_rate, (parameters, tokens), "{:.2g}"),
            ("DeepSeek's batch", deepseek_batch, (compute,), "{:,.0f} tokens"),
            ("Step Law's batch", step_law_batch, (tokens,), "{:,.0f} tokens")]
    print(f"\n{parameters:.3g} parameters (without embeddings), {tokens:.3g} tokens, 6ND = {compute:.3g} FLOPs")
    for name, law, arguments, form in rows:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = law(*arguments)
        print(f"{name:18} {form.format(value):>20}" + "".join(f"\n    outside its range: {w.message}" for w in caught))
    rate, beta1, beta2, eps = scale_adam(4, 1.0)
    print(f"4 times the batch: {rate:g} times the rate, betas 0.9 and 0.95 -> {beta1:.2g} and {beta2:.2g}, eps 1e-8 -> "
          f"{eps:.0e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parameters", nargs="?", type=float, default=1e9, help="without embeddings")
    parser.add_argument("tokens", nargs="?", type=float, default=45e9)
    parser.error = lambda message: parser.exit(2, f"error: {message}; see `python schedule.py --help`\n")
    args = parser.parse_args()
    if not (1 <= args.parameters <= 1e15 and 1 <= args.tokens <= 1e18):
        parser.error("parameters must lie between 1 and 1e15, tokens between 1 and 1e18")
    print_shapes()
    print_laws(args.parameters, args.tokens)
