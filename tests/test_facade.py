"""What an editor and a type checker know of the public names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from featureinterp.jobs.fields import ChangedFields, JobFields
from featureinterp.jobs.spec import Job

ROOT = Path(__file__).resolve().parents[1]

RIGHT = """
from pathlib import Path
import featureinterp as fi

store = fi.collect(out="run", max_tokens=50_000)
results = fi.explain("run", "random:10", explainer="tree", plan={"n_test": 4}, budget=fi.Budget(usd=2.5))
page: Path = fi.report(results.folder)
again: fi.Results = fi.falsify("run", trial={"n_texts": 4}, features="0:3")
job = fi.Job(run=Path("run"), features="0:40")
settings = (fi.Plan(n_test=4), fi.Endpoint("http://localhost/v1", "m"), fi.RecordPolicy(), fi.TrialSettings())
first: fi.FeatureResult = fi.run(job)[0]
text: str = first.explanation.text if first.explanation else ""
from featureinterp import explain, OneShot
reveal_type(fi.explain)
"""

WRONG = {
    "fi.explian('run', '0:3')": 'has no attribute "explian"',
    "fi.explain('run', '0:3', explaner='tree')": 'Unexpected keyword argument "explaner"',
    "fi.explain('run', '0:3', rule_cap='five')": '"rule_cap"',
    "fi.collect(out='run', max_tokens='many')": '"max_tokens"',
    "fi.Results.fodler": '"fodler"',
    "from featureinterp import Expalnation": '"Expalnation"',
    "fi.records('run', '0:3').count": '"count"',
}


def test_the_keyword_fields_are_those_of_a_job():
    known = set(Job.model_fields)
    assert set(get_type_hints(JobFields)) == known - {"run", "features"} | {"device", "dtype"}
    assert set(get_type_hints(ChangedFields)) == known - {"run"} | {"device", "dtype"}


@pytest.mark.slow
def test_a_type_checker_knows_every_signature(tmp_path: Path):
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(RIGHT)
    wrong.write_text("import featureinterp as fi\n" + "\n".join(WRONG) + "\n")
    checker = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "--no-error-summary"]
    checker += ["--cache-dir", str(ROOT / ".mypy_cache"), "--python-version", "3.11", str(right), str(wrong)]
    done = subprocess.run(checker, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert not [line for line in lines if "right.py" in line and ": error:" in line], done.stdout
    signature = next(line for line in lines if "right.py" in line and "Revealed type" in line)
    assert "run:" in signature and "features:" in signature and "Results" in signature
    errors = [line for line in lines if "wrong.py" in line and ": error:" in line]
    for number, (statement, said) in enumerate(WRONG.items(), start=2):
        found = [line for line in errors if f"wrong.py:{number}:" in line]
        assert found and said in found[0], (statement, found, done.stdout, done.stderr)
    assert len(errors) == len(WRONG)
