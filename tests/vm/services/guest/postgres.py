"""Clients of PostgreSQL that run in the guest: new ones, and the psql that is in a transaction.

`load` fills a table and brings that psql to the middle of its transaction; `check` goes on there.
"""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

PLACE = Path("/srv/postgres")
ROWS = 20_000
PENDING = 1000
PATIENCE = 180.0
SERVER = {
    "checkpointer",
    "background writer",
    "walwriter",
    "autovacuum launcher",
    "logical replication launcher",
}


def other(*commands, fails_with=None):
    """Have another session, a new one, run commands; return what it prints."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres", *words],
        check=False,
        capture_output=True,
        text=True,
    )
    if fails_with:
        assert fails_with in done.stderr, f"no {fails_with!r} from {commands}: {done.stderr}"
    else:
        assert done.returncode == 0, f"{commands}: {done.stderr}"
    return done.stdout.strip()


def same(query):
    """Have the psql of the tree run a query; return what it prints."""
    answer = PLACE / "answers" / "answer"
    answer.unlink(missing_ok=True)
    with (PLACE / "commands").open("w") as commands:
        print(query, r"\g answers/new", file=commands)
        print(r"\! mv answers/new answers/answer", file=commands)
    wait_for(answer.exists, f"psql does not answer to {query}")
    return answer.read_text().strip()


def tell(*commands):
    """Have the psql of the tree run commands that print nothing; return when they are done."""
    with (PLACE / "commands").open("w") as pipe:
        print(*commands, sep=";\n", end=";\n", file=pipe)
    log = (PLACE / "client.log").read_text()
    assert same("SELECT 'done'") == "done"
    assert (PLACE / "client.log").read_text() == log, (PLACE / "client.log").read_text()


def wait_for(truth, what):
    deadline = time.monotonic() + PATIENCE
    while not truth():
        assert time.monotonic() < deadline, f"{what}:\n{logs()[-3000:]}"
        time.sleep(0.1)


def logs():
    return "".join(path.read_text() for path in sorted(PLACE.glob("*.log")))


def load():
    wait_for((PLACE / "client.log").exists, "the server does not start")
    other(
        "CREATE TABLE items (id int PRIMARY KEY, text text, number int)",
        f"INSERT INTO items SELECT n, md5(n::text), n FROM generate_series(1, {ROWS}) n",
        "CREATE TABLE pending (id int PRIMARY KEY)",
    )
    clients = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
    wait_for(lambda: same(clients) == "1", "the other sessions do not end")
    tell(
        "PREPARE item AS SELECT text FROM items WHERE id = $1",
        "BEGIN",
        f"INSERT INTO pending SELECT * FROM generate_series(1, {PENDING})",
        "CREATE TEMPORARY TABLE mine AS SELECT id FROM items WHERE id % 10 = 0",
        "DECLARE walk CURSOR FOR SELECT id FROM items ORDER BY id",
        "SAVEPOINT here",
        "UPDATE items SET number = -1 WHERE id = 7",
    )
    assert same("FETCH 3 FROM walk").split() == ["1", "2", "3"]


def check():
    the_rest_sees_nothing()
    the_transaction_goes_on()
    the_rest_sees_it()
    the_server_works()


def items():
    text = ",".join(hashlib.md5(b"%d" % n).hexdigest() for n in range(1, ROWS + 1))
    found = other("SELECT md5(string_agg(text, ',' ORDER BY id)) FROM items")
    assert found == hashlib.md5(text.encode()).hexdigest(), "the table's content is wrong"


def the_rest_sees_nothing():
    items()
    assert other("SELECT count(*) FROM pending") == "0", "others see what is not committed"
    assert other("SELECT number FROM items WHERE id = 7") == "7"
    update = "UPDATE items SET number = 8 WHERE id = 7"
    other("SET lock_timeout = '500ms'", update, fails_with="lock timeout")


def the_transaction_goes_on():
    assert same("FETCH 3 FROM walk").split() == ["4", "5", "6"], "the cursor has moved"
    assert same("SELECT count(*) FROM pending") == str(PENDING)
    assert same("SELECT number FROM items WHERE id = 7") == "-1"
    assert same("SELECT count(*), min(id) FROM mine") == f"{ROWS // 10}|10"
    assert same("EXECUTE item(77)") == hashlib.md5(b"77").hexdigest()
    tell(
        "ROLLBACK TO here",
        "UPDATE items SET number = -2 WHERE id = 8",
        f"INSERT INTO pending VALUES ({PENDING + 1})",
        "COMMIT",
    )


def the_rest_sees_it():
    assert other("SELECT count(*), sum(id) FROM pending") == "1001|501501"
    numbers = other("SELECT number FROM items WHERE id IN (7, 8) ORDER BY id").split()
    assert numbers == ["7", "-2"], numbers
    items()


def the_server_works():
    other(
        "CREATE TABLE more AS SELECT n, n % 100 AS m FROM generate_series(1, 30000) n",
        "CREATE INDEX ON more (m)",
        "DELETE FROM more WHERE n > 20000",
        "VACUUM ANALYZE more",
        "CHECKPOINT",
    )
    assert other("SELECT count(*) FROM more WHERE m = 1") == "200"
    plan = other(
        "SET parallel_setup_cost = 0",
        "SET parallel_tuple_cost = 0",
        "SET min_parallel_table_scan_size = 0",
        "EXPLAIN (ANALYZE) SELECT sum(n) FROM more",
    )
    assert "Workers Launched: 2" in plan, plan
    types = set(other("SELECT DISTINCT backend_type FROM pg_stat_activity").splitlines())
    assert types >= SERVER, types
    other("ALTER SYSTEM SET work_mem = '5MB'", "SELECT pg_reload_conf()")
    wait_for(lambda: other("SHOW work_mem") == "5MB", "the server does not reload")


if __name__ == "__main__":
    {"load": load, "check": check}[sys.argv[1]]()
