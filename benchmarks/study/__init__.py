"""The study: who gains from coteries, how much, and when not. One command a table, from data to rows with intervals.

    python -m benchmarks.study [TABLE...] [--full] [--minutes MINUTES] [--out FOLDER]
    python -m benchmarks.study render

A table is a module of this package (benchmarks/study/tables.py says what it offers). Its rows are measured in two processes of
one BLAS thread each, and kept as they come, so that an interrupted run resumes. `make study` is what two cores do in an hour;
`--full` is all of it. `render` writes docs/results.md and its pictures from the results, and measures nothing.
"""
