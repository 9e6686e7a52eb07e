from __future__ import annotations

import asyncio
import sys
import time

import psutil

from benchmarks.load.resources import ResourceSampler, listening_pid

BUSY = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'while True: pass']); child.wait()"


async def test_the_whole_process_tree_is_sampled() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", BUSY)
    while not (children := psutil.Process(process.pid).children()):
        await asyncio.sleep(0.05)
    async with ResourceSampler([process.pid]) as sampler:
        await asyncio.sleep(0.5)
    children[0].kill()  # which ends its parent
    await process.wait()
    server = sampler.report()["server"]
    assert len(server["cpu_cores_by_process"]) == 2
    # The child spins; its parent only waits.
    assert server["cpu_cores"] > 2 * server["cpu_cores_by_process"][f"{process.pid} python"]
    assert server["front_cpu_s"] < 0.25  # of half a second; the child took all of it
    assert server["rss_peak_bytes"] > server["pss_bytes"] > 0
    assert server["context_switches_per_s"].keys() == {"voluntary", "nonvoluntary"}


async def test_a_busy_client_is_told() -> None:
    async with ResourceSampler([]) as sampler:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
    report = sampler.report()
    assert report["server"] is None
    assert report["client_cpu_cores"] > 0


async def test_processes_that_ended_are_no_error() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    async with ResourceSampler([process.pid]) as sampler:
        process.kill()
        await process.wait()
    assert sampler.report()["server"]["pss_bytes"] == 0


def test_nobody_listens_on_a_discard_port() -> None:
    assert listening_pid(9) is None
