"""How accelerate's launchers on several machines find each other: PyTorch's static rendezvous with plain messages.

PyTorch's launcher, which accelerate's is based on, loads this one for `--rdzv_backend direct_pt` (an entry point in
pyproject.toml). accelerate's --machine_rank numbers the machines.
"""

import socket
import sys
import time
from collections.abc import Callable
from itertools import pairwise

from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousHandler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from direct_pt.distributed.launch import interface_to, join_seconds
from direct_pt.errors import InputError

RETRY_SECONDS = 0.5


class MachineRendezvous(StaticTCPRendezvous):
    """PyTorch's static rendezvous; where machines are missing, it says which, and what address they should reach."""

    def get_backend(self) -> str:
        """The name that the launcher asks for."""
        return "direct_pt"

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other machines. Exits with a one-line message if not all of them come in time."""
        seconds = round(self.timeout.total_seconds())
        place = f"{self.master_addr} port {self.master_port} over interface {interface_to(self.master_addr)}"
        check = "check the address, the port and the firewalls between"
        if self.rank > 0 and not self._main_machine_answers(seconds):
            sys.exit(
                f"error: machine {self.rank} of {self.world_size} did not reach the main machine at {place} in "
                f"{seconds} s: start the same command there with --machine_rank 0, and {check}"
            )
        try:
            return super().next_rendezvous()
        except RuntimeError as error:
            sys.exit(
                f"error: not all of {self.world_size} machines reached {place} in {seconds} s "
                f"({str(error).splitlines()[0]}): start the same command on the others with --machine_rank 1, 2, ..., "
                f"and {check}"
            )

    def _main_machine_answers(self, seconds: int) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                socket.create_connection((self.master_addr, self.master_port), timeout=RETRY_SECONDS).close()
                return True
            except OSError:
                time.sleep(RETRY_SECONDS)
        return False


def make_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """The rendezvous with the launcher's parameters. Exits with a one-line message if one is missing or wrong."""
    address, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=29500)
    if not parameters.endpoint:
        sys.exit("error: --main_process_ip is missing: the main machine's address")
    try:  # not the timeout in the parameters: it is the launcher's own 900 seconds, also if nobody asked for it
        seconds = join_seconds()
    except InputError as error:
        sys.exit(f"error: {error}")
    return MachineRendezvous(address, port, _machine_rank(), parameters.max_nodes, parameters.run_id, seconds)


def entry_point() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What PyTorch loads: the function that makes the handler."""
    return make_handler


def _machine_rank() -> int:
    """Of the command line: accelerate passes this flag on to PyTorch's own rendezvous only."""
    for flag, value in pairwise([*" ".join(sys.argv).replace("=", " ").split(), ""]):
        if flag.replace("-", "_") == "__machine_rank":
            return int(value)
    sys.exit("error: --machine_rank is missing: give it on the command line, 0 on the main machine, from 1 elsewhere")
