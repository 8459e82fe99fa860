#!/usr/bin/env bash
# One rank; its output is appended to its own log in every start of the job: rank.sh LOGS COMMAND ...
logs=$1
shift
exec "$@" >>"$logs/rank-$RANK.log" 2>&1
