"""The page of a report in a browser: it says what the run folders say, fits the window, and its table, hovers and exports work."""

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.report.collect import collect
from experiments.report.page import render
from tests.browser import CHROMIUM, Browser
from tests.report_folders import read, run_folder, sweep_folder

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page of a report was not looked at")

TEXTS = (
    "h1, h2, h3, header p, #stamps li, dt, dd, label, main > section > p, figcaption, .legend li, .tools button, .controls button, svg text"
)

FITS = """((texts) => {
  const bad = [], page = document.documentElement;
  const seen = (e) => e.checkVisibility() && !e.closest(".scroll, .skip, .hoverlayer") && e.textContent.trim();
  const box = (e) => {
    const r = e.getBoundingClientRect();
    return { e, l: r.left, r: r.right, t: r.top, b: r.bottom, text: e.textContent.trim().slice(0, 30) };
  };
  if (page.scrollWidth > page.clientWidth) bad.push(`the page is ${page.scrollWidth} wide`);
  const leaves = [...document.querySelectorAll(texts)].filter(seen).map(box).filter((x) => x.r > x.l);
  for (const x of leaves) {
    if (x.l < -0.5 || x.r > page.clientWidth + 0.5) bad.push(`cut: ${x.text}`);
    const hides = getComputedStyle(x.e).overflowX !== "visible";
    if (hides && x.e.clientWidth && x.e.scrollWidth > x.e.clientWidth + 1) bad.push(`hidden: ${x.text}`);
    const s = x.e.closest("svg") && x.e.closest("svg").getBoundingClientRect();
    if (s && (x.l < s.left - 1 || x.r > s.right + 1 || x.t < s.top - 1 || x.b > s.bottom + 1)) bad.push(`out of its figure: ${x.text}`);
  }
  for (const [i, x] of leaves.entries()) for (const y of leaves.slice(i + 1)) {
    const wide = Math.min(x.r, y.r) - Math.max(x.l, y.l), high = Math.min(x.b, y.b) - Math.max(x.t, y.t);
    if (!x.e.contains(y.e) && !y.e.contains(x.e) && wide > 1.5 && high > 1.5) bad.push(`overlap: ${x.text} | ${y.text}`);
  }
  return bad;
})(TEXTS)""".replace("TEXTS", json.dumps(TEXTS))
"""What is cut or overlaps in the page."""

TRACES = """Object.fromEntries([...document.querySelectorAll("figure:not([hidden])")].map((f) => [f.dataset.figure,
  f.querySelector(".plot").data.map((t) => ({ name: t.name, x: Array.from(t.x), y: Array.from(t.y), custom: t.customdata }))]))"""
