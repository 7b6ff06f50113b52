"""The page of features: what it holds, what it refuses, and how it behaves in a real browser."""

import base64
import copy
import json
import re

import numpy as np
import pytest
from browser import Browser, find_chromium

from jaxrl_llm.errors import UserError
from jaxrl_llm.report.features import _word, build_features_page, write_features_page

WORDS = [" the", " cat", " sat", " on", " a", " mat", ".", "\n", "<b>", " zebra", "</script>", "é"]


def features_data(n=40, seed=0):
    """Data of n features with random contexts; feature 7 alone has a zebra, feature 3 a label."""
    rng = np.random.default_rng(seed)

    def context(kind, rank, own):
        tokens = rng.integers(0, len(WORDS), 12)
        tokens[tokens == 9] = 1
        if own == 7:
            tokens[4:6] = 9, 0
        fires = [[4, 2.0 - 0.1 * rank], [6, 0.001]]
        return {"kind": kind, "text": 100 + rank, "first": 3, "tokens": [int(t) * 10 for t in tokens], "fires": fires, "peak": 4}

    features = []
    for i in range(n):
        near = [[(i + 1) % n * 2, 0.5], [(i + 2) % n * 2 + 1, -0.25]]
        one = {"id": 2 * i, "count": 5 + i, "density": (1 + i) / 1000, "mean": 1.0, "max": 2.0 + i}
        one |= {"histogram": {"width": 0.5, "counts": [3, 0, 2]}, "near": near, "together": [[(i + 3) % n * 2, 0.4, 0.3]]}
        one |= {"logits": {"raised": [[10, 1.5]], "lowered": [[20, -1.5]]}}
        kinds = [("top", k) for k in range(3)] + [("sampled", k) for k in range(3, 5)]
        features.append(one | {"contexts": [context(kind, rank, i) for kind, rank in kinds]})
    if n > 3:
        features[3] |= {"label": "<i>animals</i> that sit", "score": 0.75, "judged": 12}
    return {
        "title": "Features of <sae>", "model": "stories", "hook": "blocks.2.resid_post", "d_sae": 2 * n, "tokens": 12345, "texts": 67,
        "alive": 2 * n - 3,
        "vocabulary": {str(10 * i): word for i, word in enumerate(WORDS)}, "features": features, "random": [],
    }  # fmt: skip


def island(page, name):
    return re.search(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', page, re.S)[1]


def test_the_page_holds_the_list_apart_from_the_details():
    data = features_data()
    page = build_features_page(data)
    index, details = json.loads(island(page, "index")), [json.loads(line) for line in island(page, "details").split("\n")]
    assert len(index["list"]) == len(details) == 40 and not index["wide"] and set(index["vocabulary"]) <= set(WORDS)
    assert index["list"][3][:2] == [6, "<i>animals</i> that sit"] and index["list"][7][2] == ["zebra"]
    for feature, kept in zip(data["features"], details, strict=True):
        tokens = np.frombuffer(base64.b64decode(kept["tokens"]), "<u2")
        fires = np.frombuffer(base64.b64decode(kept["fires"]), np.uint8)
        texts = [data["vocabulary"][str(t)] for c in feature["contexts"] for t in c["tokens"]]
        assert [index["vocabulary"][t] for t in tokens] == texts
        expected = np.zeros((5, 12))
        for i, c in enumerate(feature["contexts"]):
            for place, value in c["fires"]:
                expected[i, place] = value
        shown = fires.reshape(5, 12) / 255 * feature["max"]
        np.testing.assert_allclose(shown, expected, atol=feature["max"] / 254)
        assert ((shown > 0) == (expected > 0)).all()  # what fires weakly still shows
    assert "<i>animals" not in page and "Features of &lt;sae&gt;" in page and "80 features, 3 never fire here" in page
    assert not re.search(r'(src|href)="', page) and page.count("</script>") == 3


def test_a_feature_without_a_label_is_told_by_the_words_of_its_peaks():
    cases = {("I", " g", "ot", " it"): "got", (" p", "layed", "."): "played", ("a", ".", "b"): ".", ("ab" * 9, "cd" * 9, "e"): "cd" * 9}
    for i, (texts, word) in enumerate(cases.items()):
        peak = (2, 1, 1, 1)[i]
        assert _word(list(texts), peak) == word


def test_large_vocabularies_take_four_bytes():
    data = features_data(2)
    data["vocabulary"] = {str(i): f"w{i}" for i in range(70_000)}
    whole = {"kind": "top", "text": 0, "first": 0, "tokens": list(range(70_000)), "fires": [[69_999, 1.0]], "peak": 69_999}
    data["features"][0]["contexts"] = [whole]
    page = build_features_page(data)
    index = json.loads(island(page, "index"))
    tokens = np.frombuffer(base64.b64decode(json.loads(island(page, "details").split("\n")[0])["tokens"]), "<u4")
    assert index["wide"] and index["vocabulary"][tokens[-1]] == "w69999" and index["list"][0][2] == ["w69999"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("hook"), "data has no field 'hook'"),
        (lambda d: d.update(features=[]), "there is no feature"),
        (lambda d: d["features"][2].pop("max"), r"features\[2\] has no field 'max'"),
        (lambda d: d["features"][2].update(density="1%"), r"features\[2\].density is str; float is needed"),
        (lambda d: d["features"][1]["contexts"][2].pop("peak"), r"features\[1\].contexts\[2\] has no field 'peak'"),
        (lambda d: d["vocabulary"].pop("0"), "has token 0, of which the vocabulary says nothing"),
        (lambda d: d["features"].__setitem__(0, 5), r"features\[0\] is int"),
    ],
)
def test_data_that_does_not_fit_is_named(change, message):
    data = copy.deepcopy(features_data(4))
    change(data)
    with pytest.raises(UserError, match=message):
        build_features_page(data)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "features.html"
    write_features_page(path, features_data())
    return path.as_uri()


