import pytest

from dfssm.base import threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A made-up machine: `machine(siblings of each CPU, allowed CPUs, cpu.max of the container)`."""

    def make(siblings, allowed, quota="max 100000", **control_groups):
        for cpu, group in siblings.items():
            folder = tmp_path / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(group + "\n")
        control_groups.setdefault("files", {"unified/cpu.max": quota})
        groups(tmp_path, **control_groups)
        monkeypatch.setattr(threads, "CPUS", tmp_path)
        monkeypatch.setattr(threads, "PROC", tmp_path / "proc")
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(allowed), raising=False)
        return threads.default_threads()

    return make


V2 = "31 24 0:27 {root} {place}/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "36 25 0:30 {root} {place}/cpu,cpuacct rw,nosuid shared:13 - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "37 25 0:31 / {place}/memory rw,nosuid shared:14 - cgroup cgroup rw,memory"


def groups(folder, files, mounts=(V2,), group="0::/", root="/"):
    """/proc/self of a process in these control groups, and the files of the hierarchies, by their paths."""
    (folder / "proc").mkdir()
    lines = ["24 1 8:1 / / rw - ext4 /dev/sda rw", *(line.format(place=folder, root=root) for line in mounts)]
    (folder / "proc" / "mountinfo").write_text("\n".join(lines) + "\n")
    (folder / "proc" / "cgroup").write_text(group + "\n")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


FOUR_CORES = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}


def test_hyperthreads_of_a_core_count_once(machine):
    assert machine(FOUR_CORES, range(8)) == 4


def test_only_the_allowed_cpus_count(machine):
    assert machine(FOUR_CORES, [0, 4, 1]) == 2


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4)])
def test_a_containers_quota_counts(machine, quota, expected):
    assert machine(FOUR_CORES, range(8), quota) == expected


def test_a_machine_without_topology_counts_its_cpus(machine):
    assert machine({}, [0, 1, 2]) == 3


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"unified/a/b/cpu.max": "200000 100000", "unified/a/cpu.max": "max 100000"}, 2),
        ({"unified/a/b/cpu.max": "max 100000", "unified/a/cpu.max": "100000 100000"}, 1),
        ({"unified/a/b/cpu.max": "200000 100000", "unified/cpu.max": "50000 100000"}, 1),
        ({"unified/other/cpu.max": "100000 100000"}, 4),
        ({"unified/a/cpu.max": "0 100000"}, 4),
        ({"unified/a/cpu.max": "nonsense"}, 4),
    ],
)
def test_quotas_of_the_groups_around_it_hold_too(machine, files, expected):
    assert machine(FOUR_CORES, range(8), files=files, group="0::/a/b") == expected


@pytest.mark.parametrize(("quota", "expected"), [("250000", 3), ("-1", 4)])
@pytest.mark.parametrize("group", ["/docker/c", "/"])
def test_quotas_of_control_groups_version_1(machine, quota, expected, group):
    below = f"cpu,cpuacct{group}".rstrip("/")
    files = {f"{below}/cpu.cfs_quota_us": f"{quota}\n", f"{below}/cpu.cfs_period_us": "100000\n"}
    lines = f"4:memory:/x\n3:cpu,cpuacct:{group}\n0::/"
    assert machine(FOUR_CORES, range(8), files=files, mounts=(MEMORY, V1), group=lines) == expected


def test_the_path_of_a_container_may_be_that_of_its_host(machine):
    """Without a namespace of its own /proc names the group as the host does, while the mount begins at the group."""
    options = {
        "files": {"unified/cpu.max": "100000 100000"},
        "group": "0::/kubepods/pod1/c",
        "root": "/kubepods/pod1/c",
    }
    assert machine(FOUR_CORES, range(8), **options) == 1


def test_a_path_outside_of_what_is_mounted_takes_the_mount(machine):
    options = {"files": {"unified/cpu.max": "100000 100000"}, "group": "0::/../../elsewhere", "root": "/mine"}
    assert machine(FOUR_CORES, range(8), **options) == 1


def test_a_system_without_proc_has_no_quota(machine, monkeypatch, tmp_path):
    machine(FOUR_CORES, range(8), "100000 100000")
    monkeypatch.setattr(threads, "PROC", tmp_path / "nothing")
    assert threads.default_threads() == 4
