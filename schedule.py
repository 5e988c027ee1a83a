"""Hyperparameters: the optimizer, learning-rate schedules, loss spikes, and laws of rate, batch size and loss.

The playbook's choices: AdamW with betas 0.9 / 0.95, weight decay 0.1 on everything but the embedding (2.189 with decay
on it, 2.202 without: noise), gradients clipped at norm 1. Warmup-stable-decay (WSD) ends as low as cosine (2.204 both
with a 10 % decay; 2.184 with 20 %), and a longer run can resume from the checkpoint before the decay. SmolLM3: 2e-4,
2000 steps of warmup, linear to zero over the last 11 % of the steps.

    python schedule.py               # the schedules side by side; the laws for 1B parameters and 45B tokens
    python schedule.py 3.08B 11.1T   # the laws for another size and length
"""

import math
import warnings
from dataclasses import dataclass
from unittest.mock import patch

from tokenizer import Parser, UserError, number, run

import numpy as np
import torch
from torch.distributed.tensor import DTensor


# ---- learning-rate schedules ----------------------------------------------------------------------------------
# The last step, `total - 1`, has exactly the final rate.
# The shape of a decay: 1 at its start (progress 0), 0 at its end (progress 1). Add yours here.
DECAYS = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),  # "1-sqrt" (Haegele et al. 2024): drops fast, then stays low
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


def warmup(step, warmup_steps):
    """Share of the peak rate: never 0, and 1 from step warmup_steps - 1 on."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def wsd(step, total, warmup_steps, decay_steps, decay="linear", final=0.0):
    """Warmup-stable-decay (Hu et al. 2024), as a share of the peak: rises, stays at 1, falls to `final` at the end."""
    progress = (step + 1 - (total - decay_steps)) / max(1, decay_steps)  # of the decay: 1 at step total - 1
    falling = DECAYS[decay](min(1.0, max(0.0, progress)))
    return warmup(step, warmup_steps) * (final + (1 - final) * falling)


def cosine(step, total, warmup_steps, decay_steps=0, decay="", final=0.1):
    """Warmup, then half a cosine down to `final` at step total - 1 (Loshchilov and Hutter 2017)."""
    return wsd(step, total, warmup_steps, total - warmup_steps, "cosine", final)


def multistep(step, total, warmup_steps, *_):
    """DeepSeek LLM: 1 for 80 % of the steps, then sqrt(0.1) = 0.316 for 10 %, then 0.1 for the last 10 %."""
    drops = (step >= round(0.8 * total)) + (step >= round(0.9 * total))
    return warmup(step, warmup_steps) * 0.1 ** (drops / 2)


# Add yours here: (step, total, warmup_steps, decay_steps, decay, final) -> share of the peak rate
SCHEDULES = {"wsd": wsd, "cosine": cosine, "multistep": multistep}


def learning_rate(recipe, curriculum, step):
    """The rate of the update that begins at a step, for a Recipe and its Curriculum. A stage with its own rate warms up
    and follows a cosine to 0. The others share the run's schedule, times sqrt(their batch / the recipe's)."""
    begins, number = curriculum.begins, curriculum.stage(step)
    stage, begin = curriculum.stages[number], begins[number]
    if stage.learning_rate:
        return stage.learning_rate * cosine(step - begin, begins[number + 1] - begin, stage.warmup_steps, final=0.0)
    last = max(i for i, stage in enumerate(curriculum.stages) if not stage.learning_rate)
    before, total = begins[last:last + 2]
    decay = total - before if recipe.decay_share == -1 else round(recipe.decay_share * total)
    share = SCHEDULES[recipe.schedule](step, total, recipe.warmup_steps, decay, recipe.decay_shape, recipe.final_share)
    return recipe.learning_rate * share * math.sqrt(curriculum.batches[number] / recipe.batch_tokens)


# ---- the optimizer --------------------------------------------------------------------------------------------
def parameter_groups(model, weight_decay):
    """Named groups of parameters, all with weight decay but `embedding`, as in SmolLM3: `head` (untied), `gain` (norms,
    other vectors), `matrix` (hidden ones), `stacked` (3 dimensions: experts, convolutions)."""
    groups = {}
    for name, parameter in model.named_parameters():
        kind = ("gain" if parameter.ndim < 2 or "bias" in name else "embedding" if "embed_" in name
                else "head" if "lm_head" in name else "matrix" if parameter.ndim == 2 else "stacked")
        groups.setdefault(kind, []).append(parameter)
    return [{"name": kind, "params": params, "weight_decay": 0.0 if kind == "embedding" else weight_decay}
            for kind, params in groups.items()]


def adam_direction(mean, square, step, beta1, beta2, eps):
    """Adam's update for a rate of 1 (Kingma and Ba 2015): the mean gradient over the root of its mean square, both
    averages corrected for their start at 0. At most about 1 in every weight, however steep the loss is there."""
    return mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)


def adamw(weight, gradient, mean, square, step, rate, beta1, beta2, eps, decay):
    """(weight, mean, square) after update number `step`, from 1; both start at 0 (Loshchilov and Hutter 2019). Decay
    added to the gradient would be divided, too; here all weights shrink alike. For reading: training takes torch's."""
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient**2
    return weight - rate * (adam_direction(mean, square, step, beta1, beta2, eps) + decay * weight), mean, square


