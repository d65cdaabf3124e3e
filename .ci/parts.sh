# What .ci/run and .ci/nightly share. To be sourced, by bash.

# A missing tool fails the tests that need it; elsewhere they are skipped (tests/conftest.py).
export REQUIRE_ALL=1

# Install the Debian packages of the commands that are missing, one by one: a machine may have npm from elsewhere.
install_tools() {
  local command missing=()
  # npm runs newman; faketime and ip make the fault suite's wrong clocks and hosts apart; chromium shows the dashboard.
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

# Run a part, given its name and its command, and note how long it took.
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

# Run a command in the background, as a process group of its own: `finish` can end all of it.
beside() {
  set -m
  "$@" &
  set +m
}

# End what runs in the background, remove the temporary folder, and say what each part took.
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
