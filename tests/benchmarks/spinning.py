"""What the spinning of waiting OpenMP threads costs: DAH's bare loop alone, beside a busy process, and beside a second training.

Each policy is tried in fresh processes with one thread per core, in turn, so that all see the same machine.

Run: python -m tests.benchmarks.spinning [--counts 0,1000,10000,100000] [--seconds 8] [--rounds 3]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def loop(seconds: float) -> float:
    """Images per second of DAH with LeNet on random digits, one thread per core, after a warm-up of two steps."""
    import torch

    from data.rows import DomainBatch
    from models.method import Batch
    from models.methods.dah import DAH, DAHConfig

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    torch.manual_seed(0)
    method = DAH(DAHConfig(pretrained="none"), (1, 28, 28), 10, 64).train()
    x, label = torch.randint(0, 256, (200, 1, 28, 28), dtype=torch.uint8), torch.arange(200) % 10
    batch = Batch(DomainBatch(x, (x.float(),), label, torch.arange(200)), DomainBatch(x, (x.float(),), None, torch.arange(200)))
    optimizer, images, start = method.players["encoder"].optimizer, 0, 0.0
    method.begin_epoch(0, 1)
    for step in range(10**9):
        if step == 2:
            start, images = time.perf_counter(), 0
        if step > 2 and time.perf_counter() - start > seconds:
            break
        optimizer.zero_grad(set_to_none=True)
        method.loss("encoder", batch)[0].backward()
        optimizer.step()
        method.end_step()
        images += 2 * len(x)
    return images / (time.perf_counter() - start)


def trainings(count: int, policy: dict[str, str], seconds: float) -> list[float]:
    """Images per second of each of several trainings that run at the same time."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | policy
    command = [sys.executable, "-m", "tests.benchmarks.spinning", "--child", "--seconds", str(seconds)]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [float(process.communicate()[0]) for process in running]


def main() -> None:
    """Print images per second by policy and company, and the ratio to the default policy in the same company."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="0,1000,10000,100000", help="values of GOMP_SPINCOUNT")
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; medians are printed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(loop(given.seconds))
        return
    policies: dict[str, dict[str, str]] = {"default": {}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}
    policies |= {f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": count} for count in given.counts.split(",")}
    found: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside a busy process": [], "two trainings, each": []} for name in policies}
    for _ in range(given.rounds):
        for name, policy in policies.items():
            found[name]["alone"] += trainings(1, policy, given.seconds)
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                found[name]["beside a busy process"] += trainings(1, policy, given.seconds)
            finally:
                busy.kill()
                busy.wait()
            found[name]["two trainings, each"] += trainings(2, policy, given.seconds)
    print(f"DAH, images/s, {len(os.sched_getaffinity(0))} cores, one thread per core; in brackets the ratio to the default alone")
    print(f"{'':<26}" + "".join(f"{column:>26}" for column in found["default"]))
    alone = statistics.median(found["default"]["alone"])
    for name, columns in found.items():
        print(f"{name:<26}" + "".join(f"{f'{statistics.median(each):,.0f} ({statistics.median(each) / alone:.2f})':>26}" for each in columns.values()))


if __name__ == "__main__":
    main()
