# For scripts that train a small model in steps, below "$OUT" and SCALE times as long; sourced behind env.sh.

# scaled N: N of the full recipe at this SCALE
scaled() { "$PYTHON" -c "print(max(1, round($1 * $SCALE)))"; }

# step NAME COMMAND…: runs a step unless it is done
step() {
    local name="$1"
    shift
    [[ -e "$OUT/done-$name" ]] && return
    say "$name"
    local start=$SECONDS
    "$@"
    echo "$((SECONDS - start)) s" >"$OUT/done-$name"
}