def newton_schulz(gradient):
    """What Muon steps along instead of a matrix U S V^T: about U V^T, with all singular values near 1, so that rare
    directions are learned as fast as common ones (Jordan et al. 2024). Each round turns a singular value s into
    3.4445 s - 4.775 s^3 + 2.0315 s^5, which lifts the small ones; five leave those above 0.01 between 0.68 and 1.14.
    For reading: training takes torch's, which transposes tall matrices first, so that the products are smaller."""
    x = gradient / gradient.norm()  # no singular value is above 1
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


class Optimizers:
    """torch optimizers that step as one; `torch.distributed.checkpoint.state_dict` takes `.optimizers`."""
    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.found_inf = None  # a float tensor of one element; 1 makes `step` leave weights and moments unchanged

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.found_inf = self.found_inf  # a fused one reads it on the device, so that the host need not wait
            if optimizer.defaults.get("fused") or not self.found_inf:
                optimizer.step()

    def update_to_weight(self):
        """The largest norm of AdamW's last step over the norm of the matrix that it moved; 0 before the first step."""
        fused, largest = self.optimizers[0], 0.0
        for group in fused.param_groups:
            for weight in (w for w in group["params"] if w.ndim == 2 and w in fused.state):
                moments = (fused.state[weight][name] for name in ("exp_avg", "exp_avg_sq", "step"))
                direction = adam_direction(*moments, *group["betas"], group["eps"])
                change = group["lr"] * direction.norm() / weight.norm()
                largest = max(largest, float(change.full_tensor() if isinstance(change, DTensor) else change))
        return largest


class Float32Muon(torch.optim.Muon):
    """torch's Muon takes its Newton-Schulz steps in bfloat16. A CPU without bfloat16 emulates it 20 times slower than
    fp32 (laptop model, 2 cores: 0.56 against 0.03 s a step), so this one stays in fp32."""
    def step(self, closure=None):
        with patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            return super().step(closure)


OPTIMIZERS = {"adamw": (), "muon": ("matrix",)}  # the parameter groups that Muon updates; AdamW updates the others


def build_optimizer(model, rate, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, name="adamw", dtype=torch.bfloat16):
    """torch's fused AdamW; with "muon", torch's Muon for OPTIMIZERS' groups, with Moonlight's settings (Liu et al.
    2025), as in the playbook: updates times 0.2 sqrt(max(rows, columns)), so that AdamW's rate and decay fit; 5 steps
    in `dtype`. The playbook found Muon better when tuned at 1B, but it diverged more at 3B: SmolLM3 kept AdamW."""
    mine, rest = [], []
    for group in parameter_groups(model, weight_decay):
        (mine if group["name"] in OPTIMIZERS[name] else rest).append(group)
    adamw = torch.optim.AdamW(rest, lr=rate, betas=betas, eps=eps, fused=True)
    if not mine:
        return Optimizers(adamw)
    muon = torch.optim.Muon if dtype == torch.bfloat16 else Float32Muon
    return Optimizers(adamw, muon(mine, lr=rate, weight_decay=weight_decay, momentum=0.95, nesterov=True, ns_steps=5,
                                  adjust_lr_fn="match_rms_adamw"))


