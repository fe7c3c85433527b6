"""Commands that begin at once: a process that has imported what they need forks itself for each

`Command` is like `subprocess.Popen`, `run` like `subprocess.run`: what is begun has a process of its
own, with its own id, signals, folder and streams, and ends as Python ends it. Only the ten seconds
of importing torch, PyTorch Geometric and polars are saved. Run as a script, this file is that
process; `python warm.py kernel FILE` begins a Jupyter kernel there and lives as long as it does."""
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ADDRESS = 'ATFT_TESTS_WARM'  # the socket of the process that forks
IMPORTED = (
    'atft.phases', 'atft.eval', 'atft.folds', 'atft.hpo', 'torch_geometric.nn', 'matplotlib.pyplot',
    'papermill.cli', 'papermill.execute', 'ipykernel.kernelapp', 'ipykernel.ipkernel')

# --- who asks


class Command:
    "A command that a fork of the warm process runs; captured streams are read when it has ended"
    def __init__(self, words, cwd=None, env=None, capture=True):
        self.args = list(map(str, words))
        self.returncode = None
        places = [tempfile.TemporaryFile() if capture else open(os.devnull, 'wb') for _ in range(2)]
        self.captured = places
        asked = dict(words=self.args, cwd=str(cwd or os.getcwd()), env=dict(env or os.environ))
        with open(os.devnull, 'rb') as nothing:
            streams = [stream.fileno() for stream in (nothing, *places)]
            self.line = ask(asked, streams)
        self.pid = int(told(self.line))

    def wait(self, timeout=None):
        "Until it has ended; its exit status as `subprocess` counts it"
        if self.returncode is not None: return self.returncode
        self.line.settimeout(timeout)
        try:
            self.returncode = int(told(self.line))
        except (TimeoutError, BlockingIOError):
            raise subprocess.TimeoutExpired(self.args, timeout) from None
        self.line.close()
        return self.returncode

    def poll(self):
        "Its exit status, None while it lives"
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        "What it wrote to both streams, when it has ended"
        self.wait(timeout)
        return [said(stream) for stream in self.captured]


def said(stream):
    "All that was written to a file"
    if stream.closed or not stream.readable(): return None
    stream.seek(0)
    return stream.read().decode(errors='replace')


def run(words, check=False, **options):
    "Run a command to its end"
    command = Command(words, **options)
    out, err = command.communicate()
    done = subprocess.CompletedProcess(command.args, command.returncode, out, err)
    if check: done.check_returncode()
    return done


def ask(asked, streams):
    "The connection on which the warm process tells the id of a fork, and later its exit status"
    line = socket.socket(socket.AF_UNIX)
    line.connect(os.environ[ADDRESS])
    message = json.dumps(asked).encode()
    socket.send_fds(line, [len(message).to_bytes(8)], streams)
    line.sendall(message)
    return line


def told(line):
    "A line of the warm process"
    text = b''
    while not text.endswith(b'\n'):
        more = line.recv(64)
        if not more: raise ConnectionError('the warm process has ended')
        text += more
    return text


def kernels(folder):
    "An environment in which a Jupyter kernel is a fork too"
    spec = Path(folder)/'kernels/python3/kernel.json'
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, '-S', '-E', __file__, 'kernel', '{connection_file}']
    spec.write_text(json.dumps(dict(argv=argv, display_name='Python 3', language='python')))
    return os.environ | dict(JUPYTER_PATH=str(folder))


# --- who answers


def start():
    "Begin the warm process; what it is told by, for `stop`"
    address = os.path.join(tempfile.mkdtemp(), 'warm')
    os.environ[ADDRESS] = address
    process = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE,
                               stdin=subprocess.DEVNULL, start_new_session=True)
    process.stdout.readline()  # it listens
    return process


def stop(process):
    "End the warm process; commands that it began go on"
    process.kill()
    process.communicate()
    address = Path(os.environ.pop(ADDRESS))
    address.unlink()
    address.parent.rmdir()


def received(line):
    "What is asked, and the three streams of the command"
    size, streams, _, _ = socket.recv_fds(line, 8, 3)
    wanted = int.from_bytes(size)
    message = b''
    while len(message) < wanted: message += line.recv(wanted-len(message))
    return json.loads(message), streams


def attended(line, streams):
    "Fork the command. Its child returns; the process beside it tells its id and its end"
    child = os.fork()
    if not child: return line.close()
    for stream in streams: os.close(stream)
    line.sendall(f'{child}\n'.encode())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        line.sendall(f'{status}\n'.encode())
    except OSError:
        pass  # who asked has ended
    os._exit(0)


def serve(address):
    "Fork for everybody who asks; only forks return, with what they shall be"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those beside a command
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen(64)
        print('listening', flush=True)
        is_cold = True
        while True:
            line = door.accept()[0]
            asked, streams = received(line)
            if is_cold: import_all()
            is_cold = False
            if not os.fork(): break
            line.close()
            for stream in streams: os.close(stream)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    attended(line, streams)
    return asked, streams


def import_all():
    "All that commands need; the forks share its memory"
    for name in IMPORTED: importlib.import_module(name)
    gc.freeze()


def become(asked, streams):
    "Be the command that was asked for, from its streams to its name"
    for number, stream in enumerate(streams): os.dup2(stream, number)
    for stream in streams: os.close(stream)
    os.chdir(asked['cwd'])
    os.environ.clear()
    os.environ.update(asked['env'])


def run_here(words):
    "As `python WORDS` would"
    first, *rest = words
    if first == '-m':
        sys.argv = rest
        sys.path[0] = os.getcwd()
        sys.modules.pop(rest[0], None)  # it is read again, as __main__
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    elif first == '-c':
        code, *rest = rest
        sys.argv = ['-c', *rest]
        sys.path[0] = ''
        exec(compile(code, '<string>', 'exec'), dict(__name__='__main__'))
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(first)
        runpy.run_path(first, run_name='__main__')


def kernel(file):
    "Begin a kernel, forward its signals, end when it has ended"
    words = [sys.executable, '-m', 'ipykernel_launcher', '-f', file]
    asked = dict(words=words, cwd=os.getcwd(), env=dict(os.environ))
    line = ask(asked, [0, 1, 2])
    process = int(told(line))
    def forward(number, frame): os.kill(process, number)
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, forward)
    sys.exit(int(told(line)))


if __name__ == '__main__':
    if sys.argv[1] == 'kernel': kernel(sys.argv[2])
    asked, streams = serve(sys.argv[1])
    become(asked, streams)
    words = asked['words']
    run_here(words[1:] if words[0] == sys.executable else words)
