"""Runs of the laptop recipe that are broken on purpose, and ordinary ones, with the verdict of each.

    python tests/broken_runs.py                # all, about 4 minutes; writes runs/broken-NAME
    python tests/broken_runs.py rate labels    # some

After each verdict it prints what tests/test_schedule.py holds: the updates to a number, the means of their losses, and
the other arguments of `Guard.verdict`.
"""

import contextlib
import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from schedule import Guard


def random_half(step, tokens, targets):
    """Every second batch is noise."""
    noise = torch.randint(8192, (2, *tokens.shape), generator=torch.Generator().manual_seed(step))
    return noise.unbind() if step % 2 else (tokens, targets)


def labels_by_two(step, tokens, targets):
    """The label of a token is the one after the next."""
    return tokens, torch.nn.functional.pad(targets[:, 1:], (0, 1), value=-100)


SHORT = "--tokens 76800 --batch_tokens 512"
RUNS = {  # name: (flags of `python train.py`, what happens to a batch)
    "rate": (f"{SHORT} --learning_rate 1.0 --warmup_steps 5", None),
    "init": (f"{SHORT} --initializer_range 5", None),
    "random": (SHORT, random_half),
    "labels": ("--tokens 300k", labels_by_two),
    "slow": (f"{SHORT} --learning_rate 1e-6", None),
    "warmup": ("--tokens 76800 --learning_rate 1.0", None),
    "ordinary": (SHORT, None),
    "seed": ("--tokens 300k --seed 1", None),
    "20k": ("--tokens 20k --seed 2", None),
}
load, judge = train.Loader.get, Guard.verdict


def main():
    for name in sys.argv[1:] or RUNS:
        (flags, spoil), found = RUNS[name], []

        def spoiled(self, now, *following, spoil=spoil):
            tokens, targets, starts = load(self, now, *following)
            return *(spoil(now[0], tokens, targets) if spoil else (tokens, targets)), starts

        def recorded(self, *arguments, found=found):
            found += judge(self, *arguments), *arguments
            return found[0]

        train.Loader.get, Guard.verdict = spoiled, recorded
        with contextlib.redirect_stdout(io.StringIO()):
            train.pretrain(train.parse(flags.split())[1], Path("runs") / f"broken-{name}")
        verdict, losses, held_out, excess = found
        k = max(1, len(losses) // 30)
        means = [round(sum(losses[i:i + k]) / len(losses[i:i + k]), 2) for i in range(0, len(losses), k)]
        print(f"{name}: train.py {flags}: {verdict or 'nothing unusual'}")
        print((k, means, round(held_out, 2), round(excess, 2)), flush=True)


if __name__ == "__main__":
    main()
