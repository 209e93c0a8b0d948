"""Python that begins warm: a copy of a process that has imported what is slow to import.

``python -IS warm.py ARGUMENTS`` does what ``python ARGUMENTS`` does, for ``-m module ...`` and for
``script ...``. A server, see `start`, forks itself for each such call, with the caller's folder,
environment and streams; nothing has been done in it but imports. The caller passes signals on and
ends as its copy ends; the copy is killed when its caller is. Without a server, which only Linux
gets, or where the environment holds other settings of the interpreter, the call is an ordinary one.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback

COMMAND = [sys.executable, "-IS", __file__]
SERVER = "RSD_TEST_WARM"  # its settings and its address
# Read by the interpreter and by libraries when they begin: a copy could not obey other values.
FIXED = ("PYTHONHASHSEED", "PYTHONPATH", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE")
SLOW = """
accelerate
diffusers.models.unets.unet_2d_condition
diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
diffusers.schedulers.scheduling_ddim
faiss
ipykernel.kernelapp
ipykernel.kernelspec
IPython.core.pylabtools
matplotlib_inline.backend_inline
nbclient
open_clip
papermill.engines
pydantic
rsdlib.predict
seaborn
sentence_transformers
sklearn.cluster
sklearn.linear_model
sklearn.model_selection
timm
transformers.models.blip.modeling_blip
tyro
"""

# --- the caller -----------------------------------------------------------------------------------


def call(arguments):
    """Do what ``python ARGUMENTS`` does, by a copy of the server; end as it ends."""
    fixed, address = json.loads(os.environ.get(SERVER, "[null, null]"))
    if fixed != [os.environ.get(name) for name in FIXED]:
        os.execv(sys.executable, [sys.executable, *arguments])
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    wish = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    content = json.dumps(wish).encode()
    socket.send_fds(server, [len(content).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(content)
    code = int(server.makefile().readline() or -signal.SIGKILL)
    end(code)


# --- the server -----------------------------------------------------------------------------------


def start(folder):
    """Start a server for the calls of this process and of its children; `stop` ends it."""
    address = os.path.join(folder, "warm")
    os.environ[SERVER] = json.dumps([[os.environ.get(name) for name in FIXED], address])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        command = [sys.executable, __file__, "serve", str(listener.fileno())]
        how = {"stdout": subprocess.DEVNULL, "pass_fds": [listener.fileno()]}
        return subprocess.Popen(command, stdin=subprocess.PIPE, **how)


def stop(server):
    """End a server and all its copies."""
    os.environ.pop(SERVER)
    server.stdin.close()
    server.wait()


def serve(listener):
    """Fork a copy for each call until the standard input ends; in a copy, return what is wished."""
    awake, signals = socket.socketpair()
    signals.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
    events = selectors.DefaultSelector()
    for what in (listener, awake, sys.stdin):
        events.register(what, selectors.EVENT_READ)
    copies = {}  # by the connection to their callers
    while True:
        ready = {key.fileobj for key, _ in events.select()}
        if sys.stdin in ready:
            for copy in copies.values():
                kill(copy, signal.SIGKILL)
            os._exit(0)
        if awake in ready:
            awake.recv(4096)
        for caller in ready & copies.keys():
            number = caller.recv(1)  # none: the caller was killed
            kill(copies[caller], number[0] if number else signal.SIGKILL)
        for caller in answered(copies):
            events.unregister(caller)
            caller.close()
        if listener in ready:
            caller, _ = listener.accept()
            wish = received(caller)
            copies[caller] = fork()
            if copies[caller] == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for what in (events, listener, awake, signals, *copies):
                    what.close()
                return wish
            for stream in wish["streams"]:
                os.close(stream)
            events.register(caller, selectors.EVENT_READ)


def answered(copies):
    """Tell the callers of copies that have ended how they ended, and yield them."""
    for caller, copy in list(copies.items()):
        ended, status = os.waitpid(copy, os.WNOHANG)
        if ended:
            del copies[caller]
            with contextlib.suppress(OSError):  # the caller is gone
                caller.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            yield caller


def received(caller):
    """Return what a caller wishes, with its streams."""
    size, streams, _, _ = socket.recv_fds(caller, 8, 3)
    content = caller.makefile("rb").read(int.from_bytes(size, "little"))
    return json.loads(content) | {"streams": streams}


def kill(copy, number):
    """Send a signal to a copy and to what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(copy, number)


def fork():
    """Fork; import what is slow to import first, once."""
    for name in SLOW.split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    return os.fork()


# --- the copy -------------------------------------------------------------------------------------


def become(arguments, cwd, environment, streams):
    """Do what `call` was asked for, as its process would; never return."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    how = {"encoding": "utf-8", "closefd": False}
    sys.stdin, sys.stdout = open(0, **how), open(1, "w", **how)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", **how)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    # The kernels that it starts begin warm, too.
    sys.modules["ipykernel.kernelspec"].make_ipkernel_cmd = kernel_command
    code = 0
    try:
        if arguments[0] == "-m":
            sys.path[0], sys.argv = cwd, arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = os.path.dirname(os.path.abspath(arguments[0])), arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    except BaseException as error:
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        traceback.print_exc()
    if not isinstance(code, int):
        print(code, file=sys.stderr)
    # What Python does at its end, but for taking down what was imported: that takes a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    end(code if isinstance(code, int) else 1)


def kernel_command(extra_arguments=None, python_arguments=None):
    """Return the command of a kernel that begins warm."""
    return [
        *COMMAND,
        "-m",
        "ipykernel_launcher",
        "-f",
        "{connection_file}",
        *(extra_arguments or ()),
    ]


def end(code):
    """End as a process with this exit code, or by the signal that it names, if negative."""
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__" and sys.argv[1:2] != ["serve"]:
    call(sys.argv[1:])
elif __name__ == "__main__":
    become(**serve(socket.socket(fileno=int(sys.argv[2]))))
