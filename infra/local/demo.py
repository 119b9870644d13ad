"""`make demo`: the whole path on this machine, from photos to a better picture over HTTP.

Every step is the command that a user would type; it is printed before it runs. All state lies in `demo-out/`,
so an interrupted demo goes on where it stopped. Servers are stopped by the ids they were started with.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import skimage
import yaml

from rayscale.data.degrade import Bicubic, apply
from rayscale.data.degrade import resize_bicubic as resize
from rayscale.errors import ConfigError, RayscaleError, ResourceError
from rayscale.imaging import U8, decode_rgb, encode, panel
from rayscale.metrics import psnr, ssim
from rayscale.storage import check_free

ROOT = Path(__file__).resolve().parents[2]
MODEL, SCALE = "demo-x2", 2
PHOTOS = {
    "train": (
        "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "brick.png",
        "camera.png", "coins.png", "grass.png", "gravel.png", "moon.png", "page.png", "text.png", "color.png",
    ),
    "validation": ("rocket.jpg",),
    "test": ("astronaut.png", "chelsea.png", "coffee.png"),
}  # fmt: skip


def main() -> None:
    """Parse the flags, run, and leave an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave everything up and print the addresses")
    parser.add_argument("--port", type=int, default=8000, help="of the HTTP endpoint (8000)")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="folder of all that the demo writes")
    flags = parser.parse_args()
    try:
        Demo(flags.out.resolve(), flags.port, flags.keep).run()
    except RayscaleError as error:
        sys.exit(f"error: {error}" if error.exit_code == 1 else _complain(str(error), error.exit_code))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted; `make demo` goes on from here", 130))