"""What is drawn, by figure."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    private = run_folder(root / "private-with-a-rather-long-name", error=0.4, up=3000, noise=2.0)
    return [run_folder(root / "plain", error=0.1), private, run_folder(root / "noisier", error=0.5, noise=0.5, extrapolated=True)]


def page_of(paths: list[Path], file: Path) -> Path:
    file.write_text(render(collect(paths)), encoding="utf-8")
    return file


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["runs", "sweep"])
def test_the_page_fits_and_the_console_is_silent(browser: Browser, folders: list[Path], tmp_path: Path, width: int, kind: str) -> None:
    browser.events.clear()
    browser.open(
        page_of(folders if kind == "runs" else [sweep_folder(tmp_path / "sweep")], tmp_path / "page.html"), width, dark=width == 390
    )
    assert browser.run(FITS) == []
    for select in ("bytes", "claim", "measure", "against"):  # each choice of each switch
        for n in range(browser.run(f"$('{select}').options.length")):
            browser.run(f"$('{select}').selectedIndex = {n}; $('{select}').dispatchEvent(new Event('change'))")
            assert browser.run(FITS) == [], (select, n)
    assert browser.faults() == []
    assert browser.run("document.documentElement.dataset.theme") == ("dark" if width == 390 else "light")
    unnamed = '[...document.querySelectorAll("button, select, input, .plot, .scroll")].filter((e) => e.checkVisibility() && '
    assert browser.run(f'{unnamed}!(e.getAttribute("aria-label") || e.textContent.trim() || e.closest("label"))).length') == 0
    said = browser.run('[...document.querySelectorAll("figure:not([hidden]) .plot")].map((p) => p.getAttribute("aria-label").length)')
    assert len(said) >= 5
    assert min(said) > 40, "each figure says what it shows"


@pytest.mark.parametrize("kind", ["cases", "alone"])
def test_many_curves_are_told_apart_by_colour_and_dash(browser: Browser, tmp_path: Path, kind: str) -> None:
    cases = tuple((name, 0.1, 100) for name in ("dense", "int8", "topk", "dgc"))
    alone = [run_folder(tmp_path / f"r{n}", settings={"local": {"lr": float(n)}}) for n in range(9)] if kind == "alone" else []
    browser.events.clear()
    paths = alone or [sweep_folder(tmp_path / "sweep", cases, noises=(None, 0.6, 1.18))]
    browser.open(page_of(paths, tmp_path / "page.html"), 390, dark=True)
    browser.run("runs.forEach((run) => state.shown.add(run.id)), drawAll()")
    assert browser.run(FITS) == []
    lines = browser.run(
        "document.querySelector('[data-figure=curves] .plot').data.map((t) => [t.line.color, t.line.dash, t.line.width].join(' '))"
    )
    assert len(set(lines)) == len(lines) == (24 if kind == "cases" else 9), "seeds of a point differ too"
    legend = browser.run("[...document.querySelectorAll('[data-figure=bytes] .legend li')].map((li) => li.lastChild.textContent)")
    both = ["dense", "int8", "topk", "dgc", "no noise", "noise 0.6", "noise 1.18"]
    assert legend == (both if kind == "cases" else [f"r{n}" for n in range(9)])
    assert browser.faults() == []


def test_what_is_drawn_is_in_the_run_folders(browser: Browser, folders: list[Path], tmp_path: Path) -> None:
    browser.open(page_of(folders, tmp_path / "page.html"), 1280)
    drawn, rows = browser.run(TRACES), [read(folder / "metrics.jsonl") for folder in folders]
    ends = [(sum(r["uplink_bytes"] + r["downlink_bytes"] for r in of), 100 * of[-1]["wer"]) for of in rows]
    assert [(*t["x"], *t["y"]) for t in drawn["bytes"][1:]] == [(x, pytest.approx(y)) for x, y in ends]
    assert [(*t["x"], *t["y"]) for t in drawn["epsilon"][1:]] == [
        (of[-1]["epsilon"], pytest.approx(100 * of[-1]["wer"])) for of in rows[1:]
    ]
    curves = [t for t in drawn["curves"] if "interval" not in t["name"]]
    for trace, folder, of in zip(curves, folders, rows, strict=True):
        assert (trace["name"], trace["x"]) == (folder.name, [r["round"] for r in of if "wer" in r])
        assert trace["y"] == pytest.approx([100 * r["wer"] for r in of if "wer" in r])
    for key, factor in (("layer_clipped", 100), ("layer_norm", 1), ("layer_sparsity", 100)):
        (heat,) = drawn[key]
        for h, values in enumerate(heat["custom"]):
            assert values == pytest.approx([factor * r[key][h] for r in rows[0]], rel=1e-3)
    for trace, folder in zip(drawn["speakers"], folders, strict=True):
        assert trace["y"] == pytest.approx(sorted(100 * line["wer"] for line in read(folder / "speakers.jsonl")))
    for select, value in (("layerrun", "1"), ("bytes", "up")):
        browser.run(f"$('{select}').value = '{value}'; $('{select}').dispatchEvent(new Event('change'))")
    drawn = browser.run(TRACES)
    assert [t["x"][0] for t in drawn["bytes"][1:]] == [sum(r["uplink_bytes"] for r in of) for of in rows]
    for h, values in enumerate(drawn["layer_snr"][0]["custom"]):
        assert values == pytest.approx([r["layer_snr"][h] for r in rows[1]], rel=1e-3)


def test_the_table_sorts_filters_opens_and_compares(browser: Browser, folders: list[Path], tmp_path: Path) -> None:
    browser.open(page_of(folders, tmp_path / "page.html"), 1280)
    rows = '[...document.querySelectorAll("#table tbody tr[data-run]")].map((r) => Number(r.dataset.run))'
    head = "[...document.querySelectorAll('#table thead button')].find((b) => b.textContent === 'WER, %')"
    assert browser.run(rows) == [0, 1, 2]
    assert browser.run(f"{head}.click(); {head}.click(); {rows}") == [2, 1, 0]
    assert browser.run("document.querySelectorAll('th[aria-sort=descending]').length") == 1
    field = "[...document.querySelectorAll('#table thead input')].find((i) => i.getAttribute('aria-label') === 'Filter WER, %')"
    for text, left in ((">=40", [2, 1]), ("5..45", [1, 0]), ("<20", [0]), ("", [2, 1, 0])):
        assert browser.run(f"{field}.value = '{text}'; {field}.dispatchEvent(new Event('input')); {rows}") == left
    assert browser.run(f"$('find').value = 'LONG'; $('find').dispatchEvent(new Event('input')); {rows}") == [1]
    assert browser.run("$('count').textContent") == "1 of 3 runs"
    opened = browser.run("document.querySelector('#table .open').click(); document.querySelector('tr.details').innerText")
    assert "privacy.noise_multiplier" in opened
    assert "0.5, not set" in " ".join(opened.split()) or "not set, 0.5" in " ".join(opened.split())
    browser.run("$('second').value = 2; $('second').dispatchEvent(new Event('change'))")
    differences = browser.run("[...$('differences').rows].map((r) => [...r.cells].map((c) => c.textContent))")
    assert ["WER, %", "10.0", "50.0"] in differences
    assert ["privacy.noise_multiplier", "not set", "0.5"] in differences
    assert browser.run(TRACES)["pair"][1]["name"] == "plain"


def test_settings_that_the_opened_run_lacks_are_told_and_a_loaded_page_is_as_it_was_left(
    browser: Browser, folders: list[Path], tmp_path: Path
) -> None:
    weak = run_folder(tmp_path / "weak", error=0.05, noise=0.01, ended=False)
    rows = [row | {"epsilon": None} for row in read(weak / "metrics.jsonl")]
    (weak / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = page_of([*folders, weak], tmp_path / "page.html")
    browser.open(file, 1280)
    told = "[...document.querySelectorAll('tr.details table')[0].rows].map((r) => [...r.cells].map((c) => c.textContent))"
    assert ["privacy.noise_multiplier", "not set", "2, 0.5, 0.01"] in browser.run(f"document.querySelector('#table .open').click(); {told}")
    lines = "document.querySelector('[data-figure=epsilon] .plot').layout.annotations.map((a) => a.text)"
    assert browser.run(lines) == ["best without noise: 10.0%"], "noise of an infinite epsilon is noise"
    drawn = "document.querySelector('[data-figure=bytes] .plot').data.map((t) => t.marker && t.marker.symbol)"
    assert browser.run(drawn)[-1].endswith("-open"), "it is not finished"
    assert browser.run("document.querySelector('[data-figure=speakers] .plot').data[0].text[0]").startswith("unit ")
    browser.run("[...document.querySelectorAll('#table thead button')].find((b) => b.textContent === 'WER, %').click()")
    browser.run("document.querySelectorAll('#table tbody input')[0].click(); $('find').value = 'n'")
    browser.run(
        "(() => { const f = document.querySelectorAll('#table thead input')[0]; f.value = 'a'; f.dispatchEvent(new Event('input')); })()"
    )
    fields = "[...document.querySelectorAll('#table input')].map((i) => i.type === 'checkbox' ? i.checked : i.value)"
    left = f"[[...document.querySelectorAll('#table tbody tr')].map((r) => r.innerText), {fields}, $('find').value, state.sort]"
    before, kept = browser.run(left), browser.run("JSON.stringify({ ...sessionStorage })")
    again = browser.call("Page.addScriptToEvaluateOnNewDocument", source=f"Object.assign(sessionStorage, {kept})")
    browser.open(file, 1280)
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=again["identifier"])
    assert browser.run(left) == before
    assert (before[2], before[1].count(False)) == ("n", 1)


def test_hover_theme_and_exports(browser: Browser, folders: list[Path], tmp_path: Path) -> None:
    browser.events.clear()
    browser.open(page_of(folders, tmp_path / "page.html"), 1280)
    point = browser.run("""(() => {
      const plot = document.querySelector("[data-figure=bytes] .plot");
      plot.scrollIntoView({ block: "center" });
      const r = plot.querySelectorAll(".points path")[1].getBoundingClientRect();
      return [r.left + r.width / 2, r.top + r.height / 2];
    })()""")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=point[0] - 3, y=point[1])
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=point[0], y=point[1])
    time.sleep(0.5)
    assert "word error rate 40.0%" in browser.run('document.querySelector("[data-figure=bytes] .hoverlayer").textContent')
    backgrounds = [browser.run("getComputedStyle(document.body).backgroundColor")]
    browser.run('$("theme").click()')
    assert browser.run("getComputedStyle(document.body).backgroundColor") not in backgrounds
    assert browser.run('document.querySelector("[data-figure=bytes] .plot").layout.paper_bgcolor') == "#14161a"
    browser.run('$("csv").click()'), browser.run('$("latex").click()')
    browser.run('save("curves", "svg")'), browser.run('save("layer_clipped", "png")')
    wanted = {"runs.csv", "runs.tex", "curves.svg", "layer_clipped.png"}
    for _ in range(100):
        if wanted <= {p.name for p in browser.downloads.iterdir()}:
            break
        time.sleep(0.1)
    header, *rows = csv.reader((browser.downloads / "runs.csv").read_text().splitlines())
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert [float(row[header.index("WER, %")]) for row in rows] == pytest.approx([100 * s["wer"] for s in summaries])
    assert (browser.downloads / "runs.tex").read_text().startswith("\\begin{tabular}")
    assert (browser.downloads / "layer_clipped.png").read_bytes().startswith(b"\x89PNG")
    saved = (browser.downloads / "curves.svg").read_text()
    assert "private-with-a-rather-long-name" in saved
    for claim in ("not private, private, nominal, extrapolated", "seeded simulation: epsilon is nominal"):
        assert claim in saved
    assert browser.faults() == []
