# The public names. An editor and a type checker read them here; at run time each is loaded when it is first
# used (lazy_loader), so that importing the package brings in neither torch nor transformers.

__version__: str

from .api import (
    Probe as Probe,
)
from .api import (
    Results as Results,
)
from .api import (
    Sensitivity as Sensitivity,
)
from .api import (
    collect as collect,
)
from .api import (
    demo as demo,
)
from .api import (
    dry_run as dry_run,
)
from .api import (
    explain as explain,
)
from .api import (
    explain_async as explain_async,
)
from .api import (
    export as export,
)
from .api import (
    falsify as falsify,
)
from .api import (
    open_run as open_run,
)
from .api import (
    probe as probe,
)
from .api import (
    records as records,
)
from .api import (
    report as report,
)
from .api import (
    run as run,
)
from .api import (
    run_async as run_async,
)
from .api import (
    sae_info as sae_info,
)
from .api import (
    saes as saes,
)
from .api import (
    sensitivity as sensitivity,
)
from .api import (
    status as status,
)
from .api import (
    steer as steer,
)
from .api.local import local_simulator as local_simulator
from .api.training import (
    doctor as doctor,
)
from .api.training import (
    evaluate as evaluate,
)
from .api.training import (
    extract as extract,
)
from .api.training import (
    layers as layers,
)
from .api.training import (
    merge as merge,
)
from .api.training import (
    train as train,
)
from .codes.store import CodesStore as CodesStore
from .corpus.text import load_corpus as load_corpus
from .corpus.windows import WindowPolicy as WindowPolicy
from .domain.explanation import Explanation as Explanation
from .domain.explanation import Rule as Rule
from .domain.explanation import SearchNode as SearchNode
from .domain.feature import FeatureId as FeatureId
from .domain.intervention import Intervention as Intervention
from .domain.record import FeatureRecord as FeatureRecord
from .domain.record import Window as Window
from .domain.result import FeatureResult as FeatureResult
from .domain.score import Failure as Failure
from .domain.score import Interval as Interval
from .domain.score import Score as Score
from .domain.score import Simulation as Simulation
from .domain.trial import Trial as Trial
from .domain.usage import Usage as Usage
from .errors import (
    FeatureInterpError as FeatureInterpError,
)
from .errors import (
    InputError as InputError,
)
from .errors import (
    LanguageModelError as LanguageModelError,
)
from .errors import (
    StorageError as StorageError,
)
from .explainers.baselines import TopTokens as TopTokens
from .explainers.one_shot import OneShot as OneShot
from .explainers.styles import RulesStyle as RulesStyle
from .explainers.styles import SentenceStyle as SentenceStyle
from .explainers.tree import Tree as Tree
from .explainers.tree import TreeSettings as TreeSettings
from .falsification.counterexamples import TrialSettings as TrialSettings
from .falsification.intervention import SteeringSettings as SteeringSettings
from .jobs.budget import Budget as Budget
from .jobs.explain import ExplainJob as ExplainJob
from .jobs.plan import Plan as Plan
from .jobs.sensitivity import SensitivityPlan as SensitivityPlan
from .jobs.spec import Job as Job
from .jobs.spec import load_job as load_job
from .live.holistic import HolisticActivations as HolisticActivations
from .llm.config import Endpoint as Endpoint
from .llm.function import FunctionModel as FunctionModel
from .llm.openai import OpenAIModel as OpenAIModel
from .local.all_at_once import AllAtOnce as AllAtOnce
from .local.token_wise import TokenWise as TokenWise
from .probing.buffer import ActivationBuffer as ActivationBuffer
from .probing.study import StudySettings as StudySettings
from .sae.load import (
    LoadedSae as LoadedSae,
)
from .sae.load import (
    load_sae as load_sae,
)
from .sae.load import (
    save_sae as save_sae,
)
from .sae.load import (
    save_saelens as save_saelens,
)
from .sampling.policy import RecordPolicy as RecordPolicy
from .server.client import Service as Service
from .simulators.lexical import Lexical as Lexical
from .simulators.prompt_logprobs import PromptLogprobs as PromptLogprobs
from .simulators.rated import Rated as Rated
from .subject.load import Subject as Subject
from .subject.load import load_subject as load_subject
from .training.settings import Recipe as Recipe
from .training.settings import load_recipe as load_recipe
from .training.store import ActivationStore as ActivationStore

__all__ = [
    "ActivationBuffer",
    "ActivationStore",
    "AllAtOnce",
    "Budget",
    "CodesStore",
    "Endpoint",
    "ExplainJob",
    "Explanation",
    "Failure",
    "FeatureId",
    "FeatureInterpError",
    "FeatureRecord",
    "FeatureResult",
    "FunctionModel",
    "HolisticActivations",
    "InputError",
    "Interval",
    "Intervention",
    "Job",
    "LanguageModelError",
    "Lexical",
    "LoadedSae",
    "OneShot",
    "OpenAIModel",
    "Plan",
    "Probe",
    "PromptLogprobs",
    "Rated",
    "Recipe",
    "RecordPolicy",
    "Results",
    "Rule",
    "RulesStyle",
    "Score",
    "SearchNode",
    "Sensitivity",
    "SensitivityPlan",
    "SentenceStyle",
    "Service",
    "Simulation",
    "SteeringSettings",
    "StorageError",
    "StudySettings",
    "Subject",
    "TokenWise",
    "TopTokens",
    "Tree",
    "TreeSettings",
    "Trial",
    "TrialSettings",
    "Usage",
    "Window",
    "WindowPolicy",
    "collect",
    "demo",
    "doctor",
    "dry_run",
    "evaluate",
    "explain",
    "explain_async",
    "export",
    "extract",
    "falsify",
    "layers",
    "load_corpus",
    "load_job",
    "load_recipe",
    "load_sae",
    "load_subject",
    "local_simulator",
    "merge",
    "open_run",
    "probe",
    "records",
    "report",
    "run",
    "run_async",
    "sae_info",
    "saes",
    "save_sae",
    "save_saelens",
    "sensitivity",
    "status",
    "steer",
    "train",
]
