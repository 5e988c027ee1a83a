"""README.md and docs/*.md name only files, functions and flags that exist. Reads the sources; imports none of them."""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = README + "".join(page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md")))


@functools.cache
def names(file: str) -> dict[str, set[str]]:
    """What a file defines at its top level -> the methods and fields of a class, or the keys of a dict."""
    found = {}
    for node in ast.parse((ROOT / file).read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            targets = [part for line in node.body for part in getattr(line, "targets", [getattr(line, "target", line)])]
            found[node.name] = {getattr(part, "name", getattr(part, "id", "")) for part in targets}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = set()
        elif isinstance(node, ast.Assign):
            keys = node.value.keys if isinstance(node.value, ast.Dict) else ()
            for name in (part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)):
                found[name] = {key.value for key in keys if isinstance(key, ast.Constant)}
    return found


def test_files_and_names_exist():
    """`file.py`, and `file.py` `name`, `name.member` or `name["key"]`; `name` of `file.py`; the targets of links."""
    files = set(re.findall(r"`((?:tests/)?\w+\.py)`|(?:python|torchrun\b.*?) ([\w/]+\.py)", PAGES))
    assert not (missing := [file for pair in files for file in pair if not (ROOT / file).exists()]), missing
    spots = set(re.findall(r"`(\w+\.py)`\s`(\w+)(?:\.(\w+)|\[\"([\w.-]+)\"\])?`", PAGES))
    spots |= {(file, name, "", "") for name, file in re.findall(r"`(\w+)`\s(?:of|in)\s`(\w+\.py)`", PAGES)}
    assert len(spots) > 40
    missing = {spot for spot in spots if spot[1] not in names(spot[0])
               or (spot[2] or spot[3]) and (spot[2] or spot[3]) not in names(spot[0])[spot[1]]}
    assert not missing, sorted(missing)
    links = set(re.findall(r"\]\((?!http)([^)#]+)", PAGES))  # from README, or from a page in docs to another
    missing = [link for link in links if not any((root / link).exists() for root in (ROOT, ROOT / "docs"))]
    assert not missing, missing


def test_flags_of_readme_exist():
    """Each --flag is a literal of its file, or a field of a dataclass there, in train.py or in model.py."""
    commands = [re.split(r"\s#|[`;&]", command)[0] for command in re.findall(r"\b\w+\.py [^\n]*", README)]
    given = {(command.split()[0], flag) for command in commands for flag in re.findall(r" --([\w-]+)", command)}
    assert len(given) > 12
    given |= {("*.py", flag) for flag in re.findall(r"`--([\w-]+)", PAGES)}  # without a command: of any file
    for file, flag in given - {("train.py", "help")}:
        places = {place for name in (file, "train.py", "model.py") for place in ROOT.glob(name)}
        source = "\n".join(place.read_text("utf-8") for place in places)
        assert re.search(rf"^    {flag.replace('-', '_')}: |[\"']--{flag}[\"']", source, re.MULTILINE), (file, flag)


def test_the_data_of_the_recipes_has_its_commands(monkeypatch):
    """Each folder that a recipe at scale reads is made by a command of docs/playbook.md that data.py takes, with all
    sources of the recipe's mixtures and one tokenizer per recipe; the error about a missing folder names its data."""
    import data
    import train

    page = (ROOT / "docs/playbook.md").read_text("utf-8").split("## Data of the recipes")[1].split("\n## ")[0]
    made, shared = {}, {}  # folder: names of its sources, and its tokenizer
    monkeypatch.setattr(data, "Source", lambda where, *_, **__: where)
    monkeypatch.setattr(data, "summary", lambda out: None)
    monkeypatch.setattr(data.Tokenizer, "load", lambda path: path)
    monkeypatch.setattr(data, "prepare", lambda sources, out, tokenizer, *_: (
        made.update({out: set(sources)}), shared.update({out: tokenizer})))
    for command in re.findall(r"^python (data\.py prepare .*)", page.replace("\\\n", ""), re.MULTILINE):
        monkeypatch.setattr("sys.argv", command.split())
        data.main()
    for name in ("smollm2-135m", "baseline-1b", "smollm3"):
        folders = train.RECIPES[name].data.split(",")
        assert f"**`{name}`**" in page and set(folders) <= set(made), name
        sources = set().union(*(made[folder] for folder in folders))
        assert all(set(stage.mixture) <= sources for stage in train.RECIPES[name].stages)
        parts, tokens, size, disk = re.search(rf"\| `{name}` \| (.*) = (.*)T \| (.) \| (.*) TB \|", page).groups()
        assert float(tokens) == pytest.approx(sum(map(float, re.findall(r"[\d.]+(?= \+|$)", parts))), abs=6e-3)
        assert int(size) == (2 if train.RECIPES[name].model.vocab_size <= 2**16 else 4)
        assert float(disk) == pytest.approx(float(tokens) * int(size), rel=0.02)
        assert len({shared[folder] for folder in folders}) == 1 and None not in shared.values()
        with pytest.raises(data.UserError, match='"Data of the recipes" in docs/playbook.md.* prepare YOUR_TEXT'):
            data.source_folders(folders[0])  # the commands come first


def test_every_claim_has_a_command_that_parses():
    """Each row of "Claim by claim" names a command or links to it; each `change --try` is one that ablate.py takes."""
    import ablate

    page = (ROOT / "docs/playbook.md").read_text("utf-8").split("## Claim by claim")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "| claim |" not in line]
    assert len(rows) > 45 and all(len(row) == 4 for row in rows)
    shown = re.compile(r"`(python|change) |\]\((results\.md)?#|in the rows above")
    assert not (bare := [row[0] for row in rows if not shown.search(row[3])]), bare
    changes = re.findall(r"`change (?:--seeds 2 )?(--try [^`]+)`", page)
    assert len(changes) > 15
    for words in map(shlex.split, changes):
        assert words[::2] == ["--try"] * (len(words) // 2)
        for change in words[1::2]:
            ablate.recipe_from(["laptop", "--device", "cpu", "--dtype", "float32", "--compile", "false",
                                *(f"--{word}" for word in change.split())])


def test_readme_is_short():
    assert len(README.split()) <= 1100


SOURCES = {path.stem: ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.glob("*.py"))}


def test_no_two_public_names_are_alike():
    """A name of one file that another defines too would have to be looked up; every command line has its main()."""
    places = {}
    for file in SOURCES:
        for name in names(f"{file}.py"):
            if name and not name.startswith("_") and name != "main":
                places.setdefault(name, []).append(file)
    assert not (alike := {name: files for name, files in places.items() if len(files) > 1}), alike


def test_imports_make_no_circle_and_no_function_is_over_60_lines():
    after = {file: {part for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
                    for part in ([node.module] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names])
                    } & set(SOURCES) for file, tree in SOURCES.items()}
    while free := [file for file, needs in after.items() if not needs]:
        after = {file: needs - set(free) for file, needs in after.items() if file not in free}
    assert not after, after
    functions = {(file, node.name): node.end_lineno - node.lineno + 1 for file, tree in SOURCES.items()
                 for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not (long := {name: lines for name, lines in functions.items() if lines > 60}), long
