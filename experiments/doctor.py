"""`fedclip doctor`: what a run needs of this machine, each with its remedy. What may be broken is only imported in other processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final, Literal

from experiments.live import size
from experiments.prepare import corpus_kind
from experiments.trackers import installed
from fedclip.options import ConfigError

Status = Literal["ok", "warn", "fail"]
Probe = Callable[[str, float], tuple[int | None, str]]
"""Runs Python code in another process, within seconds; returns its exit status, None when the time was up, and what it printed."""

PATIENCE: Final = 120.0
"""Seconds for what takes a few on an idle machine."""

EXTRAS: Final[Mapping[str, tuple[str, str]]] = {
    "speech": ("espeakng_loader", "the embedded corpus"),
    "partitions": ("flwr_datasets", "partitions of images"),
    "pretrained": ("transformers", "pretrained encoders"),
    "decoder": ("flashlight.lib.text.decoder", "beam search"),
    "mlflow": ("mlflow", "the tracker MLflow"),
    "wandb": ("wandb", "the tracker Weights & Biases"),
}
"""For each extra the package that it brings, and what for."""

VERSIONS: Final = ("torch", "torchaudio", "flwr", "ray", "numpy", "dp-accounting")
BROKEN: Final = "mend what it names; where that is a package, pip install --force-reinstall it"
LEAST_MEMORY, LEAST_SHARED, LEAST_DISK = 4 * 10**9, 256 * 10**6, 5 * 10**9
FULL: Final = 0.95
"""The part of the temporary folder's disk from which on Ray puts nothing there any more."""

TORCH: Final = """
import json, torch
gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
print(json.dumps({"sum": float(torch.ones(3).sum()), "cuda": torch.version.cuda, "gpus": gpus}))
"""
TORCHAUDIO: Final = "import torchaudio.functional"
FLOWER: Final = """
from flwr.app import Message, RecordDict
from clients.identity import Identity, assume
assume(Identity(7, 8, 9))
meta = Message(RecordDict(), dst_node_id=5, message_type="train", group_id="1").metadata
found = meta.run_id, meta.src_node_id, meta.src_task_id
if found != (7, 8, 9):
    raise SystemExit(f"a message has run, node and task {found} where clients.identity put (7, 8, 9)")
"""
RAY: Final = """
import logging, ray
ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         object_store_memory=80 * 2**20)
assert ray.get(ray.remote(lambda: 42).remote()) == 42
ray.shutdown()
"""


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do where that is not well."""

    name: str
    status: Status
    said: str
    remedy: str = ""


def doctor_command(data_dir: Path | None, as_json: bool, probe: Probe | None = None) -> int:
    """Print what is found, a line as it is found, and return the exit status: 1 where something fails."""
    findings = list[Finding]()
    for finding in examine(data_dir, probe or run_python):
        findings.append(finding)
        if not as_json:
            print(f"{finding.status:5} {finding.name:15} {finding.said}", flush=True)
            if finding.remedy:
                print(f"{'':21} {finding.remedy}", flush=True)
    count = {status: sum(f.status == status for f in findings) for status in ("ok", "warn", "fail")}
    worst = next((status for status in ("fail", "warn") if count[status]), "ok")
    if as_json:
        print(json.dumps({"status": worst, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        print(f"{count['ok']} ok, {count['warn']} to mind, {count['fail']} that fail")
    return 1 if count["fail"] else 0


def examine(data_dir: Path | None, probe: Probe) -> Iterator[Finding]:
    """Yield all findings, the quick ones first. A check that itself breaks down is one that fails."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "packages": _packages,
        "extras": _extras,
        "machine": _machine,
        "disk": _disk,
        "torch": lambda: _torch(probe),
        "flower": lambda: _flower(probe),
        "ray": lambda: _ray(probe),
    }
    if data_dir is not None:
        checks["data"] = lambda: _data(data_dir)
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001  whatever is broken here is what this is for
            yield Finding(name, "fail", f"could not be looked at: {type(error).__name__}: {error}", BROKEN)


