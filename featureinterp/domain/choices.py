"""What a field of a job file, an option and a request may say, where the choice is closed: each written once.

Where other packages can add to it, the choice is a registry (``featureinterp.registry``).
"""

from __future__ import annotations

from typing import Literal

Form = Literal["sentence", "rules"]
HolisticMethod = Literal["exact", "gradient"]
Projection = Literal["closed-form", "info-nce"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
"""Of a model while it runs."""
StoredDtype = Literal["float16", "float32"]
"""Of codes and activations on disk."""
Architecture = Literal["topk", "batch_topk", "matryoshka_batch_topk", "jumprelu", "relu", "gated"]
"""Of an SAE that is trained."""
ExampleSource = Literal["corpus", "saebench"]
"""Of the examples that texts are written like."""
