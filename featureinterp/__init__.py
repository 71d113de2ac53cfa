"""featureinterp explains features of sparse autoencoders with language models, and then tries to prove the
explanations wrong.

    import featureinterp as fi

    fi.collect(out="run", max_tokens=50_000)        # the embedded model, SAE and corpus, or your own by name
    results = fi.explain("run", "random:10")        # in a notebook, `results` draws itself as a table
    fi.report(results.folder)                       # one HTML file

The names are in ``__init__.pyi``, which editors and type checkers read. Each is loaded when it is first used,
so that importing the package is quick and brings in neither torch nor transformers.
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
