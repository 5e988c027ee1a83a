"""Speed of this checkout beside another one, in turn: preparation, a short main job, training steps, sampling.

    git worktree add ../first 38fbb29
    python tests/bench_shapes.py ../first [ROUNDS]     # prints each figure and the ratio of the medians
"""

import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SAMPLING = """
import time, torch
from model import GPT, PRESETS
from sample import generate
torch.manual_seed(0)
model = GPT(PRESETS["laptop"]).eval()
for rows in 1, 16:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        list(generate(model, [1, 2, 3], 100, rows, temperature=0.0))
        times.append(time.perf_counter() - start)
    print(f"{100 * rows / min(times):,.0f} tokens/s")
"""


def timed(folder, *words):
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def speeds(folder, *words):
    said = subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True, text=True).stdout
    return [float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) tokens/s", said)]


def measure(folder):
    """{what: seconds, or tokens per second}."""
    shutil.rmtree(folder / "data/bench", ignore_errors=True)
    found = {"preparation, s": timed(folder, "data.py", "prepare", "--out", "data/bench")}
    found["main job with --tokens 4e5, s"] = timed(folder, "train.py", "--tokens", "4e5", "--name", "bench")
    found["training step, tokens/s"] = speeds(folder, "cost.py", "measure", "--seconds", "5")[0]
    one, many = speeds(folder, "-c", SAMPLING)
    return found | {"greedy sampling, batch 1, tokens/s": one, "the same, batch 16, tokens/s": many}


def main():
    other, rounds = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if sys.argv[2:] else 3
    for folder in (other, HERE):
        if not (folder / "data/laptop").exists():
            timed(folder, "train.py", "--tokens", "4e4", "--name", "bench")  # makes the data
    pairs = [(measure(other), measure(HERE)) for _ in range(rounds)]
    for what in pairs[0][0]:
        theirs, ours = ([round_[side][what] for round_ in pairs] for side in (0, 1))
        print(f"{what:36} other {statistics.median(theirs):10,.1f}  this {statistics.median(ours):10,.1f}  "
              f"this / other, pair by pair: {', '.join(f'{b / a:.2f}' for a, b in zip(theirs, ours))}")


if __name__ == "__main__":
    main()
