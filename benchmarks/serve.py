"""Throughput, latency and memory of `ratioctl serve` under load, beside bare onnxruntime in one process.

    python -m benchmarks.serve [--clients 32] [--seconds 60] [--rounds 3] [--per-request 1,32] [--width 16]
                               [--images N] [--json FILE]

Sides, in turns, on the same 32x32 JPEGs with the same random weights:

    serve    a server process and a process of clients, each with its connection, that send the next request
             as soon as they have an answer; for each number of images per request
    decoded  one process: decoding and onnxruntime passes of 32 images on all processors, no HTTP
    bare     the same with the decoded pixels in memory: onnxruntime passes alone

The clients compute on the same processors, so a share is a lower bound of what remote clients see. Every row
is compared with the label that `ood-score` gives the image: a lost or mixed answer ends the benchmark.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import scoring
from tools import harness

CLIENTS = """
import http.client, json, sys, threading, time
from pathlib import Path
host, port, folder, expected, clients, each, seconds = sys.argv[1:]
names = sorted(path.name for path in Path(folder).iterdir())
data = [(Path(folder) / name).read_bytes() for name in names]
expected = json.loads(Path(expected).read_text())
each, clients, times, faults = int(each), int(clients), [], []
ends = time.perf_counter() + float(seconds)

def body(first):
    chosen = [(first + k) % len(names) for k in range(each)]
    if each == 1:
        return chosen, data[first % len(names)], "application/octet-stream"
    parts = [b'--b\\r\\nContent-Disposition: form-data; name="image"; filename="%s"\\r\\n\\r\\n%s\\r\\n'
             % (names[k].encode(), data[k]) for k in chosen]
    return chosen, b"".join([*parts, b"--b--\\r\\n"]), "multipart/form-data; boundary=b"

def client(number):
    connection, first = http.client.HTTPConnection(host, int(port), timeout=60), number * 37
    while time.perf_counter() < ends:
        chosen, sent, kind = body(first)
        began = time.perf_counter()
        connection.request("POST", "/v1/score", sent, {"Content-Type": kind})
        answer = connection.getresponse()
        rows = json.loads(answer.read()).get("rows", [])
        times.append(time.perf_counter() - began)
        if [row["label"] for row in rows] != [expected[names[k]] for k in chosen]:
            faults.append(answer.status)
            return
        first += each

began = time.perf_counter()
threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "requests": len(times), "faults": faults, "times": times}))
"""

BARE = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from ratioctl import images
from ratioctl.onnx import runtime
from ratioctl.utils import resources
loaded, seconds = runtime.load(sys.argv[2], threads=1), float(sys.argv[3])
files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
parts = [files[k : k + 32] for k in range(0, len(files) - 31, 32)]
decode = lambda part: np.stack([images.decode(data, 32).pixels for data in part])
pixels = [decode(part) for part in parts]
with ThreadPoolExecutor(resources.processors()) as pool:
    for work in (lambda k: loaded.predict(decode(parts[k])), lambda k: loaded.predict(pixels[k])):
        list(pool.map(work, range(len(parts))))
        count, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            list(pool.map(work, range(len(parts))))
            count += 32 * len(parts)
        print(count / (time.perf_counter() - began))
"""


class Server:
    """`ratioctl serve` of a package."""

    def __init__(self, package: Path) -> None:
        line = [sys.executable, "-m", "ratioctl", "serve", str(package), "--port", "0", "--json", "--quiet"]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = ""
        while "}" not in said:
            said += self.process.stdout.readline() or sys.exit("the server ended")
        self.port = str(json.loads(said)["port"])

    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))

    def stop(self) -> None:
        self.process.terminate()
        if self.process.wait(timeout=60) != 0:
            sys.exit("the server did not end with 0")


def labels_of(folder: Path, package: Path) -> dict[str, str]:
    """What `ood-score` says, by file name."""
    import ratioctl

    return {Path(row.path).name: str(row.label) for row in ratioctl.ood_score([folder], model=package)}


def load(server: Server, folder: Path, expected: Path, options: Any, each: int) -> dict[str, Any]:
    """Images per second, latency of requests in milliseconds, memory in MiB before and after."""
    before = server.memory_mib()
    line = [sys.executable, "-c", CLIENTS, "127.0.0.1", server.port, str(folder), str(expected)]
    done = harness.run_process(*line, str(options.clients), str(each), str(options.seconds))
    found = json.loads(done.stdout)
    if found["faults"]:
        sys.exit(f"lost or mixed answers: {found['faults']}")
    times = sorted(found["times"])
    return {
        "images_per_second": found["requests"] * each / found["seconds"],
        "requests": found["requests"],
        "p50_ms": 1000 * statistics.median(times),
        "p99_ms": 1000 * times[int(0.99 * (len(times) - 1))],
        "memory_mib": [before, server.memory_mib()],
    }


def main() -> None:
    short = {"clients": 4, "seconds": 1.0, "rounds": 1, "images": 64, "per_request": "1,8"}
    parser = harness.parser(__doc__, short=short)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-request", default="1,32", help="images of one request")
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18")
    parser.add_argument("--images", type=int, default=2048, help="different images")
    options = parser.parse_args()
    sizes = [int(each) for each in options.per_request.split(",")]
    runs: dict[str, list[Any]] = {f"serve {each}": [] for each in sizes} | {"decoded": [], "bare": []}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        harness.run_process(sys.executable, "-c", scoring.PREPARE.format(scratch, [options.width]))
        package, expected = base / f"w{options.width}", base / "expected.json"
        folder = harness.sample_crops(base / "images", options.images, (32, 32))
        expected.write_text(json.dumps(labels_of(folder, package)), encoding="utf-8")
        server = Server(package)
        for _ in range(options.rounds):
            for each in sizes:
                runs[f"serve {each}"].append(load(server, folder, expected, options, each))
                time.sleep(0.2)
            line = [sys.executable, "-c", BARE, str(folder), str(package), str(options.seconds)]
            decoded, bare = map(float, harness.run_process(*line).stdout.split())
            runs["decoded"].append(decoded)
            runs["bare"].append(bare)
        server.stop()
    ratios = {
        f"share of {side}, {each} per request": harness.spread(
            [ours["images_per_second"] / b for ours, b in zip(runs[f"serve {each}"], runs[side], strict=True)]
        )
        for each in sizes
        for side in ("decoded", "bare")
    }
    harness.finish(
        {
            "benchmark": "ratioctl serve under load",
            "clients": options.clients,
            "seconds": options.seconds,
            "ratios": ratios,
            "rounds": runs,
        },
        options,
        "serve",
    )


if __name__ == "__main__":
    main()
