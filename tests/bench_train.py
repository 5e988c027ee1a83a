"""What the loop costs beside the arithmetic of an update, on the laptop recipe and its data.

    python tests/bench_train.py monitoring     # guard, log and watched numbers, against a bare update
    python tests/bench_train.py processes      # two gloo processes against one with two threads, the same global batch
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from checkpoint import Log, Saver  # noqa: E402


def bare_update(run: train.Run) -> None:
    """An update with nothing but what training needs."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.rate(run.step)
    for loss_of_piece in train.pretraining_losses(run, run.step):
        loss_of_piece()[0].backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip)
    run.optimizer.step()
    run.model.zero_grad(set_to_none=True)


def monitoring(pairs: int) -> None:
    """Bare and whole updates in turn, so that a drifting machine slows both alike; watching counts by its share."""
    recipe = train.RECIPES["laptop"]
    with tempfile.TemporaryDirectory() as folder:
        run = train.set_up(recipe, Path(folder))
        run.log = Log(run.folder)
        meter = train.Meter(run, Saver(run.folder, run.tokenizer))
        bare, whole, watched = [], [], []
        for run.step in range(pairs):
            begin = time.perf_counter()
            bare_update(run)
            middle = meter.mark = time.perf_counter()
            report = train.update(run, train.pretraining_losses(run, run.step), run.rate(run.step))
            run.step += 1
            meter.waiting.append(report)
            meter.read(0)
            end = time.perf_counter()
            bare.append(middle - begin)
            whole.append(end - middle)
            if run.step % 10 == 0:
                train.watch(run)
                watched.append(time.perf_counter() - end)
        meter.close()
    bare, whole, watched = (statistics.median(times[1:]) for times in (bare, whole, watched))
    print(f"a bare update {1000 * bare:.1f} ms; on top, in % of it: guard and log {whole / bare - 1:.1%}, watching at "
          f"every evaluation {watched / recipe.eval_every / bare:.1%}")


def processes(turns: int) -> None:
    found = {"one": [], "two": []}
    for _ in range(turns):
        for name, command in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node=2"])):
            folder = f"bench-{time.time():.0f}"
            subprocess.run([sys.executable, *command, "train.py", "--tokens", "160k", "--eval_every", "1000",
                            "--eval_tokens", "2k", "--name", folder], check=True, capture_output=True)
            speeds = [e["tokens_per_second"] for e in Log(Path("runs", folder)).entries() if "loss" in e]
            found[name].append(statistics.median(speeds[5:]))
            print(f"{name} process(es): {found[name][-1]:,.0f} tokens/s")
    print(f"two processes / one: {statistics.median(found['two']) / statistics.median(found['one']):.2f}")


if __name__ == "__main__":
    work, count = {"monitoring": (monitoring, 400), "processes": (processes, 3)}[sys.argv[1]]
    work(int(sys.argv[2]) if sys.argv[2:] else count)
