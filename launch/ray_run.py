"""A run on a Ray cluster: a process on each host, all started again until they are done."""

import argparse
import ctypes
import signal
import subprocess
import sys

import ray


class Host:
    """A machine of the cluster, which runs a process that ends with it."""

    def address(self) -> str:
        return f"{ray.util.get_node_ip_address()}:9911"

    def run(self, command: list[str]) -> int:
        ends_with_it = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        return subprocess.call([sys.executable, *command], preexec_fn=ends_with_it)


def attempt(hosts: list, command: list[str]) -> int:
    """Runs a process on each host; the status of the first that failed, or 0."""
    first = ray.get(hosts[0].address.remote())
    who = dict(enabled=True, coordinator_address=first, num_processes=len(hosts))
    flags = [f"--config.distributed.{name}={value}" for name, value in who.items()]
    of = lambda i: [*command, *flags, f"--config.distributed.process_id={i}"]
    left, status = [host.run.remote(of(i)) for i, host in enumerate(hosts)], 0
    while left and not status:
        done, left = ray.wait(left)
        status = ray.get(done[0])
    if left:  # once one has failed, the others have a minute to end by themselves
        ray.wait(left, num_returns=len(left), timeout=60)
    return status


read = argparse.ArgumentParser()
for name, count in {"hosts": 1, "cpus": 1, "gpus": 0, "tpus": 0}.items():
    read.add_argument(f"--{name}", type=int, default=count)  # the last three of each host
read.add_argument("command", nargs="+")
asked, errors, status = read.parse_args(), 0, 75
ray.init()
host = ray.remote(Host).options(
    num_cpus=asked.cpus, num_gpus=asked.gpus, max_concurrency=2, scheduling_strategy="SPREAD",
    resources={"TPU": asked.tpus} if asked.tpus else {},
)  # fmt: skip
while status not in (0, 2) and errors < 4:  # finished; a wrong command
    hosts = [host.remote() for _ in range(asked.hosts)]  # which wait until there is room for them
    try:
        status = attempt(hosts, asked.command)
    except ray.exceptions.RayError:
        status = 1  # a host is gone
    errors += status not in (0, 75)  # asked to stop: more to do
    for one in hosts:
        ray.kill(one)
    print(f"all have ended, the first that failed with status {status}", flush=True)
sys.exit(status)
