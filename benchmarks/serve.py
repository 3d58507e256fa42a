"""Throughput, latency and memory of `ratioctl serve` under load, beside bare onnxruntime in one process.

    python -m benchmarks.serve [--model cifar10-ratio] [--clients 32] [--seconds 60] [--rounds 1]
                               [--per-request 1,8,32] [--images N] [--json FILE]

Sides, in turns, on the same JPEGs of the model's size:

    serve    a server process and a process of clients, each with its connection, that send the next request
             as soon as they have an answer; for each number of images per request
    decoded  one process: decoding and onnxruntime passes of 32 images on all processors, no HTTP
    bare     the same with the decoded pixels in memory: onnxruntime passes alone

The clients compute on the same processors, so a share is a lower bound of what remote clients see; the
processor time of both processes is stated. Label, flag and confidence of every row are compared with those of
`ood-score`: a lost or mixed answer ends the benchmark.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools import harness

CLIENTS = """
import json, socket, sys, threading, time
from pathlib import Path
port, folder, expected, clients, each, seconds = sys.argv[1:]
names = sorted(path.name for path in Path(folder).iterdir())
data = [(Path(folder) / name).read_bytes() for name in names]
expected = json.loads(Path(expected).read_text())
each, clients, times, faults = int(each), int(clients), [], []
HEAD = "POST /v1/score HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: %s\\r\\n" \\
    "Content-Length: %d\\r\\n\\r\\n"

def request(first):
    chosen = [(first + k) % len(names) for k in range(each)]
    body, kind = data[chosen[0]], "application/octet-stream"
    if each > 1:
        parts = [b'--b\\r\\nContent-Disposition: form-data; name="image"; filename="%s"\\r\\n\\r\\n%s\\r\\n'
                 % (names[k].encode(), data[k]) for k in chosen]
        body, kind = b"".join([*parts, b"--b--\\r\\n"]), "multipart/form-data; boundary=b"
    return [expected[names[k]] for k in chosen], (HEAD % (kind, len(body))).encode() + body

