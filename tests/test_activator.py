"""New texts through model and SAE: the same activations as collecting gave, whatever stands beside them in a
batch.
"""

from __future__ import annotations

import anyio
import numpy as np
import pytest
import torch
from tiny import NASTY, TINY_TEXTS

from featureinterp.codes.collect import collect_shared
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.domain.feature import FeatureId
from featureinterp.errors import IncompatibleError
from featureinterp.live.activator import TextActivator
from featureinterp.sae.load import load_sae, save_sae


@pytest.fixture
def activator(subject: object, sae_folder: object) -> TextActivator:
    return TextActivator(subject, load_sae(str(sae_folder)))


def one_by_one(activator: TextActivator, text: str) -> np.ndarray:
    """Dense codes of every token, ``[token, feature]``, the plain way."""
    subject = activator.subject
    ids = torch.tensor([subject.encoder.encode([text])[0].ids])
    bos = torch.tensor([[subject.tokenizer.bos_token_id]])
    out = subject.model(input_ids=torch.cat([bos, ids], 1), output_hidden_states=True).hidden_states[2][0, 1:]
    return activator.sae.sae.encode(out).to_dense().detach().numpy()


def test_texts_are_read_exactly_and_alone(activator: TextActivator):
    texts = [*TINY_TEXTS, *(t for t in NASTY if len(t) < 290), "", "a"]
    features = list(range(0, 64, 7))
    found = activator.read(features, texts)
    for i, text in enumerate(texts):
        assert "".join(found[0][i].pieces) == text
        if not text:
            assert all(len(windows[i].activations) == 0 for windows in found)
            continue
        plain = one_by_one(activator, text)
        for place, feature in enumerate(features):
            window = found[place][i]
            kept = window.activations > 0
            np.testing.assert_allclose(window.activations[kept], plain[kept, feature], atol=1e-4)
            assert (plain[~kept, feature] > 1e-4).sum() <= 1, "a sink is not scored"
    assert any(w.fires for windows in found for w in windows)


def test_one_feature_through_the_protocol(activator: TextActivator):
    found = anyio.run(activator.run, FeatureId(activator.sae.name, 7), list(TINY_TEXTS))
    expected = activator.read([7], TINY_TEXTS)[0]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.activations, b.activations)
    with pytest.raises(IncompatibleError, match="is not one of the SAE"):
        anyio.run(activator.run, FeatureId("another", 7), ["x"])


def test_a_long_text_is_cut(subject: object, sae_folder: object):
    activator = TextActivator(subject, load_sae(str(sae_folder)), max_tokens=5)
    window = activator.read([0], ["one two three four five six seven eight nine"])[0][0]
    assert len(window.pieces) == len(window.activations) == 5


def test_several_saes_share_one_pass(
    subject: object, corpus_file: object, tmp_path: object, monkeypatch: pytest.MonkeyPatch
):
    from tiny import make_sae

    import featureinterp.codes.collect as module

    saes = []
    for number, (kind, hook) in enumerate((("topk", 1), ("relu", 1), ("jumprelu", 0))):
        folder = tmp_path / f"sae{number}"
        save_sae(
            folder,
            make_sae(kind, subject.d_model, 16 + number),
            hook=f"blocks.{hook}.hook_resid_post",
            model="tiny",
        )
        saes.append(load_sae(str(folder)))
    corpus, policy = load_corpus(str(corpus_file)), WindowPolicy(16, 8, 2000)
    alone = [
        module.collect(subject, sae, corpus, tmp_path / f"alone{i}", policy) for i, sae in enumerate(saes)
    ]
    passes = []
    real = type(subject).residual
    monkeypatch.setattr(
        type(subject), "residual", lambda self, ids, hook: passes.append(hook) or real(self, ids, hook)
    )
    together = collect_shared(
        subject, [(sae, tmp_path / f"run{i}") for i, sae in enumerate(saes)], corpus, policy
    )
    assert passes.count("blocks.1.hook_resid_post") == passes.count("blocks.0.hook_resid_post"), (
        "two SAEs at one hook, one pass"
    )
    for a, b in zip(alone, together, strict=True):
        for name in ("offsets", "positions", "values"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert a.meta == b.meta and a.windows.fingerprint == b.windows.fingerprint
    passes.clear()
    assert [
        s.meta
        for s in collect_shared(
            subject, [(sae, tmp_path / f"run{i}") for i, sae in enumerate(saes)], corpus, policy
        )
    ] == [s.meta for s in together]
    assert not passes and isinstance(CodesStore.open(tmp_path / "run2"), CodesStore)
