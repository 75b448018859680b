"""A report shows the numbers of its run folders, in one file, whatever state the runs are in."""

import csv
import datetime
import json
import math
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.report.collect import LARGEST, collect
from experiments.report.command import report_command
from experiments.report.export import as_csv, export, figures
from experiments.report.page import data_of, render
from fedclip.storage import lock
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


def test_runs_that_could_differ_in_their_results_are_no_seeds_of_one_point(tmp_path: Path) -> None:
    same = [
        {"run": {"workers": 3, "engine": "process"}, "task": {"cache_mb": 9, "name": "asr"}},
        {"evaluation": {"every": 3}, "ray": {"retries": 2}},
    ]
    other = [
        {"task": {"name": "asr", "decoder": {"kind": "beam"}}},
        {"task": {"name": "asr", "model": {"path": "a"}}},
        {"task": {"name": "asr", "model": {"adapters": {"base": "a"}}}},
        {"run": {"data_dir": "elsewhere"}},
        {"run": {"init_digest": "abc"}},
        {"evaluation": {"max_units": 3}},
    ]
    folders = [run_folder(tmp_path / f"r{n}", settings=settings, seed=1 + n // 2) for n, settings in enumerate([{}, *same, *other])]
    points = collect(folders)["points"]
    assert [point["runs"] for point in points] == [[0, 1, 2], *([n] for n in range(3, 9))]
    assert points[0]["seeds"] == 2, "three runs, two of one seed"


def test_a_run_that_is_not_finished_is_a_point_of_its_own_that_costs_what_its_error_rate_cost(tmp_path: Path) -> None:
    done, going = run_folder(tmp_path / "a1", error=0.3), run_folder(tmp_path / "a2", error=0.1, seed=2, rounds=5, ended=False, noise=None)
    stopped = run_folder(tmp_path / "a3", error=0.1, seed=3, rounds=5, ended=False)
    (stopped / "summary.json").write_text('{"status": "failed", "error": "the disk is full"}')
    shown = collect([done, going, stopped])
    assert [p["label"] for p in shown["points"]] == ["a1", "a2 (so far, round 4)", "a3 (failed, round 4)"]
    _, point, _ = shown["points"]
    rows = read(going / "metrics.jsonl")
    assert (point["y"]["mean"], rows[-1].get("wer")) == (rows[3]["wer"], None)
    assert point["x"]["up"]["mean"] == sum(row["uplink_bytes"] for row in rows[:4])
    assert shown["runs"][1]["results"]["up"] == sum(row["uplink_bytes"] for row in rows), "the table tells of the whole run"
    assert (shown["fronts"]["wer"]["up"], [run["error"] for run in shown["runs"]]) == ([0], ["", "", "the disk is full"])


def test_noise_of_an_infinite_epsilon_is_not_private(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "weak", noise=0.01)
    rows = [row | ({"epsilon": None} if row["round"] > 2 else {}) for row in read(folder / "metrics.jsonl")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = collect([folder])
    (run,), (point,) = shown["runs"], shown["points"]
    assert run["stamps"] == ["not private", "noise without a finite epsilon"]
    assert (run["results"]["epsilon"], "epsilon" in point["x"], point["noisy"]) == (None, False, True)


def test_a_trial_that_waits_has_its_own_settings_and_no_others(tmp_path: Path) -> None:
    sweep = sweep_folder(tmp_path / "sweep", cases=(("dense", 0.2, 1000),))
    file = json.loads((sweep / "sweep.json").read_text())
    file["trials"][-1]["settings"] = {"codec.name": "int8", "local.lr": "default"}
    file["trials"][0]["status"] = "failed"
    (sweep / "trials" / "dense-seed=1" / "summary.json").write_text('{"status": "interrupted"}')
    (sweep / "sweep.json").write_text(json.dumps(file))
    shown = collect([sweep])
    assert (shown["common"]["codec.name"], shown["runs"][2]["config"]) == ("dense", {"codec.name": "int8"})
    assert [run["status"] for run in shown["runs"]] == ["failed", "done", "waiting"], "the sweep knows what failed"
    row = list(csv.DictReader(as_csv(collect([sweep, run_folder(tmp_path / "x", settings={"codec": {"name": "raw"}})])).splitlines()))[2]
    assert (row["codec name"], "lr" in row) == ("int8", False)


def test_runs_of_one_name_are_told_apart_and_so_are_their_files(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / above / "x" / "run") for above in ("a", "b")]
    folders += [run_folder(tmp_path / "c" / "b-x-run"), run_folder(tmp_path / "B-x-RUN")]
    shown = collect(folders)
    assert [run["name"] for run in shown["runs"]] == ["a/x/run", "b/x/run", "b-x-run", "B-x-RUN"]
    names = [name for name, _ in figures(shown)]
    assert len({name.lower() for name in names}) == len(names)


def test_every_figure_carries_all_stamps_and_lines_of_privacy(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / "open"), run_folder(tmp_path / "private", error=0.3, noise=2.0, extrapolated=True)]
    shown = collect(folders)
    shown["runs"][0]["privacy"] = "another line"
    found = dict(figures(shown))
    assert found["wer-both"].get_suptitle().splitlines() == [
        "not private, private, nominal, extrapolated",
        "another line",
        "seeded simulation: epsilon is nominal; epsilon: at delta 1e-09, add-or-remove-one user, Poisson q = 0.01, PLD; "
        "extrapolated epsilon: at delta 1e-09, add-or-remove-one user, Poisson q = 0.01, PLD",
    ]
    assert found["private-layer_snr"].get_suptitle().splitlines()[0] == "private, nominal, extrapolated", "of its own run"


def test_what_is_missing_or_no_number_is_left_out(tmp_path: Path) -> None:
    settings = {"local": {"lr": math.inf}, "extra": {"day": datetime.date(2026, 1, 2), "list": [math.nan]}}
    folder = run_folder(tmp_path / "deployed", settings=settings)
    rows = [{k: v for k, v in row.items() if k not in ("uplink_bytes", "users")} for row in read(folder / "metrics.jsonl")]
    rows[0]["train_loss"] = math.nan
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, *_ = data_of(render(collect([folder, run_folder(tmp_path / "other")])))["runs"]
    assert [run["config"][key] for key in ("local.lr", "extra.day", "extra.list")] == ["inf", "2026-01-02", ["nan"]]
    assert [run["results"][key] for key in ("up", "both", "users", "down")] == [None, None, None, 18_000]
    assert run["curves"]["train_loss"][:2] == [None, 1.5]
    export(collect([folder]), tmp_path / "out")


def test_watching_ends_where_nobody_works_and_by_ctrl_c(tmp_path: Path) -> None:
    folder, page = run_folder(tmp_path / "run", ended=False), tmp_path / "page.html"
    held, waits = lock(folder), list[float]()

    def die(seconds: float) -> None:
        waits.append(seconds)
        os.close(held)

    assert report_command([folder], page, watch=True, every=1.0, folder=None, wait=die) == 0
    assert (len(waits), data_of(page.read_text(encoding="utf-8"))["runs"][0]["status"]) == (1, "stopped")
    (folder / ".lock").unlink()

    def leave(seconds: float) -> None:
        raise KeyboardInterrupt

    assert report_command([folder], page, watch=True, every=1.0, folder=None, wait=leave) == 0
    assert "http-equiv" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("watch", [False, True])
def test_ctrl_c_before_there_is_a_page_is_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: bool) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.report.command.collect", interrupted)
    assert report_command([run_folder(tmp_path / "run")], tmp_path / "page.html", watch=watch, every=1.0, folder=None) == 130
    assert not (tmp_path / "page.html").exists()


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


