"""The verbs as Python functions: what the command line calls, and a notebook can."""

from featureinterp.api.common import CORPUS, SAE, SUBJECT, Steps
from featureinterp.api.demonstration import DEMO_MIN_WINDOWS, demo
from featureinterp.api.dictionaries import fetch_sae, sae_info, saes
from featureinterp.api.explaining import (
    dry_run,
    explain,
    explain_async,
    falsify,
    job_in,
    run,
    run_async,
    steer,
)
from featureinterp.api.local import EXPLAINER
from featureinterp.api.measuring import probe, sensitivity
from featureinterp.api.pages import export, report, status
from featureinterp.api.results import Probe, Results, Sensitivity
from featureinterp.api.runs import collect, open_run, records

__all__ = [
    "CORPUS",
    "DEMO_MIN_WINDOWS",
    "EXPLAINER",
    "Probe",
    "Results",
    "SAE",
    "SUBJECT",
    "Sensitivity",
    "Steps",
    "collect",
    "demo",
    "dry_run",
    "explain",
    "explain_async",
    "export",
    "falsify",
    "fetch_sae",
    "job_in",
    "open_run",
    "probe",
    "records",
    "report",
    "run",
    "run_async",
    "sae_info",
    "saes",
    "sensitivity",
    "status",
    "steer",
]
