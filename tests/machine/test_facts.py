"""What a worker finds out about a machine."""

from __future__ import annotations

import os

from ipex_vllm.machine.facts import GIB, MachineFacts


def test_this_machine_can_be_read():
    machine = MachineFacts.probe()
    assert {each.id for each in machine.cpus} == os.sched_getaffinity(0)
    assert 0 <= machine.memory_available <= machine.memory_total
    assert machine.memory_total > 0
    assert machine.name


def test_a_machine_is_what_its_files_say(dual_xeon):
    machine = dual_xeon.probe()
    assert machine.name == "Intel(R) Xeon(R) Platinum 8462Y+"
    assert machine.isa == ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    assert len(machine.cpus) == 128
    assert len({each.core for each in machine.cpus}) == 64
    assert (machine.memory_total, machine.memory_available) == (512 * GIB, 490 * GIB)
    assert machine.node_available == {0: 250 * GIB, 1: 240 * GIB}
    assert machine.quota_cores is None
    assert (machine.iomp, machine.tcmalloc) == (None, None)


def test_a_desktop_has_avx_vnni_and_no_avx512(hybrid_desktop):
    assert hybrid_desktop.probe().isa == ("avx2", "avx_vnni")


def test_the_libraries_to_preload_are_found(small_box):
    small_box.install("libiomp5.so", "libtcmalloc_minimal.so.4")
    machine = small_box.probe()
    assert machine.iomp == str(small_box.path / "venv/lib/libiomp5.so")
    assert machine.tcmalloc == str(small_box.path / "usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")


def test_version_2_cgroup_limits(small_box):
    small_box.write("sys/fs/cgroup/memory.max", f"{8 * GIB}\n")
    small_box.write("sys/fs/cgroup/memory.current", f"{7 * GIB}\n")
    small_box.write("sys/fs/cgroup/memory.stat", f"anon {GIB}\nactive_file {2 * GIB}\ninactive_file {4 * GIB}\n")
    small_box.write("sys/fs/cgroup/cpu.max", "150000 100000\n")
    machine = small_box.probe()
    # The 6 GiB of page cache, such as a model file that was read, make way.
    assert (machine.memory_total, machine.memory_available) == (8 * GIB, 7 * GIB)
    assert machine.quota_cores == 1.5


def test_version_1_cgroup_limits(small_box):
    small_box.write("proc/self/cgroup", "5:cpuacct,cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    # A container sees its own cgroup as the top.
    small_box.write("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{8 * GIB}\n")
    small_box.write("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{3 * GIB}\n")
    small_box.write("sys/fs/cgroup/memory/memory.stat", f"inactive_file 1\ntotal_inactive_file {GIB}\n")
    small_box.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n")
    small_box.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    machine = small_box.probe()
    assert (machine.memory_total, machine.memory_available) == (8 * GIB, 6 * GIB)
    assert machine.quota_cores == 3


def test_no_limit_is_no_limit(small_box):
    free = small_box.probe()
    small_box.write("proc/self/cgroup", "5:cpu:/\n4:memory:/\n0::/\n")
    small_box.write("sys/fs/cgroup/memory.max", "max\n")
    small_box.write("sys/fs/cgroup/cpu.max", "max 100000\n")
    small_box.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    small_box.write("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{3 * GIB}\n")
    small_box.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert small_box.probe() == free


def test_the_limits_of_a_service_and_of_what_it_is_part_of(small_box):
    """As systemd sets them with MemoryMax= and CPUQuota=: no container, a folder for each service."""
    small_box.write("proc/self/cgroup", "0::/models.slice/worker.service\n")
    for folder, limit, used, quota in (
        ("models.slice", 10, 9, "400000 100000"),
        ("models.slice/worker.service", 12, 2, "max 100000"),
    ):
        small_box.write(f"sys/fs/cgroup/{folder}/memory.max", str(limit * GIB))
        small_box.write(f"sys/fs/cgroup/{folder}/memory.current", str(used * GIB))
        small_box.write(f"sys/fs/cgroup/{folder}/cpu.max", quota)
    machine = small_box.probe()
    assert (machine.memory_total, machine.memory_available) == (10 * GIB, 1 * GIB)
    assert machine.quota_cores == 4
