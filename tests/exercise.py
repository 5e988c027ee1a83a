"""Exercises: one function of the project is emptied in a copy; write it again until the project's own tests pass.

    python tests/exercise.py list
    python tests/exercise.py start rope       # copies the project to exercises/rope and empties the function there
    python tests/exercise.py check rope       # runs the tests that must pass
    python tests/exercise.py solution rope    # prints the function as the project has it

Docstring, shapes and source stay; the rest of the project works as ever, so you can also train with what you wrote.
"""

import argparse
import ast
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# name: (file, function, what it is, tests that need it). In the order of the workshop, easy ones first in each part.
EXERCISES = {
    "bpe": ("tokenizer.py", "bpe_merges", "train a byte-pair encoding", ["test_tokenizer.py::test_merges_by_hand"]),
    "best-fit": ("data.py", "pack_best_fit", "pack documents into rows, longest first",
                 ["test_data.py::test_best_fit_by_hand", "test_data.py::test_best_fit_by_brute_force"]),
    "mixture": ("data.py", "dealt", "deal sequences to sources so that every stretch has the mixture",
                ["test_data.py::test_interleave_deals_each_sequence_once_in_exact_shares",
                 "test_data.py::test_whole_numbers_are_dealt_exactly_once_an_epoch"]),
    "document-mask": ("model.py", "visible_keys", "which keys a query may see",
                      ["test_model.py::test_the_mask_by_brute_force", "test_model.py::test_how_far_a_layer_sees"]),
    "attention": ("model.py", "dense_attention", "softmax(QK^T)V with grouped heads and a sink",
                  ["test_model.py::test_the_definition_with_a_sink_of_no_weight_is_the_fused_kernel",
                   "test_model.py::test_attention_equals_brute_force"]),
    "rope": ("model.py", "apply_rope", "turn queries and keys by their position",
             ["test_model.py::test_rope_turns_pair_zero_fastest_and_depends_on_distance_alone"]),
    "kv-cache": ("model.py", "KVCache.append", "keep keys and values, so that a step reads one token",
                 ["test_model.py::test_cached_logits_equal_uncached"]),
    "wsd": ("schedule.py", "wsd", "warm up, stay, decay",
            ["test_schedule.py::test_wsd_by_hand", "test_schedule.py::test_last_step_has_exactly_the_final_rate"]),
    "adamw": ("schedule.py", "adamw", "one update: moments, their correction, decay",
              ["test_schedule.py::test_adamw_equals_torch"]),
    "newton-schulz": ("schedule.py", "newton_schulz", "make all singular values of an update nearly 1", [
        "test_schedule.py::test_newton_schulz_equals_torch_and_keeps_the_singular_vectors"]),
    "sqrt-rule": ("schedule.py", "scale_rate", "the rate of a larger batch",
                  ["test_schedule.py::test_larger_batches_want_higher_rates"]),
    "loss": ("model.py", "losses_and_slope", "next-token losses and their gradient by the logits",
             ["test_model.py::test_loss_and_gradients_equal_the_plain_ones"]),
    "bits-per-byte": ("evals.py", "bits_per_byte", "a loss that two tokenizers can be compared by",
                      ["test_evals.py::test_bits_per_byte_and_its_error_by_hand_whatever_the_batch"]),
    "sampling": ("sample.py", "filter_logits", "temperature, top-k, top-p and min-p",
                 ["test_sample.py::test_filters_by_hand"]),
    "dpo": ("posttrain.py", "preference_loss", "DPO and APO", [
        "test_posttrain.py::test_preference_losses_and_gradients_equal_trls"]),
    "advantages": ("posttrain.py", "advantages", "which of a group's answers are better than the rest",
                   ["test_posttrain.py::test_advantages_penalty_and_weights_by_hand"]),
    "grpo": ("posttrain.py", "policy_loss", "the clipped policy gradient",
             ["test_posttrain.py::test_clipping_and_kl_by_hand"]),
    "merge": ("posttrain.py", "merge", "average the weights of runs",
              ["test_posttrain.py::test_merge_loads_and_refuses_other_configs"]),
}


def find(source, name):
    """The node of the function NAME or CLASS.METHOD in a source text."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    return node


def emptied(source, name):
    """The source with the function's body taken out; its docstring stays."""
    node, lines = find(source, name), source.splitlines(keepends=True)
    first = node.body[1] if ast.get_docstring(node) else node.body[0]
    indent = " " * first.col_offset
    hole = f'{indent}raise NotImplementedError("write {name}")  # YOUR CODE HERE\n'
    return "".join([*lines[:first.lineno - 1], hole, *lines[node.end_lineno:]])


def start(name, folder):
    file, function, *_ = EXERCISES[name]
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("exercises", "data", "runs", ".*", "__pycache__"))
    path = folder / file
    path.write_text(emptied(path.read_text("utf-8"), function), "utf-8")
    return path, find(path.read_text("utf-8"), function).lineno


def check(name, folder):
    """Exit status of the tests: 0 if all pass."""
    tests = [f"tests/{test}" for test in EXERCISES[name][3]]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider",
                           "--tb=short", *tests], cwd=folder).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "start", "check", "solution"))
    parser.add_argument("name", nargs="?", metavar="NAME")
    args = parser.parse_args()
    if args.command == "list":
        for name, (file, function, about, _) in EXERCISES.items():
            print(f"{name:14} {file:13} {function:16} {about}")
        return
    if args.name not in EXERCISES:
        parser.error(f"{args.command} which? Give one of {', '.join(EXERCISES)}")
    folder, (file, function, about, tests) = ROOT / "exercises" / args.name, EXERCISES[args.name]
    if args.command == "solution":
        source = (ROOT / file).read_text("utf-8")
        print(ast.get_source_segment(source, find(source, function)))
    elif args.command == "start":
        if folder.exists():
            parser.error(f"{folder.relative_to(ROOT)} exists: go on there, or remove it to begin again")
        path, line = start(args.name, folder)
        print(f"{about}: write {function} in {path.relative_to(ROOT)}, line {line}\n"
              f"then: python tests/exercise.py check {args.name}\nwhich runs {', '.join(tests)}")
    elif not folder.exists():
        parser.error(f"begin with: python tests/exercise.py start {args.name}")
    else:
        sys.exit(check(args.name, folder))


if __name__ == "__main__":
    main()
