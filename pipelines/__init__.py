"""Kubeflow pipelines, their compiled YAML, and the way to run them in-process."""
