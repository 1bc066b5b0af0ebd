#!/usr/bin/env bash
# What the Dockerfile runs, so that it can be tested without Docker:
#   install.sh dependencies VENV   everything that pyproject.toml asks for; TORCH_INDEX: where torch alone comes from
#   install.sh package VENV        loramux itself, from the current directory
set -euo pipefail

step=$1
venv=$2
extras=${EXTRAS-otel}

dependencies() {
  if [ -n "${TORCH_INDEX:-}" ]; then
    "$venv/bin/pip" install --index-url "$TORCH_INDEX" "$(requirements | grep '^torch[<>=]')"
  fi
  requirements | "$venv/bin/pip" install --requirement /dev/stdin
}

requirements() {
  "$venv/bin/python" - "$extras" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = list(project["dependencies"])
for extra in filter(None, sys.argv[1].split(",")):
    wanted += project["optional-dependencies"][extra]
print("\n".join(wanted))
PYTHON
}

case $step in
  dependencies) dependencies ;;
  package) "$venv/bin/pip" install --no-deps . ;;
  *)
    echo "install.sh: dependencies or package, not '$step'" >&2
    exit 2
    ;;
esac
