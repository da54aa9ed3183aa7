"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import difflib
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import finetune_faces
import train_basic
import train_ddpm
import train_unet2d

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
UTILS = sorted((ROOT / "utils").glob("*.py"))


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
            names |= {"." * node.level + alias.name for alias in node.names} if not node.module else set()
    return names


def test_no_script_imports_a_script_and_nothing_needs_torchvision():
    assert len(SCRIPTS) >= 1 and len(UTILS) >= 10
    stems = {path.stem for path in SCRIPTS}
    for path in SCRIPTS + UTILS:
        names = imports(path)
        assert not names & stems, path
        assert not any("torchvision" in name for name in names), path


def test_utils_import_no_script_and_never_in_a_circle():
    stems = {path.stem for path in UTILS}
    siblings = {path.stem: {name[1:] for name in imports(path) if name[1:] in stems} for path in UTILS}
    visited = []

    def visit(name, above):
        assert name not in above, f"circle: {[*above, name]}"
        for sibling in siblings[name]:
            visit(sibling, [*above, name])
        visited.append(name)

    for name in siblings:
        visit(name, [])
    assert set(visited) == stems


@pytest.mark.parametrize("path", SCRIPTS + UTILS, ids=lambda path: path.name)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 350
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", UTILS, ids=lambda path: path.name)
def test_public_functions_say_what_they_do(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.col_offset == 0 and not node.name.startswith("_"):
            assert ast.get_docstring(node) or len(node.body) < 6, f"{path.name}: {node.name}"


TRAINING = {path.name: path.read_text() for path in SCRIPTS if path.name.startswith(("train_", "finetune_"))}


def code_lines(text):
    """Lines of code, without indentation, imports, comments, docstrings and lines of one word or bracket."""
    tree = ast.parse(text)
    lines = [line.strip() for line in ast.unparse(tree).splitlines()]
    return [line for line in lines if len(line.split()) > 1 and not line.startswith(("from ", "import ", '"""', "'"))]


def test_what_two_scripts_share_is_the_story():
    """Lines in common, in order. Plumbing that creeps in raises the number; drift between the scripts lowers it."""
    for first, second in itertools.combinations(TRAINING, 2):
        matcher = difflib.SequenceMatcher(
            None, code_lines(TRAINING[first]), code_lines(TRAINING[second]), autojunk=False
        )
        shared = sum(block.size for block in matcher.get_matching_blocks())
        assert 50 <= shared <= 80, (first, second, shared)


def update_block(text):
    """From the backward pass to the step count."""
    start, end = text.index("            accelerator.backward(loss)"), text.index("        global_step += 1\n")
    return text[start:end]


def headings(text):
    return re.findall(r"\n +# ([A-Z].*)\n", text[text.index("def main(") :])


def test_the_update_and_the_headings_are_the_same_text_in_every_script():
    assert len(TRAINING) == 4
    assert len({update_block(text) for text in TRAINING.values()}) == 1
    outlines = {tuple(headings(text)) for text in TRAINING.values()}
    assert len(outlines) == 1, outlines
    assert {"Data", "Model", "Noise scheduler", "Resume", "Train", "Once in N steps", "Save"} <= set(*outlines)


@pytest.mark.parametrize("script", [train_basic, train_unet2d, train_ddpm, finetune_faces])
def test_every_flag_is_tested_or_documented(capsys, script):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    flags = set(re.findall(r"--([a-z][a-z_0-9]+)", capsys.readouterr().out)) - {"help"}
    flags = {flag for flag in flags if not flag.startswith("no-")}
    known = "\n".join(
        path.read_text() for path in [*(ROOT / "tests").glob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    )
    missing = sorted(flag for flag in flags if f"--{flag}" not in known)
    assert len(flags) > 45 and not missing


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_still_fit_the_rest(path):
    """Only that they can be imported; they are too long to be run here."""
    runpy.run_path(str(path), run_name="imported")
    assert path.name in (ROOT / "README.md").read_text()


def test_readme_names_every_file_that_exists_and_no_other():
    text = (ROOT / "README.md").read_text()
    for path in SCRIPTS + [path for path in UTILS if path.stem != "__init__"]:
        assert path.name in text, path
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("script", [path.removesuffix(".py") for path in TRAINING])
def test_the_mistake_of_a_flag_is_found_without_torch(script):
    """Parsing must not import what takes seconds."""
    program = f"import sys, {script}; {script}.parse_args(['--dataset_name=digits'])"
    program += "; assert not {'torch', 'diffusers'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_fault_table_names_tests_that_exist():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| Fault |") : text.index("## Files")]
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    current, named = "test_faults.py", 0
    for line in table.splitlines():
        current = "test_faults.py"
        for file, name in re.findall(
            r"`?(test_\w+\.py)?:? ?(test_\w+(?!\w*\.py))?", line.split("|")[-2] if line else ""
        ):
            current = file or current
            if name:
                named += 1
                assert f"\ndef {name}" in tests[current], (current, name)
    assert named > 25


def test_readme_counts_the_lines_of_the_scripts():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Which script") : text.index("Each comes with `utils/`")]
    rows = re.findall(r"\n\| `(\w+\.py)` \| .* \| (\d+) \| .* \|", table)
    assert len(rows) == 4
    for script, lines in rows:
        assert len((ROOT / script).read_text().splitlines()) == int(lines), script
