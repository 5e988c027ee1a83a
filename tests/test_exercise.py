"""Every exercise fails when its function is emptied and passes with the project's own, in a copy of the project."""

import os
import subprocess
import sys
from pathlib import Path

import exercise
import pytest

# One process imports torch; each check is a fork of it.
CHECKS = """
import os, sys, torch, pytest, exercise
from pathlib import Path
for name in sys.argv[2:]:
    folder = Path(sys.argv[1], name)
    path, _ = exercise.start(name, folder)
    for said in ("emptied", "solved"):
        if said == "solved":
            path.write_text((exercise.ROOT / path.name).read_text("utf-8"), "utf-8")
        if not (child := os.fork()):
            os.chdir(folder)
            sys.path.remove(os.path.dirname(exercise.__file__))
            os._exit(pytest.main(["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=no",
                                  *(f"tests/{test}" for test in exercise.EXERCISES[name][3])]))
        print("\\n", name, said, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_every_exercise_fails_when_emptied_and_passes_when_solved(tmp_path):
    names, path = list(exercise.EXERCISES), str(Path(exercise.__file__).parent)
    said = subprocess.run([sys.executable, "-c", CHECKS, str(tmp_path), *names], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path}).stdout
    wrong = [name for name in names if f" {name} emptied 1\n" not in said or f" {name} solved 0\n" not in said]
    assert not wrong, (wrong, said[-3000:])


def test_the_commands(tmp_path, monkeypatch, capsys):
    for words, text in ((["list"], "rope"), (["solution", "wsd"], "def wsd(")):
        monkeypatch.setattr(sys, "argv", ["exercise.py", *words])
        exercise.main()
        assert text in capsys.readouterr().out
    path, line = exercise.start("kv-cache", tmp_path / "kv")
    lines = path.read_text("utf-8").splitlines()
    assert lines[line - 1].startswith("    def append(") and sum("YOUR CODE HERE" in text for text in lines) == 1
