#!/bin/sh
# Write the lock files anew: `make lock`. Arguments go to `uv pip compile` (for example --upgrade).
# They hold versions and hashes, and no address: any package index that serves the same files will do.
set -eu
cd "$(dirname "$0")"
here=../pyproject.toml

# compile NAME ARGUMENTS...: an existing NAME.txt is kept as far as it still fits.
compile() {
    name=$1
    shift
    echo "requirements/$name.txt"
    uv pip compile --quiet --universal --python-version 3.10 --fork-strategy requires-python \
        --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate \
        --custom-compile-command "make lock" --output-file "$name.txt" "$@" >/dev/null
}

project="$here --group $here:build"
# shellcheck disable=SC2086  # the words of $project are arguments
compile runtime $project "$@"
# shellcheck disable=SC2086
compile demo $project --extra demo --extra postgresql --constraint runtime.txt "$@"
compile docs --group "$here:docs" --constraint demo.txt "$@"
compile test --group "$here:test" --constraint demo.txt --constraint docs.txt "$@"
compile lint --group "$here:lint" --constraint demo.txt --constraint docs.txt --constraint test.txt "$@"
# What is built on the machine, and what builds it:
compile kerberos-build --group "$here:kerberos-build" --constraint demo.txt "$@"
compile kerberos --group "$here:kerberos" --constraint demo.txt --constraint test.txt --constraint lint.txt "$@"
# Environments of their own:
compile node --group "$here:node" "$@"
compile bench-eg --group "$here:bench-eg" "$@"
