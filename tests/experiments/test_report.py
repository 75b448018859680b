"""A report shows the numbers of its run folders, in one file, whatever state the runs are in."""

import csv
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.report.collect import LARGEST, collect
from experiments.report.command import report_command
from experiments.report.page import data_of, render
from tests.report_folders import LAYERS, read, row_of, run_folder, sweep_folder

PROJECT = Path(__file__).parents[2]


def report(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_page_holds_the_numbers_of_the_run_folders(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / "open"), run_folder(tmp_path / "private", error=0.3, noise=2.0, extrapolated=True)]
    status, output = report(*folders, "--out", tmp_path / "page.html")
    assert status == 0, output
    shown = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    for folder, run in zip(folders, shown["runs"], strict=True):
        rows, summary = read(folder / "metrics.jsonl"), json.loads((folder / "summary.json").read_text())
        for name in ("round", "train_loss", "eval_loss", "wer", "wer_low", "wer_high"):
            assert run["curves"][name] == [row.get(name) for row in rows]
        for name, key in (("up", "uplink_bytes"), ("down", "downlink_bytes"), ("users", "users"), ("seconds", "round_seconds")):
            assert run["curves"][name] == [sum(row[key] for row in rows[: n + 1]) for n in range(len(rows))]
        for key in ("layer_clipped", "layer_norm", "layer_snr", "layer_sparsity"):
            assert (key in run["layers"]) == (key in rows[0])
            if key in rows[0]:
                found = run["layers"][key]
                assert (found["names"], found["rounds"]) == (list(LAYERS), [row["round"] for row in rows])
                for h, values in enumerate(found["values"]):
                    assert values == pytest.approx([row[key][h] for row in rows], rel=1e-3)
        speakers = sorted(line["wer"] for line in read(folder / "speakers.jsonl"))
        assert (run["speakers"]["wer"], run["speakers"]["count"]) == (speakers, 12)
        assert run["speakers"]["wer_worst_decile"] == summary["wer_worst_decile"]
        results = run["results"]
        assert (results["rate"], results["low"], results["high"]) == (summary["wer"], summary["wer_low"], summary["wer_high"])
        assert (results["both"], results["ratio"]) == (sum(r["uplink_bytes"] + r["downlink_bytes"] for r in rows), 3.5)
    public, private = shown["runs"]
    assert public["stamps"] == ["not private"]
    assert private["stamps"] == ["private", "nominal", "extrapolated"]
    assert (private["results"]["epsilon"], private["results"]["extrapolated"]) == (3.0, 0.25)
    assert shown["keys"] == ["privacy.noise_multiplier"]
    assert "Epsilon 3 at delta 1e-06 in 1 of them" in shown["sentence"]


def test_seeds_are_one_point_and_the_front_is_of_points_that_none_beats(tmp_path: Path) -> None:
    dense = [run_folder(tmp_path / f"dense{seed}", error=0.1 * seed, up=10_000, seed=seed) for seed in (1, 3)]
    thin = run_folder(tmp_path / "thin", error=0.3, up=10, settings={"codec": {"name": "packed"}})
    beaten = run_folder(tmp_path / "beaten", error=0.35, up=500, settings={"codec": {"name": "none"}})
    shown = collect([*dense, thin, beaten])
    several, alone, _ = shown["points"]
    assert (several["runs"], several["label"]) == ([0, 1], "dense")
    assert several["y"] == {"mean": pytest.approx(0.2), "low": 0.1, "high": pytest.approx(0.3)}
    assert alone["y"] == {"mean": 0.3, "low": pytest.approx(0.27), "high": pytest.approx(0.32)}, "of one run the interval"
    assert shown["fronts"]["wer"]["both"] == shown["fronts"]["wer"]["up"] == [alone["id"], several["id"]]
    assert shown["fronts"]["wer"]["epsilon"] == []
    pictures = [
        run_folder(tmp_path / f"i{n}", rate="accuracy", error=e, up=u, settings={"local": {"lr": u}})
        for n, e, u in ((1, 0.4, 9), (2, 0.1, 99))
    ]
    shown = collect(pictures)
    assert shown["fronts"]["accuracy"]["up"] == [0, 1], "of accuracies the greater is the better"
    assert collect(pictures[1:] + pictures[:1])["fronts"]["accuracy"]["up"] == [1, 0]


def test_a_sweep_shows_all_its_trials_by_case_and_is_shown_once(tmp_path: Path) -> None:
    sweep = sweep_folder(tmp_path / "sweep")
    shown = collect([sweep, sweep / "trials" / "int8-seed=1"])
    assert [run["status"] for run in shown["runs"]] == ["done"] * 4 + ["waiting"]
    assert [point["label"] for point in shown["points"]] == ["dense", "int8"]
    assert [point["runs"] for point in shown["points"]] == [[0, 1], [2, 3]]
    assert (shown["title"], shown["notes"], shown["runs"][4]["stamps"]) == ("both", ["Tuning costs privacy."], [])
    assert [c["title"] for c in shown["columns"]][:3] == ["run", "case", "seed"]
    assert shown["common"]["population.size"] == 500, "a trial that waits has no configuration that could differ"
    assert shown["runs"][4]["config"] == {"codec.name": "dense", "run.seed": 3}