def run_python(code: str, seconds: float) -> tuple[int | None, str]:
    """Run code in another Python on this project; see `Probe`. Whatever it started ends with it when the time is up."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "FLWR_TELEMETRY_ENABLED": "0"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:  # no pipe: what it starts would hold it open
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**quiet, **os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return status, output.read()


def _packages() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")
    try:
        needed = requires("fedclip") or []
    except PackageNotFoundError:
        yield Finding("packages", "warn", "fedclip is not installed, so that nothing says what it needs", "pip install --editable .")
        return
    from packaging.requirements import Requirement

    missing, told = list[str](), {name: _version(name) for name in VERSIONS}
    for requirement in map(Requirement, needed):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            there = _version(requirement.name)
            if there is None or not requirement.specifier.contains(there, prereleases=True):
                missing.append(f"{requirement.name}{requirement.specifier} (there is {there or 'none'})")
    said = ", ".join(f"{name} {number or 'none'}" for name, number in told.items())
    yield Finding("packages", "ok", said)
    if missing:
        yield Finding(
            "requirements", "fail", f"not as needed: {', '.join(missing)}", "pip install --upgrade fedclip, in an environment of its own"
        )


def _extras() -> Iterator[Finding]:
    for extra, (package, purpose) in EXTRAS.items():
        try:
            there = installed(package)
        except Exception as error:  # noqa: BLE001  the package that it is in is imported, which may raise anything
            remedy = f"pip install --force-reinstall 'fedclip[{extra}]'"
            yield Finding(f"extra {extra}", "fail", f"{purpose}: {package} is broken: {type(error).__name__}: {error}", remedy)
            continue
        said = f"{purpose}: {'installed' if there else f'not installed; only where it is wanted: pip install fedclip[{extra}]'}"
        yield Finding(f"extra {extra}", "ok", said)
    if installed("espeakng_loader"):
        from fedclip.speech.errors import SynthesizerError
        from fedclip.speech.espeak import SpeechRequest, Synthesizer

        try:
            with Synthesizer() as synthesizer:
                samples = len(synthesizer.speak_all([SpeechRequest("one")])[0])
            yield Finding("espeak", "ok", f"speaks ({samples:,} samples)")
        except SynthesizerError as error:
            yield Finding("espeak", "fail", str(error), "or take recordings: --data-dir")


def _machine() -> Iterator[Finding]:
    cores, all_cores = len(os.sched_getaffinity(0)), os.cpu_count()
    yield Finding("cores", "ok", f"{cores}" + (f" of {all_cores}, as this process may" if cores != all_cores else "") + "; a worker each")
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _free_memory() or pages
    status: Status = "ok" if free >= LEAST_MEMORY else "warn"
    remedy = "" if status == "ok" else "fewer workers (--workers 1), or run.engine = 'process'; fedclip plan says what a run takes"
    yield Finding("memory", status, f"{size(free)} free of {size(pages)}", remedy)


def _disk() -> Iterator[Finding]:
    for name, place, least, remedy in (
        ("disk", Path.cwd(), LEAST_DISK, "make room, or run in another folder"),
        ("temporary", Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()), LEAST_DISK, "make room, or set TMPDIR (a short path)"),
        ("shared memory", Path("/dev/shm"), LEAST_SHARED, "in a container: --shm-size=1g; Ray would take the slower disk"),
    ):
        if not place.is_dir():
            yield Finding(name, "warn", f"there is no {place}", remedy)
            continue
        usage = shutil.disk_usage(place)
        said = f"{size(usage.free)} free of {size(usage.total)} in {place}"
        if not os.access(place, os.W_OK):
            yield Finding(name, "fail", f"{place} cannot be written", remedy)
        elif usage.free < least or (name == "temporary" and usage.used > FULL * usage.total):
            yield Finding(name, "warn", said, remedy)
        else:
            yield Finding(name, "ok", said)


def _torch(probe: Probe) -> Iterator[Finding]:
    status, output = probe(TORCH, PATIENCE)
    if status != 0:
        yield Finding("torch", "fail", _cause(status, output), "pip install --force-reinstall torch torchaudio, both from one index")
        return
    told: dict[str, Any] = json.loads(output.splitlines()[-1])
    yield Finding("torch", "ok", f"{_version('torch')}, built for {'CUDA ' + told['cuda'] if told['cuda'] else 'processors'}")
    if told["gpus"]:
        yield Finding("gpu", "ok", f"{', '.join(told['gpus'])}; run.device = 'cuda' takes it")
    elif Path("/proc/driver/nvidia/version").exists():
        yield Finding(
            "gpu", "warn", "there is a driver, and torch finds no GPU", "install the PyTorch of the driver's CUDA: https://pytorch.org"
        )
    else:
        yield Finding("gpu", "ok", "none; run.device = 'cpu'")
    status, output = probe(TORCHAUDIO, PATIENCE)
    if status == 0:
        yield Finding("torchaudio", "ok", f"{_version('torchaudio')}")
    else:
        build = "cpu" if not told["cuda"] else "cu" + told["cuda"].replace(".", "")
        remedy = (
            f"its build has to be that of torch: pip install --force-reinstall --no-deps torchaudio "
            f"--index-url https://download.pytorch.org/whl/{build}; without it speech does not run, images do"
        )
        yield Finding("torchaudio", "fail", _cause(status, output), remedy)


def _flower(probe: Probe) -> Iterator[Finding]:
    status, output = probe(FLOWER, PATIENCE)
    if status == 0:
        yield Finding("flower", "ok", f"{_version('flwr')}, with what clients/identity.py takes of it")
    else:
        yield Finding("flower", "fail", _cause(status, output), "pip install 'flwr[simulation]==1.41.*'")


def _ray(probe: Probe) -> Iterator[Finding]:
    status, output = probe(RAY, PATIENCE)
    if status == 0:
        yield Finding("ray", "ok", f"{_version('ray')} starts, computes and ends")
    else:
        remedy = "room and a short path for temporary files (RAY_TMPDIR=/tmp) and shared memory; run.engine = 'process' does without Ray"
        yield Finding("ray", "fail", _cause(status, output), remedy)


def _data(folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():
        yield Finding("data", "fail", f"there is no folder {folder}", "correct --data-dir")
        return
    try:
        if any(folder.glob("train-images*")):
            from fedclip.tasks.idx import read_part

            train, test = (len(read_part(folder, part, 256)[1]) for part in ("train", "t10k"))
            yield Finding("data", "ok", f"images in idx files: {train:,} to train on, {test:,} held out")
            return
        yield _speakers(folder, corpus_kind(folder))
    except ConfigError as error:
        yield Finding("data", "fail", str(error), "mend the folder as it says, or correct --data-dir")


def _speakers(folder: Path, kind: str) -> Finding:
    from pydantic import TypeAdapter

    from fedclip.speech.options import CorpusOptions

    try:
        from experiments.live import indexing
        from fedclip.speech.build import build_corpus

        with indexing() as watch:
            options: CorpusOptions = TypeAdapter(CorpusOptions).validate_python({"kind": kind})
            corpus = build_corpus(options, population=None, data_dir=folder, seed=1, watch=watch)
    except (ImportError, OSError) as error:
        return Finding("data", "warn", f"{kind}, not counted: {type(error).__name__}: {error}", "mend what fails above")
    causes = ", ".join(f"{cause}: {count:,}" for cause, (count, _) in getattr(corpus, "skipped", {}).items())
    counted = f"{corpus.train_speakers:,} speakers to train on, {corpus.held_out_speakers:,} held out"
    return Finding("data", "ok", f"{kind}: {counted}" + (f"; utterances left out: {causes}" if causes else ""))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _free_memory() -> int | None:
    """Return the bytes that may still be had, where Linux says it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _cause(status: int | None, output: str) -> str:
    lines: Sequence[str] = [line.strip() for line in output.splitlines() if line.strip()]
    if status is None:
        return f"took more than {PATIENCE:.0f} s" + (f"; it last said: {lines[-1]}" if lines else "")
    return lines[-1] if lines else f"ended with status {status}"
