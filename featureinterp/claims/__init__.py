"""Folders that work is kept in: what they hold (:mod:`contents`), who writes and who reads there now
(:mod:`owners`), and what was asked for (:mod:`requests`).
"""

from featureinterp.claims.contents import (
    CODES,
    EVALUATION,
    EXTRACTION,
    JOB,
    LAYERS,
    SENSITIVITY,
    STUDY,
    TABLE,
    TRAINING,
    Content,
)
from featureinterp.claims.owners import (
    LOCK,
    OWNER,
    READER,
    REPLACING,
    check_free,
    owned,
    reading,
    while_reading,
)
from featureinterp.claims.requests import REQUEST, asked_in, claim

__all__ = [
    "CODES",
    "EVALUATION",
    "EXTRACTION",
    "JOB",
    "LAYERS",
    "LOCK",
    "OWNER",
    "READER",
    "REPLACING",
    "REQUEST",
    "SENSITIVITY",
    "STUDY",
    "TABLE",
    "TRAINING",
    "Content",
    "asked_in",
    "check_free",
    "claim",
    "owned",
    "reading",
    "while_reading",
]
