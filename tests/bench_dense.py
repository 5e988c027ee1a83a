"""Training speed of the laptop model here against another checkout, step by step in turn, in one process.

    python tests/bench_dense.py ../other-checkout

Prints the median time of a step of each, and the median of the ratios of neighbouring steps: a host whose speed
drifts moves both.
"""

import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch


def load(root: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, root / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    source = (root / "model.py").read_text("utf-8").replace('"nanoplaybook::', f'"{name}::')  # operators are global
    sys.path.insert(0, str(root))
    exec(compile(source, str(root / "model.py"), "exec"), module.__dict__)
    sys.path.remove(str(root))
    sys.modules.pop("tokenizer", None)  # each checkout has its own
    return module


def main() -> None:
    here = load(Path(__file__).resolve().parent.parent, "here")
    there = load(Path(sys.argv[1]).resolve(), "there")
    tokens, starts = torch.randint(8192, (16, 128)), torch.arange(0, 2049, 64, dtype=torch.int32)
    jobs = []
    for module in (here, there):
        torch.manual_seed(0)
        model = module.GPT(module.PRESETS["laptop"])
        model.compute_dtype = torch.bfloat16
        jobs.append((module, model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), []))
    for _ in range(int(sys.argv[2]) if sys.argv[2:] else 120):
        for module, model, optimizer, times in jobs:
            begin = time.perf_counter()
            if hasattr(module, "cross_entropy"):  # a checkout from before the fused head
                loss = module.cross_entropy(model(tokens, starts), tokens)
            else:
                loss, _ = model(tokens, starts, targets=tokens)
            (loss / tokens.numel()).backward()
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - begin)
    here, there = (times[1:] for *_, times in jobs)
    print(
        f"here {statistics.median(here) * 1e3:.1f} ms, there {statistics.median(there) * 1e3:.1f} ms a step of 2,048 "
        "tokens; "
        f"here takes {statistics.median(a / b for a, b in zip(here, there)):.3f} times as long"
    )


if __name__ == "__main__":
    main()
