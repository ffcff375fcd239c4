"""The page in a real browser: its numbers are the model's, and token text is never more than text."""

import json

import numpy as np
import pytest
import torch
from browser import browser, opened
from conftest import SHAPES, random_gpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kqv.looking.figures import figures, packed
from kqv.looking.page import html
from kqv.looking.trace import Looker
from kqv.text.tokenizers import CharTokenizer

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
TOKENIZER = CharTokenizer("abcdefghijklmnopqrs")
FAMILIES = {**SHAPES, "sinusoidal": {"positions": "sinusoidal"}}


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


def page_of(tmp_path, gpt, ids=IDS, change=lambda figures: None, **options):
    """(trace, address) of the page of a text."""
    looker = Looker(gpt)
    found = figures(looker, TOKENIZER, ids, "tested", **options)
    change(found)
    path = tmp_path / "look.html"
    path.write_text(html(found), "utf-8")
    return looker.trace(torch.tensor([ids])), path.as_uri()


def formula(trace, layer, head):
    """Scores, weights (T, T) and outputs (T, hs) of a head by NumPy, in float64."""
    q = trace.q[layer][0, head].double().numpy()
    group = trace.q[layer].size(1) // trace.k[layer].size(1)
    k, v = (part[layer][0, head // group].double().numpy() for part in (trace.k, trace.v))
    scores = q @ k.T / np.sqrt(q.shape[-1])
    masked = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return scores, weights, weights @ v


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_the_page_are_those_of_the_formula(chromium, tmp_path, family):
    gpt = random_gpt(**FAMILIES[family])
    trace, url = page_of(tmp_path, gpt)
    with opened(chromium, url) as page:
        for layer in range(gpt.config.n_layer):
            for head in range(gpt.config.n_head):
                scores, weights, outputs = formula(trace, layer, head)
                found = page.evaluate(f"Array.from(scores({layer}, {head}))")
                assert np.allclose(np.reshape(found, (8, 8)), scores, atol=1e-5)
                found = np.reshape(page.evaluate(f"Array.from(weights({layer}, {head}))"), (8, 8))
                assert np.allclose(found, weights, atol=1e-5)
                assert np.allclose(found.sum(axis=-1), 1, atol=1e-6) and (np.triu(found, 1) == 0).all()
                for t in range(8):
                    found = page.evaluate(f"Array.from(output({layer}, {head}, {t}))")
                    assert np.allclose(found, outputs[t], atol=1e-5)
        assert page.problems == []
        assert page.requests == [url]  # it needs no network


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_score_add_up(chromium, tmp_path, family):
    trace, url = page_of(tmp_path, random_gpt(**FAMILIES[family]))
    with opened(chromium, url) as page:
        names = page.evaluate("partNames()")
        for head in range(2):
            scores = formula(trace, 0, head)[0]
            for t, s in ((0, 0), (7, 2), (3, 3)):
                parts = {name: page.evaluate(f"partOfScore('{name}', {head}, {t}, {s})") for name in names}
                whole = parts.pop("whole")
                assert whole == pytest.approx(scores[t, s], abs=1e-5)
                assert sum(parts.values()) == pytest.approx(whole, abs=1e-4)
                assert all(abs(part) > 1e-4 for name, part in parts.items() if name != "others")


def test_probabilities_of_the_next_token_are_the_model_s(chromium, tmp_path):
    trace, url = page_of(tmp_path, random_gpt())
    with opened(chromium, url) as page:
        plain = '{"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}'
        found = page.evaluate(f"choices(7, {plain})")
        p = trace.logits[0, 7].softmax(-1)
        assert [one["id"] for one in found] == p.argsort(descending=True).tolist()
        assert [one["p"] for one in found] == pytest.approx(p.sort(descending=True).values.tolist(), abs=1e-5)
        few = page.evaluate('choices(7, {"temperature": 0.5, "top_k": 3, "top_p": 1, "min_p": 0})')
        sharp = (trace.logits[0, 7] / 0.5).topk(3).values.softmax(-1)
        assert [one["p"] for one in few] == pytest.approx(sharp.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "change, said", [(-0.5, "the edge helped"), (0.0, "did not matter"), (0.5, "something else")]
)
def test_a_cut_edge_is_put_into_words_by_what_it_did(chromium, tmp_path, change, said):
    def changed(found):
        found["edges"][7] = packed([change] * 8)

    _, url = page_of(tmp_path, random_gpt(), change=changed)
    with opened(chromium, url) as page:
        assert said in page.inner_text("#it")


def test_a_large_page_has_rounded_weights_and_says_so(chromium, tmp_path):
    trace, url = page_of(tmp_path, random_gpt(), exact_layers=False)
    with opened(chromium, url) as page:
        found = np.reshape(page.evaluate("Array.from(weights(1, 1))"), (8, 8))
        assert np.abs(found - formula(trace, 1, 1)[1]).max() <= 0.5 / 255 + 1e-6
        assert "rounded" in page.inner_text("#scores") and page.problems == []


def test_a_page_of_36_heads_and_128_tokens_is_below_5_mb(chromium, tmp_path):
    torch.manual_seed(0)
    gpt = random_gpt(n_layer=6, n_head=6, n_embd=384, block_size=128, vocab_size=19)
    ids = torch.randint(19, (128,)).tolist()
    _, url = page_of(tmp_path, gpt, ids)
    assert (tmp_path / "look.html").stat().st_size < 5_000_000
    with opened(chromium, url) as page:
        assert page.evaluate("isExact(5)")
        assert page.evaluate("weights(5, 5).length") == 128 * 128


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.one_of(
            st.text(max_size=12),
            st.sampled_from(
                [
                    "</script><script>window.hacked = 1</script>",
                    "<img src=x onerror='window.hacked = 1'>",
                    "<!--<script>",
                    "]]>",
                    "&lt;b&gt;",
                    "'\"`${window.hacked = 1}",
                    "\u2028window.hacked = 1",
                    "__proto__",
                    "javascript:window.hacked = 1",
                    "{asks}",
                    "$&",
                ]
            ),
        ),
        min_size=100,
        max_size=100,
    )
)
def test_token_text_stays_text(chromium, tmp_path, words):
    ids = [n % 19 for n in range(8)]

    def hostile(found):
        found["vocabulary"] = {id: words[id] for id in range(19)}
        found["model"]["name"] = words[20]
        found["tokens"] = [{"id": id, "loss": 1.0} for id in ids]

    _, url = page_of(tmp_path, random_gpt(), ids, hostile)
    with opened(chromium, url) as page:
        assert page.evaluate("window.hacked") is None and page.problems == []
        found = page.eval_on_selector_all(".tokens button", "all => all.map((one) => one.textContent)")
        shown = [words[id].replace(" ", "␣") or "∅" for id in ids]
        assert json.dumps(found) == json.dumps(shown)
        assert page.evaluate("document.scripts.length") == 2 and page.evaluate("document.images.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 320])
def test_the_page_is_accessible(chromium, tmp_path, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    _, url = page_of(tmp_path, random_gpt())
    shape = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "bypass_csp": True}
    for language in ("en", "hi"):
        with opened(chromium, url, **shape) as page:
            page.evaluate(f"start('{language}')")
            found = axe.Axe().run(page)
            assert [each["id"] for each in found.response["violations"]] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_keyboard_alone_reaches_everything(chromium, tmp_path):
    _, url = page_of(tmp_path, random_gpt())
    with opened(chromium, url) as page:
        stops = []
        for _ in range(80):
            page.keyboard.press("Tab")
            stops.append(
                page.evaluate("document.activeElement.tagName + (document.activeElement.ariaLabel ?? '')")
            )
            if stops[-1].startswith("CANVAS") and "Weights" in stops[-1]:
                break
        else:
            raise AssertionError(stops)
        before = page.evaluate("[state.asks, state.asked]")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("[state.asks, state.asked]") == [before[0] - 1, before[1] - 1]
        said = page.inner_text("#live")
        assert "asks" in said and "weight" in said
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # show as a table
        assert page.evaluate("document.activeElement.ariaPressed") == "true"


def test_every_language_has_every_word():
    from kqv.looking.page import languages

    words = languages()
    assert set(words) >= {"en", "hi"}
    for language, table in words.items():
        assert table.keys() == words["en"].keys(), language
        for key, text in table.items():
            assert set(fields(text)) == set(fields(words["en"][key])), (language, key)


def fields(text):
    import re

    return re.findall(r"\{\w+\}", text)
