"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import distill_few_steps
import finetune_faces
import train_autoencoder
import train_basic
import train_conditional
import train_ddpm
import train_flow
import train_latent
import train_paired
import train_unet2d

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
UTILS = sorted((ROOT / "utils").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAYERS = [  # folders of utils/ may import those above them in this list; files directly in utils/ come first
    {"data", "diffusion"}, {"training"}, {"sources"}, {"resilience"}, {"monitoring"}, {"evaluation"}, {"publishing"},
]  # fmt: skip
OPTIONAL = {"monitoring": set(), "resilience": set(), "publishing": set(), "sources": set(), "evaluation": {"sources"}}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imported(path):
    """Return every module that a file imports, at any depth of its functions, as dotted names. Files of this repository
    have names like ``utils.data.sources`` even if the import is relative."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def files_imported(path):
    """Return the files of utils/ that an import of this file loads directly, with ``__init__.py`` of packages."""
    files = set()
    for module in imported(path):
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            place = ROOT.joinpath(*parts[:length])
            files |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file in UTILS}
    return files - {path}


def folder_of(path):
    return "" if path.parent.name == "utils" else path.parent.name


def test_no_script_imports_a_script_and_nothing_needs_torchvision():
    assert len(SCRIPTS) >= 7 and len(UTILS) >= 30
    stems = {path.stem for path in SCRIPTS}
    for path in SCRIPTS + UTILS:
        names = set(imported(path))
        assert not names & stems, path
        assert not any(name.startswith("torchvision") for name in names), path


def test_text_files_say_their_encoding():
    """The default encoding on Windows is not UTF-8."""
    for path in [*SCRIPTS, *UTILS, *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", None))
            if name in ("read_text", "write_text", "open") and not ast.unparse(node).startswith(
                ("Image.open", "archive.open")
            ):
                binary = name == "open" and any("b" in str(getattr(a, "value", "")) for a in node.args[1:])
                says = any(keyword.arg == "encoding" for keyword in node.keywords)
                assert binary or says, f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"


def test_imports_go_downwards():
    folders = [name for layer in LAYERS for name in layer]
    assert {folder_of(path) for path in UTILS} == {"", *folders}
    rank = {"": -1} | {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for path in UTILS:
        here = folder_of(path)
        for other in files_imported(path):
            there = folder_of(other)
            assert there == here or rank[there] < rank[here], f"{name_of(path)} imports {name_of(other)}"
            if there in OPTIONAL and there != here:  # an optional folder may be deleted, so no other code may need it
                assert there in OPTIONAL.get(here, ()), f"{name_of(path)} imports {name_of(other)}"


def test_training_scripts_import_nothing_that_may_be_deleted():
    for name in TRAINING:
        reached = {folder_of(path) for path in closure(ROOT / name)}
        assert not reached & {*OPTIONAL}, name
        assert reached <= {"", "data", "diffusion", "training"}


def test_utils_never_import_each_other_in_a_circle():
    siblings = {path: {f for f in files_imported(path) if f.name != "__init__.py"} for path in UTILS}
    visited = []

    def visit(path, above):
        assert path not in above, f"circle: {[*map(name_of, above), name_of(path)]}"
        for sibling in siblings[path]:
            visit(sibling, [*above, path])
        visited.append(path)

    for path in siblings:
        visit(path, [])
    assert set(visited) == set(UTILS)


def closure(script):
    """Return the files of utils/ that a script needs."""
    reached, todo = set(), [script]
    while todo:
        for other in files_imported(todo.pop()) - reached:
            reached.add(other)
            todo.append(other)
    return reached


def test_nothing_drags_along_what_it_does_not_show():
    """The script of the smallest denoiser must not load guidance, adapters or tools."""
    for script in ("train_basic.py", "train_unet2d.py", "train_ddpm.py"):
        names = {path.stem for path in closure(ROOT / script)}
        assert not names & {"guidance", "adapters", "pipelines", "few_steps", "flow"}, script
    assert not {"basic_unet", "linear_mix", "illustrations"} & {p.stem for p in closure(ROOT / "train_ddpm.py")}


@pytest.mark.parametrize("path", SCRIPTS + UTILS, ids=name_of)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", UTILS, ids=name_of)
def test_public_functions_say_what_they_do(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.col_offset == 0 and not node.name.startswith("_"):
            assert ast.get_docstring(node) or len(node.body) < 6, f"{path.name}: {node.name}"


TOOLS = {"sample.py", "evaluate.py", "push.py", "demo.py"}
TRAINING = {path.name: path.read_text() for path in SCRIPTS if path.name not in TOOLS}


def update_block(text):
    """Return the lines from the backward pass to the update of the average."""
    (block,) = re.findall(r"^            accelerator.backward\(loss\)\n.*?ema_model.step\(.*?\n", text, re.S | re.M)
    return block.replace("(losses, None,", "(losses, timesteps,").replace("autoencoder.parameters", "unet.parameters")


def headings(text):
    return re.findall(
        r"\n +# ([A-Z].*)\n", text[text.index("def main(") : text.index("        with accelerator.accum")]
    )


def test_the_update_and_the_headings_are_the_same_text_in_every_script():
    """The diff of two scripts should show only their methods, and a fix of the update must reach all of them."""
    assert len(TRAINING) == 10
    assert len({update_block(text) for text in TRAINING.values()}) == 1
    for name, text in TRAINING.items():
        common = ["Data", "Model", *["Noise scheduler"] * (name != "train_autoencoder.py"), "Samples", "Train"]
        assert [heading for heading in headings(text) if heading in common] == common, name


@pytest.mark.parametrize(
    "script",
    [
        train_basic,
        train_unet2d,
        train_ddpm,
        finetune_faces,
        train_conditional,
        train_flow,
        train_paired,
        train_autoencoder,
        train_latent,
        distill_few_steps,
    ],
)
def test_every_flag_is_tested_or_documented(capsys, script):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    flags = set(re.findall(r"--([a-z][a-z_0-9]+)", capsys.readouterr().out)) - {"help"}
    flags = {flag for flag in flags if not flag.startswith("no-")}
    known = "\n".join(
        path.read_text()
        for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    )
    missing = sorted(flag for flag in flags if f"--{flag}" not in known)
    assert len(flags) > 40 and not missing


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_still_fit_the_rest(path, monkeypatch):
    """Check only that they can be imported, because they run for too long."""
    monkeypatch.syspath_prepend(path.parent)  # as with `python benchmarks/...`
    runpy.run_path(str(path), run_name="imported")
    assert f"`benchmarks/{path.name}`" in (ROOT / "docs" / "results.md").read_text()


def test_readme_names_every_script_and_folder():
    text = (ROOT / "README.md").read_text()
    for name in [*(path.name for path in SCRIPTS), "utils/"]:
        assert f"`{name}`" in text or f"`python {name} " in text, name
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name})" in text, path
    rows = re.findall(
        r"\n\| `utils/(\w+)/` \|", text[text.index("## Make it yours") : text.index("## Draw and measure")]
    )
    assert sorted(rows) == sorted(OPTIONAL)  # the optional folders


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_readme_and_docs_link_and_name_only_what_is_there(path):
    text = path.read_text()
    for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        ast.parse(code)
    for link, section in re.findall(r"\]\(([^)#:]+)(?:#([\w-]+))?\)", text):
        target = path.parent / link
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if section else []
        assert not section or section in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
    for name in re.findall(r"\b(?:utils|benchmarks|configs|docs|tests)/[\w/]+\.(?:py|md|sbatch)\b", text):
        assert (ROOT / name).exists(), name


def test_readme_results_are_those_of_the_records():
    """Each number of seconds in the README is in docs/records.md, with the same steps and distance."""
    readme, records = ((ROOT / name).read_text() for name in ("README.md", "docs/records.md"))
    table = readme[readme.index("## Results") : readme.index("## When it stops")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    timed = [row for row in rows if re.match(r"\d+ seconds", row[0])]
    assert len(timed) >= 4
    for name, steps, distance in timed:
        found = [line for line in records.splitlines() if line.startswith(f"| {name.split()[0]} ")]
        assert any(f"| {steps} | {distance} |" in line for line in found), name


@pytest.mark.parametrize("script", [path.removesuffix(".py") for path in TRAINING])
def test_the_mistake_of_a_flag_is_found_without_torch(script):
    """Parsing must not import slow libraries."""
    flags = ["--dataset_name=digits", *["--pretrained_model_name_or_path=x"] * (script == "distill_few_steps")]
    program = f"import sys, {script}; {script}.parse_args({flags})"
    program += "; assert not {'torch', 'diffusers'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_fault_table_names_tests_that_exist():
    text = (ROOT / "docs" / "faults.md").read_text()
    table = text[text.index("| Fault |") :]
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    named = 0
    for line in table.splitlines():
        current = "test_faults.py"
        for file, name in re.findall(
            r"`?(test_\w+\.py)?:? ?(test_\w+(?!\w*\.py))?", line.split("|")[-2] if line else ""
        ):
            current = file or current
            if name:
                named += 1
                assert f"\ndef {name}(" in tests[current], (current, name)
            elif file:
                assert file in tests, file
    assert named > 25
