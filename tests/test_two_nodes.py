"""A run on two machines: two network namespaces that share nothing but a virtual cable."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_runs as runs

SCRIPT = runs.SCRIPTS / "pretrain.py"
ADDRESSES = ("10.213.0.1", "10.213.0.2")
PORT = 29500
FLAGS = (*runs.TINY, "--global-batch-size", 8, "--micro-batch-size", 4, "--max-steps", 2, "--log-every", 1)
MEET = ("--rdzv_backend", "direct_pt")  # PyTorch's own does not say which machine is missing, and where


class Hosts:
    """Both machines: `names` of the namespaces, `interfaces` at the ends of the cable."""

    def __init__(self) -> None:
        self.names = [f"direct-pt-{os.getpid()}-{host}" for host in (0, 1)]
        self.interfaces = [f"v{os.getpid()}h{host}" for host in (0, 1)]
        self.started: list[subprocess.Popen[str]] = []

    def set_up(self) -> None:
        """Raises CalledProcessError if network namespaces are not permitted."""
        for name in self.names:
            run_ip("netns", "add", name)
        cable = ("netns", self.names[0], "type", "veth", "peer", "name", self.interfaces[1], "netns", self.names[1])
        run_ip("link", "add", self.interfaces[0], *cable)
        for name, interface, address in zip(self.names, self.interfaces, ADDRESSES, strict=True):
            run_ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            for device in ("lo", interface):
                run_ip("-n", name, "link", "set", device, "up")

    def tear_down(self) -> None:
        """Remove what exists."""
        self.end()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def launch(
        self, host: int, config: Path, *arguments: object, options: tuple[str, ...] = (), **environment: object
    ) -> None:
        """Start the script with accelerate's launcher, as accelerate_configs/README.md says."""
        place = ("--machine_rank", str(host), "--main_process_ip", ADDRESSES[0])
        self.started.append(
            runs.launch_file(
                config, SCRIPT, *arguments, options=(*place, *MEET, *options), prefix=self.inside(host),
                ACCELERATE_USE_CPU="true", **environment,
            )
        )  # fmt: skip

    def start(self, host: int, *arguments: object, **environment: object) -> None:
        """Start the script without a launcher."""
        variables = [f"{name}={value}" for name, value in environment.items()]
        command = [*self.inside(host), "env", *variables, sys.executable, str(SCRIPT), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=runs.ENVIRONMENT, text=True, start_new_session=True, **pipes)
        self.started.append(process)

    def inside(self, host: int) -> tuple[str, ...]:
        """The prefix of a command that runs on a host."""
        return ("ip", "netns", "exec", self.names[host])

    def finish(self) -> list[tuple[int, str, str]]:
        """Status, output and errors of the started processes, in order."""
        found = []
        for process in self.started:
            output, errors = process.communicate(timeout=240)
            found.append((process.returncode, output, errors))
        self.started = []
        return found

    def end(self) -> None:
        """Kill everything that runs on the hosts."""
        for process in self.started:
            if process.poll() is None:
                runs.end_group(process)
        self.started = []
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in found.stdout.split():
                os.kill(int(pid), signal.SIGKILL)


def run_ip(*arguments: str) -> None:
    """Run a command of iproute2."""
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts for one test."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2's ip")
    made = Hosts()
    try:
        try:
            made.set_up()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")
        yield made
    finally:
        made.tear_down()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """multi_node.yaml for one process a machine."""
    return runs.launcher_file("multi_node", tmp_path, num_machines=2, num_processes=2, main_process_port=PORT)


@runs.cpu_only
def test_two_machines_train_as_one(hosts: Hosts, config: Path, demo: Path, tmp_path: Path) -> None:
    """Each has its own folder; only the main one's is written. The interface is found without being named."""
    assert "GLOO_SOCKET_IFNAME" not in runs.ENVIRONMENT
    folders = [tmp_path / f"host{host}" for host in (0, 1)]
    for host, folder in enumerate(folders):
        hosts.launch(host, config, "--data", demo, *FLAGS, "--output-dir", folder)
    (status, output, errors), (other_status, other_output, other_errors) = hosts.finish()
    assert (status, other_status) == (0, 0), errors[-3000:] + other_errors[-3000:]
    assert "device     2 x CPU" in output and "Direct-PT" not in other_output
    assert not folders[1].exists()

    both = runs.launch_file(
        runs.launcher_file("cpu_processes", tmp_path), SCRIPT, "--data", demo, *FLAGS, "--output-dir", tmp_path / "one",
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    hosts.started.append(both)
    ((status, _, errors),) = hosts.finish()
    assert status == 0, errors[-3000:]
    assert runs.largest_difference(runs.weights(folders[0]), runs.weights(tmp_path / "one")) == 0
    assert runs.records(folders[0]) == runs.records(tmp_path / "one")
    assert [record["bbox"]["AP"] for record in runs.records(folders[0]) if "bbox" in record]


def test_machines_whose_partner_is_missing(hosts: Hosts, config: Path, demo: Path, tmp_path: Path) -> None:
    """Each launcher, which waits for the other before the scripts start, and the main script without one."""
    flags = (*runs.train_part(demo), *FLAGS, "--output-dir", tmp_path / "run")
    wait = {"DIRECT_PT_JOIN_SECONDS": 5}
    hosts.launch(0, config, *flags, **wait)
    hosts.launch(1, config, *flags, options=("--main_process_port", str(PORT + 1)), **wait)  # not in use
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": ADDRESSES[0], "ACCELERATE_USE_CPU": "true", **wait}
    hosts.start(0, *flags, RANK=0, MASTER_PORT=PORT + 2, **place)
    main_launcher, other_launcher, main_script = hosts.finish()

    def where(host: int, port: int) -> str:
        return f"{ADDRESSES[0]} port {port} over interface {hosts.interfaces[host]} in 5 s"

    for (status, _, errors), expected, message in (
        (main_launcher, 1, f"error: not all of 2 machines reached {where(0, PORT)} ("),
        (other_launcher, 1, f"error: machine 1 of 2 did not reach the main machine at {where(1, PORT + 1)}: start the"),
        (
            main_script,
            2,
            f"error: of 2 processes, number 1 did not reach {where(0, PORT + 2)}: start the same command",
        ),
    ):
        assert status == expected and errors.splitlines()[-1].startswith(message)
        assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()
