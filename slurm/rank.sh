#!/usr/bin/env bash
# One rank, its output appended to a log of its own over all starts of the job: rank.sh LOGS COMMAND ...
logs=$1
shift
exec "$@" >>"$logs/rank-$RANK.log" 2>&1