requests = [request(k * each) for k in range(-(-len(names) // each))]

def receive(connection):
    received = b""
    while b"\\r\\n\\r\\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\\r\\n\\r\\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\\r\\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return head, body

def client(number):
    with socket.create_connection(("127.0.0.1", int(port)), timeout=120) as connection:
        k = number * 37
        while time.perf_counter() < ends:
            wanted, sent = requests[k % len(requests)]
            began = time.perf_counter()
            connection.sendall(sent)
            head, body = receive(connection)
            times.append(time.perf_counter() - began)
            rows = json.loads(body).get("rows", [])
            right = len(rows) == each and all(
                row["label"] == label and row["is_ood"] == flag and abs(row["confidence"] - confidence) < 1e-5
                for row, (label, flag, confidence) in zip(rows, wanted)
            )
            if not right:
                faults.append(head[:40].decode())
                return
            k += 1

began, busy = time.perf_counter(), time.process_time()
ends = began + float(seconds)
threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps({"seconds": time.perf_counter() - began, "busy": time.process_time() - busy,
                  "requests": len(times), "faults": faults, "times": times}))
"""

BARE = """
import itertools, sys, threading, time
from pathlib import Path
import numpy as np
from ratioctl import images
from ratioctl.onnx import runtime
from ratioctl.utils import resources
loaded, seconds = runtime.load(sys.argv[2], threads=1), float(sys.argv[3])
files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
parts = [files[k : k + 32] for k in range(0, len(files) - 31, 32)]
decode = lambda part: np.stack([images.decode(data, loaded.spec.frame).pixels for data in part])
pixels = [decode(part) for part in parts]
for work in (lambda k: loaded.predict(decode(parts[k])), lambda k: loaded.predict(pixels[k])):
    work(0)
    counts, began, busy = [], time.perf_counter(), time.process_time()

    def loop(number):
        for k in itertools.count(number):
            if time.perf_counter() > began + seconds:
                return
            work(k % len(parts))
            counts.append(32)

    threads = [threading.Thread(target=loop, args=(k,)) for k in range(resources.processors())]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print(sum(counts) / (time.perf_counter() - began), 1e6 * (time.process_time() - busy) / sum(counts))
"""


class Server:
    """`ratioctl serve` of a model."""

    def __init__(self, model: str) -> None:
        line = [sys.executable, "-m", "ratioctl", "serve", model, "--port", "0", "--json", "--quiet"]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = ""
        while "}" not in said:
            said += self.process.stdout.readline() or sys.exit("the server ended")
        self.port = str(json.loads(said)["port"])

    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))

    def busy(self) -> float:
        """Processor seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.process.terminate()
        if self.process.wait(timeout=60) != 0 and kind is None:
            sys.exit("the server did not end with 0")


def answers(folder: Path, model: str) -> dict[str, list[Any]]:
    """Label, flag and confidence that `ood-score` gives, by file name."""
    import ratioctl

    rows = ratioctl.ood_score([folder], model=model)
    return {Path(row.path).name: [row.label, row.is_ood, row.confidence] for row in rows}


def load(server: Server, folder: Path, expected: Path, options: Any, each: int) -> dict[str, Any]:
    """Images per second, latency of requests in milliseconds, memory in MiB before, half-way and after,
    processor time per image in microseconds.
    """
    memory, busy, parts = [server.memory_mib()], server.busy(), []
    for _ in range(2):
        line = [sys.executable, "-c", CLIENTS, server.port, str(folder), str(expected)]
        done = harness.run_process(*line, str(options.clients), str(each), str(options.seconds / 2))
        parts.append(json.loads(done.stdout))
        memory.append(server.memory_mib())
        if parts[-1]["faults"]:
            sys.exit(f"lost or mixed answers: {parts[-1]['faults']}")
    times = sorted(seconds for part in parts for seconds in part["times"])
    requests = sum(part["requests"] for part in parts)
    count = requests * each
    return {
        "images_per_second": count / sum(part["seconds"] for part in parts),
        "requests": requests,
        "p50_ms": 1000 * statistics.median(times),
        "p99_ms": 1000 * times[int(0.99 * (len(times) - 1))],
        "memory_mib": memory,
        "server_us_per_image": 1e6 * (server.busy() - busy) / count,
        "clients_us_per_image": 1e6 * sum(part["busy"] for part in parts) / count,
    }


def shares(runs: dict[str, list[Any]], sizes: list[int]) -> dict[str, Any]:
    """Of the images per second of the other sides; and of the bare side's, by processor time per image, which
    other work on the machine hardly changes.
    """
    found = {}
    for each in sizes:
        for side in ("decoded", "bare"):
            pairs = list(zip(runs[f"serve {each}"], runs[side], strict=True))
            found[f"share of {side}, {each} per request"] = harness.spread(
                [ours["images_per_second"] / floor["images_per_second"] for ours, floor in pairs]
            )
        found[f"share of bare by processor time, {each} per request"] = harness.spread(
            [
                floor["us_per_image"] / (ours["server_us_per_image"] + ours["clients_us_per_image"])
                for ours, floor in pairs
            ]
        )
    return found


def main() -> None:
    short = {"clients": 4, "seconds": 2.0, "images": 64, "per_request": "1,8", "model": "cifar10-ratio-small"}
    parser = harness.parser(__doc__, short=short)
    parser.add_argument("--model", default="cifar10-ratio", help="a package or a bundled model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--bare-seconds", type=float, default=15.0, help="of onnxruntime alone, per round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--per-request", default="1,8,32", help="images of one request")
    parser.add_argument("--images", type=int, default=512, help="different images")
    options = parser.parse_args()
    sizes = [int(each) for each in options.per_request.split(",")]
    runs: dict[str, list[Any]] = {f"serve {each}": [] for each in sizes} | {"decoded": [], "bare": []}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        expected = base / "expected.json"
        folder = harness.sample_crops(base / "images", options.images, (32, 32))
        expected.write_text(json.dumps(answers(folder, options.model)), encoding="utf-8")
        with Server(options.model) as server:
            for _ in range(options.rounds):
                for each in sizes:
                    runs[f"serve {each}"].append(load(server, folder, expected, options, each))
                line = [sys.executable, "-c", BARE, str(folder), options.model, str(options.bare_seconds)]
                found = iter(map(float, harness.run_process(*line).stdout.split()))
                for side in ("decoded", "bare"):
                    runs[side].append({"images_per_second": next(found), "us_per_image": next(found)})
    harness.finish(
        {
            "benchmark": "ratioctl serve under load",
            "model": options.model,
            "clients": options.clients,
            "seconds": options.seconds,
            "ratios": shares(runs, sizes),
            "rounds": runs,
        },
        options,
        "serve",
    )


if __name__ == "__main__":
    main()
