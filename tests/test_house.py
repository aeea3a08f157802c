"""What holds for the project as a whole: what an import loads, what is public, what the lock pins, what files hold."""

import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import steadynorm

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
HEAVY = {
    *("numba", "llvmlite", "triton", "sklearn", "scipy", "pandas", "plotly", "duckdb"),
    *("rich", "typer", "jinja2", "joblib", "PIL", "safetensors", "matplotlib", "pyarrow", "IPython"),
    *("ibis", "polars", "pyspark", "onnx"),
}
PUBLIC = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Moments",
    "Renorm",
    "accumulate",
    "activations",
    "average_",
    "check",
    "compare",
    "convert_",
    "diagnose",
    "domain",
    "errors",
    "experiment",
    "explain",
    "fold",
    "freeze_",
    "functional",
    "functional_call",
    "fuse",
    "init",
    "insert",
    "nn",
    "no_commit",
    "population",
    "recalibrate_",
    "report",
    "revert_",
    "shift",
    "surgery",
    "sync_",
    "unfreeze_",
]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import steadynorm",
        # Layers of all kinds, built, converted and copied: kernels come with the first forward.
        "import steadynorm as sn, copy; layers = [copy.deepcopy(layer(3, activation='relu').double()).eval()"
        " for layer in (sn.BatchNorm1d, sn.BatchNorm2d, sn.BatchNorm3d)]; layers[0].load_state_dict(sn.BatchNorm1d(3)"
        ".state_dict())",
    ],
    ids=["import", "layers"],
)
def test_nothing_heavy_is_loaded_beyond_torch(code: str):
    loaded = json.loads(
        run_python(
            f"import sys, json, torch; before = set(sys.modules); {code};"
            "print(json.dumps(sorted(set(sys.modules) - before)))"
        )
    )
    assert "steadynorm" in loaded
    assert {name.partition(".")[0] for name in loaded} & HEAVY == set()


def test_exported_names_are_pinned():
    assert sorted(steadynorm.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(steadynorm))


@pytest.mark.parametrize("name", PUBLIC)
def test_exported_name_resolves_and_documents_itself(name: str):
    exported = getattr(steadynorm, name)
    assert inspect.getdoc(exported)
    if not inspect.ismodule(exported):
        assert exported.__name__ == name
        assert ">>>" in inspect.getdoc(exported), f"{name} has no example that runs"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = steadynorm.no_such_name


def test_every_module_imports_and_lists_only_what_it_has():
    for module in pkgutil.walk_packages(steadynorm.__path__, "steadynorm."):
        if module.name.startswith("steadynorm.ops.gpu.") and importlib.util.find_spec("triton") is None:
            continue  # written in Triton, which torch's builds for a CPU do not bring
        loaded = importlib.import_module(module.name)
        assert loaded.__doc__, f"{module.name} does not say what it is"
        missing = [name for name in getattr(loaded, "__all__", []) if not hasattr(loaded, name)]
        assert not missing, f"{module.name}.__all__ names {missing}, which it does not have"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_one_concept_a_file(path: Path):
    assert len(path.read_text().splitlines()) <= 400, "split the file by concept (300 lines are the aim)"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines), "name==version, no more"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_lock_pins_every_declared_dependency_within_its_range():
    table = project()
    heavy = {"spark", "lightning"}  # which `make test` does without
    extras = {name: wanted for name, wanted in table["optional-dependencies"].items() if name not in heavy}
    declared = [*table["dependencies"], *(requirement for wanted in extras.values() for requirement in wanted)]
    pins = locked()
    for requirement in map(Requirement, declared):
        if requirement.name != table["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)
    assert pins["torch"] == "2.13.0"


def test_lock_serves_every_platform():
    """Pins of packages for one platform do no harm, as long as none is asked for elsewhere."""
    of_one_platform = [name for name in locked() if re.match(r"nvidia-|cuda-|pywin|appnope", name)]
    assert of_one_platform == []
    (triton,) = map(Requirement, project()["optional-dependencies"]["triton"])
    assert triton.marker is not None
    elsewhere = [{"sys_platform": "darwin", "platform_machine": "arm64"}, {"platform_machine": "aarch64"}]
    assert not any(triton.marker.evaluate(machine) for machine in elsewhere)
    assert triton.marker.evaluate({"sys_platform": "linux", "platform_machine": "x86_64"})


def test_readme_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "lint", "types", "docs", "lock", "clean", "help"} <= targets
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        used = set(re.findall(r"^make ([a-z]+)", page.read_text(), re.MULTILINE))
        assert used <= targets, f"{page.name} names targets that do not exist"
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))


# Written so that the patterns do not match themselves.
UNWANTED = re.compile(r"/(home|root|Users|work)/|\bTO[D]O\b|\bFIX[M]E\b|(?i:\bissue #?\d+\b)|files\.python[h]osted")


def written_by_us() -> list[Path]:
    folders = ("src", "tests", "benchmarks", "docs", "examples")
    kinds = {".py", ".md", ".toml", ".yml", ".json", ".ipynb", ".j2", ".html", ".css", ".js", ".svg"}
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    return [*inside, *(path for path in ROOT.iterdir() if path.suffix in kinds), ROOT / "Makefile", ROOT / ".ci/run"]


def test_no_machine_path_and_nothing_left_to_do_in_any_file():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in written_by_us()
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in UNWANTED.finditer(text)
    ]
    assert found == []


def named_in_the_coverage_map() -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py::\w+(?:::\w+)?)`", (ROOT / "docs/coverage.md").read_text())


def test_coverage_map_names_only_tests_that_exist():
    named = named_in_the_coverage_map()
    assert named
    missing = []
    for test in named:
        file, *parts = test.split("::")
        source = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
        if not all(re.search(rf"^\s*(?:def|class) {part}\b", source, re.MULTILINE) for part in parts):
            missing.append(test)
    assert missing == []
