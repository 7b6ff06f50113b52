"""The page in a real browser: charts exist, nothing fails, overflows or is loaded, and the switches do what they say."""

import pytest
from browser import Browser, find_chromium
from fake_run import write_run
from fake_saerl import saerl_data

from jaxrl_llm.report import build_report, run_report, write_report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(build_report(saerl_data(prompts=400)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def run_url(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    write_run(path / "r", steps=45)
    write_report(path / "r" / "report.html", run_report(path / "r"))
    return (path / "r" / "report.html").as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [380, 820, 1400])
def test_the_full_page_is_whole_at_every_width(browser, url, width, dark):
    browser.problems.clear()
    browser.open(url, width, dark=dark)
    check = browser.run("reportCheck()")
    assert check["failures"] == [] and check["overflow"] == 0 and check["empty"] == 0
    kinds = {"curves", "map", "schedule", "calibration", "quality", "feature", "rollouts", "stages"}
    assert set(check["charts"]) == kinds and check["charts"].count("schedule") == 6
    assert browser.run("document.documentElement.dataset.ready") == "yes"
    assert browser.run("window.pwned") is None
    assert browser.problems == []


def test_every_text_of_a_drawing_is_inside_the_window(browser, url):
    """Labels at the end of lines and cut labels must not be clipped; tables may scroll in their own boxes."""
    for width in (380, 600, 820, 1400):
        browser.open(url, width)
        outside = browser.run(
            "[...document.querySelectorAll('svg.lines text')].filter(t => { const b = t.getBoundingClientRect();"
            " return b.width && (b.right > innerWidth + 1 || b.left < -1); }).map(t => t.textContent)"
        )
        assert outside == [], width


@pytest.mark.parametrize("width", [380, 1400])
def test_the_page_of_a_single_run_is_whole(browser, run_url, width):
    browser.problems.clear()
    browser.open(run_url, width)
    check = browser.run("reportCheck()")
    assert check["failures"] == [] and check["overflow"] == 0 and check["empty"] == 0
    assert check["charts"].count("panel") >= 9 and check["charts"].count("curves") == 2
    assert browser.problems == []


def test_one_width_of_each_chart_is_shown(browser, url):
    shown = "[...document.querySelectorAll('#curves svg.lines')].filter(s => s.getBoundingClientRect().width).length"
    for width in (380, 600, 820, 1400):
        browser.open(url, width)
        assert browser.run(shown) == 1, width


PIXELS = (
    "(() => { const c = document.querySelector('canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, s = new Set();"
    " for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 180) s.add((d[i] >> 4) * 256 + (d[i + 1] >> 4) * 16 + (d[i + 2] >> 4));"
    " let sum = 0; for (let i = 0; i < d.length; i += 97) sum = (sum * 31 + d[i]) % 1000003; return [s.size, sum]; })()"
)


def test_the_map_changes_with_its_switch_its_legend_and_the_theme(browser, url):
    browser.open(url, 1400)
    pictures = [browser.run(PIXELS)]
    assert pictures[0][0] > 12  # many colours: sixteen clusters
    fields = browser.run("[...document.querySelectorAll('[data-field]')].map(b => b.textContent)")
    assert fields == ["cluster", "topic", "difficulty", "quality", "kept", "corruption"]
    for i, name in enumerate(fields[1:], 1):
        browser.run(f"document.querySelectorAll('[data-field]')[{i}].click()")
        pressed = "document.querySelector('[data-field][aria-pressed=true]').textContent"
        assert browser.run(pressed) == name
        pictures.append(browser.run(PIXELS))
    assert browser.run("[...document.querySelectorAll('.map-legend button')].map(b => b.children[1].textContent)")[0] == "clean"
    browser.run("document.querySelector('.map-legend button').click()")
    pictures.append(browser.run(PIXELS))
    browser.run("document.getElementById('theme').click()")
    pictures.append(browser.run(PIXELS))
    assert len({tuple(p) for p in pictures}) == len(pictures)


# In view at once, and its scroll event over, for scrolling puts the tooltip away.
FOCUS = (
    "(() => {{ const e = document.querySelector('{}'), frame = requestAnimationFrame;"
    " e.scrollIntoView({{block: 'center', behavior: 'instant'}});"
    " return new Promise(done => frame(() => frame(() => {{ e.focus({{preventScroll: true}}); done(1); }}))); }})()"
)


def test_pointer_and_keys_tell_values_as_text(browser, url):
    browser.open(url, 1400)
    shown = "document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent"
    assert browser.run(shown) is None
    browser.run(FOCUS.format("#curves .at-l svg"))
    browser.press("ArrowRight")
    assert browser.run(shown).startswith("GRPO step 0") and "30.0%" in browser.run(shown)
    for _ in range(20):
        browser.press("ArrowRight")
    text = browser.run(shown)
    assert text.startswith("GRPO step 120") and text.index("SAERL, full") < text.index("vanilla")
    browser.run(FOCUS.format("canvas"))
    browser.press("ArrowRight")
    assert "difficulty" in browser.run(shown) and "problem" in browser.run(shown)
    browser.press("Escape")
    assert browser.run(shown) is None
    browser.run(FOCUS.format("svg[data-heat]"))
    x, y = browser.run(
        "(() => { const b = document.querySelector('svg[data-heat]').getBoundingClientRect();"
        " return [b.x + b.width * 0.5, b.y + b.height * 0.6]; })()"
    )
    browser.move(x - 2, y)
    browser.move(x, y)
    assert "median difficulty" in browser.run(shown) and "cluster" in browser.run(shown)


def test_the_name_of_an_arm_singles_out_its_line(browser, url):
    browser.open(url, 1400)
    x, y = browser.run(
        "(() => { const b = [...document.querySelectorAll('.end')].find(t => t.getBoundingClientRect().width && t.dataset.arm === 'filter')"
        ".getBoundingClientRect(); return [b.x + 5, b.y + b.height / 2]; })()"
    )
    browser.move(x, y)
    assert set(browser.run("[...document.querySelectorAll('.single .on')].map(n => n.dataset.arm)")) == {"filter"}
    browser.move(5, 5)
    assert browser.run("document.querySelectorAll('.single').length") == 0


def test_rollout_filters_choose_arms_verdicts_and_changes(browser, url):
    browser.open(url, 1400)
    cards = "[...document.querySelectorAll('.rollout')].filter(c => !c.hidden).length"
    lines = "[...document.querySelectorAll('.rollout:not([hidden]) .responses li')].filter(l => !l.hidden).map(l => l.dataset.arm)"
    press = "document.querySelector('[data-value=\"{}\"]').click()"
    assert browser.run(cards) == 6
    browser.run("document.querySelector('.more').click()")
    assert browser.run(cards) == 20
    browser.run(press.format("vanilla"))
    assert set(browser.run(lines)) == {"base", "full", "published"}
    browser.run(press.format("TIMEOUT"))  # only vanilla has one, and it is switched off
    assert browser.run(cards) == 0 and browser.run("document.querySelector('.none-fit').hidden") is False
    browser.run(press.format("vanilla"))
    assert browser.run(cards) == 1
    browser.run(press.format("changed"))
    assert browser.run("[...document.querySelectorAll('.rollout:not([hidden])')].every(c => c.dataset.changed === '1')")


def test_the_config_filter_and_the_theme_by_hash(browser, url):
    browser.open(url, 1400)
    browser.run("(() => { const i = document.querySelector('input.filter'); i.value = 'SAE.'; i.dispatchEvent(new Event('input')); })()")
    kept = browser.run("[...document.querySelectorAll('#config tr')].filter(r => !r.hidden).map(r => r.textContent)")
    assert len(kept) == 4 and all(text.startswith("sae.") for text in kept)
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light = browser.run(background)
    browser.open(url + "#dark", 1400)
    assert browser.run(background) != light
    browser.open(url + "#light", 1400, dark=True)
    assert browser.run(background) == light


def test_on_paper_the_page_is_light_and_fits(browser, url):
    browser.open(url, 740, dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.run("reportCheck().overflow") == 0
        assert browser.run("getComputedStyle(document.documentElement).backgroundColor") == "rgb(253, 253, 252)"
        assert browser.run("document.querySelector('.bar').getBoundingClientRect().height") == 0
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_marks_of_a_column_line_up_whatever_the_weight_of_the_figures(browser, url):
    browser.open(url, 1400)
    spread = (
        "[...document.querySelectorAll('.signals')].map(t => { const xs = [...t.querySelectorAll('tbody tr')].map(r => r.cells[1])"
        ".map(c => c.querySelector('.mark')?.getBoundingClientRect().x).filter(x => x); return Math.max(...xs) - Math.min(...xs); })"
    )
    assert max(browser.run(spread)) < 0.6


def test_every_row_of_the_arms_table_fills_every_column(browser, url):
    for width, media in ((1400, ""), (740, "print")):
        browser.open(url, width)
        browser.call("Emulation.setEmulatedMedia", media=media)
        ends = browser.run(
            "[...document.querySelectorAll('.arms tr')].map(r => Math.round(r.lastElementChild.getBoundingClientRect().right))"
        )
        browser.call("Emulation.setEmulatedMedia", media="")
        assert len(set(ends)) == 1, media
