import pytest

from dfssm.runtime import threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A made-up machine: `machine(siblings of each CPU, allowed CPUs, cpu.max)`."""

    def make(siblings, allowed, quota="max 100000"):
        for cpu, group in siblings.items():
            folder = tmp_path / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(group + "\n")
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(threads, "CPUS", tmp_path)
        monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(allowed), raising=False)
        return threads.default_threads()

    return make


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
