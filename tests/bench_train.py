"""What the loop costs beside the arithmetic of an update, on the laptop recipe and its data.

python tests/bench_train.py monitoring     # guard, log, noise scale and the watched steps, against a bare update
python tests/bench_train.py processes      # two gloo processes against one with two threads, the same global batch
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402


def bare_update(job: train.Job, step: int) -> None:
    """An update with nothing but what training needs."""
    for group in job.optimizer.param_groups:
        group["lr"] = job.rate(step)
    for piece in job.micro_batches(step, 1):
        part, extra = job.loss(*job.load(piece, None))
        (part + extra).backward()
    torch.nn.utils.clip_grad_norm_(job.model.parameters(), job.recipe.clip)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)


def monitoring(pairs: int = 400) -> None:
    """Bare and whole updates in turn, so that a drifting machine slows both alike; rare kinds count by their share."""
    recipe = train.RECIPES["laptop"]
    job = train.set_up(recipe, train.World(), Path("runs/none"), False)
    folder = Path(f"runs/bench-{time.time():.0f}")
    folder.mkdir(parents=True)
    meter = train.Meter(job, train.Log(folder, 0, recipe))
    seconds = {"bare": [], "whole": [], "noise scale": [], "watched": []}
    for step in range(pairs):
        begin = time.perf_counter()
        bare_update(job, step)
        middle = time.perf_counter()
        noisy, watched = step % 10 == 9, step % 10 == 4  # watched more often than in a run, to have enough of them
        values = job.update(step, step + 1, measure_noise=noisy, watched=watched).read()
        meter.count(step, step + 1, values, job.guard.follow(step + 1, values))
        seconds["bare"].append(middle - begin)
        seconds["noise scale" if noisy else "watched" if watched else "whole"].append(time.perf_counter() - middle)
    bare, whole, noise, watch = (statistics.median(seconds[kind][5:]) for kind in seconds)
    parts = {
        "guard and log": whole - bare,
        f"noise scale every {recipe.noise_every}": (noise - whole) / recipe.noise_every,
        f"watching every {recipe.watch_every}": (watch - whole) / recipe.watch_every,
    }
    print(
        f"a bare update {1000 * bare:.1f} ms; on top, in % of it: "
        + ", ".join(f"{name} {part / bare:.1%}" for name, part in parts.items())
        + f"; together {sum(parts.values()) / bare:.1%}"
    )


def processes(turns: int = 3) -> None:
    flags = ["train.py", "--tokens", "163840", "--eval-every", "1000", "--eval-tokens", "2048", "--name"]
    found = {"one": [], "two": []}
    for turn in range(turns):
        for name, command in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node=2"])):
            folder = f"bench-{time.time():.0f}"
            subprocess.run([sys.executable, *command, *flags, folder], check=True, capture_output=True)
            log = map(json.loads, Path("runs", folder, "log.jsonl").read_text("utf-8").splitlines())
            found[name].append(statistics.median([e["tokens_per_second"] for e in log if "loss" in e][5:]))
            print(f"{name} process(es): {found[name][-1]:,.0f} tokens/s")
    print(f"two processes / one: {statistics.median(found['two']) / statistics.median(found['one']):.2f}")


if __name__ == "__main__":
    {"monitoring": monitoring, "processes": processes}[sys.argv[1]]()
