"""Real databases for tests and benchmarks: SQLite files, and a PostgreSQL and a Redis of the machine's own on free ports."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

NOBODY = 65534


class Postgres:
    """A server over a fresh cluster; root runs it as nobody, because it refuses to run as root."""

    def __init__(self, folder):
        self.folder = folder
        self.user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        self.role = "postgres" if self.user else getpass.getuser()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql+psycopg://{self.role}@127.0.0.1:{self.port}/postgres"
        if self.user:
            os.chown(folder, NOBODY, NOBODY)
        self._run("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", self.role, "-E", "UTF8", "--locale=C")

    def _run(self, name, *arguments):
        command = [_program(name), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, **self.user)
        assert done.returncode == 0, done.stderr

    def start(self):
        command = [
            _program("postgres"), "-D", str(self.folder / "data"), "-p", str(self.port),
            "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}",
        ]  # fmt: skip
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self.user)
        for _ in range(300):
            try:
                psycopg.connect(host="127.0.0.1", port=self.port, user=self.role, dbname="postgres").close()
                return
            except psycopg.OperationalError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.1)
        self.stop(signal.SIGKILL)
        raise AssertionError((self.folder / "log").read_text())

    def database(self):
        """The URL of a fresh database."""
        name = f"test_{time.monotonic_ns()}"
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=self.role, dbname="postgres", autocommit=True
        ) as link:
            link.execute(f"CREATE DATABASE {name}")
        return sa.make_url(self.url).set(database=name).render_as_string()

    def stop(self, how=signal.SIGINT):
        """SIGINT ends the connections; SIGKILL is a crash, after which the orphans see that their parent is gone."""
        self.process.send_signal(how)
        self.process.wait()


class Redis:
    """A Redis that keeps what it was told when it is killed."""

    def __init__(self, folder):
        self.program, self.folder = shutil.which("redis-server"), folder
        if self.program is None:
            _missing("redis-server", "redis-server")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def start(self):
        command = [self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        raise AssertionError("redis-server does not listen")

    def signal(self, how):
        self.process.send_signal(how)
        if how == signal.SIGKILL:
            self.process.wait()

    def stop(self):
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)


def _program(name):
    ours = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))  # Debian puts them beside the path
    found = str(ours[-1]) if ours else shutil.which(name)
    if found is None:
        _missing(name, "postgresql")
    return found


def _missing(name, package):
    words = f"{name} is not installed (Debian: apt-get install {package})"
    pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)


@contextmanager
def postgres():
    """A running server."""
    _program("postgres")
    with tempfile.TemporaryDirectory(prefix="coterie-postgres-") as folder:  # not pytest's, which nobody may not enter
        server = Postgres(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
