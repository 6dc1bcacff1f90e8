"""Programs that pose as the process that stands by, or as a command that asks it."""

from .test_standby import NAMED

__all__ = ["FALSE_CLIENT", "FALSE_SERVER", "REUSED_CLIENT", "REUSED_SERVER"]

# Lets a client in, whoever it is, and says what a server says up to its welcome.
SERVING = """
from ovr.standby.messages import Inbox, StandbyError, send
from ovr.standby.place import Place

def messages(place):
    place.socket.setblocking(True)
    client, _ = place.socket.accept()
    client.settimeout(20)
    inbox = Inbox(client)
    inbox.trust()
    send(client, [b"hello", b"00"])
    while True:
        message = inbox.wait()
        yield client, message
        if message.fields[0] == b"hello":
            challenge = message.fields[1]
        elif message.fields[0] == b"proof":
            send(client, [b"welcome", challenge])
"""

# Says all that a server says, and what it was told.
FALSE_SERVER = f"""{NAMED}{SERVING}
import json

told, files = [], []
with Place() as place:
    place.listen()
    print("listens", flush=True)
    try:
        for client, message in messages(place):
            told.append([field.decode(errors="replace") for field in message.fields])
            files += message.files
            match message.fields[0]:
                case b"restore":
                    send(client, [b"ready"])
                case b"go":
                    send(client, [b"ended", b"0"])
    except (OSError, StandbyError):
        pass
print(json.dumps([told, len(files)]), flush=True)
"""

# Makes sure of nobody, and asks for all that a client can ask.
FALSE_CLIENT = f"""{NAMED}
import os
from ovr.standby.messages import Inbox, StandbyError, send, version
from ovr.standby.place import connect

with connect() as server:
    inbox = Inbox(server)
    answers = []
    try:
        send(server, [b"hello", b"00"])
        challenge = inbox.wait().fields[1]
        send(server, [b"proof", challenge])
        answers.append(b" ".join(inbox.wait().fields))
        request = [version(), b"", b"", b"", b"", b"3", b"restore", b"exit", b"5"]
        send(server, [b"restore", *request])
        while True:
            answers.append(b" ".join(inbox.wait().fields))
            if answers[-1] == b"ready":
                send(server, [b"go"])
    except (OSError, StandbyError):
        pass
    print(*(answer.decode() for answer in answers), sep="\\n")
"""

# The process that has connected (or listens) ends, and a process with the rights of the other side
# gets its pid. A third one, with fewer rights, has inherited the socket, and sends.
REUSED = """
import ctypes, os, signal, socket, sys, time

def reap(pid):
    os.waitpid(pid, 0)

def again(pid):
    # A process of this pid: the next one to be made.
    for _ in range(100):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(pid - 1))
        child = os.fork()
        if not child:
            time.sleep(600)
            os._exit(0)
        if child == pid:
            return
        os.kill(child, signal.SIGKILL)
        reap(child)
    sys.exit("the pid is not free")

def leave_to_another(first, second):
    # `first` in a process that ends; `second` in its child, when the pid is another's.
    told, tell = os.pipe()
    out = os.dup(1)
    pid = os.fork()
    if not pid:
        held = first()
        if os.fork():
            os._exit(0)
        assert os.read(told, 1)
        assert not ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        second(held)
        os._exit(0)
    reap(pid)
    again(pid)
    os.write(tell, b".")
    return pid
"""

REUSED_CLIENT = f"""{NAMED}{REUSED}
import subprocess
from ovr.standby.messages import Inbox, StandbyError, send, version
from ovr.standby.place import connect

server = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], sys.prefix, str(os.getpid())], stdout=subprocess.PIPE
)
server.stdout.readline()

def talk(connection):
    connection.settimeout(20)
    inbox = Inbox(connection)
    try:
        send(connection, [b"hello", b"00"])
        send(connection, [b"proof", inbox.wait().fields[1]])
        print(b" ".join(inbox.wait().fields).decode(), flush=True)
        request = [version(), b"", b"", b"", b"", b"3", b"restore", b"exit", b"5"]
        send(connection, [b"restore", *request])
        while True:
            answer = inbox.wait().fields
            print(b" ".join(answer).decode(), flush=True)
            if answer == [b"ready"]:
                send(connection, [b"go"])
    except (OSError, StandbyError) as error:
        print("end:", error, flush=True)

server.send_signal(signal.SIGSTOP)  # accepts when the pid is another's
leave_to_another(connect, talk)
server.send_signal(signal.SIGCONT)
print("done", flush=True)
time.sleep(600)
"""

REUSED_SERVER = f"""{NAMED}{REUSED}{SERVING}
def listen():
    place = Place()
    place.listen()
    return place

def talk(place):
    try:
        for _, message in messages(place):
            print(b" ".join(message.fields[:1]).decode(), flush=True)
            if message.fields[0] not in (b"hello", b"proof"):
                break
    except (OSError, StandbyError) as error:
        print("end:", error, flush=True)

pid = leave_to_another(listen, talk)
import subprocess
said = subprocess.run(
    [sys.executable, "-c", sys.argv[1], sys.prefix, "restore", "exit", "5"], capture_output=True
)
time.sleep(0.2)
print("done", said.returncode, said.stdout.decode().strip(), flush=True)
time.sleep(600)
"""
