"""Test the README and the guide: code runs as written, links resolve, the guide builds, the API page is complete."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from documents import NOT_RUN, ROOT, CodeBlock, check, code_blocks, run
from official_checkpoints import original_shapes, random_values, synthetic

import orepa
import orepa_kernels

README = ROOT / "README.md"
GUIDE = ROOT / "python" / "guide"
PAGES = [README, *sorted(GUIDE.glob("*.md"))]
SLOW = {"recipes": pytest.mark.slow, "command-line": pytest.mark.slow}
FIGURE = GUIDE / "figures" / "two_stages.py"

TRAINING = {"lightning", "timm", "torchvision", "tensorboard", "tqdm", "matplotlib", "sklearn"}
NEEDS = {
    "orepa train": TRAINING,
    "orepa convert": TRAINING,
    "orepa analyze": TRAINING,
    "orepa models": {"timm"},
    "torch.onnx": {"onnx", "onnxscript"},
    "load_official": {"timm"},
}
OPTIONAL = {"PIL", "onnxruntime", *TRAINING}


# --- code -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _as_a_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Work in an empty folder, with one thread and no window; unregister a page's topologies afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    if all(importlib.util.find_spec(name) for name in TRAINING):
        # Only how often inference is timed at the end of a run.
        monkeypatch.setattr("orepa.surgery.evaluation._ROUNDS", 2, raising=False)
    known, threads = set(orepa.topologies()), torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small gain nothing from more threads
    yield
    torch.set_num_threads(threads)
    for name in set(orepa.topologies()) - known:
        del orepa.topology.language._REGISTRY[name]


def missing_packages(blocks: list[CodeBlock]) -> list[str]:
    """Return the optional packages that these blocks use and this environment lacks."""
    used: set[str] = set()
    for block in blocks:
        if block.language not in ("python", "bash") or block.reason is not None or block.run_by_ci:
            continue
        for phrase, packages in NEEDS.items():
            used |= packages if phrase in block.code else set()
        if block.language == "python":
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.Import):
                    used |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    used.add((node.module or "").partition(".")[0])
            used |= {"timm"} if "orepa.models" in block.code else set()
    return sorted(
        name for name in used & OPTIONAL | used & {"onnx", "onnxscript"} if not importlib.util.find_spec(name)
    )


@pytest.mark.usefixtures("_as_a_reader")
@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=SLOW.get(page.stem, ())) for page in PAGES if page.stem != "api"]
)
def test_code_runs_as_written(page: Path) -> None:
    blocks = code_blocks(page)
    if page is README:  # its blocks do not share variables
        blocks = [block for block in blocks if not missing_packages([block])]
    missing = missing_packages(blocks)
    if missing:
        pytest.skip(f"{page.name} needs {', '.join(missing)}")
    if page.stem == "migration":  # the page says that it uses synthetic checkpoints
        state = {f"module.{name}": tensor for name, tensor in synthetic("ResNet-18").items()}
        torch.save({"state_dict": state}, "ResNet-18.pth.tar")
        torch.save(random_values(original_shapes("MobileOne-S0")), "mobileone_s0_unfused.pth.tar")
    run(blocks, shared=page is not README)


def test_every_page_has_code_and_few_blocks_are_not_run() -> None:
    blocks = {page.stem: [b for b in code_blocks(page) if b.language in ("python", "bash")] for page in PAGES}
    without = {name for name, found in blocks.items() if not found}
    assert without == {"api"}
    all_blocks = [block for found in blocks.values() for block in found]
    not_run = [block for block in all_blocks if block.reason is not None]
    assert all(len(block.reason or "") > 20 for block in not_run), "a reason, in words"
    assert len(not_run) <= len(all_blocks) / 6


def test_a_block_that_cannot_be_run_is_checked_all_the_same(tmp_path: Path) -> None:
    def block(language: str, code: str) -> CodeBlock:
        return CodeBlock(tmp_path / "page.md", 1, language, f"{NOT_RUN}it is a test of the tests\n{code}\n")

    check(block("bash", "orepa train --epochs 3 && torchrun --nproc-per-node 2 -m orepa train --devices 2"))
    check(block("bash", 'python -m pip install ".[train,test]"'))
    check(block("python", "x = 1"))
    for code in (
        "orepa train --no-such-option",
        "torchrun -m orepa trian",
        'python -m pip install ".[nothing]"',
        "rm -r somewhere",
        "python examples/none.py",
    ):
        with pytest.raises(AssertionError):
            check(block("bash", code))
    with pytest.raises(SyntaxError):
        check(block("python", "x = = 1"))


def test_what_a_page_says_is_printed_is_compared(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('```python\nprint("one 1.25")\n```\n\n```output\none 1...\n```\n', encoding="utf-8")
    run(code_blocks(page))
    page.write_text('```python\nprint("one 1.25")\n```\n\n```output\none 2...\n```\n', encoding="utf-8")
    with pytest.raises(AssertionError, match=r"page\.md:6"):
        run(code_blocks(page))
    page.write_text("```\nno language\n```\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must be python, bash, output or text"):
        code_blocks(page)
    page.write_text("```bash\nrm -r somewhere\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="know no command 'rm'"):
        run(code_blocks(page))


def test_a_traceback_names_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("words\n\n```python\nx = 1\nraise KeyError(x)\n```\n", encoding="utf-8")
    with pytest.raises(KeyError) as caught:
        run(code_blocks(page))
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (page, 5)


# --- text -----------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST form them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_links_between_pages_resolve() -> None:
    count, broken = 0, []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            count += 1
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.name}: {target}")
    assert not broken and count > 20


def test_every_topology_has_its_row() -> None:
    text = (GUIDE / "status.md").read_text(encoding="utf-8")
    missing = [name for name in orepa.topologies() if f"| `{name}` |" not in text]
    assert not missing


def test_every_model_and_backend_has_its_row() -> None:
    pytest.importorskip("timm")
    from orepa.models import MODELS

    text = (GUIDE / "status.md").read_text(encoding="utf-8")
    missing = [name for name in MODELS if f"`{name}`" not in text]
    missing += [name for name in orepa_kernels.backends() if f"| `{name}` |" not in text]
    assert not missing


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 1800


def test_every_public_name_is_on_the_api_page() -> None:
    """A signature that the page spells out has the parameters of the object."""
    text = (GUIDE / "api.md").read_text(encoding="utf-8")
    documented, current = set(), ""
    for directive, argument in re.findall(r"^\.\. ([\w:]+):: (.+)$", text, flags=re.MULTILINE):
        name, parenthesis, signature = argument.partition("(")
        full = name if name.startswith("orepa") else f"{current}.{name}"
        if directive == "currentmodule":
            current = argument
            continue
        documented.add(full)
        if parenthesis and (importlib.util.find_spec("timm") or not full.startswith("orepa.models")):
            given = re.findall(r"(?:^|, )(\w+)(?=[:=,)])", re.sub(r"[\[{(].*?[\]})]", "", signature))
            assert given == list(inspect.signature(pkgutil.resolve_name(":".join(full.rsplit(".", 1)))).parameters), (
                full
            )
    modules = [orepa, orepa.topology, orepa.analysis, orepa_kernels]
    if importlib.util.find_spec("timm"):
        modules.append(importlib.import_module("orepa.models"))
    for module in modules:
        missing = {f"{module.__name__}.{name}" for name in module.__all__} - documented
        # The page says that these are the same objects as those it documents.
        same = {"orepa.BackendError", *(f"orepa.{m}.{n}" for m in ("analysis", "topology") for n in orepa.__all__)}
        assert missing <= same, missing


# --- the built guide ----------------------------------------------------------------------------------------------------------


def test_the_figure_is_what_the_script_draws(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("two_stages", FIGURE)
    assert spec is not None and spec.loader is not None
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    drawn = figure.draw(figure.dbb(figure.SPEC))
    committed = FIGURE.with_suffix(".svg").read_text(encoding="utf-8")
    assert drawn == committed, "run python/guide/figures/two_stages.py"
    with pytest.raises(TypeError, match="convolutions, average pooling and norms"):
        figure.draw(orepa.topology.catalogue.orepa(figure.SPEC))


def test_the_guide_builds_without_a_warning(tmp_path: Path) -> None:
    """Build in a separate process, without a network: warnings and unresolved references are errors."""
    for package in ("sphinx", "myst_parser", "furo", "timm"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extras docs, models)")
    out = tmp_path / "html"
    no_network = (
        "import socket, sys\n"
        "def refuse(*arguments): raise OSError('no network in this test')\n"
        "socket.create_connection = socket.socket.connect = refuse\n"
        "from sphinx.cmd.build import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    options = ["-q", "-W", "-n", "--keep-going", "-b", "html", "-d", tmp_path / "doctrees"]
    command = [sys.executable, "-c", no_network, *options, GUIDE, out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in out.glob("*.html")} - {"genindex", "search", "py-modindex"}
    assert pages == {path.stem for path in GUIDE.glob("*.md")}
    api = (out / "api.html").read_text(encoding="utf-8")
    ids = {f"{module.__name__}.{name}" for module in (orepa, orepa_kernels) for name in module.__all__}
    assert not [name for name in ids - {"orepa.BackendError"} if f'id="{name}"' not in api]
    assert (out / "_images" / "two_stages.svg").exists()
    shutil.rmtree(out)
