"""One command in several processes, each a rank of one training."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from tasft.core.errors import UserError

_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    # Every rank looks at the whole model at step 0, before it is shared.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
_ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
KINDS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": _FSDP2,
    "zero2": _ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": _ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
"""Ways to share a model, and the environment that asks accelerate for it."""
LOOPBACK = "127.0.0.1"
_GRACE = 10.0  # Seconds that a process has to end before it is killed.


def launch(command: Sequence[str], kind: str, processes: int) -> int:
    """Run a command in several processes of this machine, one GPU each, or on the CPU where there is none.

    When one fails the others are stopped, as they would wait for it for ever.

    Args:
        command: Program and arguments.
        kind: A name in `KINDS`: `ddp` keeps a whole model in each process, the others a part of it.
        processes: How many.

    Returns:
        Exit code of the first process that failed, 128 + n for one that signal n ended; 0 if none did.

    Raises:
        UserError: There are fewer GPUs, or DeepSpeed is not installed.
    """
    if 0 < gpus() < processes:
        raise UserError(f"-n {processes}: this machine has {gpus()} GPU{'s' * (gpus() > 1)}")
    if kind.startswith("zero") and find_spec("deepspeed") is None:
        raise UserError(f"--launch {kind} needs DeepSpeed: pip install deepspeed")
    store = _store()
    shared = os.environ | {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        **KINDS[kind],
    }
    # Of what the processes send each other on a CPU; a user who knows better says so.
    shared.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if not gpus():
        # accelerate takes the first for a reason not to share at all; the second merely names the device.
        shared |= {"ACCELERATE_USE_CPU": "true"} if kind == "ddp" else {"ACCELERATE_TORCH_DEVICE": "cpu"}
        shared |= {"DS_ACCELERATOR": "cpu"}
        shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    running = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    try:
        while True:
            codes = [process.poll() for process in running]
            if failed := next((code for code in codes if code), 0):
                return failed if failed > 0 else 128 - failed
            if None not in codes:
                return 0
            time.sleep(0.1)
    except KeyboardInterrupt:
        # The terminal has told the others, too.
        return 128 + signal.SIGINT
    finally:
        _stop(running)


def _store() -> Any:
    """Where the processes find each other: a server that this machine alone can reach.

    It is held here, where the system chooses the port: none of the processes has to guess one that is free. Left to
    itself it would listen on every network.
    """
    listening = socket.create_server((LOOPBACK, 0))
    port = listening.getsockname()[1]
    return dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def _stop(running: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in running:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def gpus() -> int:
    """How many GPUs this machine has."""
    return torch.cuda.device_count()