# ---- loss spikes ----------------------------------------------------------------------------------------------
class Guard:
    """Watches loss and gradient norm for spikes (OLMo-core's rule: more than 6 standard deviations above the mean of
    the last 128 values; silent until there are 63) and does what `--guard` says:
    warn    log it: the playbook lets a run continue through spikes that it recovers from
    skip    also leave this update out (OLMo-core's SkipStepAdamW)
    rewind  also, if the loss is not back after FAST updates, load a checkpoint from before the spike, skip the batches
            around it and clip at half for a while (PaLM: the same batches did no harm with other weights). Each
            further try skips twice as many; after TRIES the run ends.
    A spike is over after three losses in a row within 2 standard deviations of the mean before it: `fast` in at most
    FAST updates, `slow` in at most LOST. A smoothed loss that stays HIGH above its lowest, or above guessing, for LEAST
    updates is trouble: `diverged`, or `plateaued higher` below guessing."""
    WINDOW, LEAST, SIGMAS, FAST, LOST, HIGH = 128, 63, 6.0, 10, 256, 0.5
    TRIES, MARGIN = 3, 16  # rewinds for one spike; batches skipped on either side of it

    def __init__(self, policy, device, guessing=math.inf):
        """guessing: the loss of a model that knows nothing, ln(vocab_size) nats."""
        self.policy, self.guessing = policy, guessing
        self.seen = torch.zeros(2, self.WINDOW, device=device)  # losses and norms, a ring
        self.stopped = torch.zeros((), device=device)  # 1 after a value that is not finite: no update follows
        # All the rest is plain numbers, which a checkpoint keeps.
        self.count, self.spikes = 0, 0  # updates and spikes of the loss so far
        self.began, self.back, self.calm = None, 0.0, 0  # the spike's step; the loss to come back to; losses below it
        self.smooth, self.lowest, self.high = 0.0, 1e9, 0  # averaged loss, its lowest, updates far above that
        self.skipped, self.tight_until, self.rewinds = [], 0, 0  # [begin, end) of steps without an update

    def judge(self, loss, norm):
        """On the device: whether this update is a spike, whether to drop it, and the window's mean and deviation."""
        new = torch.stack((loss, norm))  # [2]
        seen = self.seen[:, :min(self.count, self.WINDOW)]
        mean, deviation, spike = new, torch.zeros_like(new), torch.zeros_like(loss)
        if self.count >= self.LEAST:
            mean, deviation = seen.mean(1), seen.std(1)
            spike = (new > mean + self.SIGMAS * deviation).any().float()
        self.stopped = torch.maximum(self.stopped, 1 - new.isfinite().all().float())
        self.seen[:, self.count % self.WINDOW] = new
        self.count += 1
        dropped = torch.maximum(self.stopped, spike) if self.policy == "skip" else self.stopped
        return {"spike": spike, "dropped": dropped, "stopped": self.stopped, "usual": mean[0], "spread": deviation[0]}

    def follow(self, step, values):
        """On the host, after `judge`: the event to log, if any: spike, over, trouble (with "text"), rewind."""
        loss = values["loss"]
        self.smooth = 0.95 * (self.smooth or loss) + 0.05 * loss
        self.lowest = min(self.lowest, self.smooth)
        self.high = self.high + 1 if self.smooth > min(self.lowest, self.guessing) + self.HIGH else 0
        if self.high == self.LEAST:
            kind = "diverged" if self.smooth > self.guessing else "plateaued higher"
            return {"event": "trouble", "step": step, "kind": kind, "text": f"{kind}: the loss has stayed near "
                    f"{self.smooth:.2f} for {self.LEAST} updates; its lowest was {self.lowest:.2f}; lower "
                    "--learning_rate, rewind, or look at the data"}
        if self.began is None:
            back = values["usual"] + 2 * values["spread"]
            if not values["spike"] or self.policy == "warn" and loss <= back:  # a large gradient alone is no alarm
                return None
            self.began, self.back, self.calm = step, back, 0
            self.spikes += loss > back
            return {"event": "spike", "step": step, "text": f"a spike: loss {loss:.3f} where {values['usual']:.3f} is "
                    f"usual, gradient norm {values['grad_norm']:.2f}" + ", update left out" * (self.policy == "skip")}
        began, lasted = self.began, step - self.began
        self.calm = self.calm + 1 if loss <= self.back else 0
        if self.calm == 3 or lasted >= self.LOST:
            lasted, self.began = lasted - self.calm + 1, None
            kind = "not recovered" if self.calm < 3 else "fast" if lasted <= self.FAST else "slow"
            return {"event": "over", "step": step, "kind": kind, "began": began, "lasted": lasted,
                    "text": f"the spike at step {began:,}: {kind}, {lasted} updates"}
        if self.policy == "rewind" and lasted >= self.FAST and not self.calm:
            return {"event": "rewind", "step": step, "began": began}
        return None

    def verdict(self, losses, held_out, excess):
        """How a run ended, in words; "" if nothing is unusual. losses: nats a token of each update; held_out: of
        held-out text, mixed like the last batches, which costs no less in a healthy run; excess: `laptop_excess`."""
        tenth = max(1, len(losses) // 10)
        first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
        ends = f"the loss ends at {last:.2f} nats a token"
        if last > 1.1 * self.guessing or last > max(first, self.guessing) + 0.1:
            return (f"diverged: {ends}, where guessing costs {self.guessing:.2f}; lower --learning_rate, then look at "
                    "the data, the initialisation and the precision")
        if len(losses) >= 10 and last > 0.9 * self.guessing and first - last < 0.01 * len(losses):
            return f"flat: {ends} and began at {first:.2f}; raise --learning_rate or train longer"
        if self.high >= self.LEAST or last > 1.1 * held_out or excess > 1.1:
            law = f"; held-out bits per byte are {excess:.2f} times what this size and length reach" * (excess > 1.1)
            return (f"plateaued higher than expected: {ends} (lowest average {self.lowest:.2f}, held-out text "
                    f"{held_out:.2f}){law}; look at the batches and the labels, then try another --learning_rate")
        if self.spikes or max(losses) > 1.1 * self.guessing:
            return f"spike and {'not ' * (self.began is not None)}recovered: from up to {max(losses):.2f}, {ends}"
        return ""

    def after_gap(self, step):
        """The first step from this one on whose batch is not skipped."""
        while gap := next((end for begin, end in self.skipped if begin <= step < end), None):
            step = gap
        return step

    def state(self, step):
        """As plain numbers, for a checkpoint."""
        kept = {name: value for name, value in vars(self).items() if name not in ("policy", "guessing", "stopped")}
        return kept | {"step": step, "seen": self.seen.tolist()}

    def restore(self, state):
        """Takes over a `state`; what a value that is not finite stopped may continue."""
        seen, fresh = self.seen, self.state(0)
        if any(type(state[name]) is not type(fresh[name]) for name in {*fresh} - {"began"}):
            raise ValueError("the state of the guard is damaged")
        vars(self).update({name: state[name] for name in fresh if name != "step"})
        [range(begin, end) for begin, end in [*self.skipped, (0, self.began or 0)]]  # fails if one is no step
        self.seen, self.stopped = seen.copy_(torch.tensor(state["seen"])), self.stopped * 0


# ---- laws of rate and batch -----------------------------------------------------------------------------------
def check_range(law, value, low, high, unit):
    """Warns unless low <= value <= high."""
    if not low <= value <= high:
        warnings.warn(f"{law} holds for {low:g} to {high:g} {unit}, not for {value:.3g}", stacklevel=3)


def deepseek_rate(compute):
    """Peak rate 0.3118 C^-0.1250 (DeepSeek LLM 2024), C in non-embedding FLOPs."""
    check_range("DeepSeek's rate", compute, 1e17, 2e19, "FLOPs")
    return 0.3118 * compute**-0.1250


def deepseek_batch(compute):
    """Batch in tokens, 0.2920 C^0.3271 (DeepSeek LLM 2024), C in non-embedding FLOPs."""
    check_range("DeepSeek's batch", compute, 1e17, 2e19, "FLOPs")
    return 0.2920 * compute**0.3271


def step_law_rate(parameters, tokens):
    """Peak rate 1.79 N^-0.713 D^0.307 (Step Law, Li et al. 2025), N without embeddings."""
    check_range("Step Law's rate", parameters, 0.06e9, 1.1e9, "parameters")
    check_range("Step Law's rate", tokens, 2e9, 100e9, "tokens")
    return 1.79 * parameters**-0.713 * tokens**0.307


def step_law_batch(tokens):
    """Batch in tokens, 0.58 D^0.571, whatever the size (Step Law, Li et al. 2025)."""
    check_range("Step Law's batch", tokens, 2e9, 100e9, "tokens")
    return 0.58 * tokens**0.571


def scale_rate(rate, k):
    """The rate for a batch k times as large: sqrt(k) times as HIGH (playbook; many summaries invert it). The variance
    of an update, rate^2 / batch, then stays. Holds while both batches are below the critical size."""
    check_range("square-root scaling", k, 1 / 16, 16, "times the batch")
    return rate * math.sqrt(k)


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
    parameters: tuple[float, float] = (70e6, 16e9)  # the range of the fit
    tokens: tuple[float, float] = (5e9, 500e9)

    def loss(self, parameters, tokens):
        """Predicted loss; warns outside the range of the fit."""
        check_range(self.source, parameters, *self.parameters, "parameters")
        check_range(self.source, tokens, *self.tokens, "tokens")
        return self.predict(parameters, tokens)["loss"]

    def predict(self, parameters, tokens):
        """A row for tables: the predicted loss, without a warning; `fitted`: inside the range of the fit."""
        (least, most), (fewest, longest) = self.parameters, self.tokens
        return {"parameters": parameters, "tokens": tokens,
                "loss": self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta,
                "fitted": least <= parameters <= most and fewest <= tokens <= longest}

    def optimum(self, compute):
        """(parameters, tokens) of the lowest loss for C = 6ND FLOPs: one more FLOP gains as much in either."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = G * (compute / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, compute / 6 / parameters

    def tokens_for(self, parameters):
        """The tokens for which this size is compute-optimal."""
        return (self.beta * self.B / (self.alpha * self.A) * parameters**self.alpha) ** (1 / self.beta)

    def parameters_for(self, tokens):
        """The compute-optimal size for so many tokens."""
        return (self.alpha * self.A / (self.beta * self.B) * tokens**self.beta) ** (1 / self.alpha)

    def tokens_to_reach(self, loss, parameters):
        """Tokens that a model of this size needs to reach a loss; inf if it never does."""
        gap = loss - self.E - self.A * parameters**-self.alpha
        return (self.B / gap) ** (1 / self.beta) if gap > 0 else math.inf


# Besiroglu et al. (2024) corrected the fit of Hoffmann et al. (2022), 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28: only
# theirs gives about 20 tokens a parameter.
CHINCHILLA = LossLaw("Besiroglu et al. 2024", 1.8172, 482.01, 2085.43, 0.3478, 0.3658)
# `fit_law` on twelve runs of the laptop's kind, within 1.7 % of each; bits per byte of held-out prose and code.
LAPTOP_LAW = LossLaw("fitted to the laptop's runs", 0.745, 8368, 19.69, 0.825, 0.2, (0.15e6, 7e6), (0.1e6, 10e6))


def laptop_excess(bits_per_byte, parameters, tokens, steps):
    """Held-out bits per byte of prose and code over what LAPTOP_LAW predicts; 1 where the law says nothing."""
    law = LAPTOP_LAW.predict(parameters, tokens)
    known = law["fitted"] and steps >= 100 and {"prose", "code"} <= bits_per_byte.keys()
    return (bits_per_byte["prose"] + bits_per_byte["code"]) / 2 / law["loss"] if known else 1.0


def overtrain(law, compute, k):
    """`LossLaw.predict` of a model k times smaller than the compute-optimal one, on k times the tokens. `loss_penalty`:
    how much higher its loss is. `inference_saving`: share of a generated token's FLOPs that it saves.
    `compute_to_match`: times the compute to reach the same loss (inf: never)."""
    parameters, tokens = law.optimum(compute)
    best, row = law.predict(parameters, tokens)["loss"], law.predict(parameters / k, tokens * k)
    return row | {"loss_penalty": row["loss"] - best, "inference_saving": 1 - 1 / k,
                  "compute_to_match": law.tokens_to_reach(best, parameters / k) / (tokens * k)}


def fit_law(points, source="fit"):
    """The law with the least squared error on points (parameters, tokens, loss): for each pair of exponents on a grid,
    the best E, A and B >= 0 solve a linear problem. UserError if no law fits."""
    N, D, L = np.array(points, dtype=float).T
    grid, fits = np.arange(0.05, 1.21, 0.025), []
    for alpha in grid:
        for beta in grid:
            columns = np.stack([np.ones_like(N), N**-alpha, D**-beta], 1)
            scale = columns.max(0)
            solution = np.linalg.lstsq(columns / scale, L, rcond=None)[0] / scale
            if solution.min() >= 0:
                fits.append((((columns @ solution - L) ** 2).sum(), alpha, beta, *solution))
    if not fits:
        raise UserError("no law whose loss falls with size and tokens fits these runs; train longer ones")
    _, alpha, beta, E, A, B = map(float, min(fits))
    return LossLaw(source, E, A, B, alpha, beta, (N.min() / 2, N.max() * 2), (D.min() / 2, D.max() * 2))


# ---- measuring the batch size and the rate --------------------------------------------------------------------
def gradient_noise(single, mean, n):
    """Unbiased (|G|^2, tr(S)) from n gradients' mean squared norm and the squared norm of their mean (McCandlish et al.
    2018, appendix A.2). tr(S) / |G|^2 is the noise scale in examples, the batch whose noise equals its signal; of
    several batches average both, then divide. The critical batch size (see `ablate.py branch`) is far larger."""
    noise = (single - mean) * n / (n - 1)
    return mean - noise / n, noise


def critical_multiple(losses, epsilon):
    """The largest k whose loss is within epsilon of the loss of every smaller k (Merrill et al. 2025). `losses`: {k: of
    a branch with k times the batch and sqrt(k) times the rate}."""
    return max(k for k in losses if all(losses[k] <= loss + epsilon for smaller, loss in losses.items() if smaller < k))


def smoothed(losses, memory=0.9):
    """Exponential average of the losses so far, corrected for its start at 0."""
    out, mean = [], 0.0
    for i, loss in enumerate(losses, 1):
        mean = memory * mean + (1 - memory) * loss
        out.append(mean / (1 - memory**i))
    return out


def suggest_rates(rates, losses):
    """(rate where the smoothed loss falls fastest over 10 steps, a tenth of the rate where it is lowest). A good
    peak rate lies between the two: a run stays at its peak far longer than the test did (rule of thumb)."""
    smooth = smoothed(losses)
    width = min(10, len(smooth) - 1)
    fall = min(range(len(smooth) - width), key=lambda i: smooth[i + width] - smooth[i])
    return rates[fall + width // 2], rates[smooth.index(min(smooth))] / 10


# ---- command line ---------------------------------------------------------------------------------------------
def main():
    parser = Parser(__doc__)
    parser.add_argument("parameters", nargs="?", type=number, default=1e9, help="without embeddings")
    parser.add_argument("tokens", nargs="?", type=number, default=45e9)
    args = parser.parse_args()
    if not (1 <= args.parameters <= 1e15 and 1 <= args.tokens <= 1e18):
        raise UserError("give between 1 and 1e15 parameters and between 1 and 1e18 tokens")
    shapes = {f"wsd {decay}": ("wsd", decay) for decay in DECAYS}
    shapes |= {name: (name, "linear") for name in SCHEDULES if name != "wsd"}
    print("step  " + "".join(f"{name:>14}" for name in shapes))
    for step in range(0, 40, 3):
        shares = (SCHEDULES[name](step, 40, 4, 8, decay, 0.0) for name, decay in shapes.values())
        print(f"{step:4}  " + "".join(f"{share:14.3f}" for share in shares))
    compute = 6 * args.parameters * args.tokens  # DeepSeek's laws would also count attention's FLOPs
    print(f"\n{args.parameters:.3g} parameters without embeddings, {args.tokens:.3g} tokens, 6ND = {compute:.3g} FLOPs")
    warnings.showwarning = lambda message, *_, **__: print(f"outside its range: {message}")
    laws = {"DeepSeek's rate": deepseek_rate(compute), "DeepSeek's batch, tokens": deepseek_batch(compute),
            "Step Law's rate": step_law_rate(args.parameters, args.tokens),
            "Step Law's batch, tokens": step_law_batch(args.tokens)}
    print(*(f"{name:25}{value:12.3g}" for name, value in laws.items()), sep="\n")
    print("\nA smaller model trained longer, at this compute, beside the compute-optimal one (Besiroglu et al. 2024):")
    for k in (1, 1.5, 2, 3, 4, 8):
        print("{:3g}x smaller, {tokens:.3g} tokens: loss {loss_penalty:.3f} higher, inference {inference_saving:.0%} "
              "cheaper, {compute_to_match:.2f} x compute to match".format(k, **overtrain(CHINCHILLA, compute, k)))


if __name__ == "__main__":
    run(main)