def _complain(text: str, code: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code


class Demo:
    """One run of the demo: its folders, its addresses, the processes it started."""

    def __init__(self, out: Path, port: int, keep: bool) -> None:
        self.out, self.port, self.keep = out, port, keep
        self.state = out / "state"
        self.began = time.time()
        self.env: dict[str, str] = {}
        self.dashboard = ""

    def run(self) -> None:
        """The path, step by step; the result is the last line of standard output."""
        _check_port("--port", self.port)
        if (self.state / "done").exists():
            shutil.rmtree(self.state)  # the demo of before was finished: begin anew
        self.state.mkdir(parents=True, exist_ok=True)
        check_free(self.out, 1 << 30, "the demo")
        with Memory() as memory, self._cluster():
            photos = self._photos()
            dataset = self.state / "dataset"
            self._job("ingest", photos, dataset, "--split", "folder")
            trained = self._job("train", "--recipe", "rayscale.recipes.compact:demo", "--data", dataset)
            published = self._job("publish", trained["run_uri"], "--name", MODEL, "--licence", "for show")
            self._job("promote", MODEL)
            with self._serving():
                result = self._compare(photos / "test")
                result |= {
                    "model": MODEL,
                    "version": published["version"],
                    "parity_max_abs": published["parity_max_abs"],
                    "first_step_s": round(trained.get("first_step_unix", time.time()) - self.began, 1),
                    "train_s": round(trained["seconds"], 1),
                    "total_s": round(time.time() - self.began, 1),
                    "peak_rss_gib": round(memory.peak / 2**30, 2),
                }
                (self.state / "done").write_text(json.dumps(result))
                (self.state / "memory.txt").write_text(memory.table())
                if self.keep:
                    self._stay_up()
        print(json.dumps(result), flush=True)

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        """A Ray head of our own: a random token, free ports, a temporary folder; gone when the block ends."""
        settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAYSCALE_HOME": str(self.state / "home"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.state}/home/mlflow.db",
            "PYTHONUNBUFFERED": "1",
        }
        os.environ.update(settings)  # what the cluster's processes inherit
        import ray  # now: it reads its settings when it is imported

        temp = tempfile.mkdtemp(prefix="rs", dir="/tmp")
        try:
            context = ray.init(
                address="local",
                num_cpus=max(2, os.cpu_count() or 1),
                object_store_memory=400 << 20,
                include_dashboard=self.keep,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=temp,
            )
            self.dashboard = context.dashboard_url
            self.env = {**os.environ, "RAY_ADDRESS": context.address_info["gcs_address"]}
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(temp, ignore_errors=True)

    def _photos(self) -> Path:
        """scikit-image's own photos, as their files came, in folders by split."""
        folder = self.out / "photos"
        for split, names in PHOTOS.items():
            (folder / split).mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copyfile(Path(skimage.data_dir) / name, folder / split / name)
        return folder

    def _job(self, name: str, *arguments: object) -> dict[str, Any]:
        """Run one of `jobs/` as a user would; its last line is its result."""
        command = [sys.executable, f"jobs/{name}.py", *map(str, arguments)]
        began = time.time()
        print(f"\n$ python {' '.join(command[1:])}", flush=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=ROOT, env=self.env, text=True, **pipes) as job:
            assert job.stdout is not None
            threading.Thread(target=_pass_on, args=(job.stderr,), daemon=True).start()
            last = ""
            try:
                for line in job.stdout:
                    print(line, end="", flush=True)
                    last = line.strip() or last
            except KeyboardInterrupt:  # a terminal tells the job too; where only we were told, we pass it on
                try:
                    job.wait(5)
                except subprocess.TimeoutExpired:
                    job.send_signal(signal.SIGINT)
                    job.wait(60)
                raise
        if job.returncode:
            raise subprocess.CalledProcessError(job.returncode, command)
        return {**json.loads(last), "seconds": time.time() - began}

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """`serve run` on the cluster, until the block ends."""
        config = yaml.safe_load((ROOT / "serve_configs/local.yaml").read_text())
        config["http_options"]["port"] = self.port
        written = self.state / "serve.yaml"
        written.write_text(yaml.safe_dump(config))
        print(f"\n$ serve run serve_configs/local.yaml   # port {self.port}", flush=True)
        server = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(written)],
            cwd=ROOT, env=self.env, stdout=(self.state / "serve.log").open("w"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait("the endpoint", lambda: self._http("/readyz")[0] == 200, server, self.state / "serve.log")
            yield
        finally:
            _stop(server)

    def _http(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=body)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def _compare(self, folder: Path) -> dict[str, Any]:
        """Upscale every held-out photo over HTTP; PSNR and SSIM of luma, `SCALE` px of border cut, and the picture."""
        figures: dict[str, list[float]] = {}
        rows: list[tuple[str, U8]] = []
        for path in sorted(folder.iterdir()):
            truth = decode_rgb(path.read_bytes())
            truth = truth[: truth.shape[0] // SCALE * SCALE, : truth.shape[1] // SCALE * SCALE]
            lr, _ = apply((Bicubic(scale=SCALE),), truth, np.random.default_rng(0))
            sent = encode(lr, "png")
            status, answer = self._http(f"/v1/upscale?model={MODEL}@champion", sent)
            if status != 200:
                raise ResourceError("/v1/upscale", status, answer.decode(errors="replace")[:300], "see serve.log")
            (self.out / "served").mkdir(exist_ok=True)
            (self.out / f"served/{path.stem}_sent.png").write_bytes(sent)
            (self.out / f"served/{path.stem}_answer.png").write_bytes(answer)
            pictures = {
                "bicubic": resize(lr, truth.shape[0], truth.shape[1], border="replicate"),
                "served": decode_rgb(answer),
            }
            crop = _detail(truth)
            small = tuple(slice(s.start // SCALE, s.stop // SCALE) for s in crop)
            rows.append((f"{path.stem}: low resolution", lr[small]))
            for name, picture in pictures.items():
                db = psnr(picture, truth, border_px=SCALE, luma_only=True)
                similarity = ssim(picture, truth, border_px=SCALE, luma_only=True)
                figures.setdefault(f"{name}_psnr_db", []).append(db)
                figures.setdefault(f"{name}_ssim", []).append(similarity)
                label = "bicubic" if name == "bicubic" else "ours"
                rows.append((f"{label}: {db:.2f} dB, SSIM {similarity:.4f}", picture[crop]))
            rows.append(("truth", truth[crop]))
            gain = figures["served_psnr_db"][-1] - figures["bicubic_psnr_db"][-1]
            print(f"{path.stem}: {gain:+.2f} dB over bicubic", flush=True)
        (self.out / "before_after.png").write_bytes(encode(panel(rows, columns=4, cell_px=320), "png"))
        print(f"\nlook at {os.path.relpath(self.out / 'before_after.png')}", flush=True)
        gains = np.subtract(figures["served_psnr_db"], figures["bicubic_psnr_db"])
        means = {name: round(float(np.mean(values)), 4) for name, values in figures.items()}
        return {**means, "worst_gain_db": round(float(gains.min()), 4)}

    def _stay_up(self) -> None:
        """Print the addresses and wait for Ctrl-C."""
        mlflow_port = _free_port()
        mlflow = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "ui", "--host=127.0.0.1", f"--port={mlflow_port}",
             f"--backend-store-uri={self.env['MLFLOW_TRACKING_URI']}"],
            env=self.env, stdout=(self.state / "mlflow.log").open("w"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait("MLflow", lambda: _answers(mlflow_port), mlflow, self.state / "mlflow.log")
            print(
                f"\nendpoint   http://127.0.0.1:{self.port}/v1/upscale?model={MODEL}@champion"
                f"\nAPI page   http://127.0.0.1:{self.port}/docs"
                f"\nMLflow     http://127.0.0.1:{mlflow_port}"
                f"\ndashboard  http://{self.dashboard}  (token: {self.env['RAY_AUTH_TOKEN']})"
                "\nCtrl-C stops everything.",
                flush=True,
            )
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopping", flush=True)
        finally:
            _stop(mlflow)


class Memory:
    """Peak of the resident memory of all processes below this one, Ray's object store (shared memory) left out.

    A page that several processes share (Ray's and torch's libraries, mostly) is resident once and counted once.
    """

    def __enter__(self) -> Memory:
        self.peak, self._at_peak = 0, list[tuple[int, int, str]]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            own = psutil.Process()
            found = [(*_resident(p.pid), p) for p in [own, *own.children(recursive=True)]]
            if (total := sum(share for share, _, _ in found)) > self.peak:
                self.peak, self._at_peak = total, [(share, rss, _title(p)) for share, rss, p in found]

    def table(self) -> str:
        """Who held how much at the peak: its share of the pages and its RSS (which counts shared ones again), MiB."""
        together = (sum(row[0] for row in self._at_peak), sum(row[1] for row in self._at_peak), "all together")
        rows = [together, *sorted(self._at_peak, reverse=True)]
        return "".join(f"{share >> 20:6} {rss >> 20:6} {title}\n" for share, rss, title in rows)


def _pass_on(lines: Any) -> None:
    """A job's standard error, but for an actor of Ray's that misses the dashboard we did not start."""
    for line in lines:
        if "PlacementGroupCleaner" not in line:
            print(line, end="", file=sys.stderr, flush=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return "(ended)"


def _resident(pid: int) -> tuple[int, int]:
    """(proportional share, RSS) of a process's private and file pages, bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # it has ended
        return 0, 0
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    store = kib.get("Pss_Shmem", 0)
    return (kib.get("Pss", 0) - store) << 10, (kib.get("Rss", 0) - store) << 10


def _detail(truth: U8, side: int = 160) -> tuple[slice, slice]:
    """The square with the most detail: where a better picture shows."""
    best, at = -1.0, (0, 0)
    gray = truth.astype(np.float32).mean(2)
    for y in range(0, truth.shape[0] - side + 1, 20):
        for x in range(0, truth.shape[1] - side + 1, 20):
            detail = float(np.abs(np.diff(gray[y : y + side, x : x + side], axis=1)).mean())
            if detail > best:
                best, at = detail, (y, x)
    return slice(at[0], at[0] + side), slice(at[1], at[1] + side)


def _check_port(field: str, port: int) -> None:
    if not 0 < port < 1 << 16:
        raise ConfigError(field, port, "must be 1 to 65535", "e.g. `make demo PORT=8123`")
    if _answers(port):
        raise ResourceError(field, port, "is in use by another program", "stop it, or `make demo PORT=8123`")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(what: str, ready: Any, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 120.0) -> None:
    """Until `ready`; a process that ends before is an error with the end of its log."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = " | ".join(log.read_text(errors="replace").splitlines()[-3:])
            raise ResourceError(what, process.poll(), f"did not come up: {tail}", f"see {log}")
        time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop one process that we started, and what it started, by their ids."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=5)
    for child in alive:
        child.kill()


if __name__ == "__main__":
    main()