def test_of_many_points_the_colour_says_the_case_and_the_sign_the_noise_in_short_labels(tmp_path: Path) -> None:
    cases = tuple((name, 0.1 * n, 100 * n) for n, name in enumerate(("dense", "int8", "topk", "dgc"), start=1))
    shown = collect([sweep_folder(tmp_path / "sweep", cases, noises=(None, 0.6, 1.18))])
    points = shown["points"]
    assert [p["label"] for p in points] == [f"{case}{noise}" for case, _, _ in cases for noise in ("", ", noise 0.6", ", noise 1.18")]
    assert [p["style"] for p in points] == [[colour, sign, sign] for colour in range(4) for sign in range(3)]
    assert shown["legend"] == {"colours": ["dense", "int8", "topk", "dgc"], "signs": ["no noise", "noise 0.6", "noise 1.18"]}
    (axes,) = next(figure for name, figure in figures(shown) if name == "wer-up").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*shown["legend"]["colours"], *shown["legend"]["signs"]]
    # Alike in nothing: each has its own colour and sign. Few of either: the sign says what has too many values for colours.
    alone = [run_folder(tmp_path / f"r{n}", settings={"local": {"lr": float(n)}}) for n in range(9)]
    assert [p["style"] for p in collect(alone)["points"]] == [[n, n, n // 7] for n in range(9)]
    eight = tuple((f"c{n}", 0.1, n + 1) for n in range(8))
    shown = collect([sweep_folder(tmp_path / "eight", eight, noises=(None, 0.6))])
    assert (len(shown["legend"]["colours"]), len(shown["legend"]["signs"])) == (2, 8)
    assert len({tuple(p["style"]) for p in shown["points"]}) == 16


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
    assert "layer_sparsity" not in rows[0], "the chain leaves nothing out"
    assert set(run["layers"]) == {"layer_clipped", "layer_norm", "layer_snr"}
    for key, found in run["layers"].items():
        assert found["names"] == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "out.weight", "out.bias"]
        assert found["values"][-1] == pytest.approx([row[key][-1] for row in rows], rel=1e-3)
    assert run["results"]["epsilon"] == rows[-1]["epsilon"]
    assert run["stamps"] == ["private", "nominal"]
