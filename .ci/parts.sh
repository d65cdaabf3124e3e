# Functions that .ci/run and .ci/nightly share. Source this file with bash.

# A missing tool fails the tests that need it; elsewhere they are skipped (tests/conftest.py).
export REQUIRE_ALL=1

# Install the Debian packages of missing commands only: a machine may have npm from elsewhere.
install_tools() {
  local command missing=()
  # npm runs newman. The fault suite needs faketime for wrong clocks and ip for separate hosts. chromium shows the
  # dashboard.
  local -A packages=(
    [git]=git [npm]=npm [faketime]=faketime [ip]=iproute2 [chromium]=chromium [openssl]=openssl [ps]=procps [curl]=curl
  )
  for command in "${!packages[@]}"; do
    command -v "$command" >/dev/null || missing+=("${packages[$command]}")
  done
  if ((${#missing[@]} && EUID)); then
    echo "Only root can install ${missing[*]}." >&2
    return 1
  elif ((${#missing[@]})); then
    apt-get update -qq && apt-get install -qq -y "${missing[@]}"
  fi
}

install_project() { pip install pipenv && pipenv sync --dev; }

# Run a part and note how long it took. Arguments: its name, its command.
part() {
  local name=$1 start=$SECONDS code=0
  shift
  printf '\n=== %s\n' "$name"
  "$@" || code=$?
  durations+=("$(printf '%5d s  %s%s' $((SECONDS - start)) "$name" "$( ((code)) && echo ': FAILED')")")
  printf '=== %s: %d s\n' "$name" $((SECONDS - start))
  return $code
}
durations=()

# Run a command in the background, as a process group of its own, so that `finish` can end all of its processes.
beside() {
  set -m
  "$@" &
  set +m
}

# End the background processes, remove the temporary folder, and print the time of each part.
finish() {
  local job
  for job in $(jobs -p); do
    kill -- -"$job" 2>/dev/null || true # it has just ended
  done
  rm -rf "$folder"
  printf '\n=== Time\n'
  printf '%s\n' "${durations[@]}" "$(printf '%5d s  in all' "$SECONDS")"
}
folder=$(mktemp -d)
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
