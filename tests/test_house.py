"""The architecture: which room may import which, what the façade exports, and what an import costs."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import featureinterp

ROOT = Path(featureinterp.__file__).parent
FOUNDATION = {
    "errors",
    "intervals",
    "files",
    "claims",
    "formerly",
    "stored",
    "resources",
    "quiet",
    "domain",
    "tasks",
    "validation",
    "visible",
}
LANGUAGE = FOUNDATION | {"prompts", "replies", "interfaces", "llm", "registry"}
ALLOWED = {
    "errors": set(),
    "domain": {"domain", "errors"},
    "files": {"errors"},
    "claims": {"claims", "errors", "files", "stored", "visible"},
    "stored": {"stored", "errors", "files"},
    "intervals": {"domain"},
    "formerly": set(),
    "resources": set(),
    "quiet": set(),
    "visible": set(),
    "prompts": {"errors", "resources", "visible", "files"},
    "machine": {"machine", "assets", "errors", "stored"},
    "replies": {"replies", "errors", "files"},
    "tasks": set(),
    "validation": {"errors"},
    "interfaces": {"domain", "errors"},
    "registry": {"errors", "interfaces"},
    "assets": {"assets", "errors", "files", "stored", "quiet"},
    "corpus": {"corpus", "errors", "files", "stored", "assets"},
    "subject": {"subject", "corpus", "errors", "files", "assets", "quiet", "machine"},
    "sae": {"sae", "errors", "files", "registry", "resources"},
    "codes": {
        "codes",
        "claims",
        "machine",
        "sae",
        "subject",
        "corpus",
        "domain",
        "errors",
        "files",
        "stored",
    },
    "sampling": {
        "validation",
        "sampling",
        "machine",
        "registry",
        "claims",
        "codes",
        "corpus",
        "domain",
        "errors",
        "files",
        "stored",
        "assets",
        "quiet",
    },
    "llm": {
        "llm",
        "domain",
        "errors",
        "files",
        "stored",
        "interfaces",
        "assets",
        "replies",
        "tasks",
        "validation",
    },
    "explainers": LANGUAGE | {"explainers"},
    "simulators": LANGUAGE | {"simulators"},
    "local": LANGUAGE | {"local", "simulators", "machine"},
    "live": {"live", "codes", "sae", "subject", "machine", "corpus", "domain", "errors"},
    "scorers": LANGUAGE | {"scorers"},
    "falsification": LANGUAGE | {"falsification"},
    "probing": {
        "validation",
        "probing",
        "codes",
        "corpus",
        "domain",
        "errors",
        "files",
        "stored",
        "intervals",
    },
    "training": {
        "training",
        "claims",
        "probing",
        "codes",
        "sae",
        "subject",
        "corpus",
        "domain",
        "errors",
        "files",
        "stored",
        "intervals",
        "quiet",
        "resources",
        "validation",
        "machine",
        "__version__",
    },
    "reports": {
        "reports",
        "falsification",
        "probing",
        "domain",
        "errors",
        "files",
        "interfaces",
        "registry",
        "stored",
        "prompts",
        "visible",
    },
    "jobs": LANGUAGE
    | {
        "live",
        "local",
        "machine",
        "registry",
        "jobs",
        "explainers",
        "simulators",
        "scorers",
        "falsification",
        "sampling",
        "codes",
        "sae",
        "subject",
        "corpus",
        "__version__",
    },
    "__main__": {"cli"},
    "server": {
        "server",
        "claims",
        "registry",
        "api",
        "domain",
        "errors",
        "files",
        "jobs",
        "stored",
        "validation",
        "visible",
        "__version__",
    },
    "cli": {
        "cli",
        "claims",
        "registry",
        "server",
        "api",
        "stored",
        "probing",
        "training",
        "errors",
        "assets",
        "domain",
        "jobs",
        "sampling",
        "llm",
        "visible",
        "__version__",
        "machine",
        "files",
    },
}
TORCH_ROOMS = {"machine", "subject", "sae", "codes", "live", "local", "training"}
TORCH_FILES = {"probing/tensors.py", "sampling/projected.py"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "featureinterp":
                found |= {f"featureinterp.{alias.name}" for alias in node.names}
    return found - {"featureinterp"}


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def test_rooms_import_only_what_they_may():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = room_of(path)
        if room in ("__init__", "api"):
            continue
        for name in imports(path):
            if name.startswith("featureinterp."):
                other = name.split(".")[1]
                if other not in ALLOWED[room]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_every_room_has_a_rule():
    rooms = {room_of(p) for p in ROOT.rglob("*.py")} - {"__init__", "api"}
    assert rooms == set(ALLOWED)


def test_torch_stays_on_the_tensor_side():
    wrong = []
    for path in ROOT.rglob("*.py"):
        relative = str(path.relative_to(ROOT))
        if room_of(path) in TORCH_ROOMS or relative in TORCH_FILES:
            continue
        wrong += [
            relative
            for name in imports(path)
            if name.split(".")[0] in ("torch", "transformers") and relative != "quiet.py"
        ]
    assert not wrong


def test_façade_names():
    names = """ActivationBuffer ActivationStore AllAtOnce Budget CodesStore Endpoint ExplainJob Explanation
        Failure FeatureId FeatureInterpError FeatureRecord FeatureResult FunctionModel HolisticActivations
        InputError Interval Intervention Job LanguageModelError Lexical LoadedSae OneShot
        OpenAIModel Plan Probe PromptLogprobs Rated Recipe RecordPolicy Results Rule RulesStyle
        Score SearchNode Sensitivity SensitivityPlan SentenceStyle Service Simulation
        SteeringSettings StorageError StudySettings Subject TokenWise TopTokens Tree TreeSettings
        Trial TrialSettings Usage Window WindowPolicy collect demo doctor dry_run evaluate explain
        explain_async export extract falsify layers load_corpus load_job load_recipe load_sae
        load_subject local_simulator merge open_run probe records report run run_async sae_info saes
        save_sae save_saelens sensitivity status steer train"""
    assert sorted(featureinterp.__all__) == names.split()
    for name in featureinterp.__all__:
        assert getattr(featureinterp, name) is not None


def run_alone(code: str) -> None:
    """Runs a program in an interpreter that has imported nothing yet; it must end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_and_asking_for_help_brings_in_nothing_heavy():
    code = (
        "import sys, featureinterp, featureinterp.cli.main\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(featureinterp.cli.main.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'openai', 'faiss', 'sentence_transformers', 'numpy', 'httpx'} & "
        "set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run_alone(code)


def test_every_function_of_the_facade_has_a_docstring():
    for name in featureinterp.__all__:
        assert (getattr(featureinterp, name).__doc__ or "").strip(), name


def test_no_module_has_the_name_of_a_function_beside_it():
    """Importing such a module would put it in the function's place."""
    code = (
        "import importlib, pathlib, featureinterp.api as api\n"
        "for path in pathlib.Path(api.__file__).parent.glob('*.py'):\n"
        "    assert path.stem == '__init__' or not hasattr(api, path.stem) or not callable(getattr(api, "
        "path.stem)), path\n"
    )
    run_alone(code)


def lines_of_functions(tree: ast.AST) -> list[int]:
    """Lines of every function and method, from its ``def`` on; those inside others count, too."""
    return [
        node.end_lineno - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def test_lines_are_counted_as_they_are():
    code = (
        "def f(\n    x,\n):\n    return x\n\nclass C:\n    @property\n    def g(self):\n"
        "        async def h():\n            pass\n"
    )
    assert sorted(lines_of_functions(ast.parse(code))) == [2, 3, 4]


def test_functions_and_modules_are_short():
    paths = sorted(ROOT.rglob("*.py"))
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    found = [n for text in texts.values() for n in lines_of_functions(ast.parse(text))]
    assert statistics.median(found) <= 12
    assert statistics.quantiles(found, n=10)[-1] <= 40
    assert not [name for name, text in texts.items() if text.count("\n") > 450]
