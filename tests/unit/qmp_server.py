"""A QMP server that answers what a test tells it to and remembers what it was asked."""

import json
import socket
import threading
from contextlib import suppress
from pathlib import Path

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}


class QmpServer:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = "running"
        self.asked: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._closed = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._listener.close()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            # A client that was killed does not read the answer to its last command.
            with suppress(OSError), connection, connection.makefile("rwb") as stream:
                self._talk(stream)

    def _talk(self, stream) -> None:
        stream.write(json.dumps(GREETING).encode() + b"\r\n")
        stream.flush()
        for line in stream:
            command = json.loads(line)
            self.asked.append(command["execute"])
            answer = {"return": self._answer(command["execute"])}
            if "id" in command:
                answer["id"] = command["id"]
            stream.write(json.dumps(answer).encode() + b"\r\n")
            stream.flush()

    def _answer(self, command: str):
        if command == "stop":
            self.state = "paused"
        elif command == "cont":
            self.state = "running"
        elif command == "query-status":
            return {"status": self.state, "running": self.state == "running"}
        return {}