def test_a_run_that_goes_on_is_shown_as_far_as_it_is_written_and_watched_to_its_end(tmp_path: Path) -> None:
    folder, page = run_folder(tmp_path / "run", ended=False, noise=1.0), tmp_path / "page.html"
    metrics, pages = folder / "metrics.jsonl", list[str]()
    with metrics.open("a") as file:
        file.write('{"round": 7, "att')

    def wait(seconds: float) -> None:
        assert seconds == 3.0
        pages.append(page.read_text(encoding="utf-8"))
        if len(pages) == 1:
            whole = metrics.read_text().rsplit("\n", 1)[0] + "\n"
            metrics.write_text(whole + json.dumps(row_of(7, 0.1, 1, "wer", 1.0, 3, evaluated=True)) + "\n")
        else:
            (folder / "summary.json").write_text(json.dumps({"status": "interrupted", "privacy": "insecure"}))

    assert report_command([folder], page, watch=True, every=3.0, folder=None, wait=wait) == 0
    assert len(pages) == 2
    assert all('<meta http-equiv="refresh" content="3">' in text for text in pages)
    assert [data_of(text)["runs"][0]["results"]["rounds"] for text in pages] == [6, 7]
    assert [data_of(text)["runs"][0]["status"] for text in pages] == ["running", "running"]
    last = page.read_text(encoding="utf-8")
    assert "http-equiv" not in last
    assert (data_of(last)["runs"][0]["status"], data_of(last)["runs"][0]["stamps"]) == ("interrupted", ["private", "insecure"])


def test_the_page_is_one_small_file_that_asks_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(f"blocks.{n}.weight" for n in range(40))
    monkeypatch.setattr("experiments.report.collect.LARGEST", LARGEST // 10)
    folders = [
        run_folder(tmp_path / f"r{n}", rounds=400, noise=2.0, layers=names, seed=n, settings={"local": {"steps": n // 2}}) for n in range(3)
    ]
    folders.append(run_folder(tmp_path / "hostile", settings={"run": {"name": "</script><b>"}}))
    shown = collect(folders)
    assert len(json.dumps(shown)) < LARGEST // 10
    first = shown["runs"][0]
    assert {1, 400} <= set(first["curves"]["round"]), "the ends of a thinned run are kept"
    assert len(first["curves"]["round"]) > 4 * len(first["layers"]["layer_snr"]["rounds"]), "heat maps are thinned first"
    assert (first["curves"]["wer"][-1], first["curves"]["both"][-1]) == (0.2, first["results"]["both"])
    page = render(shown)
    assert len(page.encode()) < 6_000_000
    assert data_of(page)["runs"][3]["config"]["run.name"] == "</script><b>"
    own = page.replace(page[page.index("<script>") : page.index("</script>", page.index("<script>"))], "")
    assert "</script><b>" not in own
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)|url\(|@import|https?://""", own)


def test_export_writes_the_table_and_each_figure(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a_1", error=0.1, noise=2.0)
    waiting = sweep_folder(tmp_path / "sweep", cases=())
    status, output = report(folder, waiting, "--out", tmp_path / "page.html", "--export", tmp_path / "out")
    assert status == 0, output
    header, *rows = csv.reader((tmp_path / "out/runs.csv").read_text().splitlines())
    line, summary = dict(zip(header, rows[0], strict=True)), json.loads((folder / "summary.json").read_text())
    assert float(line["WER, %"]) == pytest.approx(100 * summary["wer"])
    assert float(line["up, MB"]) * 1e6 == pytest.approx(21_000)
    assert (line["run"], float(line["epsilon"]), len(rows)) == (folder.name, summary["epsilon"], 2)
    latex = (tmp_path / "out/runs.tex").read_text()
    assert r"a\_1 &" in latex
    assert latex.count("\\\\") == 3
    written = {p.stem for p in (tmp_path / "out").glob("*.png")}
    assert written == {p.stem for p in (tmp_path / "out").glob("*.svg")}
    curves = {f"wer-over-{axis}" for axis in ("round", "seconds", "users", "both", "epsilon")}
    heat = {f"a_1-layer_{what}" for what in ("clipped", "norm", "snr", "sparsity")}
    assert written == curves | heat | {"wer-both", "wer-up", "wer-down", "wer-epsilon", "speakers"}
    assert min(p.stat().st_size for p in (tmp_path / "out").iterdir()) > 100


def test_what_cannot_be_shown_is_refused_with_a_remedy(tmp_path: Path) -> None:
    damaged = run_folder(tmp_path / "damaged")
    (damaged / "summary.json").write_text("{")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sweep.json").write_text('{"trials": [{}]}')
    for path, said in ((tmp_path, "no metrics.jsonl and no sweep.json"), (damaged, "damaged file"), (broken, "one by one")):
        status, output = report(path)
        assert status == 2
        assert said in " ".join(output.split())


def test_a_run_of_this_program_is_shown_with_the_names_of_its_layers(tmp_path: Path) -> None:
    out = tmp_path / "run"
    strategy = "strategy={client=[{clip_per_layer={max_norm=0.5}}],server=[{adam={lr=0.02}}]}"
    chosen = [
        "--set",
        'run.engine="process"',
        "--set",
        strategy,
        "--set",
        "privacy.noise_multiplier=1.0",
        "--rounds",
        "2",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, ["run", str(PROJECT / "experiments/vision.toml"), *chosen, "--quiet"])
    assert result.exit_code == 0, result.output
    assert report(out)[0] == 0
    (run,) = data_of((out / "report.html").read_text(encoding="utf-8"))["runs"]
    rows = read(out / "metrics.jsonl")
    assert set(run["layers"]) == {"layer_clipped", "layer_norm", "layer_snr", "layer_sparsity"}
    for key, found in run["layers"].items():
        assert found["names"] == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "out.weight", "out.bias"]
        assert found["values"][-1] == pytest.approx([row[key][-1] for row in rows], rel=1e-3)
    assert run["results"]["epsilon"] == rows[-1]["epsilon"]
    assert run["stamps"] == ["private", "nominal"]
