# What .ci/run and .ci/nightly share. To be sourced, by bash.

# Nothing is skipped here: what a test wants and does not find fails it (tests/conftest.py).
export REQUIRE_ALL=1

# Install the Debian packages of the commands that are missing, one by one: a machine may have npm from elsewhere.
install_tools() {
  local command missing=()
  # npm runs newman; faketime and ip make the fault suite's wrong clocks and hosts apart; chromium shows the dashboard.
  local -A packages=(
    [npm]=npm [faketime]=faketime [ip]=iproute2 [chromium]=chromium [openssl]=openssl [ps]=procps [curl]=curl
  )
  for command in "${!packages[@]}"; do
    command -v "$command" >/dev/null || missing+=("${packages[$command]}")
  done
  if ((${#missing[@]})); then
    apt-get update -qq && apt-get install -qq -y "${missing[@]}"
  fi
}

# Run a part, given its name and its command, and note how long it took.
part() {
  local name=$1 start=$SECONDS code=0
  shift
  printf '\n=== %s\n' "$name"
  "$@" || code=$?
  durations+=("$(printf '%5d s  %s%s' $((SECONDS - start)) "$name" "$( ((code)) && echo ': FAILED')")")
  return $code
}
durations=()

# What each part took, whatever became of it.
print_durations() {
  printf '\n=== Time\n'
  printf '%s\n' "${durations[@]}" "$(printf '%5d s  in all' "$SECONDS")"
}
trap print_durations EXIT
