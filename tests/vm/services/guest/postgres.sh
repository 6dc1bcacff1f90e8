#!/bin/sh
# The root of the tree: PostgreSQL, and a client whose commands come out of a FIFO.
cd /srv/postgres || exit
as_postgres='setpriv --reuid postgres --regid postgres --init-groups'
bin=$(echo /usr/lib/postgresql/*/bin)

# Open for reading and writing: the FIFO never ends, whoever comes and goes.
exec 3<>commands
$as_postgres "$bin/postgres" -D data 3>&- >>server.log 2>&1 &
until $as_postgres "$bin/pg_isready" -q -h /srv/postgres 3>&-; do
	sleep 0.2
done
$as_postgres "$bin/psql" -XqAt -h /srv/postgres postgres <&3 3>&- >>client.log 2>&1 &
wait