BOXES = ["Activations", "Logits", "Nearest decoder rows", "Fires together with", "Strongest contexts", "Over the whole range"]
OPEN = "document.querySelector('#open h2').textContent"
LISTED = "[...document.querySelectorAll('.item')].map(n => n.querySelector('b').textContent)"
SEARCH = "(() => {{ document.getElementById('search').value = {!r}; refresh(); return listed.map(f => f.id); }})()"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [380, 820, 1400])
def test_the_page_is_whole_at_every_width(browser, url, width, dark):
    browser.problems.clear()
    browser.open(url, width, dark=dark)
    check = browser.run("reportCheck()")
    assert check == {"charts": BOXES, "empty": 0, "failures": [], "overflow": 0} and browser.problems == []
    assert browser.run("document.documentElement.dataset.ready") == "yes"
    assert browser.run(OPEN) == "Feature 0" and 0 < len(browser.run(LISTED)) < 40  # of the list, what is in view


def test_tokens_are_tinted_and_told(browser, url):
    browser.open(url + "#14", 1400)
    mark = browser.run(
        "(() => { const m = document.querySelector('#open mark'); return [m.textContent, m.style.cssText, m.className, m.dataset.tip]; })()"
    )
    assert mark[:3] == [" zebra", "--a: 0.224;", "peak"] and mark[3].split() == ["zebra", "2.01"]
    assert browser.run(OPEN) == "Feature 14" and browser.run("document.querySelectorAll('#open .shown li').length") == 5
    assert "<b>" in browser.run("document.querySelector('.context').parentElement.parentElement.textContent")  # a token is text, never a tag


def test_search_by_number_label_and_text(browser, url):
    browser.open(url, 1400)
    find = lambda text: browser.run(SEARCH.format(text))  # noqa: E731
    assert find("14") == [14] and find("6")[0] == 6 and set(find("6")) == {6, 60, 62, 64, 66, 68}
    assert find("ANIMALS") == [6] and find("zebra") == [14] and find(" zeb") == [14] and find("giraffe") == []
    assert browser.run("document.getElementById('found').textContent") == "Nothing found."
    assert len(find("")) == 40


def test_orders_and_keys(browser, url):
    browser.open(url, 1400)
    order = lambda key: browser.run(f"(() => {{ document.getElementById('sort').value = '{key}'; refresh(); return listed[0].id; }})()")  # noqa: E731
    assert [order(key) for key in ("density", "rare", "max", "score", "id")] == [78, 0, 78, 6, 0]
    browser.press("ArrowDown")
    browser.press("j")
    assert browser.run(OPEN) == "Feature 4" and browser.run("location.hash") == "#4"
    browser.press("k")
    browser.press("End")
    assert browser.run(OPEN) == "Feature 78" and "78" in browser.run(LISTED)
    assert browser.run("document.querySelector('[aria-selected=true] b').textContent") == "78"
    browser.press("/")
    assert browser.run("document.activeElement.id") == "search"
    browser.run("[...document.querySelectorAll('.pairs-list button')][0].click()")
    assert browser.run(OPEN) == "Feature 0"
    before = browser.run("getComputedStyle(document.documentElement).backgroundColor")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("getComputedStyle(document.documentElement).backgroundColor") != before


def test_a_thousand_features_open_with_few_elements(browser, tmp_path):
    """What opening costs is what is drawn and read: the list in view and one feature, whatever their number."""
    write_features_page(tmp_path / "many.html", features_data(1000))
    browser.open((tmp_path / "many.html").as_uri(), 1400)
    assert browser.run("document.querySelectorAll('*').length") < 500 and browser.run("features.length") == 1000
    assert browser.run("contextTexts === null") and browser.run(OPEN) == "Feature 0"
