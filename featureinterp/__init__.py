"""featureinterp explains features of sparse autoencoders with language models, and then tries to prove the
explanations wrong.

    import featureinterp as fi

    fi.collect(out="run", max_tokens=50_000)        # the embedded model, SAE and corpus, or your own by name
    results = fi.explain("run", "random:10")        # in a notebook, `results` draws itself as a table
    fi.report(results.folder)                       # one HTML file

Names are loaded when they are first used, so that importing the package is quick and brings in neither torch
nor transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Results": "api",
    "collect": "api",
    "demo": "api",
    "dry_run": "api",
    "explain": "api",
    "explain_async": "api",
    "falsify": "api",
    "steer": "api",
    "SteeringSettings": "falsify.intervention",
    "Intervention": "domain.intervention",
    "TrialSettings": "falsify.counterexamples",
    "Trial": "domain.trial",
    "local_simulator": "api.local",
    "probe": "api",
    "Probe": "api",
    "StudySettings": "probing.study",
    "ActivationBuffer": "probing.buffer",
    "open_run": "api",
    "sae_info": "api",
    "sensitivity": "api",
    "Sensitivity": "api",
    "SensitivityPlan": "jobs.sensitivity",
    "saes": "api",
    "records": "api",
    "report": "api",
    "run": "api",
    "status": "api",
    "export": "api",
    "run_async": "api",
    "extract": "api.training",
    "merge": "api.training",
    "train": "api.training",
    "evaluate": "api.training",
    "doctor": "api.training",
    "layers": "api.training",
    "Recipe": "training.settings",
    "load_recipe": "training.settings",
    "ActivationStore": "training.store",
    "save_saelens": "sae.load",
    "CodesStore": "codes.store",
    "WindowPolicy": "corpus.windows",
    "load_corpus": "corpus.text",
    "Explanation": "domain.explanation",
    "Rule": "domain.explanation",
    "FeatureId": "domain.feature",
    "FeatureRecord": "domain.record",
    "Window": "domain.record",
    "FeatureResult": "domain.result",
    "Failure": "domain.score",
    "Interval": "domain.score",
    "Score": "domain.score",
    "Simulation": "domain.score",
    "Usage": "domain.usage",
    "FeatureInterpError": "errors",
    "InputError": "errors",
    "LanguageModelError": "errors",
    "StorageError": "errors",
    "OneShot": "explain.one_shot",
    "RulesStyle": "explain.styles",
    "SentenceStyle": "explain.styles",
    "TopTokens": "explain.baselines",
    "Tree": "explain.tree",
    "TreeSettings": "explain.tree",
    "SearchNode": "domain.explanation",
    "HolisticActivations": "codes.holistic",
    "ExplainJob": "jobs.explain",
    "Budget": "jobs.budget",
    "Plan": "jobs.plan",
    "Job": "jobs.spec",
    "load_job": "jobs.spec",
    "Endpoint": "llm.config",
    "FunctionModel": "llm.function",
    "OpenAIModel": "llm.openai",
    "RecordPolicy": "records.policy",
    "LoadedSae": "sae.load",
    "load_sae": "sae.load",
    "save_sae": "sae.load",
    "Service": "server.client",
    "AllAtOnce": "simulate.all_at_once",
    "Lexical": "simulate.lexical",
    "PromptLogprobs": "simulate.prompt_logprobs",
    "Rated": "simulate.rated",
    "TokenWise": "simulate.token_wise",
    "Subject": "subject.load",
    "load_subject": "subject.load",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'featureinterp' has no attribute {name!r}")
    value = getattr(import_module(f"featureinterp.{_HOME[name]}"), name)
    return globals().setdefault(
        name, value
    )  # importing may have put a room of that name there, which is callable too


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _Room(ModuleType):
    """A package that shares its name with a function, such as ``report``: importing it puts it in the
    function's place, so it can be called.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"featureinterp.{_HOME[name]}"), name)(*args, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
