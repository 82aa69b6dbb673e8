"""Run the benchmark of a training step."""

from benchmarks.step import main

main()
