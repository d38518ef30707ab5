"""How the programs run and end: an error that the user can fix is one line on stderr and exit status 2."""

from direct_pt.program.startup import libraries_loaded
import sys
from collections.abc import Callable
from typing import NoReturn

from direct_pt.distributed.peers import failed_peer, tell_peers
from direct_pt.errors import InputError, StopSignal, TrainingStopped, printable
from direct_pt.program.signals import ignore_stop_signals
from direct_pt.program.standard_streams import keep_streams_open


def run_program(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit with status 0, 2 (wrong input), 1 (training stopped), or 143 or 130 (stop signal).

    Where it is one of several processes, the others are told why it ends; and where it ends as another one has failed,
    it says why that one has.
    """
    keep_streams_open()
    try:
        with libraries_loaded():
            main()
    except InputError as error:
        _exit("error", error, 2)
    except TrainingStopped as error:
        _exit("stopped", error, 1)
    except StopSignal as stop:
        _leave(_report("stopped", str(stop), stop.exit_status))
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        if failure := failed_peer():
            _leave(_report(failure.kind, str(failure), failure.status))
        tell_peers("failed", f"{type(error).__name__}: {error}", 1)
        raise
    _leave(0)


def _exit(kind: str, error: Exception, status: int) -> NoReturn:
    _report(kind, str(error), status)
    tell_peers(kind, str(error), status)
    _leave(status)


def _leave(status: int) -> NoReturn:
    ignore_stop_signals()
    sys.exit(status)


def _report(kind: str, message: str, status: int) -> int:
    one_line = " ".join(line.strip() for line in message.splitlines() if line.strip())
    print(f"{kind}: {printable(one_line)}", file=sys.stderr, flush=True)
    return status
