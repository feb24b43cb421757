"""Kubeflow components: a signature, and the call of a stage. The image brings the code; nothing is installed at run time."""
